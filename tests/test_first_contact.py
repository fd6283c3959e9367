"""What a machine cannot do is said in one line, before any data is read."""

import os
import random
import signal
from datetime import timedelta

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linear
import main
from hardneg import runtime
from hardneg.runtime import UserError


@pytest.fixture(params=[main, linear], ids=lambda script: script.__name__)
def start(request, monkeypatch):
    """start(*flags): one of the scripts, up to where it would read anything; what it says is kept."""
    class Reading(Exception):
        pass

    def read(*args, **kwargs):
        raise Reading

    def start(*flags):
        with pytest.raises(Reading):
            request.param.main([*(['--model_path', 'model_1.pth'] if request.param is linear else []), *flags])

    for name in ('load_data', 'load_model'):
        monkeypatch.setattr(request.param, name, read, raising=False)
    return start


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 1)
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda including_emulation: including_emulation)


def test_more_ranks_than_gpus(start, gpu, monkeypatch):
    monkeypatch.setattr(runtime, 'ranks', lambda: runtime.Ranks(0, 2, 0, 2))
    start()  # a scheduler may show one GPU to each rank; torchrun shows all to all
    monkeypatch.setattr('torch.distributed.is_torchelastic_launched', lambda: True)
    with pytest.raises(UserError, match='1 GPUs here: start at most as many ranks'):
        start()


LAUNCHER = dict(RANK='1', WORLD_SIZE='4', MASTER_ADDR='localhost', MASTER_PORT='29500')


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*LAUNCHER, 'LOCAL_RANK', 'LOCAL_WORLD_SIZE']), st.sampled_from(
    [None, '', '0', '1', '3', '4', '８', '-1', '1.5', '²', 'x', ' '])))
