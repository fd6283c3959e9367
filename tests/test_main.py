"""Training and probe in one process: the step, the monitor, what is written, and what is refused."""

import hashlib
import json
import math
import random
import shutil
import signal
import zlib
from argparse import Namespace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outcome, outcome, stop_after
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.datasets import STL10

from hardneg import evaluate
from hardneg import files
import linear
import main
import model
from hardneg import runs
from hardneg import runtime
import step
from hardneg.augment import MEAN, STD
from data import Data, load_data
from hardneg.losses import contrastive_loss
from hardneg.runtime import UserError

CPU, NO_AUTOCAST = torch.device('cpu'), torch.autocast('cpu', enabled=False)
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A finished run of 3 epochs."""
    results = tmp_path_factory.mktemp('runs') / 'finished'
    main.main([*tiny, '--epochs', '3', '--results_dir', str(results)])
    return results


def equations(z1, z2, t, tau_plus, beta):
    """HCL, eq. 4, on the whole matrix of exponentials."""
    B, z = len(z1), torch.cat([z1, z2])
    neg = (z @ z.T / t).exp()[~torch.eye(B, dtype=torch.bool).repeat(2, 2)].view(2 * B, -1)
    pos = ((z1 * z2).sum(1) / t).exp().repeat(2)
    N = 2 * B - 2
    R = N * (neg ** (1 + beta)).sum(1) / (neg ** beta).sum(1)
    Ng = ((R - tau_plus * N * pos) / (1 - tau_plus)).clamp(min=N * math.exp(-1 / t))
    return -(pos / (pos + Ng)).log().mean()


@pytest.mark.parametrize('dtype, lr, tolerance', [(torch.float32, 3e-6, 1e-4), (torch.float64, 1e-3, 1e-10)],
                         ids=['float32', 'float64'])
def test_a_dozen_steps_are_the_plain_loop(dtype, lr, tolerance):
    """main.py's own step against views one after the other, the equations above and plain Adam.

    Adam divides tiny gradients by their size, so that rounding in float32 grows tenfold a step at the default
    learning rate, between any two orders of summation; float64 shows that the steps are the same there too.
    """
    torch.manual_seed(0)
    net, plain = (model.Model(16, 'resnet18', width=0.25).to(dtype) for _ in range(2))
    plain.load_state_dict(net.state_dict())
    net.to(memory_format=torch.channels_last)
    views = list(torch.randn(2, 8, 3, 8, 8, dtype=dtype))
    optimizer = torch.optim.Adam(net.parameters(), lr, weight_decay=1e-6, fused=True)
    other = torch.optim.Adam(plain.parameters(), lr, weight_decay=1e-6, fused=False, foreach=False)
    optimizer.skipped, losses = 0, []
    for _ in range(12):
        loss, _ = step.train_step(net, views, None, optimizer, contrastive_loss, NO_AUTOCAST, NO_SCALER)
        losses.append(loss.item())
        expected = equations(plain(views[0])[1], plain(views[1])[1], 0.5, 0.1, 1.0)
        other.zero_grad()
        expected.backward()
        other.step()
        assert losses[-1] == pytest.approx(expected.item(), rel=tolerance)
    assert losses[-1] < 0.9 * losses[0]


def test_joint_views_share_one_batchnorm_batch():
    torch.manual_seed(0)
    net, views = model.Model(16, 'resnet18'), torch.randn(2, 4, 3, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    optimizer.skipped = 0
    losses = [step.train_step(net, list(views), None, optimizer, contrastive_loss, NO_AUTOCAST, NO_SCALER, joint)[0]
              for joint in (False, True)]
    z1, z2 = net(torch.cat(list(views)))[1].chunk(2)
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], contrastive_loss(z1, z2).detach())


@pytest.mark.parametrize('temperature', [0.5, 0.005])  # exp(1 / 0.005) is infinite in float32
def test_knn_is_the_weighted_vote(temperature):
    generator = torch.Generator().manual_seed(0)
    memory, queries = (torch.randn(n, 8, generator=generator) for n in (60, 30))
    memory_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (60, 30))
    hits = np.zeros(2)
    for query, label in zip(queries, labels):
        similarity = F.cosine_similarity(query[None], memory)
        votes = np.zeros(7)
        for j in similarity.argsort(descending=True)[:30]:
            votes[memory_labels[j]] += math.exp(similarity[j] / temperature)
        ranked = list(np.argsort(-votes))
        hits += [ranked[0] == label, label.item() in ranked[:5]]
    found = evaluate.knn(memory, queries, memory_labels, labels, k=30, temperature=temperature)
    assert found == pytest.approx(list(100 * hits / 30))


def test_encode_is_f_in_eval_mode_at_the_size_asked_for():
    torch.manual_seed(0)
    net = model.Model(16, 'resnet18')
    images = torch.randint(256, (10, 3, 24, 24), dtype=torch.uint8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    index = torch.tensor([7, 3, 3])
    features = evaluate.encode(net, images, index, 0, NO_AUTOCAST, CPU, block=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
    expected = net.eval().f((images[index] / 255 - mean) / std).flatten(1)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(evaluate.encode(net, images, index, 16, NO_AUTOCAST, CPU), expected)


def test_files_of_a_run(finished, tiny):
    assert {path.name for path in finished.iterdir()} == {'.lock', 'config.json', 'last.pth', 'log.csv', 'model_0.pth',
                                                          'model_1.pth', 'model_2.pth', 'model_3.pth'}
    log = pd.read_csv(finished / 'log.csv')
    assert list(log) == ['epoch', 'train_loss', 'test_acc@1', 'test_acc@5', 'alignment', 'uniformity', 'rankme', 'lr',
                         'images/s', 'seconds', 'encoder']
    assert list(log['epoch']) == [0, 1, 2, 3] and log['train_loss'].isna().tolist() == [True, False, False, False]
    assert log['test_acc@1'].isna().tolist() == [False, True, False, False]  # untrained, every second epoch, the last
    assert log['encoder'].tolist() == [zlib.crc32((finished / f'model_{i}.pth').read_bytes()) for i in range(4)]
    config = json.loads((finished / 'config.json').read_text())
    assert config['settings']['beta'] == 1.0 and config['classes'] == ['a', 'b', 'c']
    assert config['images'] == {'train': 30, 'test': 9} and config['versions']['torch'] == torch.__version__
    state = model.read_checkpoint(finished / 'model_3.pth')
    assert all(torch.equal(value, state[name]) for name, value in model.load_model(finished / 'last.pth')
               .state_dict().items())


def test_same_seed_same_bits_and_another_seed_others(finished, tiny, tmp_path):
    main.main([*tiny, '--epochs', '3', '--results_dir', str(tmp_path / 'again')])
    assert_same_outcome(tmp_path / 'again', outcome(finished))
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path / 'other'), '--seed', '1'])
    assert outcome(tmp_path / 'other')[0]['train_loss'][1] != outcome(finished)[0]['train_loss'][1]


@pytest.mark.parametrize('augment', ['device', 'pil'])
def test_stopped_anywhere_it_resumes_to_the_same_bits(tiny, tmp_path, augment, monkeypatch, capsys):
    """Stopped while the untrained encoder is measured, after steps 1, 3 (a whole epoch, before its kNN) and 5 of 6."""
    flags = [*tiny, '--epochs', '2', '--save_every', '2', '--augment', augment, '--workers', '0', '--results_dir']
    main.main([*flags, str(tmp_path / 'whole')])
    check, calls = runtime.Signals.check, []

    def check_and_stop(self, due=False):
        calls.append(1)
        if len(calls) in (2, 8, 10, 12):  # five are of the untrained encoder's measures
            raise runtime.Stopped(signal.SIGTERM)
        check(self)

    monkeypatch.setattr(runtime.Signals, 'check', check_and_stop)
    before = [signal.getsignal(signum) for signum in runtime.STOP_SIGNALS]
    for after in (0, 1, 3, 2):
        with pytest.raises(SystemExit) as stop:
            main.main([*flags, str(tmp_path / 'parts')])
        assert stop.value.code == 143 and f'after step {after}, saved' in capsys.readouterr().out
    main.main([*flags, str(tmp_path / 'parts')])
    assert [signal.getsignal(signum) for signum in runtime.STOP_SIGNALS] == before
    assert_same_outcome(tmp_path / 'parts', outcome(tmp_path / 'whole'))


def snapshot(results):
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in results.iterdir() if path.name != '.lock'}


def refuses(argv, message):
    with pytest.raises(UserError, match=message):
        main.main(argv)


def test_a_finished_run_says_so_and_other_settings_are_refused(finished, tiny, capsys):
    flags, before = [*tiny, '--epochs', '3', '--results_dir', str(finished)], snapshot(finished)
    main.main([*flags, '--workers', '1'])
    assert 'holds this run, finished: loss' in capsys.readouterr().out
    refuses([*flags, '--beta', '2', '--lr', '0.01'], r'other settings \(--beta 1.0 there, 2.0 here; --lr 0.001 there')
    (finished / 'log.csv').unlink()
    main.main(flags)
    assert snapshot(finished) == before


def test_run_on_other_data_is_refused(finished, tiny, tree, tmp_path):
    shutil.copytree(tree, tmp_path / 'tree')
    (tmp_path / 'tree' / 'test' / 'a' / '0.png').unlink()
    flags, before = list(tiny), snapshot(finished)
    flags[flags.index('--root') + 1] = str(tmp_path / 'tree')
    refuses([*flags, '--epochs', '3', '--results_dir', str(finished)],
            r"a run on other data \({'train': 30, 'test': 9}")
    assert snapshot(finished) == before


@pytest.mark.parametrize('damage, message', [
    (lambda r: (r / 'last.pth').write_bytes((r / 'last.pth').read_bytes()[:-100]),
     r'last.pth: damaged .* cannot be continued; beside it is last.pth, log.csv, model_1.pth'),
    (lambda r: torch.save({'a': torch.zeros(1)}, r / 'last.pth'), 'last.pth is damaged, changed'),
    (lambda r: torch.save(torch.tensor(1), r / 'last.pth'), 'last.pth is damaged, changed'),
    (lambda r: (r / 'last.pth').unlink(), 'holds log.csv, model_1.pth but no last.pth'),
    (lambda r: [p.unlink() for p in r.glob('*.pth')], 'holds log.csv but no last.pth'),
    (lambda r: (r / 'config.json').unlink(), 'but no config.json'),
    (lambda r: (r / 'config.json').write_text('{'), 'config.json is damaged'),
])
def test_no_run_starts_over_what_it_cannot_continue(finished, tiny, tmp_path, damage, message):
    results = tmp_path / 'copy'
    results.mkdir()
    for name in ('config.json', 'log.csv', 'last.pth', 'model_1.pth'):
        shutil.copy(finished / name, results / name)
    damage(results)
    before = snapshot(results)
    refuses([*tiny, '--epochs', '3', '--results_dir', str(results)], message)
    assert snapshot(results) == before


def test_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(tiny, tmp_path, monkeypatch):
    train_step, calls = main.train_step, []

    def broken(*args):
        calls.append(1)
        loss, skipped = train_step(*args)
        return loss * (math.nan if len(calls) == 5 else 1), skipped

    monkeypatch.setattr(main, 'train_step', broken)
    refuses([*tiny, '--epochs', '3', '--results_dir', str(tmp_path)],
            r'loss is nan at epoch 2, step 2; the last good state is untouched.* --lr too high')
    with pytest.raises(UserError, match='loss is inf at epoch 3, step 2;'):
        main.check_finite(torch.tensor([1, math.inf, 2, math.nan]), NO_SCALER, 3)
    assert model.read_checkpoint(tmp_path / 'last.pth')['epoch'] == 1


def test_a_run_killed_before_its_first_state_begins_anew(finished, tiny, tmp_path):
    for name in ('config.json', 'model_0.pth'):
        shutil.copy(finished / name, tmp_path)
    main.main([*tiny, '--epochs', '3', '--results_dir', str(tmp_path)])
    assert_same_outcome(tmp_path, outcome(finished))


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    train_step, calls = main.train_step, []

    def broken(net, *args):
        done = train_step(net, *args)
        calls.append(1)
        if len(calls) == 6:
            net.g[3].bias.data.fill_(math.nan)
        return done

    monkeypatch.setattr(main, 'train_step', broken)
    refuses([*tiny, '--epochs', '3', '--results_dir', str(tmp_path)], 'weights are not finite after epoch 2')
    assert model.read_checkpoint(tmp_path / 'last.pth')['epoch'] == 1 and not (tmp_path / 'model_2.pth').exists()


@pytest.mark.parametrize('flags, message', [(['--batch_size', '31'], 'larger than the data set, 30 images'),
                                            (['--k', '30'], 'larger than the kNN memory, 29 images'),
                                            (['--stem', 'imagenet'], 'leaves less than a pixel of views of 8 px')])
def test_flags_that_do_not_fit_the_data(tiny, tmp_path, flags, message, capsys, monkeypatch):
    load_data = main.load_data

    def one_without_label(*args):
        data = load_data(*args)
        data.train_labels[7] = -1
        return data

    monkeypatch.setattr(main, 'load_data', one_without_label)
    with pytest.raises(SystemExit) as stop:
        main.main([*tiny, '--results_dir', str(tmp_path / 'new'), *flags])
    assert stop.value.code == 2 and message in capsys.readouterr().err and not (tmp_path / 'new').exists()


@pytest.mark.parametrize('flags', [['--estimator', 'standard'], ['--estimator', 'debiased', '--views', '3'],
                                   ['--oracle'], ['--joint_views'], ['--precision', 'bf16'], ['--micro_batch', '4'],
                                   ['--temperature', '0.05', '--feature_dim', '16']], ids=' '.join)
def test_every_objective_trains_and_differs(finished, tiny, tmp_path, flags):
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path), *flags])
    loss = pd.read_csv(tmp_path / 'log.csv')['train_loss'][1]
    assert math.isfinite(loss) and loss != pd.read_csv(finished / 'log.csv')['train_loss'][1]


@pytest.mark.parametrize('flags, given', [
    ([], dict(temperature=0.5, tau_plus=0.1, beta=1.0, labels=None)),
    (['--temperature', '0.2', '--tau_plus', '0.05', '--beta', '2'], dict(temperature=0.2, tau_plus=0.05, beta=2.0)),
    (['--oracle'], dict(tau_plus=0, beta=0, labels=8)), (['--anneal', 'down', '--epochs', '2'], dict(beta=0.0)),
    (['--lr', '0.02', '--weight_decay', '0.3'], dict(lr=0.02, weight_decay=0.3)),
    (['--views', '3', '--feature_dim', '16'], dict(shapes=[(8, 16)] * 3))], ids=str)
def test_flags_reach_the_loss_and_the_optimizer(tiny, tmp_path, flags, given, monkeypatch):
    seen = {}

    def loss(*views, labels, **kwargs):
        seen.update(kwargs, shapes=[tuple(z.shape) for z in views], labels=labels if labels is None else len(labels))
        return contrastive_loss(*views, labels=labels, **kwargs)

    class Adam(torch.optim.Adam):
        def __init__(self, parameters, lr, **kwargs):
            super().__init__(parameters, lr, **kwargs)
            seen.update(self.defaults)

    monkeypatch.setattr(main, 'contrastive_loss', loss)
    monkeypatch.setattr(torch.optim, 'Adam', Adam)
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path), *flags])
    assert {name: seen[name] for name in given} == given


def test_oracle_is_given_the_labels_of_the_batch(tiny, tree, tmp_path, monkeypatch):
    batches, given = [], []
    epoch = main.DeviceViews.epoch

    def views(self, *args):
        for x, index in epoch(self, *args):
            batches.append(index)
            yield x, index

    def loss(*views, labels, **kwargs):
        given.append(labels)
        return contrastive_loss(*views, labels=labels, **kwargs)

    monkeypatch.setattr(main.DeviceViews, 'epoch', views)
    monkeypatch.setattr(main, 'contrastive_loss', loss)
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path), '--oracle'])
    assert torch.equal(torch.cat(given), load_data('folder', tree, 16).train_labels[torch.cat(batches)])


@pytest.mark.parametrize('flags', [['--optimizer', 'sgd', '--schedule', 'cosine', '--warmup', '1', '--lr', '0.05'],
                                   ['--positives', 'label', '--views', '3', '--micro_batch', '4'],
                                   ['--precision', 'fp16', '--optimizer', 'sgd'],
                                   ['--anneal', 'down', '--oracle', '--beta', '1']], ids=' '.join)
def test_variants_resume_to_the_same_bits(tiny, tmp_path, flags, monkeypatch):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**16, growth_interval=2)  # of fp16: some steps are skipped
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    flags = [*tiny, '--epochs', '2', '--hidden_dim', '24', *flags, '--results_dir']
    main.main([*flags, str(tmp_path / 'whole')])
    with monkeypatch.context() as patch:
        stop_after(9, patch)  # in the second epoch
        with pytest.raises(SystemExit):
            main.main([*flags, str(tmp_path / 'parts')])
    main.main([*flags, str(tmp_path / 'parts')])
    assert_same_outcome(tmp_path / 'parts', outcome(tmp_path / 'whole'))
    skipped = torch.load(tmp_path / 'parts' / 'last.pth')['skipped']
    assert 0 < skipped < 5 if 'fp16' in flags else skipped == 0, skipped


def test_dkobaks_recipe_is_sgd_with_momentum_and_cosine(tiny, tmp_path, monkeypatch):
    seen = []

    class SGD(torch.optim.SGD):
        def step(self):
            seen.append({**self.param_groups[0], 'params': None})
            super().step()

    monkeypatch.setattr(torch.optim, 'SGD', SGD)
    main.main([*tiny, '--epochs', '2', '--optimizer', 'sgd', '--lr', '0.06', '--weight_decay', '5e-4', '--schedule',
               'cosine', '--hidden_dim', '1024', '--results_dir', str(tmp_path)])
    assert {(group['momentum'], group['weight_decay'], group['nesterov']) for group in seen} == {(0.9, 5e-4, False)}
    assert model.load_model(tmp_path / 'model_2.pth').g[0].out_features == 1024


@pytest.mark.parametrize('augment, name', [('device', 'DeviceViews'), ('pil', 'ReferenceViews')])
def test_positives_by_label_and_the_recipe_reach_the_views(tiny, tmp_path, monkeypatch, augment, name):
    given, Views = [], getattr(main, name)
    monkeypatch.setattr(main, name, lambda images, batches, *args, **recipe: given.extend((images, batches, recipe)) or
                        Views(images, batches, *args, **recipe))
    main.main([*tiny, '--epochs', '1', '--positives', 'label', '--augment', augment, '--workers', '0', '--blur', 'none',
               '--crop_min', '0.3', '--jitter', '0.5', '--grayscale', '0.1', '--vertical_flip', '--results_dir',
               str(tmp_path)])
    images, batches, recipe = given
    assert batches.labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10 and len(images) == 30
    assert recipe == dict(blur=False, crop_min=0.3, jitter=0.5, grayscale=0.1, vertical_flip=True)


def test_rows_of_the_log_are_those_of_the_numbers_that_were_measured(tiny, tmp_path, monkeypatch):
    """Of 5 epochs of 3 steps, stopped in the second; what takes time on the clock is a step, or a monitor."""
    draw, steps, clock, measured, rates = random.Random(0), [], [0], [], []

    def train_step(net, views, labels, optimizer, *args):
        steps.append((draw.random(), draw.uniform(1, 9)))  # loss and seconds
        rates.append(optimizer.param_groups[0]['lr'])
        clock[0] += steps[-1][1]
        return torch.tensor(steps[-1][0]), 0

    def measures(*names):
        clock[0] += 100
        measured.append({name: draw.random() for name in names})
        return measured[-1]

    for name, value in dict(
            train_step=train_step, time=Namespace(monotonic=lambda: clock[0]),
            label_free=lambda *_: measures('alignment', 'uniformity', 'rankme'),
            knn=lambda *_: measures('test_acc@1', 'test_acc@5').values(),
            encode=lambda net, images, index, size, **_: torch.zeros(len(index), 1)).items():
        monkeypatch.setattr(main, name, value)
    flags = [*tiny, '--epochs', '5', '--schedule', 'cosine', '--warmup', '2', '--lr', '0.3', '--results_dir']
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(SystemExit):
            main.main([*flags, str(tmp_path)])
    main.main([*flags, str(tmp_path)])

    def rate(epochs):
        return 0.3 * (epochs / 2 if epochs < 2 else (1 + math.cos(math.pi * (epochs - 2) / 3)) / 2)

    assert rates == pytest.approx([rate(i / 3) for i in range(15)])
    rows = []
    for epoch in range(6):
        rows.append(dict(epoch=epoch))
        if epoch:
            losses, seconds = zip(*steps[3 * epoch - 3:3 * epoch])
            rows[-1] |= {'train_loss': sum(losses) / 3, 'lr': rate(epoch), 'seconds': sum(seconds),
                         'images/s': 24 / sum(seconds)}
        if epoch in (0, 2, 4, 5):  # every second one, and the last
            rows[-1] |= measured.pop(0) | measured.pop(0)
    found = pd.read_csv(tmp_path / 'log.csv').drop(columns='encoder')
    pd.testing.assert_frame_equal(found, pd.DataFrame(rows), check_like=True, check_dtype=False, rtol=1e-6)


def test_network_trains_in_train_mode_after_the_monitor(tiny, tmp_path, monkeypatch):
    modes, train_step = [], main.train_step
    monkeypatch.setattr(main, 'train_step', lambda net, *args: modes.append(net.training) or train_step(net, *args))
    main.main([*tiny, '--epochs', '2', '--knn_every', '1', '--results_dir', str(tmp_path)])
    assert modes == [True] * 6


def test_state_is_saved_once_a_minute_though_no_encoder_is_kept(tiny, tmp_path, monkeypatch):
    saved, clock = [], iter(range(0, 10**6, 25))
    monkeypatch.setattr(runs.Saver, 'save', lambda self, state, keep=False: saved.append((state['epoch'], keep)))
    monkeypatch.setattr(runs.time, 'monotonic', lambda: next(clock))
    saver = runs.Saver(tmp_path, None, None, None)
    for epoch in range(1, 6):
        saver.epoch_ended(dict(epoch=epoch, log=[]), keep=epoch == 2)
    assert saved == [(2, True), (4, False), (5, False)]  # 25 s an epoch; save() itself would start a new minute
    for seconds in (600, 601):  # within an epoch
        monkeypatch.setattr(runs.time, 'monotonic', lambda seconds=seconds: saver.last + seconds)
        assert saver.due() == (seconds > 600)


@pytest.mark.parametrize('bn', ['eval', 'train'])
def test_probe(finished, capsys, bn, tmp_path):
    checkpoint = finished / 'model_3.pth'
    linear.main(['--model_path', str(checkpoint), '--epochs', '30', '--bn', bn, '--lr', '0.01'])
    last = capsys.readouterr().out.splitlines()[-1]
    name = 'model_3_linear' if bn == 'eval' else 'model_3_linear_bn_train'
    table, log = pd.read_csv(finished / f'{name}.csv'), pd.read_csv(finished / 'log.csv')
    about = json.loads((finished / f'{name}.json').read_text())
    assert about['settings']['lr'] == 0.01 and about['settings']['bn'] == bn and about['versions']
    assert list(table['epoch']) == list(range(1, 31))
    assert list(table) == ['epoch', 'train_loss', 'train_acc@1', 'train_acc@5', 'test_loss', 'test_acc@1', 'test_acc@5']
    untrained = pd.read_csv(finished / f'{name.replace("3", "0")}.csv')
    assert last == (f'kNN {log["test_acc@1"][3]:.2f} %, linear probe {table["test_acc@1"][29]:.2f} % (@5 100.00 %); '
                    f'untrained: kNN {log["test_acc@1"][0]:.2f} %, linear probe {untrained["test_acc@1"][29]:.2f} %; '
                    f'files in {finished}')
    assert table['train_loss'][29] < 0.7 * table['train_loss'][0]
    if bn == 'eval':  # features of the test images are fixed: a probe can be trained on them again to the same end
        linear.main(['--model_path', str(checkpoint), '--epochs', '30', '--lr', '0.01'])
        assert capsys.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize('flags', [[], ['--augment', 'none'], ['--probe', 'logistic'], ['--bn', 'train']], ids=str)
def test_a_probe_leaves_the_encoder_as_it_was(finished, tmp_path, monkeypatch, flags):
    """Its file and all of its tensors; with --bn train, but for BatchNorm's statistics."""
    for name in ('config.json', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path / name)
    nets, before = [], model.read_checkpoint(tmp_path / 'model_3.pth')
    load_model = linear.load_model
    monkeypatch.setattr(linear, 'load_model', lambda *args, **how: nets.append(load_model(*args, **how)) or nets[-1])
    linear.main(['--model_path', str(tmp_path / 'model_3.pth'), '--epochs', '2', *flags])
    moved = {name for name, x in nets[0].state_dict().items() if not torch.equal(x, before[name])}
    assert all('running' in name or 'batches' in name for name in moved) and bool(moved) == ('train' in flags)
    assert (tmp_path / 'model_3.pth').read_bytes() == (finished / 'model_3.pth').read_bytes()


