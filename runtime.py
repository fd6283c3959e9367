"""What a process needs around its training: ranks, flags, files that are whole or absent, and a way to stop."""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

TIMEOUT = timedelta(minutes=10)  # how long a rank waits for the others before it ends with an error
RANK, LOCAL_RANK = int(os.environ.get('RANK', 0)), int(os.environ.get('LOCAL_RANK', 0))
WORLD, LOCAL_WORLD = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('LOCAL_WORLD_SIZE', 1))
locks = []  # files that stay open, and so locked, until the process ends


class Help(argparse.HelpFormatter):
    """Every help text ends with its default, unless it tells it itself or the default is nothing."""

    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        told = nothing or 'default' in action.help
        return action.help if told else f'{action.help} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said once for all ranks."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n' if RANK == 0 else None)


def number(kind, text, valid):
    """An argparse type: a number of this kind for which valid(number) holds, described by text."""
    def parse(value):
        try:
            x = kind(value)
        except ValueError:
            x = None
        if x is None or not valid(x):
            raise argparse.ArgumentTypeError(f'must be {text}, got {value!r}')
        return x
    return parse


def integer(low, high):
    return number(int, f'an integer from {low} to {high}', lambda x: low <= x <= high)


positive_int = number(int, 'an integer of at least 1', lambda x: x >= 1)
positive = number(float, 'a positive number', lambda x: 0 < x < float('inf'))
non_negative = number(float, 'a number of at least 0', lambda x: 0 <= x < float('inf'))
seed = integer(0, 2**32 - 1)


def boolean(value):
    """An argparse type: True/False, yes/no, 1/0."""
    if value.lower() not in ('true', 'yes', '1', 'false', 'no', '0'):
        raise argparse.ArgumentTypeError(f'must be True/False, yes/no or 1/0, got {value!r}')
    return value.lower() in ('true', 'yes', '1')


@contextlib.contextmanager
def one_line_errors():
    """End with one line, said once a machine, when the code within finds that a file or directory cannot be used."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f'error: {error}' if LOCAL_RANK == 0 else 1) from None


def start():
    """Join torchrun's process group, if there is one, and return this rank's device."""
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < LOCAL_WORLD:
        raise ValueError(f'{torch.cuda.device_count()} GPUs here: start at most as many ranks, one for each')
    device = torch.device('cuda', LOCAL_RANK) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
    if 'RANK' in os.environ and not dist.is_initialized():
        store, _, _ = next(dist.rendezvous('env://', timeout=TIMEOUT))
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # torchrun's own store outlives a restart, with the addresses of ranks that died: each has keys of its own.
            store = dist.PrefixStore(f'restart {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group('nccl' if cuda else 'gloo', store=store, rank=RANK, world_size=WORLD, timeout=TIMEOUT,
                                device_id=device if cuda else None)
    return device


def autocast(device, precision):
    """The autocast of --precision: bf16, fp32 (none), or None for bf16 on CUDA and fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=(precision or default_precision()) == 'bf16')


def default_precision():
    fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bf16' if fast else 'fp32'


def fits(device, *tensors):
    """Whether the tensors, kept on the device, leave most of its free memory to the training."""
    needed = sum(x.nbytes for x in tensors)
    return device.type == 'cpu' or needed < 0.4 * torch.cuda.mem_get_info(device)[0]


def on_rank0(function):
    """The result of function(), run by rank 0 alone, on every rank; so is the ValueError or OSError it raises."""
    result = error = None
    if RANK == 0:
        try:
            result = function()
        except (ValueError, OSError) as e:
            error = e
    if WORLD > 1:
        both = [result, error]
        dist.broadcast_object_list(both)
        result, error = both
    if error is not None:
        raise error
    return result


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


def peak_memory(reset=False):
    """The most memory, in bytes, that this process has held at once since the last reset (Linux)."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition('VmHWM:')[2].split()[0])


def write(path, data):
    """Write the bytes so that path holds either what it held before or all of them, whatever happens meanwhile."""
    path, beside = Path(path), Path(f'{path}.part')
    try:
        with open(beside, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise OSError(f'cannot write {path} ({error.strerror}); what was saved before is untouched') from error


def read_config(path):
    """The config.json of a run, its settings checked to be a dict; ValueError if it is not."""
    try:
        config = json.loads(Path(path).read_text())
        if isinstance(config['settings'], dict) and {'classes', 'images'} <= {*config}:
            return config
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f'{path} is damaged or not of a run: restore it, or choose another place')


def lock(directory):
    """Make this process the only one that writes in the directory, until it ends.

    Raises:
        ValueError, OSError: another run writes there; the directory cannot be made or written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        locks.append(open(Path(directory, '.lock'), 'w'))
    except OSError as error:
        raise OSError(f'cannot write in {directory} ({error.strerror}): choose another --results_dir') from error
    try:
        fcntl.lockf(locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f'another run is writing in {directory}: wait for it, or choose another directory') from None


def stop_signals():
    """The signals that ask a process to end, without those it ignores, as nohup lets it."""
    return [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]


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
    """Run a script's main(); Ctrl-C, and the end of another rank, end it with one line instead of a traceback."""
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()  # only here: after an error the other ranks would not join in
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except RuntimeError as error:
        if WORLD == 1 or 'closed by peer' not in str(error):
            raise
        raise SystemExit(f'rank {RANK}: another rank has ended; stopping') from None
