"""Training in one process: the step, the monitor, what is written, and what is refused."""

import copy
import hashlib
import json
import math
import random
import shutil
import signal
import threading
from argparse import Namespace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_outcome, outcome, stop_after
from torchvision.datasets import STL10

import linear
import main
import model
from hardneg import files, runs, runtime
from hardneg.augment import MEAN, STD
from hardneg.evaluate import Evaluator
from hardneg.files import read_checkpoint, read_json, write_json
from hardneg.losses import contrastive_loss
from hardneg.runtime import UsageError, UserError
from utils import load_data

NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A finished run of 3 epochs."""
    results = tmp_path_factory.mktemp('runs') / 'finished'
    main.main([*tiny, '--epochs', '3', '--results_dir', str(results)])
    return results


def train(flags, results):
    main.main([*flags, '--results_dir', str(results)])


def refuses(flags, results, message):
    with pytest.raises(UserError, match=message):
        train(flags, results)


def contents(directory):
    """The bytes of every file, by name, without locks."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != '.lock'}


def keep_network(monkeypatch):
    """A list that will hold the network of the next run."""
    kept = []
    build_network = main.build_network

    def build(args, init=None):
        kept.append(build_network(args, init))
        return kept[-1]

    monkeypatch.setattr(main, 'build_network', build)
    return kept


def spy_on_loss(monkeypatch, act):
    """Let act(call, views, options) see every call of the loss, counted from 1."""
    calls = []

    def spy(*views, **options):
        calls.append(1)
        act(len(calls), views, options)
        return contrastive_loss(*views, **options)

    monkeypatch.setattr(main, 'contrastive_loss', spy)


# The step


def equations(z1, z2, t, tau_plus, beta):
    """HCL, eq. 4, on the whole matrix of exponentials."""
    B = len(z1)
    z = torch.cat([z1, z2])
    others = ~torch.eye(B, dtype=torch.bool).repeat(2, 2)
    neg = (z @ z.T / t).exp()[others].view(2 * B, -1)  # -> (2B, 2B - 2)
    pos = ((z1 * z2).sum(1) / t).exp().repeat(2)
    N = 2 * B - 2
    R = N * (neg ** (1 + beta)).sum(1) / (neg**beta).sum(1)
    Ng = ((R - tau_plus * N * pos) / (1 - tau_plus)).clamp(min=N * math.exp(-1 / t))
    return -(pos / (pos + Ng)).log().mean()


def normalized(views):
    """uint8 views in float64, normalised as published."""
    mean = torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)  # (3,) -> (3, 1, 1)
    std = torch.tensor(STD, dtype=torch.float64).view(3, 1, 1)
    return (views.double() / 255 - mean) / std


def test_training_is_the_plain_loop(tiny, tmp_path, monkeypatch):
    """Twelve steps of main.py in float64 are those of HCL's equations and plain Adam.

    Views go through the network one after the other.
    """
    plain, losses, seen = [], [], []
    build_network = main.build_network

    def build(args, init=None):
        net = build_network(args, init).double()
        plain.append(copy.deepcopy(net))
        return net

    monkeypatch.setattr(main, 'build_network', build)
    epoch = main.DeviceViews.epoch

    def views(self, *args):
        for x, index in epoch(self, *args):
            seen.append(x)
            yield x, index

    monkeypatch.setattr(main.DeviceViews, 'epoch', views)

    def loss(*z, **objective):
        losses.append(contrastive_loss(*z, **objective))
        return losses[-1]

    monkeypatch.setattr(main, 'contrastive_loss', loss)
    monkeypatch.setattr(model, 'standardize', lambda x, mean, std: normalized(x))
    train([*tiny, '--epochs', '4', '--knn_every', '0'], tmp_path)
    (net,) = plain
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-6, foreach=False)
    assert len(seen) == 12
    for (x1, x2), found in zip(seen, losses):
        z1 = net(normalized(x1))[1]
        z2 = net(normalized(x2))[1]
        expected = equations(z1, z2, 0.5, 0.1, 1.0)
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()