def test_stopped_probe_leaves_the_finished_one(finished, tmp_path, monkeypatch):
    for name in ('config.json', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path / name)
    flags = ['--model_path', str(tmp_path / 'model_3.pth'), '--epochs']
    linear.main([*flags, '1'])
    before = snapshot(tmp_path)

    def end_in_epoch_2(path, data, write=files.write):
        if data.count(b'\n') == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(files, 'write', end_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        linear.main([*flags, '3'])
    assert pd.read_csv(tmp_path / 'model_3_linear.partial.csv')['epoch'].tolist() == [1]
    (tmp_path / 'model_3_linear.partial.csv').unlink()
    assert snapshot(tmp_path) == before


def test_probe_of_a_checkpoint_alone_takes_stl10(finished, tmp_path, capsys):
    shutil.copy(finished / 'model_3.pth', tmp_path)
    with pytest.raises(UserError, match=r'STL10 is not in .*stl10_binary'):
        linear.main(['--model_path', str(tmp_path / 'model_3.pth'), '--root', '/proc/nowhere'])
    assert 'No config.json beside' in capsys.readouterr().out


def test_probe_says_what_is_wrong(tmp_path, finished):
    for path, message in ((tmp_path / 'none.pth', 'no such file'), (finished / 'log.csv', 'log.csv: '),
                          (finished, 'a directory; in .* there is model_0.pth, '), ('.', 'a directory')):
        with pytest.raises(UserError, match=message):
            linear.main(['--model_path', str(path)])


def write_stl10(root, monkeypatch, **counts):
    """Files of STL10's format; only their checksums are the test's own."""
    folder, rng = root / 'stl10_binary', np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in counts.items():
        rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8).tofile(folder / f'{name}_X.bin')
        if name != 'unlabeled':
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f'{name}_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join('abcdefghij'))
    for which in ('train_list', 'test_list'):
        monkeypatch.setattr(STL10, which, [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()]
                                           for name, _ in getattr(STL10, which)])


