"""The CUDA path without a GPU: tensors in host memory of which some pretend to be on a device.

What a GPU would refuse, tensors of two places in one operation, raises. What would make the host wait for the device,
copies from memory that is not pinned included, is counted by line, and must not grow with the number of steps.
"""

import inspect
import linecache
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import HOME
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import evaluate
import linear
import losses
import main
import model
import runs
import runtime
from data import Data

T, aten, CUDA = torch.Tensor, torch.ops.aten, torch.device('cuda', 0)
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
MODULES = augment, evaluate, linear, losses, main, model, runs, runtime


def tensors(*values):
    return [y for x in values for y in (tensors(*x) if isinstance(x, (list, tuple)) else [x]) if isinstance(y, T)]


def key(x):
    return x.untyped_storage()._cdata


class Pretend(TorchFunctionMode):
    """torch as it were with a CUDA device, whose waits are counted: (what, file, line)."""

    def __init__(self):
        super().__init__()
        self.waits, self.places, self.flying, self.side, self.made = Counter(), {}, set(), False, 'cpu'

    def place(self, x):
        return self.places.get(key(x), ['cpu'])[0]

    def put(self, x, place):
        self.places[key(x)] = place, StorageWeakRef(x.untyped_storage())  # the reference keeps the key from reuse
        return x

    def wait(self, what):
        frame = sys._getframe()
        while frame and Path(frame.f_code.co_filename).parent != HOME:
            frame = frame.f_back
        file = frame.f_code.co_filename
        self.waits[what, Path(file).name, linecache.getline(file, frame.f_lineno).strip()] += 1

    def move(self, x, device, dtype=None, non_blocking=False, memory_format=None):
        y, before = x.to(dtype or x.dtype, memory_format=memory_format or torch.preserve_format), self.place(x)
        after = device.type if device else before
        if before == after or 'cuda' not in (before, after):
            return y
        if (before, non_blocking) != ('pinned', True):
            self.wait(f'copy from {before} to {after}')
        y = self.put(y.clone(), after)
        self.flying |= {key(y)} if self.side else set()
        return y

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == T.device.__get__:
            return CUDA if self.place(args[0]) == 'cuda' else torch.device('cpu')
        if func == T.is_cuda.__get__:
            return self.place(args[0]) == 'cuda'
        if func is T.to:
            kwargs.pop('copy', None)
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[1:], **kwargs)
            return self.move(args[0], device, dtype, non_blocking, memory_format=memory_format)
        if func is T.cpu:
            return self.move(args[0], torch.device('cpu'))
        if func is T.pin_memory:
            return self.put(args[0].clone(), 'pinned')
        if func in (T.tolist, T.numpy) and self.place(args[0]) == 'cuda':
            self.wait(func.__name__)
        device, generator = kwargs.get('device'), kwargs.get('generator')
        if generator and generator.device.type != torch.device(device or 'cpu').type:
            raise RuntimeError(f'{func.__name__}: a generator on {generator.device} for {device}')
        if device is None:
            return func(*args, **kwargs)
        self.made = torch.device(device).type
        if func in (torch.tensor, torch.as_tensor) and self.made == 'cuda':
            self.wait(func.__name__)
        out = func(*args, **{**kwargs, 'device': 'cpu'})
        out = self.put(out, self.made) if isinstance(out, T) else out  # torch.tensor's is known to no operation
        self.made = 'cpu'
        return out


class Operations(TorchDispatchMode):
    """Every operation, backward too, has its tensors in one place, and puts its results there."""

    def __init__(self, pretend):
        super().__init__()
        self.pretend = pretend

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            found = tensors(args, *(kwargs or {}).values())
            place = self.check(func, found, args)
            out, known = func(*args, **(kwargs or {})), {key(x) for x in found}
            for x in tensors(out):
                if key(x) not in known:
                    self.pretend.put(x, place)
            return out

    def check(self, func, found, args):
        pretend, name, places = self.pretend, func.overloadpacket, [self.pretend.place(x) for x in found]
        if not pretend.side and any(key(x) in pretend.flying for x in found):
            raise RuntimeError(f'{func}: a copy is used before its stream was waited for and the tensor recorded')
        if 'cuda' not in places:
            return 'cpu' if found else pretend.made
        if name is aten.copy_:
            if places[0] != places[1]:
                pretend.wait(f'copy from {places[1]} to {places[0]}')
            return places[0]
        index = {id(x) for x in tensors(args[1])} if name in INDEXING else set()
        for x, place in zip(found, places):
            if id(x) in index:
                if place != 'cuda' or x.dtype == torch.bool:
                    pretend.wait(f'index by {place} {x.dtype}')
            elif place != 'cuda' and (x.ndim or func._schema.is_mutable and x is args[0]):
                raise RuntimeError(f'{func}: tensors on CUDA and on the CPU')
        if name in READS:
            pretend.wait(str(name))
        return 'cuda'