@pytest.mark.parametrize(
    'flags, expected', [([], [8, 8, 8, 8]), (['--joint_views'], [16, 16])], ids=str
)
def test_joint_views_share_one_batchnorm_batch(tiny, tmp_path, monkeypatch, flags, expected):
    """BatchNorm's batches in the second and third step."""
    nets = keep_network(monkeypatch)
    sizes = []

    def act(call, views, options):
        if call == 1:
            nets[0].f[1].register_forward_pre_hook(lambda bn, x: sizes.append(len(x[0])))

    spy_on_loss(monkeypatch, act)
    train([*tiny, '--epochs', '1', '--knn_every', '0', *flags], tmp_path)
    assert sizes == expected


@pytest.mark.parametrize(
    'flags, expected',
    [
        ([], dict(temperature=0.5, tau_plus=0.1, beta=1.0)),
        (
            ['--temperature', '0.2', '--tau_plus', '0.05', '--beta', '2'],
            dict(temperature=0.2, tau_plus=0.05, beta=2.0),
        ),
        (['--oracle'], dict(temperature=0.5, tau_plus=0, beta=0)),
        (['--anneal', 'down', '--epochs', '2'], dict(temperature=0.5, tau_plus=0.1, beta=0.0)),
        (['--views', '3'], dict(temperature=0.5, tau_plus=0.1, beta=1.0)),
    ],
    ids=str,
)
def test_flags_reach_the_loss(tiny, tmp_path, flags, expected, monkeypatch):
    given = []
    spy_on_loss(monkeypatch, lambda call, views, options: given.append((views, options)))
    train([*tiny, '--epochs', '1', '--feature_dim', '16', *flags], tmp_path)
    views, options = given[-1]
    labels = options.pop('labels', None)
    assert options == expected
    assert (labels is not None) == ('--oracle' in flags)
    number = 3 if '--views' in flags else 2
    assert [z.shape for z in views] == [(8, 16)] * number


@pytest.mark.parametrize(
    'flags, kind, expected',
    [
        (['--lr', '0.02', '--weight_decay', '0.3'], torch.optim.Adam, (0.02, 0.3, None)),
        (['--optimizer', 'sgd', '--lr', '0.06'], torch.optim.SGD, (0.06, 1e-6, 0.9)),
    ],
)
def test_flags_reach_the_optimizer(flags, kind, expected):
    args, _, _ = main.arguments([*flags, '--arch', 'resnet18', '--width', '0.25'])
    optimizer = main.build_optimizer(args, main.build_network(args))
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind
    assert (group['lr'], group['weight_decay'], group.get('momentum')) == expected
    assert not group.get('nesterov')


@pytest.mark.parametrize(
    'flags',
    [
        ['--estimator', 'standard'],
        ['--estimator', 'debiased', '--views', '3'],
        ['--oracle'],
        ['--joint_views'],
        ['--precision', 'bf16'],
        ['--micro_batch', '4'],
        ['--temperature', '0.05', '--feature_dim', '16'],
    ],
    ids=' '.join,
)
def test_every_objective_trains_and_differs(finished, tiny, tmp_path, flags):
    train([*tiny, '--epochs', '1', *flags], tmp_path)
    loss = pd.read_csv(tmp_path / 'log.csv')['train_loss'][1]
    assert math.isfinite(loss)
    assert loss != pd.read_csv(finished / 'log.csv')['train_loss'][1]


def test_the_oracle_is_given_the_labels_of_the_batch(tiny, tree, tmp_path, monkeypatch):
    indices, given = [], []
    epoch = main.DeviceViews.epoch

    def views(self, *args):
        for x, index in epoch(self, *args):
            indices.append(index)
            yield x, index

    monkeypatch.setattr(main.DeviceViews, 'epoch', views)
    spy_on_loss(monkeypatch, lambda call, views, options: given.append(options['labels']))
    train([*tiny, '--epochs', '1', '--oracle'], tmp_path)
    labels = load_data('folder', tree, store_size=16).train_labels
    assert torch.equal(torch.cat(given), labels[torch.cat(indices)])