def test_what_a_launcher_left_behind_in_part_starts_nothing(changes):
    env = {name: value for name, value in {**LAUNCHER, **changes}.items() if value is not None}
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LAUNCHER, 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'):
            patch.delenv(name, raising=False)
        for name, value in env.items():
            patch.setenv(name, value)
        found = runtime.ranks()
    rank, world, port, local, local_world = (int(env[name]) if env.get(name, '').isdecimal() else None for name in (
        'RANK', 'WORLD_SIZE', 'MASTER_PORT', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE'))
    if None in (rank, world, port) or rank >= world or not port or not env.get('MASTER_ADDR'):
        assert found == (0, 1, 0, 1)
    else:
        assert found == (rank, world, local or 0, max(local_world or 1, (local or 0) + 1))


def test_ranks_are_the_launchers_until_there_is_a_group(monkeypatch):
    for variable, content in LAUNCHER.items():
        monkeypatch.setenv(variable, content)
    assert runtime.ranks() == (1, 4, 0, 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    monkeypatch.setattr(runtime, 'cpu_count', lambda: 7)
    assert runtime.ranks() == (1, 4, 1, 2) and runtime.cores() == 3
    for name, value in dict(is_initialized=True, get_rank=2, get_world_size=3).items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert runtime.ranks() == (2, 3, 1, 2)
    monkeypatch.delenv('MASTER_ADDR')
    assert runtime.ranks()[:2] == (2, 3)


@pytest.mark.parametrize('gpus, local_rank, device', [(0, 1, 'cpu'), (1, 1, 'cuda:0'), (4, 1, 'cuda:1'),
                                                       (4, 3, 'cuda:3')])
@pytest.mark.parametrize('restart', [None, '2'])
def test_a_rank_joins_with_its_device_once_all_are_ready(monkeypatch, gpus, local_rank, device, restart):
    """By NCCL for GPUs, else by gloo; under torchrun's store, which outlives a restart, each restart for itself."""
    agent = {'TORCHELASTIC_USE_AGENT_STORE': 'True', 'TORCHELASTIC_RESTART_COUNT': restart} if restart else {}
    for variable, content in {**LAUNCHER, 'LOCAL_RANK': str(local_rank), **agent}.items():
        monkeypatch.setenv(variable, content)
    monkeypatch.setattr('torch.cuda.is_available', lambda: gpu)
    monkeypatch.setattr('torch.cuda.device_count', lambda: gpus)
    monkeypatch.setattr(runtime, 'FIRST_TIMEOUT', timedelta(milliseconds=10))
    store, done, device, gpu = torch.distributed.HashStore(), [], torch.device(device), gpus > 0
    monkeypatch.setattr('torch.cuda.set_device', done.append)
    monkeypatch.setattr('torch.distributed.rendezvous', lambda url, timeout: iter([(store, 1, 4)]))
    monkeypatch.setattr('torch.distributed.init_process_group', lambda backend, *, store, **how: done.append(
        (backend, how['rank'], how['world_size'], how['timeout'], how['device_id'])))
    for other in '023':
        with pytest.raises(torch.distributed.DistStoreError):
            runtime.start()
        store.set(f'restart 2/ready {other}' if restart else f'ready {other}', '')
    done.clear()
    assert runtime.start() == device
    assert done == [*[device] * gpu, ('nccl' if gpu else 'gloo', 1, 4, runtime.TIMEOUT, device if gpu else None)]


@pytest.fixture
def handlers():
    """As a shell leaves them to a process under nohup, whatever the tests run under."""
    before, nohup = {}, {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_IGN}
    for signum in runtime.STOP_SIGNALS:
        before[signum] = signal.signal(signum, nohup.setdefault(signum, signal.SIG_DFL))
    yield nohup
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_a_signal_is_kept_until_the_loop_asks_and_a_second_ctrl_c_ends_at_once(handlers):
    with runtime.Signals() as signals:
        assert signals.check() is False and signals.check(due=True) is True
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        for signum, left in ((signal.SIGTERM, signals.catch), (signal.SIGTERM, signals.catch),
                             (signal.SIGINT, signal.SIG_DFL)):
            os.kill(os.getpid(), signum)
            with pytest.raises(runtime.Stopped) as stopped:
                signals.check()
            assert stopped.value.signum == signum and signal.getsignal(signum) == left
    assert {signum: signal.getsignal(signum) for signum in runtime.STOP_SIGNALS} == handlers


def test_data_fit_if_they_take_two_fifths_of_the_free_memory(monkeypatch):
    draw, gpu = random.Random(0), torch.device('cuda', 1)
    for _ in range(50):
        tensors = [torch.zeros(draw.randint(1, 50), 3, 8, dtype=draw.choice([torch.uint8, torch.float32]))
                   for _ in range(draw.randint(1, 3))]
        least = sum(x.numel() * x.element_size() for x in tensors) / 0.4
        for free, fits in ((1.001 * least, True), (0.999 * least, False)):
            monkeypatch.setattr('torch.cuda.mem_get_info', lambda device, free=free: (free, 9 * free)[device != gpu:])
            assert runtime.fits(gpu, *tensors) == fits
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda device: 1 / 0)
    assert runtime.fits(torch.device('cpu'), *tensors)


def test_gpu_without_bf16(start, gpu, capsys):
    start()
    assert capsys.readouterr().out == (
        'This GPU has no bf16: --precision fp16 is faster than fp32 and takes half of the memory\n')
    start('--precision', 'bf16')
    assert capsys.readouterr().out == ('--precision bf16: this GPU emulates it, which is slower than fp32; --precision '
                                       'fp16 is faster\n')
    start('--precision', 'fp16')
    assert capsys.readouterr().out == ''


def test_gpu_that_torch_cannot_use(start, monkeypatch, capsys):
    monkeypatch.setattr('os.path.exists', lambda path: path == '/proc/driver/nvidia/version')
    start()  # CUDA_VISIBLE_DEVICES is empty: the user wants no GPU
    assert capsys.readouterr().out == ''
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    start()
    said, = capsys.readouterr().out.splitlines()
    assert said.startswith('There is a GPU, but torch') and 'driver' in said
    monkeypatch.setattr('os.path.exists', lambda path: False)
    start()
    assert capsys.readouterr().out == ''


def test_what_may_not_be_read_ends_in_one_line():
    def main():
        raise PermissionError(13, 'Permission denied', 'secret/train')

    with pytest.raises(SystemExit, match="error: .*Permission denied: 'secret/train'"):
        runtime.run(main)


def test_memory_of_the_gpu_runs_out():
    def main():
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...')

    with pytest.raises(SystemExit, match=r'memory is full \(CUDA out of memory\): lower this$'):
        runtime.run(main, 'lower this')
