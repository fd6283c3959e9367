"""Distributed set-up, devices, signals, and messages to the user."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from datetime import timedelta
from inspect import signature
from typing import NamedTuple

import torch
import torch.distributed as dist
from joblib import cpu_count
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# How long a rank waits for the others. The first start may download or decode a data set.
TIMEOUT = timedelta(hours=2)


class UserError(ValueError):
    """An error that the user can fix. Its message is one line that says how."""


class UsageError(UserError):
    """A UserError in the flags: the script ends with exit code 2, as argparse does."""


class Stopped(Exception):
    """The run was asked to stop by the signal of this number."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


def say(text):
    """Print a line on rank 0, above a progress bar."""
    if ranks().rank == 0:
        say_anywhere(text)


def say_anywhere(text):
    """Print a line on this rank, which alone does what the line tells."""
    tqdm.write(text)
    sys.stdout.flush()


def no_bar():
    """tqdm's `disable`: one bar, on rank 0, and none if the output is not a terminal."""
    if ranks().rank == 0:
        return None
    return True


# Ranks


class Ranks(NamedTuple):
    """Rank and number of ranks, over all machines and on this one."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def ranks():
    """The Ranks of this process.

    They are those of torch.distributed once it is initialised, before that those of the launcher's
    variables. Variables that are incomplete, as a scheduler or a notebook may leave them, do not
    count: this process is then alone.
    """
    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    elif launched():
        rank, world = _variable('RANK'), _variable('WORLD_SIZE')
    else:
        return Ranks(0, 1, 0, 1)
    local_rank = max(0, _variable('LOCAL_RANK'))
    local_world = max(_variable('LOCAL_WORLD_SIZE'), local_rank + 1)
    return Ranks(rank, world, local_rank, local_world)


def launched():
    """Whether torchrun, or another launcher that sets its variables, started this process."""
    address = os.environ.get('MASTER_ADDR') and _variable('MASTER_PORT') > 0
    return bool(address) and 0 <= _variable('RANK') < _variable('WORLD_SIZE')


def _variable(name):
    """The environment variable as a number, or -1."""
    value = os.environ.get(name, '')
    return int(value) if value.isdecimal() else -1


def start():
    """Join the launcher's process group, if there is one, and return this rank's device."""
    rank, world, local_rank, _ = ranks()
    if 'OMP_NUM_THREADS' not in os.environ:
        # torch counts the machine's cores, of which a container may have few.
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
    device = torch.device('cpu')
    backend = 'gloo'
    device_id = None
    if torch.cuda.is_available():
        if torch.cuda.device_count() == 1:
            local_rank = 0  # Slurm may show each rank its own GPU alone
        device = device_id = torch.device('cuda', local_rank)
        backend = 'nccl'
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    if world > 1 and not dist.is_initialized():
        waiting = threading.Timer(10, _tell_of_waiting)
        waiting.daemon = True
        waiting.start()
        # torchrun's store outlives a restart, and with it the addresses of ranks that died.
        store, _, _ = next(dist.rendezvous('env://', timeout=TIMEOUT))
        store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=device_id,
        )
        waiting.cancel()
    return device


def keep_freed_memory():
    """Let the C library keep what the process frees, for what it needs next.

    glibc returns large blocks to the system, which clears each page that it gives out again. With
    large images that took up to half of the time of a step on a CPU.
    """
    library = ctypes.CDLL(None)
    if sys.platform == 'linux' and hasattr(library, 'mallopt'):  # musl has none
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)


def _tell_of_waiting():
    place = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
    advice = ''
    if not dist.is_torchelastic_launched():  # which sets the variables itself
        advice = '; unset RANK and WORLD_SIZE to run alone'
    print(f'Rank {ranks().rank} is waiting for the other ranks at {place}{advice}', file=sys.stderr)


def on_rank0(function):
    """Call function() on rank 0, and return its result, or raise its UserError, on every rank."""
    result, error = None, None
    if ranks().rank == 0:
        try:
            result = function()
        except UserError as caught:
            error = caught
    if ranks().world > 1:
        both = [result, error]
        dist.broadcast_object_list(both)
        result, error = both
    if error:
        raise error
    return result


def check_same_data(digest, device):
    """Raise UserError on every rank if the digest of the data is not the same on all of them."""
    differs = digest != on_rank0(lambda: digest)
    if sum_ranks(torch.tensor(int(differs), device=device)):
        raise UserError(
            'the ranks found different images: a machine has another copy, or files came or went '
            'as the run started'
        )


def sum_ranks(x):
    """The sum of x over all ranks, in place."""
    if ranks().world > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """Every rank's rows, in rank order: (n_rank, ...) -> (n, ...). Numbers of rows may differ."""
    rank, world, _, _ = ranks()
    if world == 1:
        return x
    sizes = x.new_zeros(world, dtype=torch.int64)
    sizes[rank] = len(x)
    ends = sum_ranks(sizes).cumsum(0).tolist()
    whole = x.new_zeros(ends[-1], *x.shape[1:])
    whole[ends[rank] - len(x) : ends[rank]] = x
    return sum_ranks(whole)