@pytest.mark.parametrize('augment, name', [('device', 'DeviceViews'), ('pil', 'ReferenceViews')])
def test_positives_by_label_and_the_recipe_reach_the_views(
    tiny, tmp_path, monkeypatch, augment, name
):
    given = []
    Views = getattr(main, name)

    def spy(images, batches, size, device, recipe, last):
        given.append((len(images), batches.labels.tolist(), recipe))
        return Views(images, batches, size, device, recipe, last)

    monkeypatch.setattr(main, name, spy)
    flags = (
        f'--positives label --augment {augment} --workers 0 --blur none --crop_min 0.3 '
        '--jitter 0.5 --grayscale 0.1 --horizontal_flip 0 --vertical_flip'
    )
    train([*tiny, '--epochs', '1', *flags.split()], tmp_path)
    expected = dict(blur=False, crop_min=0.3, jitter=0.5, grayscale=0.1)
    expected |= dict(horizontal_flip=0, vertical_flip=0.5)
    assert given == [(30, [0] * 10 + [1] * 10 + [2] * 10, expected)]


def test_the_network_trains_in_train_mode_after_the_monitor(tiny, tmp_path, monkeypatch):
    nets, modes = keep_network(monkeypatch), []
    spy_on_loss(monkeypatch, lambda call, views, options: modes.append(nets[0].training))
    train([*tiny, '--epochs', '2', '--knn_every', '1'], tmp_path)
    assert modes == [True] * 6


# What a run writes


def test_files_of_a_run(finished):
    assert set(contents(finished)) == {
        'config.json',
        'last.pth',
        'log.csv',
        'model_0.pth',
        'model_1.pth',
        'model_2.pth',
        'model_3.pth',
    }
    log = pd.read_csv(finished / 'log.csv')
    assert tuple(log) == runs.LOG
    assert list(log['epoch']) == [0, 1, 2, 3]
    assert log['train_loss'].isna().tolist() == [True, False, False, False]
    # untrained, every second epoch, the last
    assert log['test_acc@1'].isna().tolist() == [False, True, False, False]
    config = json.loads((finished / 'config.json').read_text())
    assert config['settings']['beta'] == 1.0
    assert config['classes'] == ['a', 'b', 'c']
    assert config['images'] == {'train': 30, 'test': 9}
    assert config['versions']['torch'] == torch.__version__
    kept = read_checkpoint(finished / 'model_3.pth')
    last = model.load_model(finished / 'last.pth').state_dict()
    assert kept.keys() == last.keys()
    for name, x in last.items():
        assert torch.equal(x, kept[name])


def test_rows_of_the_log_are_those_of_the_numbers_that_were_measured(tiny, tmp_path, monkeypatch):
    """Of 5 epochs of 3 steps, stopped in the second. Only steps and measures take time."""
    dice = random.Random(0)
    clock, steps, measured, rates, optimizers = [0], [], [], [], []
    build_optimizer = main.build_optimizer

    def build(args, net):
        optimizers.append(build_optimizer(args, net))
        return optimizers[-1]

    def loss(z1, z2, **objective):
        value, seconds = dice.random(), dice.uniform(1, 9)
        steps.append((value, seconds))
        rates.append(optimizers[-1].param_groups[0]['lr'])
        clock[0] += seconds
        return 0 * z1.sum() + value

    def measures(names):
        clock[0] += 100
        measured.append({name: dice.random() for name in names})
        return measured[-1]

    def knn(*_):
        return measures(['test_acc@1', 'test_acc@5']).values()

    monkeypatch.setattr(main, 'build_optimizer', build)
    monkeypatch.setattr(main, 'contrastive_loss', loss)
    monkeypatch.setattr(main, 'time', Namespace(monotonic=lambda: clock[0]))
    label_free = ['alignment', 'uniformity', 'rankme']
    monkeypatch.setattr(main, 'label_free', lambda *_: measures(label_free))
    monkeypatch.setattr(main, 'knn', knn)
    monkeypatch.setattr(Evaluator, 'features', lambda self, images, index, size: torch.zeros(1, 1))
    flags = [*tiny, '--epochs', '5', '--schedule', 'cosine', '--warmup', '2', '--lr', '0.3']
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(SystemExit):
            train(flags, tmp_path)
    train(flags, tmp_path)

    def rate(epochs):
        if epochs < 2:
            return 0.3 * epochs / 2
        return 0.3 * (1 + math.cos(math.pi * (epochs - 2) / 3)) / 2

    assert rates == pytest.approx([rate(i / 3) for i in range(15)])
    rows = []
    for epoch in range(6):
        row = dict(epoch=epoch)
        if epoch:
            losses, seconds = zip(*steps[3 * epoch - 3 : 3 * epoch])
            row['train_loss'] = sum(losses) / 3
            row['lr'] = rate(epoch)
            row['seconds'] = sum(seconds)
            row['images/s'] = 24 / sum(seconds)
        if epoch in (0, 2, 4, 5):  # every second one, and the last
            row |= measured.pop(0) | measured.pop(0)
        rows.append(row)
    found = pd.read_csv(tmp_path / 'log.csv')
    expected = pd.DataFrame(rows)
    pd.testing.assert_frame_equal(found, expected, check_like=True, check_dtype=False, rtol=1e-6)


