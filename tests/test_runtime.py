"""Ranks, devices and signals; what a machine cannot do is said before any data is read."""

import os
import signal
import threading
import time
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linear
import main
from hardneg import runtime
from hardneg.runtime import UsageError, UserError

# What a machine cannot do


class Reading(Exception):
    """A script has come to where it reads data or a checkpoint."""


@pytest.fixture(params=[main, linear], ids=['main', 'linear'])
def start(request, monkeypatch):
    """start(*flags): one of the scripts, up to where it would read anything."""

    def read(*args, **kwargs):
        raise Reading

    def start(*flags):
        with pytest.raises(Reading):
            request.param.main(list(flags))

    monkeypatch.setattr(request.param, 'load', read)
    for name in ('load_model', 'load_encoder'):
        monkeypatch.setattr(request.param, name, read, raising=False)
    return start


@pytest.fixture
def gpu(monkeypatch):
    """One GPU without bf16."""
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_arch_list', lambda: [])
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    emulated = 'torch.cuda.is_bf16_supported'
    monkeypatch.setattr(emulated, lambda including_emulation: including_emulation)


def test_more_ranks_than_gpus(start, gpu, monkeypatch):
    monkeypatch.setattr(runtime, 'ranks', lambda: runtime.Ranks(0, 2, 0, 2))
    start()  # a scheduler may show one GPU to each rank; torchrun shows all to all
    monkeypatch.setattr('torch.distributed.is_torchelastic_launched', lambda: True)
    with pytest.raises(UserError, match='1 GPUs here: start at most as many ranks'):
        start()


@pytest.mark.parametrize(
    'flags, said',
    [
        ([], 'This GPU has no bf16: --precision fp16 is faster than fp32 and takes half of the'),
        (['--precision', 'bf16'], '--precision bf16: this GPU emulates it, which is slower than'),
        (['--precision', 'fp16'], ''),
    ],
)
def test_a_gpu_without_bf16(start, gpu, capsys, flags, said):
    start(*flags)
    lines = capsys.readouterr().out.splitlines()
    lines = [line for line in lines if not line.startswith('Precision:')]  # which it chose
    assert len(lines) == bool(said)
    assert all(line.startswith(said) for line in lines)


def test_a_gpu_that_torch_cannot_use(start, monkeypatch, capsys):
    driver = '/proc/driver/nvidia/version'
    monkeypatch.setattr('os.path.exists', lambda path: path == driver)
    for hidden in ('', '-1', 'NoDevFiles'):
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)
        start()
        assert 'GPU' not in capsys.readouterr().out
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    start()
    assert 'There is a GPU, but torch' in capsys.readouterr().out
    monkeypatch.setattr('os.path.exists', lambda path: False)
    start()
    assert 'GPU' not in capsys.readouterr().out


@pytest.mark.parametrize('free, fits', [(126, True), (124, False)])
def test_data_fit_if_they_and_what_is_reserved_take_four_fifths_of_the_free_memory(
    monkeypatch, free, fits
):
    device = torch.device('cuda', 1)
    asked = []

    def mem_get_info(device):
        asked.append(device)
        return free, 10 * free

    monkeypatch.setattr('torch.cuda.mem_get_info', mem_get_info)
    tensors = [torch.zeros(10, dtype=torch.uint8), torch.zeros(10, dtype=torch.float32)]
    assert runtime.fits(device, *tensors, reserved=50) == fits
    assert asked == [device]
    assert runtime.fits(torch.device('cpu'), *tensors, reserved=1e30)


# Ranks

LAUNCHER = dict(RANK='1', WORLD_SIZE='4', MASTER_ADDR='localhost', MASTER_PORT='29500')
LOCAL = ['LOCAL_RANK', 'LOCAL_WORLD_SIZE']
ODD = [None, '', '0', '1', '3', '4', '８', '-1', '1.5', '²', 'x', ' ']


def as_number(text):
    if text is not None and text.isdecimal():
        return int(text)
    return None


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*LAUNCHER, *LOCAL]), st.sampled_from(ODD)))
def test_what_a_launcher_left_behind_in_part_starts_nothing(changes):
    variables = {**LAUNCHER, **changes}
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LAUNCHER, *LOCAL):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            if value is not None:
                patch.setenv(name, value)
        found = runtime.ranks()
    rank = as_number(variables['RANK'])
    world = as_number(variables['WORLD_SIZE'])
    port = as_number(variables['MASTER_PORT'])
    if rank is None or world is None or rank >= world or not port or not variables['MASTER_ADDR']:
        assert found == (0, 1, 0, 1)
    else:
        local = as_number(variables.get('LOCAL_RANK')) or 0
        local_world = as_number(variables.get('LOCAL_WORLD_SIZE')) or 1
        assert found == (rank, world, local, max(local_world, local + 1))


