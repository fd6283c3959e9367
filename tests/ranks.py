"""Functions that tests run on several ranks: each returns what one rank computes."""

import os
import signal
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_losses import random_case
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import linear
import main
from hardneg import runs, runtime
from hardneg.evaluate import Evaluator
from hardneg.losses import contrastive_loss
from hardneg.micro_batch import MicroBatches
from model import Embeddings, Model

CPU = torch.device('cpu')
NO_AUTOCAST = torch.autocast('cpu', enabled=False)
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
BATCH = 8
CASES = 60


def on_ranks(world, function, out, *args):
    """function(rank, world, *args) in processes that form a gloo group -> what each returns."""
    arguments = world, function, out / 'store', out, args
    start_processes(_join, arguments, world, start_method='forkserver')
    return [torch.load(out / f'{rank}.pt') for rank in range(world)]


def _join(rank, world, function, store, out, args):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{store}', rank=rank, world_size=world
        )
    torch.save(function(rank, world, *args), f'{out}/{rank}.pt')
    if world > 1:
        torch.distributed.destroy_process_group()


def everything(rank, world, flags):
    """All that the tests compare, on one rank."""
    found = {
        'parts': weights_after_steps(rank, world),
        'main': update_of_main(rank, world, flags),
        'losses': [losses_and_gradients(rank, world, V) for V in (2, 3)],
        'features': features(),
        'gathered': runtime.gather(torch.arange(7).tensor_split(world)[rank]),
        'one each': loss_of_one_sample_each(rank, world),
        'embedded': features_of_files(rank, flags),
        'cases': [random_case_on_rank(rank, world, seed) for seed in range(CASES)],
    }
    if world > 1:
        found['statistics'] = statistics(rank, world, flags)
        found['groups'] = groups(rank, world)
    return found


# The loss

SETTINGS = [
    dict(),
    dict(beta=0, tau_plus=0),
    dict(beta=2.5, tau_plus=0.3, temperature=0.1),
    dict(beta=0),
    dict(chunk_size=1),
    dict(tau_plus=0, labelled=True),
    dict(tau_plus=0, beta=0, labelled=True),
    dict(intra_view=False),
    dict(temperature=0.01, intra_view=False),
    dict(learnable=0.2),
    dict(learnable=0.2, tau_plus=0.9),
    dict(learnable=0.05, intra_view=False, beta=0, tau_plus=0),
]


def random_views(V, B, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V, B, 6, generator=generator, dtype=torch.float64)


def losses_and_gradients(rank, world, V):
    """By setting the loss, and the gradients at the temperature and at this rank's views."""
    whole = random_views(V, BATCH, seed=V)
    labels = torch.tensor([-1, 0, 0, 0, -1, 1, 0, 0])  # some ranks hold one class; -1: unknown
    results = []
    for setting in SETTINGS:
        options = dict(setting)
        views = [z.chunk(world)[rank].clone().requires_grad_() for z in whole]
        if options.pop('labelled', False):
            options['labels'] = labels.chunk(world)[rank]
        t = torch.tensor(options.pop('learnable', 0.5), dtype=torch.float64, requires_grad=True)
        if 'learnable' in setting:
            options['temperature'] = t
        loss = contrastive_loss(*views, **options)
        loss.backward()
        by_t = t.grad
        if by_t is None:
            by_t = torch.zeros(())
        results.append((loss.detach(), by_t, torch.stack([z.grad for z in views])))
    return results


def loss_of_one_sample_each(rank, world):
    whole = random_views(2, world, seed=0)
    if world == 1:
        return None
    return contrastive_loss(*whole[:, rank : rank + 1])


def random_case_on_rank(rank, world, seed):
    """The value and the gradients at views, further negatives and temperature of a random case."""
    views, setting = random_case(seed, sizes=(world, 2 * world, 3 * world))
    inputs = [z.chunk(world)[rank].clone().requires_grad_() for z in views]
    if 'labels' in setting:
        setting['labels'] = setting['labels'].chunk(world)[rank]
    by_negatives = None
    if 'negatives' in setting:
        setting['negatives'] = setting['negatives'][rank::world].clone().requires_grad_()
    t = torch.as_tensor(setting['temperature'], dtype=torch.float64).clone().requires_grad_()
    value = contrastive_loss(*inputs, **{**setting, 'temperature': t})
    value.backward()
    if 'negatives' in setting:
        by_negatives = setting['negatives'].grad
    return value.detach(), torch.stack([z.grad for z in inputs]), by_negatives, t.grad