def test_without_a_monitor_the_log_has_no_measures(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(main, 'monitor', lambda *_: 1 / 0)
    train([*tiny, '--epochs', '1', '--knn_every', '0'], tmp_path)
    log = pd.read_csv(tmp_path / 'log.csv')
    assert log['epoch'].tolist() == [0, 1]
    assert log.loc[0].drop('epoch').isna().all()
    assert log[['test_acc@1', 'alignment', 'rankme']].isna().all(axis=None)
    assert log['train_loss'].notna().sum() == 1
    assert (tmp_path / 'model_0.pth').exists()


def test_a_state_is_saved_once_a_minute_though_no_encoder_is_kept(tmp_path, monkeypatch):
    """Epochs take 25 s here; save() itself would start a new minute."""
    saved, clock = [], iter(range(0, 10**6, 25))

    def save(self, progress, keep=False):
        saved.append((progress.epoch, keep))

    monkeypatch.setattr(runs.Saver, 'save', save)
    monkeypatch.setattr(runs.time, 'monotonic', lambda: next(clock))
    saver = runs.Saver(tmp_path, {}, None, None, None, resumed=True)
    for epoch in range(1, 6):
        saver.epoch_ended(runs.Progress(None, epoch), keep=epoch == 2)
    assert saved == [(2, True), (4, False), (5, False)]


@pytest.mark.parametrize('seconds, due', [(599, False), (601, True)])
def test_a_state_is_due_after_ten_minutes(tmp_path, monkeypatch, seconds, due):
    monkeypatch.setattr(runs.time, 'monotonic', lambda: 0.0)
    saver = runs.Saver(tmp_path, {}, None, None, None, resumed=True)
    first = runs.Saver(tmp_path, {}, None, None, None)
    assert first.due()  # there is no state yet
    monkeypatch.setattr(runs.time, 'monotonic', lambda: seconds)
    assert saver.due() == due


def test_a_state_that_is_due_is_saved_within_an_epoch(finished, tiny, tmp_path, monkeypatch):
    """The run is killed at its sixth step, two steps after a state was due."""
    calls = []

    def act(call, views, options):
        calls.append(call)
        if call == 6:
            raise SystemError('killed')

    with monkeypatch.context() as patch:
        spy_on_loss(patch, act)
        patch.setattr(runs.Saver, 'due', lambda self: len(calls) == 4)
        with pytest.raises(SystemError):
            train([*tiny, '--epochs', '3'], tmp_path)
    state = read_checkpoint(tmp_path / 'last.pth')
    assert (state['epoch'], state['step'], len(state['losses'])) == (1, 1, 1)
    train([*tiny, '--epochs', '3'], tmp_path)
    assert_same_outcome(tmp_path, outcome(finished))


# The same run, and others


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(finished, tiny, tmp_path):
    train([*tiny, '--epochs', '3'], tmp_path / 'again')
    assert_same_outcome(tmp_path / 'again', outcome(finished))
    train([*tiny, '--epochs', '1', '--seed', '1'], tmp_path / 'other')
    log, _ = outcome(tmp_path / 'other')
    expected, _ = outcome(finished)
    assert log['train_loss'][1] != expected['train_loss'][1]


@pytest.mark.parametrize('augment', ['device', 'pil'])
def test_stopped_anywhere_it_resumes_to_the_same_bits(tiny, tmp_path, augment, monkeypatch, capsys):
    """Stopped while the untrained encoder is measured, and after steps 1, 3 and 5 of 6.

    After step 3, the last of the epoch, its kNN is not measured yet.
    """
    flags = [*tiny, '--epochs', '2', '--save_every', '2', '--augment', augment, '--workers', '0']
    train(flags, tmp_path / 'whole')
    check, calls = runtime.Signals.check, []

    def check_and_stop(self, due=False):
        calls.append(1)
        if len(calls) in (2, 8, 10, 12):  # five are of the untrained encoder's measures
            raise runtime.Stopped(signal.SIGTERM)
        return check(self)

    monkeypatch.setattr(runtime.Signals, 'check', check_and_stop)
    before = [signal.getsignal(signum) for signum in runtime.STOP_SIGNALS]
    for step in (0, 1, 3, 2):
        with pytest.raises(SystemExit) as stop:
            train(flags, tmp_path / 'parts')
        assert stop.value.code == 143
        told = f'after step {step}, saved' if step else 'before the first step'
        assert told in capsys.readouterr().out
    train(flags, tmp_path / 'parts')
    assert [signal.getsignal(signum) for signum in runtime.STOP_SIGNALS] == before
    assert_same_outcome(tmp_path / 'parts', outcome(tmp_path / 'whole'))


def test_a_thread_trains_to_the_same_bits(finished, tiny, tmp_path, capsys):
    flags = [*tiny, '--epochs', '3', '--results_dir', str(tmp_path)]
    thread = threading.Thread(target=main.main, args=[flags])
    thread.start()
    thread.join()
    assert 'Not in the main thread' in capsys.readouterr().out
    assert_same_outcome(tmp_path, outcome(finished))


def test_a_run_that_goes_on_under_changed_code_says_so(tiny, tmp_path, monkeypatch, capsys):
    flags = [*tiny, '--epochs', '1', '--results_dir', str(tmp_path)]
    main.main(flags)
    changed = 'the code has changed since this run began'
    for code, told in ((None, False), (runs.code_digest(), False), ('other', True)):
        config = read_json(tmp_path / 'config.json')
        config['code'] = code
        if code is None:
            del config['code']
        write_json(tmp_path / 'config.json', config)
        capsys.readouterr()
        main.main(flags)
        assert (changed in capsys.readouterr().out) == told


@pytest.mark.parametrize(
    'flags',
    [
        '--optimizer sgd --schedule cosine --warmup 1 --lr 0.05',
        '--positives label --views 3 --micro_batch 4',
        '--precision fp16 --optimizer sgd',
        '--anneal down --oracle --beta 1',
    ],
)
def test_variants_resume_to_the_same_bits(tiny, tmp_path, flags, monkeypatch):
    # With this scale some steps of fp16 overflow.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**16, growth_interval=2)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    flags = [*tiny, '--epochs', '2', '--hidden_dim', '24', *flags.split()]
    train(flags, tmp_path / 'whole')
    with monkeypatch.context() as patch:
        stop_after(9, patch)  # in the second epoch
        with pytest.raises(SystemExit):
            train(flags, tmp_path / 'parts')
    train(flags, tmp_path / 'parts')
    assert_same_outcome(tmp_path / 'parts', outcome(tmp_path / 'whole'))


def test_a_finished_run_says_so_and_other_settings_are_refused(finished, tiny, capsys):
    flags = [*tiny, '--epochs', '3']
    before = contents(finished)
    train([*flags, '--workers', '1'], finished)
    assert 'holds this run, finished: loss' in capsys.readouterr().out
    message = r'other settings \(--lr 0.001 there, 0.01 here; --beta 1.0 there'
    refuses([*flags, '--beta', '2', '--lr', '0.01'], finished, message)
    (finished / 'log.csv').unlink()
    train(flags, finished)
    assert contents(finished) == before


def test_a_run_on_other_data_is_refused(finished, tiny, tree, tmp_path):
    shutil.copytree(tree, tmp_path / 'tree')
    (tmp_path / 'tree' / 'test' / 'a' / '0.png').unlink()
    flags = [*tiny, '--root', str(tmp_path / 'tree'), '--epochs', '3']
    before = contents(finished)
    refuses(flags, finished, r'a run on other data \(30 training and 9 test images there, .*--init')
    assert contents(finished) == before


@pytest.mark.parametrize(
    'damage, message',
    [
        (
            lambda r: (r / 'last.pth').write_bytes((r / 'last.pth').read_bytes()[:-100]),
            r'last.pth: damaged .* continued; beside it is last.pth, log.csv, model_1.pth',
        ),
        (
            lambda r: torch.save({'a': torch.zeros(1)}, r / 'last.pth'),
            'last.pth is not the state of a run. The run cannot be continued',
        ),
        (lambda r: torch.save(torch.tensor(1), r / 'last.pth'), 'is not the state of a run'),
        (lambda r: (r / 'last.pth').unlink(), 'holds log.csv, model_1.pth but no last.pth'),
        (lambda r: [p.unlink() for p in r.glob('*.pth')], 'holds log.csv but no last.pth'),
        (lambda r: (r / 'config.json').unlink(), 'but no config.json'),
        (lambda r: (r / 'config.json').write_text('{'), 'config.json is damaged'),
        (lambda r: (r / 'config.json').write_text('[1]'), 'config.json is damaged'),
    ],
)
def test_no_run_starts_over_what_it_cannot_continue(finished, tiny, tmp_path, damage, message):
    for name in ('config.json', 'log.csv', 'last.pth', 'model_1.pth'):
        shutil.copy(finished / name, tmp_path / name)
    damage(tmp_path)
    before = contents(tmp_path)
    refuses([*tiny, '--epochs', '3'], tmp_path, message)
    assert contents(tmp_path) == before


def test_a_state_whose_tensors_do_not_fit_is_refused(finished, tiny, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    state = read_checkpoint(tmp_path / 'run' / 'last.pth')
    state['model']['g.3.bias'] = torch.zeros(3)
    torch.save(state, tmp_path / 'run' / 'last.pth')
    before = contents(tmp_path / 'run')
    message = r'last.pth does not fit this run \(.*g.3.bias'
    refuses([*tiny, '--epochs', '3'], tmp_path / 'run', message)
    assert contents(tmp_path / 'run') == before


def test_a_run_killed_before_its_first_state_begins_anew(finished, tiny, tmp_path):
    for name in ('config.json', 'model_0.pth'):
        shutil.copy(finished / name, tmp_path)
    train([*tiny, '--epochs', '3'], tmp_path)
    assert_same_outcome(tmp_path, outcome(finished))


# What is not finite, and what does not fit


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_state(
    tiny, tmp_path, monkeypatch
):
    calls = []

    def loss(*views, **options):
        calls.append(1)
        value = contrastive_loss(*views, **options)
        if len(calls) == 5:
            return value * math.nan
        return value

    monkeypatch.setattr(main, 'contrastive_loss', loss)
    message = r'loss is nan at epoch 2, step 2; the last good state is untouched.* --lr too high'
    refuses([*tiny, '--epochs', '3'], tmp_path, message)
    assert read_checkpoint(tmp_path / 'last.pth')['epoch'] == 1


def test_the_first_loss_that_is_not_finite_is_told():
    losses = torch.tensor([1, math.inf, 2, math.nan])
    with pytest.raises(UserError, match='loss is inf at epoch 3, step 2;'):
        main.check_finite(losses, NO_SCALER, 3)


def test_features_that_overflow_have_no_knn_accuracy(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, 'encode', overflowing(Evaluator.encode))
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path)])
    log = pd.read_csv(tmp_path / 'log.csv')
    assert log['epoch'].tolist() == [0, 1]
    assert log[['test_acc@1', 'test_acc@5', 'rankme']].isna().all(axis=None)