def set_variables(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_ranks_are_the_launchers_until_there_is_a_group(monkeypatch):
    set_variables(monkeypatch, **LAUNCHER)
    assert runtime.ranks() == (1, 4, 0, 1)
    set_variables(monkeypatch, LOCAL_RANK='1', LOCAL_WORLD_SIZE='2')
    monkeypatch.setattr(runtime, 'cpu_count', lambda: 7)
    assert runtime.ranks() == (1, 4, 1, 2)
    assert runtime.cores() == 3
    monkeypatch.setattr('torch.distributed.is_initialized', lambda: True)
    monkeypatch.setattr('torch.distributed.get_rank', lambda: 2)
    monkeypatch.setattr('torch.distributed.get_world_size', lambda: 3)
    assert runtime.ranks() == (2, 3, 1, 2)
    monkeypatch.delenv('MASTER_ADDR')
    assert runtime.ranks()[:2] == (2, 3)


@pytest.mark.parametrize('restart', [None, '2'])
@pytest.mark.parametrize(
    'gpus, local_rank, device, backend',
    [
        (0, 1, 'cpu', 'gloo'),
        (1, 1, 'cuda:0', 'nccl'),
        (4, 1, 'cuda:1', 'nccl'),
        (4, 3, 'cuda:3', 'nccl'),
    ],
)
def test_a_rank_joins_its_group_with_its_device(
    monkeypatch, gpus, local_rank, device, backend, restart
):
    """After a restart by torchrun, whose store goes on, under keys of its own."""
    set_variables(monkeypatch, **LAUNCHER, LOCAL_RANK=str(local_rank))
    if restart:
        set_variables(monkeypatch, TORCHELASTIC_RESTART_COUNT=restart)
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpus > 0)
    monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
    done = []
    monkeypatch.setattr('torch.cuda.set_device', done.append)

    def join(backend, store, rank, world_size, timeout, device_id):
        store.set('key', 'value')
        done.append((backend, rank, world_size, timeout, device_id))

    whole = torch.distributed.HashStore()
    rendezvous = 'torch.distributed.rendezvous'
    monkeypatch.setattr(rendezvous, lambda url, timeout: iter([(whole, 1, 4)]))
    monkeypatch.setattr('torch.distributed.init_process_group', join)
    expected = torch.device(device)
    assert runtime.start() == expected
    if gpus:
        assert done == [expected, (backend, 1, 4, runtime.TIMEOUT, expected)]
    else:
        assert done == [(backend, 1, 4, runtime.TIMEOUT, None)]
    assert whole.get(f'{restart or 0}/key') == b'value'


def test_buffers_that_are_not_in_the_state_are_not_averaged(monkeypatch):
    """Such as Swin's masks: a state with them would not fit the network again."""
    net = torch.nn.BatchNorm1d(3)
    net.register_buffer('mask', torch.ones(3), persistent=False)
    monkeypatch.setattr(runtime, 'ranks', lambda: runtime.Ranks(0, 2, 0, 2))
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda x: x.mul_(2).add_(1))
    averaged = runtime.averaged_buffers(net)
    assert averaged.keys() == {'running_mean', 'running_var'}
    assert averaged['running_mean'].tolist() == [0.5] * 3


@pytest.mark.parametrize('other', ['a', 'b'])
@pytest.mark.parametrize('rank', [0, 1])
def test_ranks_with_other_images_end_together(monkeypatch, rank, other):
    own = 'ab'[rank] if other == 'b' else 'a'
    monkeypatch.setattr(runtime, 'ranks', lambda: runtime.Ranks(rank, 2, rank, 2))

    def from_rank_0(both):
        both[0] = 'a'

    def with_the_other_rank(x):
        differs = 1 - rank if other == 'b' else 0
        x += differs

    monkeypatch.setattr(torch.distributed, 'broadcast_object_list', from_rank_0)
    monkeypatch.setattr(torch.distributed, 'all_reduce', with_the_other_rank)
    expected = nullcontext()
    if other == 'b':
        expected = pytest.raises(UserError, match='the ranks found different images')
    with expected:
        runtime.check_same_data(own, torch.device('cpu'))


