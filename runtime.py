"""One process among others: its rank, its device, the signals that stop it, and how it ends."""

import multiprocessing
import os
import signal
import sys
from datetime import timedelta
from inspect import signature
from typing import NamedTuple

import torch
import torch.distributed as dist
from joblib import cpu_count
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others before it ends with an error
FIRST_TIMEOUT = timedelta(hours=12)  # at the start: until all machines have downloaded or decoded their data


class UserError(ValueError):
    """An error that the user can fix; its message says how, in one line."""


class Ranks(NamedTuple):
    rank: int
    world: int
    local_rank: int
    local_world: int


def ranks():
    """This process among others: torch.distributed's, if it is initialised; else the launcher's; else one process."""
    env = os.environ

    def number(name):
        return int(env[name]) if env.get(name, '').isdecimal() else -1

    if dist.is_available() and dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
    elif env.get('MASTER_ADDR') and 0 <= number('RANK') < number('WORLD_SIZE') and number('MASTER_PORT') > 0:
        rank, world = number('RANK'), number('WORLD_SIZE')
    else:  # variables that a scheduler or a notebook left behind start nothing
        return Ranks(0, 1, 0, 1)
    local = max(0, number('LOCAL_RANK'))
    return Ranks(rank, world, local, max(number('LOCAL_WORLD_SIZE'), local + 1))


def cores():
    """This rank's share of the cores that affinity and cgroup leave to this process."""
    return max(1, cpu_count() // ranks().local_world)


def check_machine(precision):
    """Warn about a GPU that cannot be used or a precision that does not suit it; UserError if ranks outnumber GPUs."""
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if gpus < ranks().local_world and (gpus > 1 or dist.is_torchelastic_launched()):  # Slurm may show one to each
            raise UserError(f'{gpus} GPUs here: start at most as many ranks, one for each')
        if precision == 'bf16' and default_precision() == 'fp32':
            say('--precision bf16: this GPU emulates it, which is slower than fp32; --precision fp16 is faster')
        if precision == 'fp32' and default_precision() == 'fp32':
            say('This GPU has no bf16: --precision fp16 is faster than fp32 and takes half of the memory')
    elif os.environ.get('CUDA_VISIBLE_DEVICES') != '' and any(
            map(os.path.exists, ('/proc/driver/nvidia/version', '/dev/kfd'))):  # of NVIDIA's and of AMD's driver
        say(f'There is a GPU, but torch {torch.__version__} cannot use it: the driver is older than this torch needs, '
            'torch was built for CPUs, or the container was started without GPUs. The run goes on on the CPU')


def start():
    """Join the launcher's process group, if there is one, and return this rank's device."""
    rank, world, local_rank, _ = ranks()
    cuda = torch.cuda.is_available()
    device = torch.device('cuda', local_rank if torch.cuda.device_count() > 1 else 0) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous('env://', timeout=FIRST_TIMEOUT))
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torch numbers the keys of its process groups anew in each process. torchrun's store, however, outlives a
            # restart, and the addresses of dead ranks would stand under the same keys: each restart has its own.
            store = dist.PrefixStore(f'restart {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        store.set(f'ready {rank}', '')
        store.wait([f'ready {other}' for other in range(world)], FIRST_TIMEOUT)
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=rank, world_size=world, timeout=TIMEOUT,
                                device_id=device if cuda else None)
    return device


def autocast(device, precision):
    """The autocast of --precision: bf16, fp16 or fp32 (none)."""
    dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != 'fp32')


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
    if ranks().rank == 0:
        try:
            both[0] = function()
        except UserError as error:
            both[1] = error
    if ranks().world > 1:
        dist.broadcast_object_list(both)
    if both[1]:
        raise both[1]
    return both[0]


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
    whole[ends[rank] - len(x):ends[rank]] = x
    return sum_ranks(whole)


def distributed(net, device):
    """The network under DDP, if there are several ranks; the views of a step go through it one after the other."""
    if ranks().world == 1:
        return net
    # DDP must not overwrite BatchNorm's buffers between two forwards; torch 2.13 renamed the flag that says so.
    known = signature(DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(net, [device] if device.type == 'cuda' else None, **{name: False})


def averaged_buffers(net):
    """By name, the means over ranks of BatchNorm's running statistics, which each rank keeps of its own part."""
    world = ranks().world
    return {name: sum_ranks(buffer.clone()).div_(world) for name, buffer in net.named_buffers()
            if world > 1 and buffer.is_floating_point()}


STOP_SIGNALS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, name)]
# Ctrl-C, a scheduler, a closed terminal, which Windows does not have


def stop_signals():
    """The stop signals, minus any that this process ignores (SIGHUP under nohup)."""
    return [s for s in STOP_SIGNALS if signal.getsignal(s) != signal.SIG_IGN]


class Stopped(Exception):
    """Somebody asked the run to stop, by the signal whose number it holds."""

    def __init__(self, signum):
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Within `with`, keeps the stop signals until the loop asks. A second Ctrl-C ends at once and loses no file."""

    def __enter__(self):
        self.caught, self.before = 0, {signum: signal.signal(signum, self.catch) for signum in stop_signals()}
        return self

    def __exit__(self, *error):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def catch(self, signum, frame):
        self.caught = signum
        if signum == signal.SIGINT:  # SIGTERM may come twice, from a cluster's scheduler and from torchrun
            signal.signal(signum, signal.SIG_DFL)

    def check(self, due=False):
        """Whether anything is due on any rank. Every rank must call it at the same place.

        Raises:
            Stopped: on every rank, if any rank was asked to stop.
        """
        world = ranks().world
        asked = torch.tensor([self.caught, due], device='cuda' if torch.cuda.is_available() and world > 1 else 'cpu')
        if world > 1:
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        caught, due = asked.tolist()
        if caught:
            raise Stopped(caught)
        return bool(due)


def say(text):
    """Print once for all ranks, above a progress bar."""
    if ranks().rank == 0:
        tqdm.write(text)
        sys.stdout.flush()


def run(main, memory='free it, or use the CPU by CUDA_VISIBLE_DEVICES='):
    """Run a script's main(). An error that the user can cause ends with one line, said once a machine, no traceback.

    Args:
        memory: what to do when the memory of the GPU is full.
    """
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has not
        sys.stdout.reconfigure(errors='backslashreplace')  # names may have letters that the locale has not
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # only here: after an error the other ranks would not join in
    except (UserError, PermissionError) as error:  # the latter names its file
        raise SystemExit(f'error: {error}' if ranks().local_rank == 0 else 1) from None
    except torch.OutOfMemoryError as error:
        raise SystemExit(f'error: the GPU\'s memory is full ({str(error).partition(". ")[0]}): {memory}') from None
    except RuntimeError as error:
        if 'DataLoader worker' not in str(error):
            raise
        raise SystemExit('error: a worker of --augment pil was killed, perhaps as memory ran out: use fewer --workers. '
                         'The same command continues from the last saved state') from None
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    finally:
        for worker in multiprocessing.active_children():  # they ignore the SIGTERM by which Python would end them
            worker.kill()