def overflowing(encode):
    def encoded(self, images, size):
        features = encode(self, images, size)
        features[0] = math.inf
        return features

    return encoded


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, monkeypatch):
    nets = keep_network(monkeypatch)

    def act(call, views, options):
        if call == 6:  # the last step of the second epoch
            nets[0].g[3].bias.data.fill_(math.nan)

    spy_on_loss(monkeypatch, act)
    refuses([*tiny, '--epochs', '3'], tmp_path, 'weights are not finite after epoch 2')
    assert read_checkpoint(tmp_path / 'last.pth')['epoch'] == 1
    assert not (tmp_path / 'model_2.pth').exists()


def test_steps_whose_gradients_overflow_fp16_are_skipped(tiny, tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    flags = [*tiny, '--epochs', '1', '--precision', 'fp16']
    for scale, expected in ((16.0, 16.0), (2.0**120, 2.0**117)):
        monkeypatch.setattr(torch.amp, 'GradScaler', partial(scaler, init_scale=scale))
        results = tmp_path / str(scale)
        train(flags, results)
        state = read_checkpoint(results / 'last.pth')
        before = read_checkpoint(results / 'model_0.pth')
        assert state['scaler']['scale'] == expected
        same = all(
            torch.equal(x, before[name]) for name, x in state['model'].items() if 'f.0' in name
        )
        assert same == (scale > 16)
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(scaler, init_scale=1e-7))
    message = 'gradients overflow fp16 at any scale in epoch 1: use --precision fp32'
    refuses(flags, tmp_path / 'c', message)


