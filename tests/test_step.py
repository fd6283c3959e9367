"""The step: a batch in parts has the whole batch's gradient, fp16 is scaled, compiling may fail, epochs are saved."""

import copy
import math
from argparse import Namespace
from collections import Counter
from functools import partial

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outcome, outcome

from hardneg import evaluate
import main
from hardneg import runs
import step
from hardneg.losses import contrastive_loss
from hardneg.runtime import UserError

CPU, NO_AUTOCAST = torch.device('cpu'), torch.autocast('cpu', enabled=False)
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)
SMALL = ['--arch', 'resnet18', '--width', '0.125', '--feature_dim', '8', '--hidden_dim', '16', '--optimizer', 'sgd']


def built(*flags):
    torch.manual_seed(0)
    net, optimizer, _ = step.build(main.arguments([*SMALL, *flags])[0], CPU)
    return net, optimizer


def in_one_graph(net, views, labels, loss_of, joint, m):
    """The loss of views whose BatchNorm batches are parts of m images, and its gradient, by autograd alone."""
    parts = []
    for part in zip(*(x.split(m) for x in views)):
        parts.append(net(torch.cat(part))[1].chunk(len(views)) if joint else [net(x)[1] for x in part])
    loss = loss_of(*(torch.cat(z) for z in zip(*parts)), labels=labels)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize('V, joint, labels, objective', [
    (2, False, None, dict()), (3, False, None, dict(beta=0, tau_plus=0)), (2, True, None, dict(beta=2.0)),
    (3, True, torch.arange(12) % 4, dict(tau_plus=0)), (2, False, torch.arange(12) % 4, dict(tau_plus=0, beta=0))],
    ids=str)
def test_a_batch_in_parts_has_the_gradient_and_statistics_of_one_graph(V, joint, labels, objective):
    """In float64; statistics after the step are those of the second pass alone, and of all parts as of one batch."""
    net, _ = built('--batch_size', '12', '--micro_batch', '4')
    net.double()
    whole, seen = copy.deepcopy(net), []
    views, loss_of = list(torch.randn(V, 12, 3, 8, 8).double()), partial(contrastive_loss, **objective)
    whole.f[1].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    loss = step.backward_in_parts(net, views, labels, loss_of, NO_AUTOCAST, NO_SCALER, joint, 4).item()
    assert loss == pytest.approx(in_one_graph(whole, views, labels, loss_of, joint, 4).item(), rel=1e-12)
    for (name, p), q in zip(net.named_parameters(), whole.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-12 * q.grad.norm() + 1e-15, name
    for (name, x), y in zip(net.named_buffers(), whole.buffers()):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14, msg=name)
    mean, momentum = torch.zeros(8).double(), 1 - 0.9 ** (1 / 3)  # three parts
    for x in seen:
        mean = (1 - momentum) * mean + momentum * x.mean((0, 2, 3))
    torch.testing.assert_close(net.f[1].running_mean, mean)
    assert len(seen) == net.f[1].num_batches_tracked == 3 * (1 if joint else V)


def test_sync_bn_leaves_no_batchnorm_of_a_rank(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    flags = '--batch_size', '12', '--precision', 'fp32', '--no-compile', '--micro_batch', '4'
    own, synchronised = (
        [m for m in built(*flags, *more)[0].modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
        for more in ([], ['--sync_bn']))
    assert {type(m) for m in synchronised} == {torch.nn.SyncBatchNorm} and len(own) == len(synchronised) > 20
    assert [m.momentum for m in own] == [m.momentum for m in synchronised]


def plain_loss(z1, z2, labels):
    return F.cross_entropy(z1 @ z2.T, torch.arange(len(z1)))  # the objective's torch.func takes no hooks


class Kept:
    """The bytes of tensors that are kept for the backward pass, at most at any time, weights and views not counted."""

    def __init__(self, net, views):
        self.live, self.peak = Counter(), 0
        self.own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *views)}

    def __enter__(self):
        def pack(x):
            return Kept.Tensor(self, x)

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    class Tensor:
        def __init__(self, kept, x):
            self.kept, self.x, storage = kept, x, x.untyped_storage()
            self.key = (storage.data_ptr(), storage.nbytes())
            if self.key[0] not in kept.own:
                kept.live[self.key] += 1
                kept.peak = max(kept.peak, sum(nbytes for _, nbytes in kept.live))

        def __del__(self):
            self.kept.live[self.key] -= 1
            if self.kept.live[self.key] <= 0:
                del self.kept.live[self.key]