def distributed(net, device):
    """The network under DistributedDataParallel, if there are several ranks."""
    if ranks().world == 1:
        return net
    # A step has several forward passes, between which DDP must not overwrite BatchNorm's buffers.
    # Newer versions of torch have another name for the flag that says so.
    flag = 'broadcast_buffers'
    if 'forward_sync_buffers' in signature(DistributedDataParallel).parameters:
        flag = 'forward_sync_buffers'
    devices = [device] if device.type == 'cuda' else None
    return DistributedDataParallel(net, devices, **{flag: False})


def averaged_buffers(net):
    """The means over ranks of BatchNorm's running statistics, by name; empty for one rank."""
    world = ranks().world
    averaged = {}
    if world > 1:
        kept = net.state_dict()  # timm's networks have buffers that are not in it
        for name, buffer in net.named_buffers():
            if name in kept and buffer.is_floating_point():
                averaged[name] = sum_ranks(buffer.clone()).div_(world)
    return averaged


# Devices


def cores():
    """This rank's share of the cores that affinity and cgroup leave to this process."""
    return max(1, cpu_count() // ranks().local_world)


def default_precision():
    """'bf16' where this machine computes faster in it, else 'fp32'."""
    if torch.cuda.is_available():
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = _cpu_is_faster_in_bf16()
    if faster:
        return 'bf16'
    return 'fp32'


def _cpu_is_faster_in_bf16():
    """Whether the CPU has AMX, or is AMD's with AVX512-BF16. Others were slower or not measured.

    A ResNet-18 trains 2.5 times as fast in bf16 on a Xeon with AMX, 1.7 times on an EPYC of 2024.
    On the Xeon with AVX512-BF16 alone, bf16 was slower than fp32.
    """
    if hasattr(torch.cpu, 'get_capabilities'):
        found = torch.cpu.get_capabilities()
        amd = 'AMD' in found.get('cpu_name', '')
        return bool(found.get('amx_bf16') or (amd and found.get('avx512_bf16')))
    # Earlier versions of torch tell of AMX alone.
    has_amx = getattr(torch.cpu, '_is_amx_tile_supported', bool)
    return has_amx()


def autocast(device, precision):
    """torch.autocast for a --precision. It casts nothing for 'fp32' and 'tf32'.

    It also sets whether convolutions on a GPU round to TF32, which torch does by default. Products
    of matrices never do: the loss is exact in float32.
    """
    torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.bfloat16
    if precision == 'fp16':
        dtype = torch.float16
    return torch.autocast(device.type, dtype, enabled=precision in ('bf16', 'fp16'))


def has_kernels(capability, architectures):
    """Whether a build of torch has kernels for a GPU.

    Args:
        capability: (major, minor) of the GPU, as torch.cuda.get_device_capability() gives it.
        architectures: what the build has, as torch.cuda.get_arch_list() gives it: 'sm_80' is a
            kernel for GPUs of major version 8, 'compute_90' is code that newer GPUs translate.
    """
    major, minor = capability
    for name in architectures:
        kind, number = re.fullmatch(r'(\w+)_(\d+)[a-z]?', name).groups()
        built_major, built_minor = int(number[:-1]), int(number[-1])
        if kind == 'sm' and built_major == major and built_minor <= minor:
            return True
        if kind == 'compute' and (built_major, built_minor) <= (major, minor):
            return True
    return False


def _check_kernels():
    """UserError if this build of torch has no kernels for the GPU."""
    if torch.version.hip or not torch.cuda.get_arch_list():
        return
    capability = torch.cuda.get_device_capability()
    if has_kernels(capability, torch.cuda.get_arch_list()):
        return
    advice = 'a newer build of torch'
    if capability < (7, 5):
        advice = 'the build of torch for CUDA 12.6'
    major, minor = capability
    raise UserError(
        f'{torch.cuda.get_device_name()} (capability {major}.{minor}) has no kernels in this torch '
        f'{torch.__version__}: install {advice}, or use the CPU by CUDA_VISIBLE_DEVICES='
    )


def check_machine(precision):
    """Warn about a GPU that cannot be used, and about a precision that does not suit it.

    precision None is the machine's own.

    Raises:
        UserError: there are more ranks than GPUs, or torch has no kernels for the GPU.
        UsageError: the GPU does not support this precision.
    """
    if precision == 'tf32':
        _check_tf32()
    if torch.cuda.is_available():
        _check_kernels()
        gpus = torch.cuda.device_count()
        one_for_each = gpus == 1 and not dist.is_torchelastic_launched()  # as Slurm may show them
        if gpus < ranks().local_world and not one_for_each:
            raise UserError(f'{gpus} GPUs here: start at most as many ranks, one for each')
        no_bf16 = default_precision() == 'fp32'
        if precision == 'bf16' and no_bf16:
            say(
                '--precision bf16: this GPU emulates it, which is slower than fp32; '
                '--precision fp16 is faster'
            )
        if precision in (None, 'fp32') and no_bf16:
            say(
                'This GPU has no bf16: --precision fp16 is faster than fp32 and takes half of '
                'the memory'
            )
        return
    drivers = '/proc/driver/nvidia/version', '/dev/kfd'  # NVIDIA's and AMD's
    hidden = os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1', 'NoDevFiles')
    if any(map(os.path.exists, drivers)) and not hidden:
        say(
            f'There is a GPU, but torch {torch.__version__} cannot use it: the driver is older '
            'than this torch needs, torch was built for CPUs, or the container was started '
            'without GPUs. The run continues on the CPU'
        )


def _check_tf32():
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        raise UsageError('--precision tf32 needs a GPU of capability 8.0 or more: choose fp32')


def fits(device, *tensors, reserved=0):
    """Whether a GPU has room for the tensors beside `reserved` bytes; always true for a CPU."""
    if device.type == 'cpu':
        return True
    needed = sum(x.nbytes for x in tensors)
    free, _ = torch.cuda.mem_get_info(device)
    return needed + reserved < 0.8 * free


def free_memory():
    """Bytes of the machine's memory that are free, or None where the system does not tell."""
    with contextlib.suppress(OSError), open('/proc/meminfo') as lines:
        for line in lines:
            name, value, *_ = line.split()
            if name == 'MemAvailable:':
                return 1024 * int(value)
    return None


class _FirstFailure(logging.Filter):
    """Replaces the traces of code that torch could not compile by one line."""

    told = False

    def filter(self, record):
        if record.levelno >= logging.WARNING and not self.told:
            self.told = True
            _, error, _ = record.exc_info or (None, record.getMessage(), None)
            reason = ' '.join(str(error).partition('\n\n')[0].split())
            advice = ''
            if re.search(r'compiler|gcc|g\+\+|Python\.h', reason):
                advice = '. On Debian, apt install build-essential python3-dev brings it'
            say(f'Not compiled, which is slower: {reason:.200}{advice}')
        return False


def compiles_or_goes_on():
    """Let torch.compile() run code uncompiled where it fails to compile it, and say so once."""
    torch._dynamo.config.suppress_errors = True
    logging.getLogger('torch._dynamo.convert_frame').addFilter(_FirstFailure())


# Signals

# Ctrl-C, a scheduler, a closed terminal, and what Slurm's --signal may name
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2


def stop_signals():
    """The stop signals that this process does not ignore; under nohup it ignores SIGHUP."""
    return [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]


class Signals:
    """Within `with`, keeps the stop signals until the loop asks for them by check().

    A second Ctrl-C ends the process at once. No file is lost then, as files are written whole.
    Python catches signals in the main thread alone. In another one this class says so.
    """

    def __enter__(self):
        self.caught = 0
        self.waiting = False
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self.catch) for signum in stop_signals()}
        else:
            say('Not in the main thread: a signal will end the run without saving')
        return self

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def catch(self, signum, frame):
        self.caught = signum
        if signum == signal.SIGINT:  # SIGTERM may come twice: from a scheduler and from torchrun
            signal.signal(signum, signal.SIG_DFL)
        if self.waiting:
            raise Stopped(signum)

    def awaited(self, batches):
        """Yield batches that other processes make.

        A single process stops at once if a signal comes before the next one. Several ranks have to
        agree, by check().
        """
        batches = iter(batches)
        alone = ranks().world == 1
        while True:
            self.waiting = alone
            try:
                if alone and self.caught:
                    raise Stopped(self.caught)
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting = False
            yield batch

    def check(self, due=False):
        """Whether something is due on any rank. All ranks must call it at the same place.

        Raises:
            Stopped: on every rank, if any of them was asked to stop.
        """
        caught = self.caught
        if ranks().world > 1:
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
            asked = torch.tensor([caught, int(due)], device=device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            caught, due = asked.tolist()
        if caught:
            raise Stopped(caught)
        return bool(due)


# How a script ends


def is_memory_error(error):
    """Whether the host's memory is full, by an error of Python or of torch."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def memory_reason(error):
    """The first sentence of an out-of-memory error; the rest are numbers for programmers."""
    return str(error).partition('. ')[0]


def run(main):
    """Run a script's main(). An error that the user can cause ends in one line, not a traceback."""
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's stream has no such method
        # File names may contain characters that the locale cannot encode.
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        main()
        if dist.is_initialized():
            # Not after an error, when the other ranks would not join in.
            dist.destroy_process_group()
    except UsageError as error:
        if ranks().rank == 0:
            print(f'{os.path.basename(sys.argv[0])}: error: {error}', file=sys.stderr)
        sys.exit(2)
    except (UserError, PermissionError) as error:  # the latter names its file
        if ranks().local_rank == 0:
            print(f'error: {error}', file=sys.stderr)
        sys.exit(1)
    except torch.OutOfMemoryError as error:
        reason = memory_reason(error)
        sys.exit(
            f"error: the GPU's memory is full ({reason}): lower --batch_size, free memory, or use "
            'the CPU by CUDA_VISIBLE_DEVICES='
        )
    except (MemoryError, RuntimeError) as error:
        if is_memory_error(error):
            sys.exit('error: memory is full: lower --batch_size, or free memory')
        if 'DataLoader worker' in str(error):
            sys.exit(
                'error: a worker of --augment pil was killed, perhaps as memory ran out: use fewer '
                '--workers. The same command continues from the last saved state'
            )
        raise
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    finally:
        # Workers ignore the signal by which Python would end them. torch's handler would raise an
        # error for each that is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