def test_published_command_lines_run_as_printed(tmp_path, monkeypatch, capsys):
    """DCL's README, HCL's README, and the two of HCL's launch.sh, with a small network in the place of ResNet-50."""
    (tmp_path / 'code').mkdir()
    monkeypatch.chdir(tmp_path / 'code')
    write_stl10(tmp_path / 'code' / 'data', monkeypatch, train=200, test=10, unlabeled=60)
    monkeypatch.setattr(step, 'Model', lambda *args: model.Model(128, 'resnet18', width=0.125))
    monkeypatch.setattr(linear, 'tqdm', lambda epochs, *args, **kwargs: list(epochs)[:1])

    def stop(*args):
        raise runtime.Stopped(signal.SIGTERM)

    for line, objective in (
            ('main.py --tau_plus = 0.1', ('hard', 0.1, 1.0)), ('main.py --tau_plus 0.1 --beta 1.0', ('hard', 0.1, 1.0)),
            ('main.py --dataset_name stl10 --batch_size 256 --estimator hard --tau_plus 0.1 --beta 1.0',
             ('hard', 0.1, 1.0))):
        with monkeypatch.context() as patch:
            patch.setattr(main, 'check_finite', stop)
            if '--beta' in line:
                patch.setattr(main, 'monitor', lambda *_: {})  # once is enough
            with pytest.raises(SystemExit):
                main.main(line.split()[1:])
        assert 'Stopped in epoch 1 after step 1, saved in results' in capsys.readouterr().out
        settings = files.read_json('results/config.json')['settings']
        assert (settings['estimator'], settings['tau_plus'], settings['beta']) == objective
        shutil.copy('results/model_0.pth', 'encoder.pth')
        shutil.rmtree('results')
    for place in ('results', '../results/stl10'):
        (tmp_path / 'code' / place).mkdir(parents=True)
    shutil.copy('encoder.pth', 'results/model_400.pth')
    shutil.copy('encoder.pth', '../results/stl10/stl10_hard_model_256_0.1_1.0_400.pth')
    for line in ('linear.py --model_path results/model_400.pth',
                 'linear.py --dataset_name stl10 --model_path ../results/stl10/stl10_hard_model_256_0.1_1.0_400.pth'):
        linear.main(line.split()[1:])
        assert 'linear probe' in capsys.readouterr().out