def test_a_first_step_that_overflows_fp16_leaves_sgd_as_it_was(tmp_path, tiny, monkeypatch):
    """torch fills memory that it leaves uninitialised with NaN here, so that it is seen."""
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(torch.amp.GradScaler, init_scale=2.0**120))
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        train([*tiny, '--epochs', '1', '--precision', 'fp16', '--optimizer', 'sgd'], tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    state = read_checkpoint(tmp_path / 'last.pth')
    assert state['scaler']['scale'] == 2.0**117
    for moments in state['optimizer']['state'].values():
        assert moments['momentum_buffer'] is None or moments['momentum_buffer'].isfinite().all()


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--batch_size', '31'], 'larger than the data set, 30 images'),
        (['--k', '30'], 'larger than the kNN memory, 29 images'),
        (['--stem', 'imagenet'], '--stem imagenet needs views of more than 16 px, not 8'),
    ],
)
def test_flags_that_do_not_fit_the_data(tiny, tmp_path, flags, message, monkeypatch):
    load = main.load

    def one_without_label(*args):
        data = load(*args)
        data.train_labels[7] = -1
        return data

    monkeypatch.setattr(main, 'load', one_without_label)
    with pytest.raises(UsageError, match=message):
        train([*tiny, *flags], tmp_path / 'new')
    assert not (tmp_path / 'new').exists()