def groups(rank, world):
    """A rank's losses alone, in its pair and in the whole group; and the words of two errors.

    The errors are of a group that lacks this rank, and of unequal numbers of samples.
    """
    mine = random_views(2, BATCH, seed=0).chunk(world, 1)[rank]
    pairs = [torch.distributed.new_group([i, i + 1]) for i in range(0, world, 2)]
    not_mine = 1
    if world > 2:
        not_mine = pairs[rank // 2 - 1]
    errors = []
    for views, group in ((mine, not_mine), (mine[:, rank % 2 :], None)):
        with pytest.raises(ValueError) as error:
            contrastive_loss(*views, group=group)
        errors.append(str(error.value))
    values = [contrastive_loss(*mine, group=group) for group in (False, pairs[rank // 2], None)]
    return values, errors


# Training

SMALL = '--arch resnet18 --width 0.25 --feature_dim 8 --hidden_dim 16 --optimizer sgd --lr 0.1'


def weights_after_steps(rank, world):
    """The weights after four steps of SGD in float64, by the images of a part and joint views.

    On one process for the parts of any number of ranks; on several, also for all of a rank's
    images at once.
    """
    B, found = 32, {}
    generator = torch.Generator().manual_seed(2)
    steps = torch.randn(4, 2, B, 3, 8, 8, generator=generator).double()
    sizes = (16, 8)
    if world > 1:
        sizes = (None, 8)
    for m, joint in product(sizes, (False, True)):
        torch.manual_seed(0)
        flags = [*SMALL.split(), '--batch_size', str(B)]
        if m:
            flags += ['--micro_batch', str(m)]
        args, _, _ = main.arguments(flags)
        net = main.build_network(args).double()
        optimizer = main.build_optimizer(args, net)
        ddp = runtime.distributed(Embeddings(net, joint), CPU)
        parts = MicroBatches(ddp, m, NO_AUTOCAST)
        for views in steps:
            own = [x.chunk(world)[rank] for x in views]
            optimizer.zero_grad()
            if m:
                parts.backward(own, lambda z: contrastive_loss(*z), NO_SCALER)
            else:
                contrastive_loss(*ddp(*own)).backward()
            optimizer.step()
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        found[m or B // world, joint] = weights
    return found


def update_of_main(rank, world, flags):
    """What one step of main.py changes of the weights, by the images of a BatchNorm batch."""
    build_network = main.build_network
    nets, found = [], {}

    def build(args, init=None):
        nets.append(build_network(args, init))
        before = [p.detach().clone() for p in nets[-1].parameters()]
        nets.append(before)
        return nets[-2]

    step = [*flags, '--epochs', '1', '--batch_size', '24', '--optimizer', 'sgd', '--lr', '0.1']
    step += ['--knn_every', '0']
    sizes = [24 // world]
    if world == 1:
        sizes = [12, 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, 'build_network', build)
        for m in sizes:
            own = list(step)
            if world == 1:
                own += ['--results_dir', f'{flags[-1]}_{m}', '--micro_batch', str(m)]
            main.main(own)
            net, before = nets[-2:]
            changes = [(p.detach() - q).flatten() for p, q in zip(net.parameters(), before)]
            found[m] = torch.cat(changes)
    return found


def features():
    """f's features of 23 images in blocks of 5."""
    torch.manual_seed(0)
    net = Model(16, 'resnet18', width=0.25)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (23, 3, 8, 8), dtype=torch.uint8, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('hardneg.evaluate.BLOCK', 5)
        return Evaluator(net, CPU, NO_AUTOCAST).features(images, torch.arange(23), 0)


def gradient_of_a_step(rank, compiled):
    """The gradient of two views in float64 under DistributedDataParallel with small buckets."""
    torch.manual_seed(0)
    net = Model(8, 'resnet18', 8, width=0.25).double()
    embed = Embeddings(net)
    if compiled:
        embed.compile(dynamic=False, backend='aot_eager')
    ddp = DistributedDataParallel(embed, bucket_cap_mb=1.1, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(rank)
    views = torch.randn(2, 8, 3, 8, 8, dtype=torch.float64, generator=generator)
    contrastive_loss(*ddp(*views)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def gradients_of_a_step(rank, world):
    """Eager and compiled."""
    return [gradient_of_a_step(rank, compiled) for compiled in (False, True)]


class LateCollectives(TorchFunctionMode):
    """Sums over ranks that return before the others have arrived, as those of a GPU do.

    The host waits when it next uses a tensor.
    """

    def __init__(self):
        super().__init__()
        self.under_way = []
        self.all_reduce = torch.distributed.all_reduce

    def begin(self, x, op=torch.distributed.ReduceOp.SUM):
        self.under_way.append(self.all_reduce(x, op, async_op=True))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        while self.under_way:
            self.under_way.pop().wait()
        return func(*args, **(kwargs or {}))


def features_of_files(rank, flags):
    """What misc/embed.py writes of the images in --root. All ranks but the first are slow."""
    import embed

    results = Path(f'{flags[-1]}_embedded')
    checkpoint = results / str(rank) / 'model_1.pth'
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(Model(8, 'resnet18', 8, width=0.25).state_dict(), checkpoint)
    decode = embed.decode_or_why

    def slowly(*args):
        time.sleep(0.01 * rank)
        return decode(*args)

    with pytest.MonkeyPatch.context() as patch, LateCollectives() as late:
        patch.setattr(torch.distributed, 'all_reduce', late.begin)
        patch.setattr(embed, 'decode_or_why', slowly)
        patch.setattr(embed, 'BLOCK', 7)
        root = flags[flags.index('--root') + 1]
        out = str(results / 'features.npz')
        words = ['--model_path', str(checkpoint), '--root', root, '--out', out]
        embed.main([*words, '--precision', 'fp32'])
    if rank > 0:
        return None
    return torch.from_numpy(np.load(out)['features'])


def running(state):
    """All running statistics of BatchNorm in a state_dict, in one vector."""
    return torch.cat([x.flatten() for name, x in state.items() if 'running' in name])


def statistics(rank, world, flags):
    """BatchNorm's running statistics in a run that one rank is asked to stop, and in a probe.

    A list of (name, statistics): 'own' after each step of this rank; 'monitor' where images are
    encoded; otherwise the name of a file that is saved.
    """
    seen, nets = [], []
    results = Path(f'{flags[-1]}_statistics')
    build_network, check_finite = main.build_network, main.check_finite
    write_tensors, features_of_views = runs.write_tensors, linear.features_of_views

    def steps():
        return sum(name == 'own' for name, _ in seen)

    def build(args, init=None):
        nets.append(build_network(args, init))
        return nets[-1]

    def after_step(losses, scaler, epoch):
        seen.append(('own', running(nets[0].state_dict())))
        if rank == world - 1 and steps() == 5:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        check_finite(losses, scaler, epoch)

    def spy_views(net, *args):
        for pair in features_of_views(net, *args):
            seen.append(('own', running(net.state_dict())))
            yield pair

    def save(path, content):
        weights = content.get('model', content)
        if 'f.0.weight' in weights:
            seen.append((path.name, running(weights)))
        return write_tensors(path, content)

    def encode(self, images, index, *args):
        seen.append(('monitor', running(self.net.state_dict())))
        return torch.rand(len(index), self.net.features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, 'build_network', build)
        patch.setattr(main, 'check_finite', after_step)
        patch.setattr(runs, 'write_tensors', save)
        patch.setattr(runs.Saver, 'due', lambda self: steps() == 2)
        patch.setattr(Evaluator, 'features', encode)
        patch.setattr(Evaluator, 'embeddings', encode)
        patch.setattr(linear, 'features_of_views', spy_views)
        with pytest.raises(SystemExit) as stopped:
            main.main([*flags, '--results_dir', str(results), '--epochs', '2', '--knn_every', '1'])
        assert stopped.value.code == 128 + signal.SIGTERM
        runtime.on_rank0((results / 'model_0.pth').unlink)
        probe = ['--model_path', str(results / 'model_1.pth'), '--bn', 'train', '--epochs', '1']
        linear.main([*probe, '--batch_size', '8'])
    return seen


def memory_of_the_loss(rank, world, B):
    """The megabytes that the loss and its gradient take at most, beyond their inputs."""
    import bench

    views = []
    for _ in range(2):
        views.append(F.normalize(torch.randn(B // world, 128), dim=1).requires_grad_())
    contrastive_loss(*(x[:64] for x in views)).backward()  # libraries are loaded
    before = bench.peak_memory(CPU, reset=True)
    contrastive_loss(*views).backward()
    return (bench.peak_memory(CPU) - before) / 1e6
