"""A CUDA device that is not there: tensors in host memory of which some pretend to be on it.

What a GPU would refuse, tensors of two places in one operation, raises. What would make the host wait for the device,
copies from memory that is not pinned included, is counted by line.
"""

import linecache
import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch
from conftest import HOME
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T, aten, CPU, CUDA = torch.Tensor, torch.ops.aten, torch.device('cpu'), torch.device('cuda', 0)
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def tensors(*values):
    return [y for x in values for y in (tensors(*x) if isinstance(x, (list, tuple)) else [x]) if isinstance(y, T)]


def key(x):
    return x.untyped_storage()._cdata


class Pretend(TorchFunctionMode):
    """torch with a device: each tensor has a place, cpu, pinned or cuda. It is the stream beside the first one, too."""

    def __init__(self):
        super().__init__()
        self.waits, self.places, self.made = Counter(), {}, 'cpu'
        self.flying, self.waited, self.late, self.aside = set(), set(), [], False

    def place(self, x):
        return self.places.get(key(x), ['cpu'])[0]

    def put(self, x, place):
        self.places[key(x)] = place, StorageWeakRef(x.untyped_storage())  # the reference keeps the key from reuse
        return x

    def wait(self, what):
        frame = sys._getframe()
        while frame.f_back and Path(frame.f_code.co_filename).parent != HOME:
            frame = frame.f_back
        self.waits[what, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()] += 1

    def move(self, x, device, dtype=None, non_blocking=False, copy=False, memory_format=torch.preserve_format):
        y, before = x.to(dtype or x.dtype, memory_format=memory_format), self.place(x)
        after = device.type if device else before
        if 'cuda' not in (before, after) or before == after:
            return y.clone() if copy else y
        if not non_blocking or before == 'cpu':
            self.wait(f'copy from {before} to {after}')
        y = self.put(y.clone(), after)
        if self.aside:
            self.flying.add(key(y))
        if non_blocking and after == 'cpu':  # nothing is there before an event after it
            self.late.append((y, y.clone()))
            y.fill_(math.nan if y.is_floating_point() else 0)
        return y

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, '__name__', '')
        if func in (T.device.__get__, T.is_cuda.__get__):
            there = self.place(args[0]) == 'cuda'
            return there if func == T.is_cuda.__get__ else CUDA if there else CPU
        if func in (T.to, T.cpu):
            copy = kwargs.pop('copy', False)
            device, dtype, non_blocking, form = torch._C._nn._parse_to(*args[1:] or [CPU] * (func is T.cpu), **kwargs)
            return self.move(args[0], device, dtype, non_blocking, copy, form or torch.preserve_format)
        if func is T.pin_memory or kwargs.pop('pin_memory', False):
            return self.put(args[0].clone() if func is T.pin_memory else func(*args, **kwargs), 'pinned')
        if func in (T.tolist, T.numpy) and self.place(args[0]) == 'cuda':
            self.wait(name)
        device, generator = torch.device(kwargs.get('device') or 'cpu'), kwargs.get('generator')
        if generator and generator.device.type != device.type:
            raise RuntimeError(f'{name}: generator on {generator.device}, tensor on {device}')
        if kwargs.get('device') is None:
            return func(*args, **kwargs)
        self.made = device.type
        if name in ('tensor', 'as_tensor') and device.type == 'cuda':
            self.wait(name)
        out, self.made = self.put(func(*args, **{**kwargs, 'device': CPU}), device.type), 'cpu'
        return out

    @contextmanager
    def stream(self, _):
        self.aside = True
        yield
        self.aside = False

    def record_event(self):
        return self

    def synchronize(self):
        for x, values in self.late:
            x.copy_(values)

    def wait_stream(self, _):
        self.waited |= self.flying

    def record(self, x, _):
        self.flying -= {key(x)} & self.waited


class Operations(TorchDispatchMode):
    """Every operation, backward too, has its tensors in one place, and puts its results there."""

    def __init__(self, pretend):
        super().__init__()
        self.pretend = pretend

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunction():
            found = tensors(args, *(kwargs or {}).values())
            known = [key(x) for x in found]
            place, out = self.check(func, found, known, args), func(*args, **(kwargs or {}))
            for x in tensors(out):
                if key(x) not in known:
                    self.pretend.put(x, place)
            return out

    def check(self, func, found, known, args):
        pretend, name = self.pretend, func.overloadpacket
        places = [pretend.places.get(k, ['cpu'])[0] for k in known]
        if not pretend.aside and not pretend.flying.isdisjoint(known):
            raise RuntimeError(f'{func}: a copy used before its stream was waited for and the tensor recorded')
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
