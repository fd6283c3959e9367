"""A CUDA device that is not there: tensors in host memory of which some pretend to be on it.

What a GPU would refuse, tensors of two places in one operation, raises. What would make the host wait for the device,
copies from memory that is not pinned included, is counted by line. Copies come late: on the device in the order of
streams and events alone, in host memory with an event behind them for which the host has waited.
"""

import linecache
import math
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from conftest import HOME
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

T, aten, CPU, CUDA = torch.Tensor, torch.ops.aten, torch.device('cpu'), torch.device('cuda', 0)
autocast = torch.autocast
READS = {aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def tensors(*values):
    return [y for x in values for y in (tensors(*x) if isinstance(x, (list, tuple)) else [x]) if isinstance(y, T)]


def key(x):
    return x.untyped_storage()._cdata


class Stream:
    """How many operations it was given, and how many of which streams come before its next one."""

    def __init__(self, pretend):
        self.pretend, self.given, self.after = pretend, 0, Counter()

    def record_event(self):
        return Event(self.pretend, self.after | Counter({self: self.given}))

    def wait_event(self, event):
        self.after |= event.after

    def wait_stream(self, other):
        self.wait_event(other.record_event())


class Event(namedtuple('Event', 'pretend after')):
    def synchronize(self):
        for place in self.pretend.late:
            self.pretend.complete(self.after, place)
        for k, (stream, number) in list(self.pretend.sources.items()):
            if number <= self.after[stream]:
                del self.pretend.sources[k]


Place = namedtuple('Place', 'name reference stream number used')  # the reference keeps the storage's key from reuse
HOST = Place('cpu', *[None] * 4)


class Pretend(TorchFunctionMode):
    """torch with a device: each tensor has a place, cpu, pinned or cuda. Convolutions on it are in its dtype."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.waits, self.places, self.made, self.dtype = Counter(), {}, 'cpu', dtype
        self.current = Stream(self)
        self.late = {'cpu': {}, 'cuda': {}}  # by place and number: copies that were begun, stream, number and values
        self.sources = {}  # by key: pinned memory that a copy may still read

    def place(self, x):
        return self.places.get(key(x), HOST).name

    def put(self, x, place):
        stream = self.current
        self.places[key(x)] = Place(place, StorageWeakRef(x.untyped_storage()), stream, stream.given, {stream})
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
        self.current.given += 1
        y, values = self.put(y.clone(), after), y if before == 'pinned' else y.clone()
        if non_blocking:
            copy = self.current, self.current.given
            y.fill_(math.nan if y.is_floating_point() else 0)
            self.late[after][len(self.places), key(y)] = *copy, y, values
            if before == 'pinned':
                self.sources[key(x)] = copy
        return y

    def complete(self, after, place):
        """Make the copies to a place that are not after what comes before."""
        for name, (stream, number, x, values) in list(self.late[place].items()):
            if number <= after[stream]:
                del self.late[place][name]
                x.copy_(values)

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
    def stream(self, stream):
        self.current, before = stream, self.current
        yield
        self.current = before

    def autocast(self, device, *args, **how):
        """torch.autocast: what acts on the device is the CPU's here, and the CPU's acts on nothing there."""
        return autocast('cpu', *args, **how) if device == 'cuda' else nullcontext()


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
        found_places, current = [pretend.places.get(k, HOST) for k in known], pretend.current
        places = [place.name for place in found_places]
        if func._schema.is_mutable and not pretend.sources.keys().isdisjoint(known[:1] + known[-1:]):  # self, or out
            raise RuntimeError(f'{func}: memory used anew while a copy from it may be under way')
        if 'cuda' not in places:
            return 'cpu' if found else pretend.made
        current.given += 1
        if pretend.late['cuda']:
            pretend.complete(current.record_event().after, 'cuda')
        if any(place.name == 'cuda' and (current not in place.used or place.stream is not current
                                         and place.number > current.after[place.stream]) for place in found_places):
            raise RuntimeError(f'{func}: a copy used before its stream was waited for and the tensor recorded')
        if name is aten.convolution and found[0].dtype != pretend.dtype:
            raise RuntimeError(f'{func}: in {found[0].dtype}')
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