def test_a_run_without_knn_needs_no_k(tiny, tmp_path):
    train([*tiny, '--epochs', '1', '--k', '1000', '--knn_every', '0'], tmp_path)
    assert (tmp_path / 'model_1.pth').exists()


@pytest.mark.parametrize('free, such_as', [(1e12, None), (1e3, ' such as 8'), (None, None)])
def test_a_step_that_exceeds_the_memory_of_a_cpu_is_told(
    tiny, tmp_path, monkeypatch, capsys, free, such_as
):
    monkeypatch.setattr(runtime, 'free_memory', lambda: free)
    train([*tiny, '--epochs', '1'], tmp_path)
    said = capsys.readouterr().out
    assert ('A step keeps' in said) == (such_as is not None)
    if such_as:
        assert f'choose a --micro_batch{such_as}, or --arch resnet18' in said


@pytest.mark.parametrize(
    'flags, advice',
    [
        ([], ' such as 8,'),  # one view at a time
        (['--joint_views'], ' such as 4,'),
        (['--micro_batch', '8'], ' such as 4,'),
        (['--micro_batch', '2'], ','),
    ],
)
def test_a_full_memory_names_the_next_smaller_part(tiny, tmp_path, monkeypatch, flags, advice):
    def full(*views, **options):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(main, 'contrastive_loss', full)
    message = rf'error: .*memory is full \(CUDA out of memory\): choose a --micro_batch{advice}'
    with pytest.raises(SystemExit, match=message):  # on every rank, not on the first alone
        train([*tiny, '--epochs', '1', *flags], tmp_path)


def test_a_memory_that_kNN_fills_is_told_as_such(tiny, tmp_path, monkeypatch):
    """A smaller --micro_batch would not help."""

    def full(*_):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    monkeypatch.setattr(main, 'knn', full)
    message = r'as kNN compares 30 images \(CUDA out of memory\): .*--knn_every 0'
    with pytest.raises(SystemExit, match=message):
        train([*tiny, '--epochs', '1'], tmp_path)


# STL10 and the published commands


