"""Several processes compute what one would: the objective, its gradients, features and whole runs under torchrun."""

import os
import signal
import time
from collections import Counter
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
import torch.nn.functional as F
from conftest import Job, skip_if_not_compiled
from test_losses import oracle, random_case
from torch.multiprocessing import start_processes


def everything(rank, world, flags):
    """All that this file compares, on one rank."""
    return {'parts': weights_after_steps(rank, world), 'main': update_of_main(rank, world, flags),
            'statistics': statistics(rank, world, flags) if world > 1 else None,
            'losses': [losses_and_gradients(rank, world, V) for V in (2, 3)],
            'features': features_and_gathered(rank, world), 'one each': loss_of_one_sample_each(rank, world),
            'cases': [random_case_on_rank(rank, world, seed) for seed in range(CASES)], 'groups': groups(rank, world)}


def joined(rank, world, function, store, out, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=world)
    torch.save(function(rank, world, *args), f'{out}/{rank}.pt')
    if world > 1:
        torch.distributed.destroy_process_group()


def on_ranks(world, function, out, *args):
    """function(rank, world, *args) in `world` processes that form a gloo group -> the list of what they return."""
    start_processes(joined, (world, function, out / 'store', out, args), world, start_method='forkserver')
    return [torch.load(out / f'{rank}.pt') for rank in range(world)]


@pytest.fixture(scope='module')
def one(tiny, tmp_path_factory):
    return everything(0, 1, [*tiny, '--results_dir', str(tmp_path_factory.mktemp('one'))])