def test_stl10_is_trained_on_and_probed_at_96_pixels(tmp_path, monkeypatch, capsys):
    write_stl10(tmp_path, monkeypatch, train=20, test=10, unlabeled=12)
    sizes, encode = [], evaluate.encode

    def spy(net, images, index, size, *args, **kwargs):
        sizes.append((len(index), *images.shape[2:], size))
        return encode(net, images, index, size, *args, **kwargs)

    monkeypatch.setattr(main, 'encode', spy)
    monkeypatch.setattr(linear, 'encode', spy)
    results = tmp_path / 'results'
    main.main(['--root', str(tmp_path), '--arch', 'resnet18', '--width', '0.25', '--batch_size', '16', '--epochs', '1',
               '--k', '20', '--results_dir', str(results)])
    assert json.loads((results / 'config.json').read_text())['images'] == {'train': 32, 'test': 10}
    linear.main(['--model_path', str(results / 'model_1.pth'), '--epochs', '1'])
    # views of half of the images, all of them, memory and test images before and after the epoch, and the test images
    # of the probes of both encoders
    measures = [(16, 96, 96, 32)] * 2 + [(32, 96, 96, 0), (20, 96, 96, 0), (10, 96, 96, 0)]
    assert sizes == measures * 2 + [(10, 96, 96, 0)] * 2
    assert 'linear probe' in capsys.readouterr().out