class Generator(torch.Generator):
    device = property(lambda self: self.pretended)

    def __new__(cls, device='cpu'):
        self = super().__new__(cls)
        self.pretended = torch.device(device)
        return self


class Stream:
    def __init__(self, pretend):
        self.pretend, self.waited = pretend, set()

    def __enter__(self):
        self.pretend.side = True

    def __exit__(self, *_):
        self.pretend.side = False

    def wait_stream(self, other):
        self.waited |= self.pretend.flying


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """start(function) -> the waits of function(), in which a device seems to be there; `fits`, whether images do."""
    def start(function, fits=True, world=1):
        pretend = Pretend()
        stream = Stream(pretend)
        for where, name, value in [
                (torch, 'Generator', Generator), (torch.cuda, 'Stream', lambda device: stream),
                (torch.cuda, 'stream', lambda stream: stream), (torch.cuda, 'current_stream', lambda device: stream),
                (T, 'record_stream', lambda x, stream: pretend.flying.difference_update({key(x)} & stream.waited)),
                (runtime, 'start', lambda: CUDA), (runtime, 'fits', lambda *_: fits), (runs, 'device_name', str)]:
            monkeypatch.setattr(where, name, value)
        for module in MODULES:
            monkeypatch.setattr(module, 'WORLD', world, raising=False)
        with pretend, Operations(pretend):
            function()
        return pretend.waits
    monkeypatch.setitem(losses.SIDE, 'cuda', 16)  # several tiles
    monkeypatch.setitem(model.ARCHS, 'resnet18', (model.BasicBlock, (1, 1, 1, 1)))
    random, labels = augment.seeded(0), torch.arange(64) % 4
    images = torch.randint(256, (64, 3, 12, 12), dtype=torch.uint8, generator=random)
    for module in main, linear:
        monkeypatch.setattr(module, 'load_data', lambda *_: Data(images[:48], labels[:48], images[48:], labels[48:],
                                                                 list('abcd')))
    return start


def train(results, batch_size, *flags):
    main.main(['--arch', 'resnet18', '--width', '0.125', '--image_size', '8', '--test_size', '8', '--k', '5',
               '--epochs', '1', '--batch_size', str(batch_size), '--results_dir', str(results), *flags])


CASES = {'labels, images on the device': (True, ['--oracle']), 'three views, images in host memory': (False, [
    '--views', '3']), 'positives by label, joint': (False, ['--positives', 'label', '--joint_views', '--anneal', 'down'])}
LOOK = 'copy from cuda to cpu', 'main.py', "losses = state['losses'][:state['step']].cpu()"


@pytest.mark.parametrize('fits, flags', CASES.values(), ids=CASES)
def test_waits_do_not_grow_with_the_steps(pretend, monkeypatch, tmp_path, fits, flags):
    """Train, stop in the middle of an epoch of 24 steps or at the end of one of 3, resume, monitor, probe."""
    waits = []
    for batch_size in (2, 16):
        stops = iter([True])

        def stop(self, stops=stops):
            if sys._getframe(1).f_code.co_name == 'train_epoch' and next(stops, False):
                raise runtime.Stopped(15)

        def job(results=tmp_path / str(batch_size), batch_size=batch_size):
            with pytest.raises(SystemExit):
                train(results, batch_size, *flags)
            train(results, batch_size, *flags)
            linear.main(['--model_path', str(results / 'model_1.pth'), '--epochs', '1', '--batch_size', str(batch_size),
                         '--bn', 'train'])

        monkeypatch.setattr(runtime.Signals, 'check', stop)
        waits.append(pretend(job, fits))
    assert waits[0].pop(LOOK) == 2 and waits[1].pop(LOOK) == 1  # after 20 of 24 steps, and at the end
    assert waits[0] == waits[1] and len(waits[0]) > 5


