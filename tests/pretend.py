"""A CUDA device that is not there: tensors in host memory, of which some pretend to be on it.

What a GPU would refuse, tensors of two places in one operation, raises. What would make the host
wait for the device, copies from memory that is not pinned included, is counted by line. Copies come
late: on the device in the order of streams and events alone, in host memory with an event behind
them for which the host has waited.
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

Tensor = torch.Tensor
aten = torch.ops.aten
CPU = torch.device('cpu')
CUDA = torch.device('cuda', 0)
autocast = torch.autocast
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


def tensors(*values):
    """The tensors in values, and in lists and tuples of them."""
    found = []
    for x in values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (list, tuple)):
            found += tensors(*x)
    return found


def key(x):
    """What identifies the memory of a tensor."""
    return x.untyped_storage()._cdata


class Stream:
    """How many operations it was given, and how many of which streams come before its next one."""

    def __init__(self, pretend):
        self.pretend = pretend
        self.given = 0
        self.after = Counter()

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


# The reference keeps the key of a storage from being used again.
Place = namedtuple('Place', 'name reference stream number used')
HOST = Place('cpu', *[None] * 4)


class Pretend(TorchFunctionMode):
    """torch with a device: each tensor has a place, cpu, pinned or cuda.

    Convolutions on the device are in dtype.
    """

    newest = None

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        Pretend.newest = self
        self.dtype = dtype
        self.waits = Counter()
        self.places = {}
        self.made = 'cpu'
        self.current = Stream(self)
        # by place and number, the copies that were begun: stream, number and values
        self.late = {'cpu': {}, 'cuda': {}}
        # by key, pinned memory that a copy may still read
        self.sources = {}

    def place(self, x):
        return self.places.get(key(x), HOST).name

    def put(self, x, place):
        stream = self.current
        reference = StorageWeakRef(x.untyped_storage())
        self.places[key(x)] = Place(place, reference, stream, stream.given, {stream})
        return x

    def wait(self, what):
        """Count a wait by the line of the project that causes it."""
        frame = sys._getframe()
        while frame.f_back and Path(frame.f_code.co_filename).parent not in (
            HOME,
            HOME / 'hardneg',
        ):
            frame = frame.f_back
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.waits[what, line] += 1

    def move(self, x, device, dtype, non_blocking, copy, memory_format):
        y = x.to(dtype or x.dtype, memory_format=memory_format)
        before = self.place(x)
        after = before
        if device:
            after = device.type
        if 'cuda' not in (before, after) or before == after:
            if copy:
                return y.clone()
            return y
        if not non_blocking or before == 'cpu':
            self.wait(f'copy from {before} to {after}')
        self.current.given += 1
        values = y
        if before != 'pinned':
            values = y.clone()
        y = self.put(y.clone(), after)
        if non_blocking:
            begun = self.current, self.current.given
            y.fill_(math.nan if y.is_floating_point() else 0)
            self.late[after][len(self.places), key(y)] = *begun, y, values
            if before == 'pinned':
                self.sources[key(x)] = begun
        return y

    def complete(self, after, place):
        """Make the copies to a place that are not after what comes before."""
        for name, (stream, number, x, values) in list(self.late[place].items()):
            if number <= after[stream]:
                del self.late[place][name]
                x.copy_(values)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, '__name__', '')
        if func == Tensor.is_cuda.__get__:
            return self.place(args[0]) == 'cuda'
        if func == Tensor.device.__get__:
            return CUDA if self.place(args[0]) == 'cuda' else CPU
        if func in (Tensor.to, Tensor.cpu):
            return self.to(func, args, kwargs)
        if func is Tensor.pin_memory:
            return self.put(args[0].clone(), 'pinned')
        if kwargs.pop('pin_memory', False):
            return self.put(func(*args, **kwargs), 'pinned')
        if func in (Tensor.tolist, Tensor.numpy) and self.place(args[0]) == 'cuda':
            self.wait(name)
        device, generator = torch.device(kwargs.get('device') or 'cpu'), kwargs.get('generator')
        if generator and generator.device.type != device.type:
            raise RuntimeError(f'{name}: generator on {generator.device}, tensor on {device}')
        if kwargs.get('device') is None:
            return func(*args, **kwargs)
        self.made = device.type
        if name in ('tensor', 'as_tensor') and device.type == 'cuda':
            self.wait(name)
        out = self.put(func(*args, **{**kwargs, 'device': CPU}), device.type)
        self.made = 'cpu'
        return out

    def to(self, func, args, kwargs):
        copy = kwargs.pop('copy', False)
        words = args[1:]
        if func is Tensor.cpu:
            words = [CPU]
        device, dtype, non_blocking, form = torch._C._nn._parse_to(*words, **kwargs)
        form = form or torch.preserve_format
        return self.move(args[0], device, dtype, non_blocking, copy, form)

    @contextmanager
    def stream(self, stream):
        before = self.current
        self.current = stream
        yield
        self.current = before

    def autocast(self, device, *args, **how):
        """torch.autocast: what acts on the device is the CPU's here, the CPU's acts on nothing."""
        if device == 'cuda':
            return autocast('cpu', *args, **how)
        return nullcontext()


def place_of(x):
    """The place of a tensor, also within a backward pass, where x.device is not pretended."""
    return Pretend.newest.place(x)


class Operations(TorchDispatchMode):
    """Every operation, backward too, has its tensors in one place, and puts its results there."""

    def __init__(self, pretend):
        super().__init__()
        self.pretend = pretend

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            found = tensors(args, *kwargs.values())
            known = [key(x) for x in found]
            place = self.check(func, found, known, args)
            out = func(*args, **kwargs)
            for x in tensors(out):
                if key(x) not in known:
                    self.pretend.put(x, place)
            return out

    def check(self, func, found, known, args):
        """The place of an operation's tensors; RuntimeError if a GPU would refuse it."""
        pretend, name, current = self.pretend, func.overloadpacket, self.pretend.current
        mutable = func._schema.is_mutable
        written = known[:1] + known[-1:]  # self, or out
        if mutable and not pretend.sources.keys().isdisjoint(written):
            raise RuntimeError(f'{func}: memory used anew while a copy from it may be under way')
        places = [pretend.places.get(k, HOST) for k in known]
        names = [place.name for place in places]
        if 'cuda' not in names:
            return 'cpu' if found else pretend.made
        current.given += 1
        if pretend.late['cuda']:
            pretend.complete(current.record_event().after, 'cuda')
        if any(self.too_early(place) for place in places):
            raise RuntimeError(
                f'{func}: a copy used before its stream was waited for and the tensor recorded'
            )
        if name is aten.convolution and found[0].dtype != pretend.dtype:
            raise RuntimeError(f'{func}: in {found[0].dtype}')
        if name is aten.copy_:
            if names[0] != names[1]:
                pretend.wait(f'copy from {names[1]} to {names[0]}')
            return names[0]
        index = set()
        if name in INDEXING:
            index = {id(x) for x in tensors(args[1])}
        for x, place in zip(found, names):
            written_to = mutable and x is args[0]
            if id(x) in index:
                if place != 'cuda' or x.dtype == torch.bool:
                    pretend.wait(f'index by {place} {x.dtype}')
            elif place != 'cuda' and (x.ndim or written_to):
                raise RuntimeError(f'{func}: tensors on CUDA and on the CPU')
        if name in READS:
            pretend.wait(str(name))
        return 'cuda'

    def too_early(self, place):
        """Whether the current stream may use this memory before it is ready."""
        if place.name != 'cuda':
            return False
        current = self.pretend.current
        not_waited = place.stream is not current and place.number > current.after[place.stream]
        return current not in place.used or not_waited


class Generator(torch.Generator):
    """A generator that may pretend to be on the device."""

    device = property(lambda self: self.pretended)

    def __new__(cls, device='cpu'):
        self = super().__new__(cls)
        self.pretended = torch.device(device)
        return self