def test_encode_resizes_with_antialiasing_as_pil_does():
    images = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []

    class Net(torch.nn.Module):
        features = 1

        def f(self, x):
            seen.append(x)
            return x.mean((1, 2, 3), keepdim=True)

    evaluate.encode(Net(), images, torch.arange(4), 16, NO_AUTOCAST, CPU)
    theirs = [np.asarray(Image.fromarray(x.permute(1, 2, 0).numpy()).resize((16, 16), Image.Resampling.BILINEAR))
              for x in images]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    ours = 255 * (seen[0] * std + mean)
    assert (ours - torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2)).abs().max() <= 1


def test_class_without_a_vote_is_no_hit_at_5():
    """Ten classes of separated features; the labels of the queries are never among the neighbours."""
    memory, classes = torch.eye(10).repeat_interleave(5, 0), torch.arange(10).repeat_interleave(5)
    assert evaluate.knn(memory, torch.eye(10), classes, (torch.arange(10) + 1) % 10, 5, 0.5) == [0, 0]
    assert evaluate.knn(memory, torch.eye(10), classes, torch.arange(10), 5, 0.5) == [100, 100]


@pytest.mark.parametrize('bn, encoded', [('eval', 1), ('train', 3)])
def test_test_features_are_computed_again_only_if_statistics_drift(finished, tmp_path, monkeypatch, bn, encoded):
    for name in ('config.json', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path / name)
    found, encode = [], evaluate.encode
    monkeypatch.setattr(linear, 'encode', lambda *args: found.append(encode(*args)) or found[-1])
    linear.main(['--model_path', str(tmp_path / 'model_3.pth'), '--epochs', '12', '--bn', bn, '--batch_size', '29'])
    assert len(found) == encoded  # once, after every tenth epoch and the last; the last batch has one image of 8 pixels
    assert (bn == 'eval') or not torch.equal(found[0], found[-1])
    table = pd.read_csv(next(tmp_path.glob('model_3_*.csv')))
    assert table.index[table['test_acc@1'].notna()].tolist() == (list(range(12)) if bn == 'eval' else [9, 11])