def test_a_rank_that_waits_for_others_says_where(monkeypatch, capsys):
    """And goes on to wait."""
    set_variables(monkeypatch, **LAUNCHER)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    waits = []

    def timer(seconds, tell):
        waits.append(seconds)
        return threading.Timer(0.01, tell)

    monkeypatch.setattr(runtime, 'threading', Namespace(Timer=timer))
    store = torch.distributed.HashStore()
    monkeypatch.setattr('torch.distributed.rendezvous', lambda *_, **__: iter([(store, 1, 4)]))
    monkeypatch.setattr('torch.distributed.init_process_group', lambda *_, **__: time.sleep(0.2))
    runtime.start()
    assert waits == [10]
    place = f'{LAUNCHER["MASTER_ADDR"]}:{LAUNCHER["MASTER_PORT"]}'
    assert capsys.readouterr().err == (
        f'Rank 1 is waiting for the other ranks at {place}; unset RANK and WORLD_SIZE to run '
        'alone\n'
    )


# Signals


@pytest.fixture
def handlers():
    """As a shell leaves them to a process under nohup, whatever the tests run under."""
    nohup = dict.fromkeys(runtime.STOP_SIGNALS, signal.SIG_DFL)
    nohup[signal.SIGINT] = signal.default_int_handler
    nohup[signal.SIGHUP] = signal.SIG_IGN
    before = {signum: signal.signal(signum, handler) for signum, handler in nohup.items()}
    yield nohup
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_is_kept_until_the_loop_asks_and_a_second_ctrl_c_ends_at_once(handlers):
    with runtime.Signals() as signals:
        assert signals.check() is False
        assert signals.check(due=True) is True
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for signum, handler in (
            (signal.SIGTERM, signals.catch),
            (signal.SIGTERM, signals.catch),
            (signal.SIGINT, signal.SIG_DFL),
        ):
            os.kill(os.getpid(), signum)
            with pytest.raises(runtime.Stopped) as stopped:
                signals.check()
            assert stopped.value.signum == signum
            assert signal.getsignal(signum) == handler
    for signum, handler in handlers.items():
        assert signal.getsignal(signum) == handler


def test_a_signal_ends_the_wait_for_a_batch(handlers):
    """It came while the batch was awaited, or before."""

    def batches():
        yield 1
        os.kill(os.getpid(), signal.SIGUSR1)
        yield 2

    with runtime.Signals() as signals:
        seen = []
        with pytest.raises(runtime.Stopped):
            seen.extend(signals.awaited(batches()))
        with pytest.raises(runtime.Stopped):
            next(signals.awaited([3]))
    with runtime.Signals() as signals:
        assert list(signals.awaited([4, 5])) == [4, 5]
        os.kill(os.getpid(), signal.SIGUSR2)  # between batches it is kept
        with pytest.raises(runtime.Stopped):
            signals.check()


def test_ranks_do_not_stop_alone_as_they_wait_for_a_batch(handlers, monkeypatch):
    monkeypatch.setattr(runtime, 'ranks', lambda: runtime.Ranks(0, 2, 0, 2))

    def batches():
        os.kill(os.getpid(), signal.SIGTERM)
        yield 1

    with runtime.Signals() as signals:
        assert list(signals.awaited(batches())) == [1]
        assert signals.caught == signal.SIGTERM


def test_signals_outside_of_the_main_thread_are_left_alone_and_a_line_says_so(handlers, capsys):
    def train():
        with runtime.Signals() as signals:
            checked.append(signals.check())

    checked = []
    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert checked == [False]
    assert capsys.readouterr().out.startswith('Not in the main thread')
    for signum, handler in handlers.items():
        assert signal.getsignal(signum) == handler


# How a script ends


