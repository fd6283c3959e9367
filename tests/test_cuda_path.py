"""The CUDA path without a GPU: no operation mixes places, and the host does not wait for the device at every step."""

import inspect
import os
import sys
import textwrap
from collections import Counter

import pytest
import torch
from pretend import CUDA, Generator, Operations, Pretend, Stream, key

from hardneg import augment
from hardneg import batches
import linear
from hardneg import losses
import main
import model
from hardneg import runs
from hardneg import runtime
from data import Data, Joined


@pytest.fixture
def waits_of(monkeypatch):
    """waits_of(function, fits) -> the waits of function() where there is a device, on which images fit or not."""
    def waits_of(function, fits=True):
        pretend = Pretend()
        for where, name, value in [
                (torch, 'Generator', Generator), (torch, 'autocast', pretend.autocast),
                (torch.cuda, 'Stream', lambda device: Stream(pretend)), (torch.cuda, 'stream', pretend.stream),
                (torch.cuda, 'current_stream', lambda device=None: pretend.current),
                (torch.Tensor, 'record_stream', lambda x, stream: pretend.places[key(x)].used.add(stream)),
                (runs, 'device_name', str), (main, 'check_memory', lambda *_: None),
                (runtime, 'start', lambda: CUDA), (runtime, 'fits', lambda *_: fits),
                (runtime, 'default_precision', lambda: 'bf16')]:
            monkeypatch.setattr(where, name, value)
        with pretend, Operations(pretend):
            function()
        return pretend.waits

    monkeypatch.setitem(losses.SIDE, 'cuda', 16)  # several tiles
    monkeypatch.setitem(model.ARCHS, 'resnet18', (model.BasicBlock, (1, 1, 1, 1)))
    images, labels = torch.randint(256, (64, 3, 12, 12), dtype=torch.uint8), torch.arange(64) % 4
    for module in main, linear:
        monkeypatch.setattr(module, 'load_data', lambda *_: Data(
            Joined([images[:20], images[20:48]]), labels[:48], images[48:], labels[48:], list('abcd'), 'digest'))
    return waits_of


def train(results, batch_size, *flags):
    main.main(['--arch', 'resnet18', '--width', '0.125', '--image_size', '8', '--test_size', '8', '--k', '5',
               '--epochs', '1', '--batch_size', str(batch_size),
               '--results_dir', str(results / str(batch_size)), *flags])


@pytest.mark.parametrize('fits, flags', [(True, ['--oracle']), (False, ['--views', '3', '--anneal', 'down']),
                                         (False, ['--positives', 'label', '--joint_views']),
                                         (True, ['--micro_batch', '2'])], ids=str)
def test_waits_do_not_grow_with_the_steps(waits_of, monkeypatch, tmp_path, fits, flags):
    """Train, stop after 20 of 24 steps or at the end of 3, of one part or of eight, continue, monitor, probe."""
    def stop(self, due=False):
        if sys._getframe(1).f_code.co_name == 'train_epoch' and next(stops, False):
            raise runtime.Stopped(15)

    def job(n):
        with pytest.raises(SystemExit):
            train(tmp_path, n, *flags)
        train(tmp_path, n, *flags)
        linear.main(['--model_path', str(tmp_path / str(n) / 'model_1.pth'), '--epochs', '1', '--bn', 'train',
                     '--batch_size', str(4 * n)])

    monkeypatch.setattr(runtime.Signals, 'check', stop)
    waits = []
    for n in (2, 16):
        stops = iter([True])
        waits.append(waits_of(lambda n=n: job(n), fits))
    look = 'copy from cuda to cpu', "losses = state['losses'][:state['step']].cpu()"
    assert [waiting.pop(look) for waiting in waits] == [2, 1]  # after 20 steps, and at the end
    assert waits[0] == waits[1] and len(waits[0]) > 5


@pytest.mark.parametrize('nth', range(1, 4))
def test_a_save_that_fails_in_the_background_ends_the_run_and_keeps_the_former(waits_of, monkeypatch, tmp_path, nth):
    """The nth of three, as the disk is full: the next save tells, or the end."""
    replace, states = os.replace, iter(range(1, 4))

    def full(part, path):
        if path.name == 'last.pth' and next(states) == nth:
            raise OSError(28, 'No space left on device')
        replace(part, path)

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(runtime.UserError, match='cannot write .*last.pth .No space left on device.; what was saved'):
        waits_of(lambda: train(tmp_path, 16, '--epochs', '2', '--save_every', '1'))
    left = {path.name for path in (tmp_path / '16').iterdir()} - {'.lock', 'config.json'}
    whole = {*(f'model_{epoch}.pth' for epoch in range(nth)), *(['last.pth', 'log.csv'] if nth > 1 else [])}
    assert left == whole
    if nth > 1:
        state = runs.verified(model.read_checkpoint(tmp_path / '16' / 'last.pth'), 'last.pth')
        log = runs.read_table(tmp_path / '16' / 'log.csv', runs.LOG)
        assert state['epoch'] == nth - 2 and log['epoch'].tolist() == [*range(nth - 1)]