FAULTS = [
    (main, 'train_epoch', "= loss\n", "= loss.item()\n"),
    (main, 'train_epoch', '% look_every', '% 1'),
    (main, 'train_epoch', 'labels[index]', 'labels[index.cpu()]'),
    (main, 'train_epoch', "state['losses'][state['step']] = loss", "state['losses'][state['step'], None] = loss.cpu()"),
    (main, 'train_step', 'return loss.detach()', 'return loss.detach().cpu()'),
    (main, 'train_step', 'loss.backward()', 'loss.backward() if loss.isfinite() else None'),
    (main, 'train_step', 'loss = objective(*z,', 'loss = objective(*(x[x.isfinite().all(1)] for x in z),'),
    (main, 'main', 'data.train_labels.to(device) if', 'data.train_labels if'),
    (main, 'build', 'net.to(device, ', 'net.to('),
    (main, 'monitor', 'data.test_labels.to(device)', 'data.test_labels'),
    (evaluate, 'encode', '.to(images.device)).to(device)', '.to(images.device))'),
    (losses._ContrastiveLoss, 'forward', 'torch.eye(V, dtype=torch.bool, device=x.device)', 'torch.eye(V).bool()'),
    (losses, '_anchors', 'N.clamp(min=1)', 'N.clamp(min=N.min().item())'),
    (augment, 'resize_weights', 'torch.arange(size, device=start.device)', 'torch.arange(size)'),
    (augment, 'gaussian_blur', 'r, h, w =', 'if not sigma.any(): return x\n    r, h, w ='),
    (augment, 'luma', 'return ', "return x.new_tensor(LUMA).view(3, 1, 1).mul(x).sum(1, True) if x.is_cuda else "),
    (augment, 'luma', 'return ', 'torch.tensor(LUMA, device=x.device); return '),
    (augment.DeviceViews, 'epoch', 'epoch, step, device=self.device', 'epoch, step'),
    (augment.DeviceViews, 'epoch', ".to(self.device if self.resident else 'cpu')", ''),
    (augment.DeviceViews, 'fetch', 'images.pin_memory()', 'images'),
    (augment.DeviceViews, 'arrived', 'current.wait_stream(self.stream)', 'pass'),
    (augment.DeviceViews, 'arrived', 'x.record_stream(current)', 'pass')]


@pytest.mark.parametrize('where, name, good, bad', FAULTS, ids=[f'{name}: {bad}' for _, name, _, bad in FAULTS])
def test_faults_are_noticed(pretend, monkeypatch, tmp_path, where, name, good, bad):
    function = getattr(where, name)
    module, source = sys.modules[function.__module__], textwrap.dedent(inspect.getsource(function))
    assert good in source
    place = {}
    code = '\n' * (function.__code__.co_firstlineno - 1) + source.replace(good, bad, 1)
    exec(compile(code, module.__file__, 'exec'), vars(module), place)
    monkeypatch.setattr(where, name, place[name])
    fits, flags = (False, []) if name in ('fetch', 'arrived', 'encode') else (True, ['--oracle'])
    try:
        waits = [pretend(lambda n=n: train(tmp_path / str(n), n, *flags), fits) for n in (16, 24)]
    except RuntimeError as error:
        assert 'tensors on CUDA' in str(error) or 'generator on' in str(error) or 'a copy is used' in str(error)
    else:
        assert waits[0] != waits[1]


def test_collectives_of_two_ranks_see_the_device(pretend, monkeypatch, tmp_path):
    """Training on one of two ranks, each tensor of the other being the same as its own."""
    seen = Counter()

    def all_reduce(x, op=None):
        seen[x.device.type, x.dtype] += 1

    def gather(whole, x):
        seen[whole.device.type, whole.dtype] += whole.device == x.device
        whole.copy_(torch.cat([x, x]))

    for name, value in dict(is_initialized=lambda: True, get_world_size=lambda: 2, get_rank=lambda: 0, all_gather_single=
                            gather, all_reduce=all_reduce, broadcast_object_list=lambda objects: None).items():
        monkeypatch.setattr(torch.distributed, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: sys._getframe(1).f_code.co_name == 'check')
    monkeypatch.setattr(main, 'distributed', lambda net, device: net)
    waits = [pretend(lambda n=n: train(tmp_path / str(n), n, '--oracle'), world=2) for n in (4, 16)]
    assert waits[0] == waits[1] and {device for device, _ in seen} == {'cuda'}
    assert {dtype for _, dtype in seen} == {torch.float32, torch.int64}  # features, losses; labels, signals