@pytest.mark.parametrize(
    'error, code, line',
    [
        (UserError('give another --root'), 1, 'error: give another --root'),
        (UsageError('--k 5 is too large'), 2, 'main.py: error: --k 5 is too large'),
        (
            PermissionError(13, 'Permission denied', 'secret/train'),
            1,
            "error: [Errno 13] Permission denied: 'secret/train'",
        ),
        (
            RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'),
            1,
            'error: a worker of --augment pil was killed',
        ),
        (
            torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB'),
            1,
            "error: the GPU's memory is full (CUDA out of memory): lower",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
            1,
            'error: memory is full: lower --batch_size',
        ),
        (MemoryError(), 1, 'error: memory is full: lower --batch_size'),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_the_user_ends_in_one_line(monkeypatch, capsys, error, code, line):
    def main():
        raise error

    monkeypatch.setattr('sys.argv', ['/somewhere/main.py', '--k', '5'])
    with pytest.raises(SystemExit) as stop:
        runtime.run(main)
    err = capsys.readouterr().err
    if isinstance(stop.value.code, str):  # Python prints it, and ends with 1
        err = f'{stop.value.code}\n'
        assert code == 1
    else:
        assert stop.value.code == code
    assert err.startswith(line)
    assert err.count('\n') == 1


def test_a_programmers_mistake_keeps_its_traceback():
    def main():
        raise RuntimeError('shapes do not match')

    with pytest.raises(RuntimeError, match='shapes'):
        runtime.run(main)


# What suits a machine


@pytest.mark.parametrize(
    'found, precision',
    [
        (dict(amx_bf16=True, avx512_bf16=True), 'bf16'),
        (dict(amx_bf16=False, avx512_bf16=True, cpu_name='Intel(R) Xeon(R)'), 'fp32'),
        (dict(amx_bf16=False, avx512_bf16=True, cpu_name='AMD EPYC'), 'bf16'),
        (dict(amx_bf16=False, avx512_bf16=False, cpu_name='AMD EPYC'), 'fp32'),
        (dict(avx2=True), 'fp32'),
        (dict(), 'fp32'),
    ],
)
def test_a_cpu_computes_in_bf16_if_it_is_faster_so(monkeypatch, found, precision):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: found, raising=False)
    assert runtime.default_precision() == precision


@pytest.mark.parametrize('amx', [True, False])
def test_an_early_torch_tells_of_amx_by_its_tiles(monkeypatch, amx):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: amx)
    assert runtime.default_precision() == ('bf16' if amx else 'fp32')


# As torch's builds for CUDA 13.0 have it
BUILD = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']


@pytest.mark.parametrize(
    'capability, architectures, usable',
    [
        ((7, 0), BUILD, False),  # V100
        ((7, 5), BUILD, True),  # T4
        ((8, 9), BUILD, True),  # RTX 40
        ((9, 0), BUILD, True),  # H100
        ((10, 3), BUILD, True),  # B300
        ((12, 1), BUILD, True),
        ((13, 0), BUILD, True),  # by translation of compute_120
        ((13, 0), BUILD[:-1], False),
        ((8, 0), ['sm_86'], False),
        ((9, 0), ['sm_90a'], True),
    ],
)
def test_a_build_of_torch_has_kernels_for_a_gpu(capability, architectures, usable):
    assert runtime.has_kernels(capability, architectures) == usable


@pytest.mark.parametrize(
    'capability, advice',
    [((7, 0), 'the build of torch for CUDA 12.6'), ((11, 0), 'a newer build of torch')],
)
def test_a_gpu_without_kernels_is_named_before_the_first_one(
    start, gpu, monkeypatch, capability, advice
):
    monkeypatch.setattr('torch.cuda.get_arch_list', lambda: BUILD)
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: capability)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda: 'Tesla')
    major, minor = capability
    message = rf'Tesla \(capability {major}.{minor}\) has no kernels .* install {advice}, or use'
    with pytest.raises(UserError, match=message):
        start()


@pytest.fixture
def rounded():
    """torch rounds to TF32 wherever it may."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False  # as by default


@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16', 'fp16'])
def test_convolutions_round_to_tf32_only_if_asked_and_products_never(rounded, precision):
    cast = runtime.autocast(torch.device('cpu'), precision)
    assert torch.backends.cudnn.allow_tf32 == (precision == 'tf32')
    assert not torch.backends.cuda.matmul.allow_tf32
    with cast:
        output = torch.zeros(1, 2) @ torch.zeros(2, 1)
    casts = {'bf16': torch.bfloat16, 'fp16': torch.float16}
    assert output.dtype == casts.get(precision, torch.float32)


def test_tf32_needs_a_gpu_that_has_it(start, gpu, monkeypatch):
    monkeypatch.setattr('torch.cuda.get_device_capability', lambda: (7, 5))
    with pytest.raises(UsageError, match='--precision tf32 needs a GPU of capability 8.0'):
        start('--precision', 'tf32')


@pytest.mark.parametrize('variable, threads', [(None, 3), ('8', None)])
def test_torch_takes_no_more_threads_than_there_are_cores(monkeypatch, variable, threads):
    """Unless OMP_NUM_THREADS says how many."""
    given = []
    monkeypatch.delenv('OMP_NUM_THREADS')
    if variable:
        monkeypatch.setenv('OMP_NUM_THREADS', variable)
    monkeypatch.setattr(runtime, 'cpu_count', lambda: 3)
    monkeypatch.setattr('torch.get_num_threads', lambda: 8)
    monkeypatch.setattr('torch.set_num_threads', given.append)
    runtime.start()
    assert given == ([threads] if threads else [])