def test_images_in_host_memory_give_the_views_of_resident_ones(waits_of):
    def compare():
        images = torch.randint(256, (50, 3, 12, 12), dtype=torch.uint8)
        both = [batches.DeviceViews(x, batches.Batches(50, 16, drop_last=False), 8, CUDA, resident).epoch(1)
                for x, resident in ((images, True), (Joined([images[:9], images[9:]]), False))]
        for (views, index), (others, same) in zip(*both, strict=True):
            assert index.is_cuda and torch.equal(index, same) and all(map(torch.equal, views, others))
    waits_of(compare)


def test_collectives_of_two_ranks_see_the_device(waits_of, monkeypatch, tmp_path):
    """One of two ranks trains; the tensors of the other are always like its own."""
    seen = Counter()

    def all_reduce(x, op=None, group=None):
        seen[x.device.type, x.dtype] += 1

    def gather(whole, x, group=None):
        seen[whole.device.type, whole.dtype] += 1
        whole.copy_(torch.cat([x, x]))

    for name, value in dict(is_initialized=lambda: True, get_world_size=lambda group=None: 2,
                            get_rank=lambda group=None: 0, all_reduce=all_reduce, all_gather_single=gather,
                            all_gather_into_tensor=gather, broadcast_object_list=lambda objects: None).items():
        monkeypatch.setattr(torch.distributed, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: sys._getframe(1).f_code.co_name == 'check')  # of signals
    monkeypatch.setattr(runtime, 'distributed', lambda net, device: net)
    waits = [waits_of(lambda n=n: train(tmp_path, n, '--oracle')) for n in (4, 16)]
    assert waits[0] == waits[1] and {place for place, _ in seen} == {'cuda'}
    assert {dtype for _, dtype in seen} == {torch.float32, torch.int64}  # features and losses; labels and signals


FAULTS = [
    (main, 'train_epoch', '= loss\n', '= loss.item()\n'),
    (main, 'train_epoch', '% look_every', '% 1'),
    (main, 'train_epoch', 'labels[index]', 'labels[index.cpu()]'),
    (main, 'train_step', 'scaler.scale(loss).backward()', 'loss.backward() if loss.isfinite() else None'),
    (main, 'train_step', '(*z,', '(*(x[x.isfinite().all(1)] for x in z),'),
    (main, 'main', 'data.train_labels.to(device) if', 'data.train_labels if'),
    (main, 'encode', '.to(images.device)).to(device)', '.to(images.device))'),
    (losses, '_classes', ', device=labels.device', ''),
    (augment, 'resize_weights', 'torch.arange(size, device=start.device)', 'torch.arange(size)'),
    (augment, 'gaussian_blur', 'r, h, w =', 'if not sigma.any(): return x\n    r, h, w ='),
    (augment, 'luma', 'return ', 'torch.tensor(LUMA, device=x.device); return '),
    (augment, 'uniforms', 'device=generator.device', "device='cpu'"),
    (batches.DeviceViews, 'epoch', 'epoch, step, device=self.device', 'epoch, step'),
    (batches.DeviceViews, 'fetch', ', pin_memory=True', ''),
    (batches.DeviceViews, 'arrived', 'current.wait_stream(self.stream)', 'pass'),
    (batches.DeviceViews, 'fetch', 'pinned =', "pinned = self.kept = self.kept if hasattr(self, 'kept') else"),
    (batches.DeviceViews, 'arrived', 'current.wait_stream(self.stream)', 'self.stream.wait_stream(current)'),
    (batches.DeviceViews, 'arrived', 'current.wait_stream(self.stream)', 'current.wait_stream(current)'),
    (batches.DeviceViews, 'arrived', 'x.record_stream(current)', 'pass'),
    (batches.DeviceViews, 'arrived', 'x.record_stream(current)', 'x.record_stream(self.stream)'),
    (runtime, 'autocast', 'device.type,', "'cpu',"),
    (runs.Saver, 'write', 'copied.synchronize()', 'pass'),
    (runs.Saver, 'save', 'torch.cuda.current_stream().record', "torch.cuda.Stream('cuda').record"),
    (runs.Saver, 'save', 'self.writing =',
     "whole['model'] = {name: host(x) for name, x in self.net.state_dict().items()}; self.writing =")]


@pytest.mark.parametrize('where, name, good, bad', FAULTS, ids=[f'{name}: {bad}' for _, name, _, bad in FAULTS])
def test_faults_are_noticed(waits_of, monkeypatch, tmp_path, where, name, good, bad):
    function = getattr(where, name)
    module, source, faulty = sys.modules[function.__module__], textwrap.dedent(inspect.getsource(function)), {}
    assert good in source
    code = '\n' * (function.__code__.co_firstlineno - 1) + source.replace(good, bad, 1)
    exec(compile(code, module.__file__, 'exec'), vars(module), faulty)
    monkeypatch.setattr(where, name, faulty[name])
    fits, flags = (False, []) if name in ('fetch', 'arrived', 'encode') else (True, ['--oracle'])
    try:
        waits = [waits_of(lambda n=n: train(tmp_path, n, *flags), fits) for n in (16, 24)]
    except (RuntimeError, runtime.UserError) as error:
        assert any(text in str(error) for text in (
            'tensors on CUDA', 'generator on', 'a copy used', 'used anew', 'convolution.default: in', 'not finite'))
    else:
        assert waits[0] != waits[1]