@pytest.fixture(scope='module', params=[2, pytest.param(4, marks=pytest.mark.slow)])
def ranks(request, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks')
    return on_ranks(request.param, everything, out, [*tiny, '--results_dir', str(out / 'run')])


SETTINGS = [dict(), dict(beta=0, tau_plus=0), dict(beta=2.5, tau_plus=0.3, temperature=0.1), dict(beta=0),
            dict(chunk_size=1), dict(tau_plus=0, labelled=True), dict(tau_plus=0, beta=0, labelled=True),
            dict(intra_view=False), dict(temperature=0.01, intra_view=False), dict(learnable=0.2),
            dict(learnable=0.2, tau_plus=0.9), dict(learnable=0.05, intra_view=False, beta=0, tau_plus=0)]
BATCH = 8


def losses_and_gradients(rank, world, V):
    from hardneg.losses import contrastive_loss
    whole = torch.randn(V, BATCH, 6, generator=torch.Generator().manual_seed(V), dtype=torch.float64)
    all_labels = torch.tensor([-1, 0, 0, 0, -1, 1, 0, 0])  # some ranks hold one class alone; -1: unknown
    results = []
    for setting in SETTINGS:
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        views = [z[part].clone().requires_grad_() for z in whole]
        setting = dict(setting)
        labels = all_labels[part] if setting.pop('labelled', False) else None
        if learnable := setting.pop('learnable', None):
            setting['temperature'] = torch.tensor(learnable, dtype=torch.float64, requires_grad=True)
        loss = contrastive_loss(*views, labels=labels, **setting)
        loss.backward()
        by_t = setting['temperature'].grad if learnable else torch.zeros(())
        results.append((loss.detach(), by_t, torch.stack([z.grad for z in views])))
    return results


def loss_of_one_sample_each(rank, world):
    from hardneg.losses import contrastive_loss
    whole = torch.randn(2, max(2, world), 6, generator=torch.Generator().manual_seed(0))
    return contrastive_loss(*(whole if world == 1 else whole[:, rank:rank + 1]))


def test_ranks_may_hold_one_sample_each(ranks):
    from hardneg.losses import contrastive_loss
    whole = torch.randn(2, len(ranks), 6, generator=torch.Generator().manual_seed(0))
    for rank in ranks:
        torch.testing.assert_close(rank['one each'], contrastive_loss(*whole))


@pytest.mark.parametrize('V', [2, 3])
def test_loss_and_gradient_are_those_of_the_whole_batch(one, ranks, V):
    """The mean over ranks, which DistributedDataParallel takes, is the gradient: each has n times its own part."""
    for i, (loss, by_t, gradient) in enumerate(one['losses'][V - 2]):
        parts = [rank['losses'][V - 2][i] for rank in ranks]
        for part in parts:
            torch.testing.assert_close(part[:2], (loss, by_t), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(torch.cat([part[2] for part in parts], 1) / len(ranks), gradient, rtol=0, atol=1e-11)


CASES = 60


def random_case_on_rank(rank, world, seed):
    """The value, and the gradients at views, further negatives and temperature, of a rank's part of a random case."""
    from hardneg.losses import contrastive_loss
    views, setting = random_case(seed, sizes=(world, 2 * world, 3 * world))
    inputs = [z.chunk(world)[rank].clone().requires_grad_() for z in views]
    if 'labels' in setting:
        setting['labels'] = setting['labels'].chunk(world)[rank]
    if 'negatives' in setting:
        setting['negatives'] = setting['negatives'][rank::world]
    for name in {'negatives', 'temperature'} & set(setting):
        setting[name] = torch.as_tensor(setting[name], dtype=torch.float64).clone().requires_grad_()
    value = contrastive_loss(*inputs, **setting)
    value.backward()
    by_negatives = setting['negatives'].grad if 'negatives' in setting else None
    return value.detach(), torch.stack([z.grad for z in inputs]), by_negatives, setting['temperature'].grad


def test_random_cases_are_the_equations_with_negatives_for_each_rank(ranks):
    world = len(ranks)
    for seed, parts in enumerate(zip(*(rank['cases'] for rank in ranks))):
        views, setting = random_case(seed, sizes=(world, 2 * world, 3 * world))
        V, B = len(views), len(views[0])
        views = [z.requires_grad_() for z in views]
        t = setting['temperature'] = torch.as_tensor(setting['temperature'], dtype=torch.float64).requires_grad_()
        if 'negatives' in setting:
            owner = torch.arange(world).repeat_interleave(B // world)[:, None] == torch.arange(
                len(setting['negatives'].requires_grad_())) % world  # (B, K)
            setting['meet'] = torch.cat([owner & (setting['intra_view'] or v == 0) for v in range(V)])
        expected = oracle(*views, **setting)
        expected.backward()
        for rank, (value, by_views, by_negatives, by_t) in enumerate(parts):
            close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12, msg=lambda m: f'case {seed}: {m}')  # noqa: B023
            close((value, by_t), (expected.detach(), t.grad))
            close(by_views / world, torch.stack([z.grad.chunk(world)[rank] for z in views]))
            if by_negatives is not None:
                close(by_negatives / world, setting['negatives'].grad[rank::world])


def groups(rank, world):
    """A rank's losses alone, among pairs and with the group left out, and errors: not a member, not equally many."""
    from hardneg.losses import contrastive_loss
    views = torch.randn(2, BATCH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if world == 1:
        return None
    mine, errors = views.chunk(world, 1)[rank], []
    pairs = [torch.distributed.new_group([i, i + 1]) for i in range(0, world, 2)]
    for views, group in (mine, pairs[rank // 2 - 1] if world > 2 else 1), (mine[:, rank % 2:], None):
        with pytest.raises(ValueError) as error:
            contrastive_loss(*views, group=group)
        errors.append(str(error.value))
    return [contrastive_loss(*mine, group=group) for group in (False, pairs[rank // 2], None)], errors


def test_a_group_makes_the_batch(ranks):
    from hardneg.losses import contrastive_loss
    views = torch.randn(2, BATCH, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = views.chunk(len(ranks), 1)
    for rank, (values, (outside, unequal)) in enumerate(rank['groups'] for rank in ranks):
        pair = torch.cat(parts[rank // 2 * 2:][:2], 1)
        expected = [contrastive_loss(*z) for z in (parts[rank], pair, views)]
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
        assert outside.startswith('group must be None, False or a ProcessGroup that holds this process, got ')
        numbers = [BATCH // len(ranks) - rank % 2 for rank in range(len(ranks))]
        assert unequal == f'views must hold equally many samples on every rank, got {numbers}'


def weights_after_steps(rank, world):
    """By the images of a part: the weights after steps of SGD in float64. On one process for the parts of any number of
    ranks; on several, also for all of a rank's images at once."""
    import main
    from hardneg import runtime
    import step
    from hardneg.losses import contrastive_loss
    B, found = 32, {}
    views = torch.randn(10, 2, B, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    part = slice(rank * B // world, (rank + 1) * B // world)
    for m, joint in product((16, 8) if world == 1 else (None, 8), (False, True)):
        torch.manual_seed(0)
        args, _ = main.arguments(['--arch', 'resnet18', '--width', '0.125', '--feature_dim', '8', '--hidden_dim', '16',
                                  '--optimizer', 'sgd', '--lr', '0.1', '--batch_size', str(B),
                                  *(['--micro_batch', str(m)] if m else [])])
        net, optimizer, scaler = step.build(args, torch.device('cpu'))
        assert net.f[1].momentum == pytest.approx(1 - 0.9 ** (m * world / B if m else 1))  # of a rank's parts
        ddp, autocast = runtime.distributed(net.double(), torch.device('cpu')), torch.autocast('cpu', enabled=False)
        for state in optimizer.state.values():
            state['momentum_buffer'] = state['momentum_buffer'].double()
        for x in views:
            step.train_step(ddp, list(x[:, part]), None, optimizer, contrastive_loss, autocast, scaler, joint, m)
        found[m or B // world, joint] = torch.cat([p.detach().flatten() for p in net.parameters()])
    return found


def test_parts_on_one_process_train_as_ranks(one, ranks):
    for rank in ranks:
        for part, weights in rank['parts'].items():
            torch.testing.assert_close(weights, one['parts'][part], rtol=0, atol=1e-9)


def update_of_main(rank, world, flags):
    """What main.py's own run of one step changes of the weights: by the images of a BatchNorm batch."""
    import main
    build, found = main.build, {}
    for m in (12, 6) if world == 1 else (24 // world,):
        def spy(*args):
            net, *others = build(*args)
            spy.net, spy.before = net, [p.detach().clone() for p in net.parameters()]
            return net, *others

        main.build = spy
        main.main([*flags, '--epochs', '1', '--batch_size', '24', '--optimizer', 'sgd', '--lr', '0.1', '--knn_every',
                   '0', *(['--results_dir', f'{flags[-1]}_{m}', '--micro_batch', str(m)] if world == 1 else [])])
        found[m] = torch.cat([(p.detach() - q).flatten() for p, q in zip(spy.net.parameters(), spy.before)])
    main.build = build
    return found


def test_main_under_a_launcher_takes_the_mean_of_the_ranks_gradients(one, ranks):
    """The step is that of one process whose parts are the ranks', on every rank."""
    (m, update), = ranks[0]['main'].items()
    assert all(torch.equal(rank['main'][m], update) for rank in ranks)
    alone = one['main'][m]
    assert F.cosine_similarity(update, alone, dim=0) > 0.999 and update.norm() > 0
    assert (update.norm() / alone.norm() - 1).abs() < 0.01
    other = one['main'][18 - m]
    assert F.cosine_similarity(update, other, dim=0) < 0.99  # the parts matter


def features_and_gathered(rank, world):
    from hardneg import evaluate
    import model
    from hardneg import runtime
    torch.manual_seed(0)
    net = model.Model(16, 'resnet18', width=0.25)
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = evaluate.encode(net, images, torch.arange(23), 0, torch.autocast('cpu', enabled=False),
                               torch.device('cpu'), block=5)
    gathered = runtime.gather(torch.arange(7).tensor_split(world)[rank])
    return features, gathered


def test_features_are_identical_and_no_image_counts_twice(one, ranks):
    for features, gathered in (rank['features'] for rank in ranks):
        assert torch.equal(features, one['features'][0]) and torch.equal(gathered, torch.arange(7))


def running(state):
    return torch.cat([x.flatten() for name, x in state.items() if 'running' in name])


def statistics(rank, world, flags):
    """BatchNorm's running statistics, step by step, of a run that one rank is asked to stop, and of a probe.

    Each rank's own after a step under 'own'; by name those that are saved, or that encode the images of a monitor.
    """
    import linear
    import main
    from hardneg import runs
    from hardneg import runtime
    seen, inputs, results = [], [], Path(f'{flags[-1]}_statistics')
    train_step, write, views = main.train_step, runs.write_tensors, linear.features_of_views

    def steps():
        return sum(name == 'own' for name, _ in seen)

    def step(ddp, *args):
        net = getattr(ddp, 'module', ddp)
        if steps() % 3 == 0:  # at the start of an epoch they may be all ranks'
            inputs[:] = [net.f[1].running_mean.clone()]
        hook = net.f[1].register_forward_pre_hook(lambda _, x: inputs.append(inputs[-1].lerp(x[0].mean((0, 2, 3)), .1)))
        done = train_step(ddp, *args)
        hook.remove()
        torch.testing.assert_close(net.f[1].running_mean, inputs[-1])  # of this rank's own images
        seen.append(('own', running(net.state_dict())))
        if rank == world - 1 and steps() == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    def features_of_views(net, *args):
        for pair in views(net, *args):
            seen.append(('own', running(net.state_dict())))
            yield pair

    def save(path, content):
        if 'model' in content or 'f.0.weight' in content:
            seen.append((path.name, running(content.get('model', content))))
        return write(path, content)

    def encode(net, images, index, *args, **how):
        seen.append(('monitor', running(net.state_dict())))
        return torch.rand(len(index), net.features if how.get('view') is None else 4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Saver, 'due', lambda self: steps() == 2)
        for module, name, value in ((main, 'train_step', step), (runs, 'write_tensors', save), (main, 'encode', encode),
                                    (linear, 'features_of_views', features_of_views), (linear, 'encode', encode)):
            patch.setattr(module, name, value)
        with pytest.raises(SystemExit) as stopped:
            main.main([*flags, '--results_dir', str(results), '--epochs', '2', '--knn_every', '1'])
        assert stopped.value.code == 128 + signal.SIGTERM
        runtime.on_rank0((results / 'model_0.pth').unlink)
        linear.main(['--model_path', str(results / 'model_1.pth'), '--bn', 'train', '--epochs', '1', '--batch_size',
                     '8'])
    return seen


def test_running_statistics_become_their_mean_over_ranks_wherever_they_are_used(ranks):
    own = list(zip(*([x for name, x in rank['statistics'] if name == 'own'] for rank in ranks)))
    assert all((a - b).norm() > 1e-3 for a, b, *_ in own)
    for rank in ranks:
        steps, used = 0, Counter()
        for name, x in rank['statistics']:
            steps += name == 'own'
            if name != 'own' and steps not in (0, 5) or name == 'last.pth' and steps:
                torch.testing.assert_close(x, torch.stack(own[steps - 1]).mean(0), msg=f'{name} after {steps} steps')
                used[name, steps] += 1
        monitored = {('monitor', 3), ('monitor', 9)}
        assert set(used) == monitored | ({('last.pth', 2), ('last.pth', 3), ('model_1.pth', 3), ('last.pth', 5)}
                                         if rank is ranks[0] else set())


def memory_of_the_loss(rank, world, B):
    import bench
    from hardneg.losses import contrastive_loss
    views = [F.normalize(torch.randn(B // world, 128), dim=1).requires_grad_() for _ in range(2)]
    contrastive_loss(*[x[:64] for x in views]).backward()  # libraries are loaded
    before = bench.peak_memory(reset=True)
    contrastive_loss(*views).backward()
    return (bench.peak_memory() - before) / 1e6


@pytest.mark.slow
def test_memory_of_the_loss_is_that_of_rows_and_tiles(tmp_path):
    """One matrix of exponentials of this batch is 4.3 GB."""
    for world in (1, 4):
        (tmp_path / str(world)).mkdir()
    one, four = (max(on_ranks(world, memory_of_the_loss, tmp_path / str(world), 16384)) for world in (1, 4))
    print(f'{one:.0f} MB on one process, {four:.0f} MB on each of four')
    assert one < 300 and four < 300


def flags(tiny, results, epochs=3):
    return [*tiny, '--epochs', str(epochs), '--results_dir', str(results)]


def test_torchrun_trains_logs_and_saves_once_and_one_process_continues(tiny, tmp_path, run):
    results = tmp_path / 'r'
    job = Job('main.py', flags(tiny, results, 6), torchrun=['--nproc_per_node=2'])
    while job.process.poll() is None and not (results / 'model_1.pth').exists():
        time.sleep(0.01)
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    assert job.code != 0 and job.out.count('saved in') == 1 and job.out.count('epoch 1/6:') == 1, job.err
    again = run('main.py', flags(tiny, results, 6))
    assert again.code == 0 and 'Continuing' in again.out
    log = pd.read_csv(results / 'log.csv')
    assert list(log['epoch']) == [0, 1, 2, 3, 4, 5, 6] and log['train_loss'][1:].notna().all()


@pytest.mark.slow
def test_compiled_ranks_train_as_eager_ones(tiny, tmp_path, run):
    logs = []
    for compile in ('--compile', '--no-compile'):
        # PIL's views, as compiled ones round a few grey levels otherwise
        job = run('main.py', [*flags(tiny, tmp_path / compile, 2), '--lr', '1e-5', '--augment', 'pil', '--workers', '0',
                              compile],
                  torchrun=['--nproc_per_node=2'])
        assert job.code == 0, job.err
        skip_if_not_compiled(job.out)
        logs.append(pd.read_csv(tmp_path / compile / 'log.csv')[1:])
    assert logs[0]['train_loss'].tolist() == pytest.approx(logs[1]['train_loss'].tolist(), rel=1e-4)
    assert logs[0]['encoder'].tolist() != logs[1]['encoder'].tolist()  # another order of sums


@pytest.mark.slow
def test_probe_under_torchrun_is_that_of_one_process(tiny, tmp_path, run):
    assert run('main.py', flags(tiny, tmp_path, 1)).code == 0
    tables, probing = [], ['--model_path', tmp_path / 'model_1.pth', '--epochs', '3', '--batch_size', '7']
    for torchrun in ([], ['--nproc_per_node=3']):
        job = run('linear.py', probing, torchrun=torchrun)
        assert job.code == 0 and sum('linear probe' in line for line in job.out.splitlines()) == 1
        tables.append(pd.read_csv(tmp_path / 'model_1_linear.csv'))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


@pytest.mark.slow
def test_errors_are_shown_once(tiny, tmp_path, run):
    job = run('main.py', [*flags(tiny, tmp_path / 'r'), '--beta', '-1'], torchrun=['--nproc_per_node=2'])
    assert job.code != 0 and job.err.count('main.py: error: argument --beta') == 1
    job = run('main.py', [*flags(tiny, tmp_path / 'r'), '--batch_size', '9'], torchrun=['--nproc_per_node=2'])
    assert job.err.count('does not divide evenly over 2 ranks') == 1
    job = run('main.py', flags(tiny, '/proc/r'), torchrun=['--nproc_per_node=2'])
    assert job.code != 0 and job.err.count('choose another directory') == 1 and 'Traceback' not in job.out


def kill_a_rank(job, results):
    while job.process.poll() is None and not (results / 'model_1.pth').exists():
        time.sleep(0.01)
    ranks = [p for p in psutil.Process(job.process.pid).children() if 'main.py' in ' '.join(p.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    return time.monotonic()


@pytest.mark.slow
def test_killed_rank_ends_the_run_and_the_command_again_continues(tiny, tmp_path, run):
    results = tmp_path / 'r'
    job = Job('main.py', flags(tiny, results, 6), torchrun=['--nproc_per_node=2'])
    killed = kill_a_rank(job, results)
    job.finish()
    assert job.code != 0 and time.monotonic() - killed < 45  # torchrun gives the others 30 seconds
    again = run('main.py', flags(tiny, results, 6), torchrun=['--nproc_per_node=2'])
    assert again.code == 0 and 'Continuing' in again.out and list(pd.read_csv(results / 'log.csv')['epoch']) == [
        0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_it_stopped(tiny, tmp_path):
    results = tmp_path / 'r'
    job = Job('main.py', flags(tiny, results, 6), torchrun=['--nproc_per_node=2', '--max_restarts=1'])
    kill_a_rank(job, results)
    job.finish()
    assert job.code == 0 and 'Continuing' in job.out and 'Finished' in job.out
    assert list(pd.read_csv(results / 'log.csv')['epoch']) == [0, 1, 2, 3, 4, 5, 6]
