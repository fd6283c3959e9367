"""One process among others: its rank, its device, the signals that stop it, and how it ends."""

import os
import shutil
import signal
import sys
import sysconfig
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from joblib import cpu_count
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others before it ends with an error
RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
WORLD, LOCAL_WORLD = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
CORES = max(1, cpu_count() // LOCAL_WORLD)  # this rank's share of what affinity and cgroup leave to this process


class UserError(ValueError):
    """Something that the user can mend. Its text says in one line what is wrong and what to do."""


def check_machine(precision):
    """Warn about a GPU that cannot be used, or a precision that it only emulates; UserError if ranks outnumber GPUs."""
    if torch.cuda.is_available():
        if torch.cuda.device_count() < LOCAL_WORLD:
            raise UserError(f'{torch.cuda.device_count()} GPUs here: start at most as many ranks, one for each')
        if precision == 'bf16' and default_precision() == 'fp32':
            say('--precision bf16: this GPU emulates it, which is slower than fp32')
    elif os.environ.get('CUDA_VISIBLE_DEVICES') != '' and any(
            map(os.path.exists, ('/proc/driver/nvidia/version', '/dev/kfd'))):  # of NVIDIA's and of AMD's driver
        say(f'There is a GPU, but torch {torch.__version__} cannot use it: the driver is older than this torch needs, '
            'torch was built for CPUs, or the container was started without GPUs. The run goes on on the CPU')


def can_compile():
    """Whether all is here that torch.compile() builds with; if not, a line says what to install."""
    cuda = torch.cuda.is_available()  # Triton builds with a C compiler, Inductor's CPU code with a C++ compiler
    default = 'clang++' if sys.platform == 'darwin' else 'g++'
    compilers = (os.environ.get('CC', 'gcc'), 'clang') if cuda else (os.environ.get('CXX', default),)
    found = {'a C compiler' if cuda else 'a C++ compiler': any(map(shutil.which, compilers)),
             'Python.h': os.path.exists(os.path.join(sysconfig.get_path('include', 'posix_prefix'), 'Python.h'))}
    if not all(found.values()):
        say(f'Not compiled: {" and ".join(name for name in found if not found[name])} not found. Install what is '
            'missing to train faster (Debian: apt install build-essential python3-dev)')
    return all(found.values())


def start():
    """Join torchrun's process group, if there is one, and return this rank's device."""
    cuda = torch.cuda.is_available()
    device = torch.device('cuda', LOCAL_RANK) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    if 'RANK' in os.environ and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous('env://', timeout=TIMEOUT))
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torch numbers the keys of its process groups anew in each process. torchrun's store, however, outlives a
            # restart, and the addresses of dead ranks would stand under the same keys: each restart has its own.
            store = dist.PrefixStore(f'restart {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=RANK, world_size=WORLD, timeout=TIMEOUT,
                                device_id=device if cuda else None)
    return device


def autocast(device, precision):
    """The autocast of --precision, bf16 or fp32 (none)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16')


def default_precision():
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bf16' if fast else 'fp32'


def fits(device, *tensors):
    """Whether the tensors, kept on the device, leave most of its free memory to the training."""
    needed = sum(x.nbytes for x in tensors)
    return device.type == 'cpu' or needed < 0.4 * torch.cuda.mem_get_info(device)[0]


def on_rank0(function):
    """The result of function(), run by rank 0 alone, on every rank; a UserError in it is raised on every rank."""
    both = [None, None]  # result and error
    if RANK == 0:
        try:
            both[0] = function()
        except UserError as error:
            both[1] = error
    if WORLD > 1:
        dist.broadcast_object_list(both)
    if both[1]:
        raise both[1]
    return both[0]


def sum_ranks(x):
    """The sum of x over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def gather(x):
    """Every rank's rows, in rank order: (n_rank, ...) -> (n, ...). Numbers of rows may differ."""
    if WORLD == 1:
        return x
    sizes = x.new_zeros(WORLD, dtype=torch.int64)
    sizes[RANK] = len(x)
    ends = sum_ranks(sizes).cumsum(0).tolist()
    whole = x.new_zeros(ends[-1], *x.shape[1:])
    whole[ends[RANK] - len(x):ends[RANK]] = x
    return sum_ranks(whole)


def distributed(net, device):
    """The network under DDP, if there are several ranks; the views of a step go through it one after the other."""
    if WORLD == 1:
        return net
    # DDP must not overwrite BatchNorm's buffers between two forwards; torch 2.13 renamed the flag that says so.
    known = signature(DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(net, [device] if device.type == 'cuda' else None, **{name: False})


def average_buffers(net):
    """BatchNorm's running statistics, kept by each rank of its own part, become their mean over ranks."""
    for buffer in net.buffers():
        if WORLD > 1 and buffer.is_floating_point():
            sum_ranks(buffer).div_(WORLD)


STOP_SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C, a scheduler, a closed terminal


def stop_signals():
    """The signals that ask a process to end, without those it ignores, as nohup lets it."""
    return [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]


class Stopped(Exception):
    """Somebody asked the run to stop, by the signal whose number it holds."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Keeps Ctrl-C, SIGTERM and SIGHUP until the loop asks; a second Ctrl-C ends at once, which loses no file."""

    def __init__(self):
        self.caught = 0
        for signum in stop_signals():
            signal.signal(signum, self.catch)

    def catch(self, signum, frame):
        self.caught = signum
        if signum == signal.SIGINT:  # SIGTERM may come twice, from a cluster's scheduler and from torchrun
            signal.signal(signum, signal.SIG_DFL)

    def check(self):
        """Raise Stopped, on every rank, if any rank was asked to stop. Every rank must call it at the same place."""
        caught = torch.tensor([self.caught], device='cuda' if torch.cuda.is_available() and WORLD > 1 else 'cpu')
        if WORLD > 1:
            dist.all_reduce(caught, dist.ReduceOp.MAX)
        if caught.item():
            raise Stopped(caught.item())


def say(text):
    """Print once for all ranks, above a progress bar."""
    if RANK == 0:
        tqdm.write(text)
        sys.stdout.flush()


def run(main):
    """Run a script's main(). What a user can cause ends with one line, said once a machine, not with a traceback."""
    sys.stdout.reconfigure(errors='backslashreplace')  # a directory's name may have letters that the locale has not
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # only here: after an error the other ranks would not join in
    except (UserError, PermissionError) as error:  # the latter names its file
        raise SystemExit(f'error: {error}' if LOCAL_RANK == 0 else 1) from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f'error: the GPU\'s memory is full ({str(error).partition(". ")[0]}): start more ranks, which '
                         'share the batch, or lower --batch_size or --image_size, in another --results_dir') from None
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