def write_stl10(root, monkeypatch, **counts):
    """Files of STL10's format; only their checksums are the test's own."""
    folder = root / 'stl10_binary'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        images = rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8)
        images.tofile(folder / f'{name}_X.bin')
        if name != 'unlabeled':
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f'{name}_y.bin')
    (folder / 'class_names.txt').write_text('\n'.join('abcdefghij'))
    for which in ('train_list', 'test_list'):
        checksums = []
        for name, _ in getattr(STL10, which):
            checksums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
        monkeypatch.setattr(STL10, which, checksums)


def test_published_command_lines_run_as_printed(tmp_path, monkeypatch, capsys):
    """DCL's README, HCL's README, and the two of HCL's launch.sh, with a small network."""
    (tmp_path / 'code' / 'results').mkdir(parents=True)
    (tmp_path / 'results' / 'stl10').mkdir(parents=True)
    monkeypatch.chdir(tmp_path / 'code')
    write_stl10(tmp_path / 'code' / 'data', monkeypatch, train=200, test=10, unlabeled=60)
    # With 4 channels instead of 8, torch's 1x1 convolution of stride 2 crashes on some CPUs.
    monkeypatch.setattr(main, 'network', lambda args: model.Model(128, 'resnet18', width=1 / 8))
    monkeypatch.setattr(linear, 'tqdm', lambda epochs, *args, **kwargs: list(epochs)[:1])

    def stop(*args):
        raise runtime.Stopped(signal.SIGTERM)

    hcl = 'main.py --dataset_name stl10 --batch_size 256 --estimator hard --tau_plus 0.1 --beta 1.0'
    lines = ['main.py --tau_plus = 0.1', 'main.py --tau_plus 0.1 --beta 1.0', hcl]
    for line in lines:
        with monkeypatch.context() as patch:
            patch.setattr(main, 'check_finite', stop)
            if line != hcl:  # once is enough
                patch.setattr(main, 'monitor', lambda *_: {})
            with pytest.raises(SystemExit):
                main.main(line.split()[1:])
        said = capsys.readouterr().out
        assert 'Stopped in epoch 1 after step 1, saved in results' in said
        settings = files.read_json('results/config.json')['settings']
        objective = settings['estimator'], settings['tau_plus'], settings['beta']
        assert objective == ('hard', 0.1, 1.0)
        shutil.copy('results/model_0.pth', 'encoder.pth')
        shutil.rmtree('results')
    (tmp_path / 'code' / 'results').mkdir()
    theirs = '../results/stl10/stl10_hard_model_256_0.1_1.0_400.pth'
    for path in ('results/model_400.pth', theirs):
        shutil.copy('encoder.pth', path)
    for line in (
        'linear.py --model_path results/model_400.pth',
        f'linear.py --dataset_name stl10 --model_path {theirs}',
    ):
        linear.main(line.split()[1:])
        assert 'linear probe' in capsys.readouterr().out


def test_stl10_is_trained_on_and_probed_at_96_pixels(tmp_path, monkeypatch):
    write_stl10(tmp_path, monkeypatch, train=20, test=10, unlabeled=12)
    seen = []
    features, embeddings = Evaluator.features, Evaluator.embeddings

    def spy_features(self, images, index, size):
        seen.append((len(index), *images.shape[2:], size))
        return features(self, images, index, size)

    def spy_embeddings(self, images, index, size, view, recipe):
        seen.append((len(index), *images.shape[2:], size))
        return embeddings(self, images, index, size, view, recipe)

    monkeypatch.setattr(Evaluator, 'features', spy_features)
    monkeypatch.setattr(Evaluator, 'embeddings', spy_embeddings)
    flags = f'--root {tmp_path} --arch resnet18 --width 0.25 --batch_size 16 --epochs 1 --k 20'
    results = tmp_path / 'results'
    train(flags.split(), results)
    config = json.loads((results / 'config.json').read_text())
    assert config['images'] == {'train': 32, 'test': 10}
    linear.main(['--model_path', str(results / 'model_1.pth'), '--epochs', '1'])
    two_views_of_half = [(16, 96, 96, 32)] * 2
    all_images_memory_and_test = [(32, 96, 96, 0), (20, 96, 96, 0), (10, 96, 96, 0)]
    monitored = two_views_of_half + all_images_memory_and_test
    probed = [(10, 96, 96, 0)] * 2  # the trained and the untrained encoder
    assert seen == monitored * 2 + probed
