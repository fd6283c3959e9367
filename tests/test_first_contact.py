"""What a machine cannot do is said in one line, before any data is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linear
import main
import runtime
from runtime import UserError


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
    assert runtime.ranks() == (1, 4, 1, 2)
    for name, value in dict(is_initialized=True, get_rank=2, get_world_size=3).items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert runtime.ranks() == (2, 3, 1, 2)
    monkeypatch.delenv('MASTER_ADDR')
    assert runtime.ranks()[:2] == (2, 3)


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