@pytest.mark.parametrize('blur', ['published', 'none'])
def test_the_probes_views_are_blurred_as_the_encoders(finished, tmp_path, monkeypatch, blur):
    shutil.copy(finished / 'model_3.pth', tmp_path)
    config = files.read_json(finished / 'config.json')
    files.write_json(tmp_path / 'config.json', {**config, 'settings': {**config['settings'], 'blur': blur}})
    seen, views = [], linear.DeviceViews
    monkeypatch.setattr(linear, 'DeviceViews', lambda *args, **how: seen.append(how['blur']) or views(*args, **how))
    linear.main(['--model_path', str(tmp_path / 'model_3.pth'), '--epochs', '1'])
    assert seen == [blur == 'published']


@pytest.mark.parametrize('flags, name', [(['--augment', 'none', '--epochs', '200', '--lr', '0.01'], 'linear_cached'),
                                         (['--probe', 'logistic'], 'logistic')])
def test_probe_on_cached_features_classifies_again_from_its_file(finished, tree, tmp_path, flags, name):
    for file in ('config.json', 'model_3.pth'):
        shutil.copy(finished / file, tmp_path / file)
    linear.main(['--model_path', str(tmp_path / 'model_3.pth'), *flags])
    row = pd.read_csv(tmp_path / f'model_3_{name}.csv').iloc[-1]
    probe = model.read_checkpoint(tmp_path / f'model_3_{name}.pth')
    data, net = load_data('folder', tree, 16), model.load_model(tmp_path / 'model_3.pth', head=False)
    assert probe['classes'] == data.classes
    for split in ('train', 'test'):
        images, labels = getattr(data, split), getattr(data, f'{split}_labels')
        features = evaluate.encode(net, images, torch.arange(len(images)), 0, NO_AUTOCAST, CPU)
        output = features @ probe['weight'].T + probe['bias']
        if split == 'test' or name == 'logistic':  # the other counts while it trains
            assert row[f'{split}_acc@1'] == pytest.approx(100 * (output.argmax(1) == labels).float().mean().item())
        if name == 'logistic':
            assert row[f'{split}_loss'] == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-4)
    assert row['train_acc@1'] > 90