def test_a_step_in_parts_keeps_what_a_step_of_one_part_keeps():
    """And z, its gradient, and the byte views."""
    def peak(B, *flags, micro_batch=None):
        net, optimizer = built('--batch_size', str(B), *flags)
        views = list(torch.randint(256, (2, B, 3, 16, 16), dtype=torch.uint8))
        with Kept(net, views) as kept:
            step.train_step(net, views, None, optimizer, plain_loss, NO_AUTOCAST, NO_SCALER, False, micro_batch)
        return kept.peak, 2 * sum(x.nbytes for x in torch.empty(2, B, 8)) + sum(x.nbytes for x in views)

    part, _ = peak(8)
    whole, _ = peak(64)
    parts, others = peak(64, '--micro_batch', '8', micro_batch=8)
    assert parts <= part + others < whole / 3


@pytest.mark.parametrize('free, line', [
    (1.0, ''), (1e-3, 'fits'), (1e-9, 'lower --image_size, or choose a smaller --arch')])
def test_memory_that_a_step_lacks_is_told_with_the_parts_that_fit(monkeypatch, capsys, free, line):
    args, _ = main.arguments([*SMALL, '--batch_size', '256', '--image_size', '16', '--precision', 'fp32'])
    each = step.kept_bytes(args)
    net, optimizer = built('--batch_size', '8')
    views = list(torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8))
    with Kept(net, views) as kept:
        step.train_step(net, views, None, optimizer, plain_loss, NO_AUTOCAST, NO_SCALER)
    assert each == pytest.approx(kept.peak / 16, rel=0.02)  # counted without memory, and as it is
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda device: (free * 1e9, 1e9))
    if line == 'fits':
        monkeypatch.setattr('torch.cuda.mem_get_info', lambda device: (33 * each / 0.9, 1e9))
        line = f'A step keeps {512 * each / 1e9:.1f} GB, and {33 * each / 1e9:.1f} GB are free: --micro_batch 32 fits\n'
    step.check_memory(args, Namespace(type='cuda'))
    said = capsys.readouterr().out
    assert said.endswith(line + '\n' * (line[:5] == 'lower')) and bool(said) == bool(line)


def trained(tiny, results, *flags):
    main.main([*tiny, '--epochs', '1', *flags, '--results_dir', str(results)])
    return torch.load(results / 'last.pth', weights_only=True)


def test_steps_whose_gradients_overflow_are_skipped_and_counted(tiny, tmp_path, monkeypatch, capsys):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(scaler, init_scale=16.0))
    state = trained(tiny, tmp_path / 'a', '--precision', 'fp16')
    assert state['skipped'] == 0 and state['scaler']['scale'] == 16 and state['scaler']['_growth_tracker'] == 3
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(scaler, init_scale=2.0**120))
    state = trained(tiny, tmp_path / 'b', '--precision', 'fp16')
    before = torch.load(tmp_path / 'b' / 'model_0.pth', weights_only=True)
    assert state['skipped'] == 3 and state['scaler']['scale'] == 2.0**117
    assert all(torch.equal(x, before[name]) for name, x in state['model'].items()
               if 'running' not in name and 'tracked' not in name)
    assert 'Finished. 3 steps were skipped, as fp16 overflowed.' in capsys.readouterr().out
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(scaler, init_scale=1e-7))
    with pytest.raises(UserError, match='gradients overflow fp16 at any scale in epoch 1: use --precision fp32'):
        trained(tiny, tmp_path / 'c', '--precision', 'fp16')


def test_momentum_is_nothing_after_a_first_step_that_was_skipped():
    net, optimizer = built('--batch_size', '8')
    for p in net.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler, before = torch.amp.GradScaler('cpu'), copy.deepcopy(net.state_dict())
    scaler.scale(torch.zeros(()))
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what it leaves uninitialised with NaN
    scaler.step(optimizer)
    torch.use_deterministic_algorithms(False)
    assert optimizer.skipped == 1 and all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all((optimizer.state[p]['momentum_buffer'] == 0).all() for p in net.parameters())


@pytest.fixture(scope='module')
def whole(tiny, tmp_path_factory):
    """A run of two epochs of three steps."""
    results = tmp_path_factory.mktemp('step') / 'whole'
    main.main([*tiny, '--epochs', '2', '--results_dir', str(results)])
    return outcome(results)


@pytest.mark.parametrize('broken', ['network', 'views'])
def test_what_cannot_be_compiled_trains_eagerly_to_the_same_bits(tiny, whole, tmp_path, monkeypatch, capsys, broken):
    """Though the network was tried, which moves its buffers."""
    def compile(function, **_):
        def run(*args, **kwargs):
            made = function(*args, **kwargs)
            if isinstance(function, torch.nn.Module) == (broken == 'network'):
                raise RuntimeError('no\nC compiler')
            return made
        return run

    monkeypatch.setattr(torch, 'compile', compile)
    main.main([*tiny, '--epochs', '2', '--compile', '--results_dir', str(tmp_path)])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('Not compiled')]
    assert len(said) == 1 and said[0].startswith('Not compiled, which is slower: RuntimeError: no C compiler. On ')
    assert_same_outcome(tmp_path, whole)


def test_state_is_saved_within_an_epoch_when_it_is_due(tiny, whole, tmp_path, monkeypatch):
    train_step, calls = main.train_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 6:
            raise SystemError('killed')
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(main, 'train_step', killed)
        patch.setattr(runs.Saver, 'due', lambda self: len(calls) == 4)
        with pytest.raises(SystemError):
            main.main([*tiny, '--epochs', '2', '--results_dir', str(tmp_path)])
    state = torch.load(tmp_path / 'last.pth', weights_only=True)
    assert (state['epoch'], state['step'], len(state['losses'])) == (1, 1, 1)
    main.main([*tiny, '--epochs', '2', '--results_dir', str(tmp_path)])
    assert_same_outcome(tmp_path, whole)


def test_without_a_monitor_the_log_has_no_measures(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(main, 'monitor', lambda *_: 1 / 0)
    state = trained(tiny, tmp_path, '--knn_every', '0')
    log = pd.read_csv(tmp_path / 'log.csv')
    assert log['epoch'].tolist() == [0, 1] and log.loc[0].drop(['epoch', 'encoder']).isna().all()
    assert log[['test_acc@1', 'alignment', 'rankme']].isna().all(axis=None) and log['train_loss'].notna().sum() == 1
    assert (tmp_path / 'model_0.pth').exists() and state['epoch'] == 1


def test_a_block_goes_through_the_network_in_slices_of_so_many_pixels(monkeypatch):
    net, _ = built()
    images, seen = torch.randint(256, (10, 3, 24, 24), dtype=torch.uint8), []
    net.f.register_forward_pre_hook(lambda _, x: seen.append(tuple(x[0].shape)))

    def encoded():
        return [evaluate.encode(net, images, torch.arange(10), size, NO_AUTOCAST, CPU, block=8, view=view)
                for size, view in ((0, None), (12, None), (12, 1))]

    whole, monkeypatched = encoded(), monkeypatch.setattr(evaluate, 'PIXELS', 3 * 24**2)
    assert monkeypatched is None and [shape[0] for shape in seen] == [8, 2] * 3
    seen.clear()
    for x, y in zip(encoded(), whole):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert [shape[0] for shape in seen] == [3, 3, 2, 2] + [8, 2] * 2 and math.prod(seen[0]) == 3 * 3 * 24**2