@pytest.mark.parametrize('flags', [[], ['--bn', 'train'], ['--augment', 'none']], ids=' '.join)
def test_rows_of_a_probe_are_those_of_what_entered_its_loss(finished, tmp_path, monkeypatch, flags):
    """Of batches of 13, 13 and 4 images and all test images, by hand; seeds and epochs see other views of an image."""
    for name in ('config.json', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path)
    images, labels, calls, seen = torch.randint(256, (50, 3, 16, 16)).byte(), torch.arange(50) * 3 % 8, [], []
    monkeypatch.setattr(linear, 'load_data', lambda *_: Data(images[:30], labels[:30], images[30:], labels[30:],
                                                             list('abcdefgh'), 'digest'))
    views, cross_entropy, one_epoch = linear.features_of_views, F.cross_entropy, linear.one_epoch

    def loss(output, target):
        value = cross_entropy(output, target)
        calls[-1].append((output.detach(), target, value.requires_grad))
        return value

    def epoch(probe, pairs, n, optimizer=None):
        calls.append([])
        assert optimizer is None or {'lr': 0.1, 'weight_decay': 0.3}.items() <= optimizer.defaults.items()
        before, done = probe.weight.clone(), one_epoch(probe, pairs, n, optimizer)
        assert torch.equal(probe.weight, before) == (optimizer is None)
        assert all(grad == (optimizer is not None) for _, _, grad in calls[-1])
        return done

    def features_of_views(net, batches, *args):
        kept = list(batches)
        index = torch.cat([index for _, index in kept])
        seen.append((index, torch.cat([x for (x,), _ in kept])[index.argsort()]))
        return views(net, kept, *args)

    monkeypatch.setattr(F, 'cross_entropy', loss)
    monkeypatch.setattr(linear, 'one_epoch', epoch)
    monkeypatch.setattr(linear, 'features_of_views', features_of_views)
    for seed in '01':
        calls.clear()
        linear.main(['--model_path', str(tmp_path / 'model_3.pth'), '--epochs', '3', '--batch_size', '13', '--lr', '.1',
                     '--weight_decay', '.3', '--seed', seed, *flags])
        rows, found = [], pd.read_csv(next(tmp_path.glob('model_3_*.csv')))
        for numbers in ([len(target) for _, target, _ in call] for call in calls[::2]):
            assert numbers == [13, 13, 4]
        for call in calls:
            output, target = (torch.cat(x) for x in list(zip(*call))[:2])
            rank = (output > output.gather(1, target[:, None])).sum(1)  # how many classes come before
            rows.append([-output.log_softmax(1).gather(1, target[:, None]).mean().item(),
                         *(100 * (rank < k).double().mean().item() for k in (1, 5))])
        if 'train' in flags:
            rows[1:1] = rows[3:3] = [[math.nan] * 3]
        rows = [[i + 1, *rows[2 * i], *rows[2 * i + 1]] for i in range(3)]
        names = ['epoch', *(f'{part}_{what}' for part in ('train', 'test') for what in ('loss', 'acc@1', 'acc@5'))]
        np.testing.assert_allclose(found[names], rows, rtol=1e-5)
    for i, (index, x) in enumerate(seen):
        for other, y in seen[:i]:
            assert not torch.equal(index, other) and (x != y).flatten(1).any(1).float().mean() > 0.9


def test_logistic_probe_is_scikit_learns(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for classes in (2, 3):
        features, labels = torch.randn(60, 5, generator=generator) * 3 + 1, torch.arange(60) % classes
        probe = torch.nn.Linear(5, classes)
        linear.fit_logistic(probe, features, labels)
        theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(features, labels)
        torch.testing.assert_close(probe(features).softmax(1), torch.tensor(theirs.predict_proba(features)).float(),
                                   rtol=1e-3, atol=1e-4)


def test_probe_of_another_data_set_takes_the_encoders_sizes_and_not_this_ones_place(finished, monkeypatch):
    given = {}
    monkeypatch.setattr(linear, 'load_data', lambda name, root, store_size, *rest: given.update(
        name=name, root=root, store_size=store_size) or 1 / 0)
    checkpoint = ['--model_path', str(finished / 'model_3.pth')]
    with pytest.raises(ZeroDivisionError):
        linear.main([*checkpoint, '--dataset_name', 'stl10'])
    assert given == dict(name='stl10', root='data', store_size=16)
    with pytest.raises(ZeroDivisionError):
        linear.main(checkpoint)
    assert given['name'] == 'folder' and given['store_size'] == 16


def test_encoder_of_another_run_is_named(finished, tmp_path):
    for name in ('config.json', 'log.csv', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path / name)
    shutil.copy(finished / 'model_1.pth', tmp_path / 'model_3.pth')
    with pytest.raises(UserError, match=r'model_3.pth is not what the run in .* wrote'):
        linear.main(['--model_path', str(tmp_path / 'model_3.pth')])


EDGES = {f'--{name}': values.split() for name, values in dict(
    temperature='1e-30 1e-3 100', tau_plus='0.9999999999999999 1e-320 -0', beta='1000 1e-320 -0', jitter='2.5 1e-320',
    crop_min='1e-320 1e-9 1', grayscale='1 0', image_size='8 9 64', test_size='1 2 64', store_size='8 33', views='3 16',
    fit='pad squeeze', stem='imagenet', feature_dim='1', hidden_dim='1', batch_size='3 4', lr='1000 1e-30', k='1 3',
    weight_decay='100 1e-320', optimizer='sgd', schedule='cosine', knn_temperature='1e-30 100', precision='bf16 fp16',
    positives='label', estimator='standard debiased easy', micro_batch='2', seed='4294967295', augment='pil').items()}
PROBE_EDGES = {f'--{name}': values.split() for name, values in dict(
    label_fraction='1e-320 0.3', probe='logistic', augment='none', bn='train', batch_size='1 2 999999', lr='1000 1e-30',
    weight_decay='100', precision='fp16 bf16', test_size='1 40', image_size='8 40').items()}


@pytest.mark.slow
@pytest.mark.parametrize('kind, sizes, images', [('one image a class', [(16, 16)], 1), ('black', [(16, 16)], 3),
                                                 ('a pixel wide', [(1, 50), (90, 1)], 2)])
@pytest.mark.filterwarnings('error')
def test_values_at_the_edge_give_numbers_or_one_line(tmp_path, kind, sizes, images, capsys):
    """Random ones together, of runs and probes on the smallest sets."""
    dice, root, done = random.Random(kind), tmp_path / 'set', 0
    for part in 'train', 'test':
        for name in 'ab':
            (root / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = np.random.default_rng(i).integers(256, size=(*dice.choice(sizes), 3), dtype=np.uint8)
                Image.fromarray(pixels * (kind != 'black')).save(root / part / name / f'{i}.png')

    def run(script, words, results):
        existed = results.exists()
        try:
            script.main(words)
            return True
        except UserError as error:
            assert '\n' not in str(error), words
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert stop.code == 2 and len(err.splitlines()) == 1 and results.exists() == existed, (words, err)

    def some(edges):
        chosen = dice.sample(sorted(edges), dice.randint(1, 4))
        return [word for flag in chosen for word in (flag, dice.choice(edges[flag]))]

    for i in range(12):
        results = tmp_path / str(i)
        words = ['--dataset_name', 'folder', '--root', str(root), '--arch', 'resnet18', '--width', '0.125',
                 '--image_size', '8', '--batch_size', '2', '--hidden_dim', '4', '--epochs', '1', '--k', '1',
                 '--workers', '0', '--knn_every', '1', '--results_dir', str(results), *some(EDGES)]
        if run(main, words, results):
            done += 1
            log = pd.read_csv(results / 'log.csv')
            assert np.isfinite(log['train_loss'][1]) and log['test_acc@1'].between(0, 100).all(), words
            run(linear, ['--model_path', str(results / 'model_1.pth'), '--epochs', '1', *some(PROBE_EDGES)], results)
    assert done > 3
