"""The CUDA path on a pretended device: no operation mixes places, no step waits for the device."""

import os
import sys
from collections import Counter

import pytest
import torch
from pretend import CUDA, Generator, Operations, Pretend, Stream, key, place_of

import linear
import main
import model
from hardneg import batches, losses, runs, runtime
from hardneg.files import read_checkpoint, read_table
from utils import Data


@pytest.fixture
def waits_of(monkeypatch):
    """waits_of(function, fits) -> where function() waits for the device.

    fits says whether the images fit on it.
    """

    def waits_of(function, fits=True):
        pretend = Pretend()

        def record_stream(x, stream):
            pretend.places[key(x)].used.add(stream)

        monkeypatch.setattr(torch, 'Generator', Generator)
        monkeypatch.setattr(torch, 'autocast', pretend.autocast)
        monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Stream(pretend))
        monkeypatch.setattr(torch.cuda, 'stream', pretend.stream)
        monkeypatch.setattr(torch.cuda, 'current_stream', lambda device=None: pretend.current)
        monkeypatch.setattr(torch.Tensor, 'record_stream', record_stream)
        monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (1e9, 1e9))
        monkeypatch.setattr(runs, 'device_name', str)
        monkeypatch.setattr(runtime, 'start', lambda: CUDA)
        monkeypatch.setattr(runtime, 'fits', lambda *_, reserved=0: fits)
        monkeypatch.setattr(runtime, 'default_precision', lambda: 'bf16')
        monkeypatch.setattr(main, 'step_bytes', lambda args: 0)
        with pretend, Operations(pretend):
            function()
        return pretend.waits

    monkeypatch.setitem(losses.TILE_SIZE, 'cuda', 16)  # several tiles
    monkeypatch.setitem(model.ARCHS, 'resnet18', (model.BasicBlock, (1, 1, 1, 1)))
    images = torch.randint(256, (64, 3, 12, 12), dtype=torch.uint8)
    labels = torch.arange(64) % 4

    def load(*args, **options):
        return Data(images[:48], labels[:48], images[48:], labels[48:], list('abcd'), 'digest')

    monkeypatch.setattr(main, 'load', load)
    monkeypatch.setattr(linear, 'load', load)
    return waits_of


def train(results, batch_size, *flags):
    small = '--arch resnet18 --width 0.25 --image_size 8 --test_size 8 --k 5 --epochs 1'
    place = ['--batch_size', str(batch_size), '--results_dir', str(results / str(batch_size))]
    main.main([*small.split(), *place, *flags])


@pytest.mark.parametrize(
    'fits, flags',
    [
        (True, ['--oracle', '--micro_batch', '2']),
        (False, ['--views', '3', '--anneal', 'down', '--positives', 'label', '--joint_views']),
    ],
    ids=str,
)
def test_waits_do_not_grow_with_the_steps(waits_of, monkeypatch, tmp_path, fits, flags):
    """Train, stop after 20 of 24 steps or at the end of 3, continue, monitor and probe."""
    stops = []

    def stop(self, due=False):
        if sys._getframe(1).f_code.co_name == 'main' and stops:
            stops.clear()
            raise runtime.Stopped(15)

    def job(n):
        with pytest.raises(SystemExit):
            train(tmp_path, n, *flags)
        train(tmp_path, n, *flags)
        checkpoint = str(tmp_path / str(n) / 'model_1.pth')
        probe = ['--epochs', '1', '--bn', 'train', '--batch_size', str(4 * n)]
        linear.main(['--model_path', checkpoint, *probe])

    monkeypatch.setattr(runtime.Signals, 'check', stop)
    waits = []
    for n in (2, 16):
        stops.append(True)
        waits.append(waits_of(lambda n=n: job(n), fits))
    look = 'copy from cuda to cpu', 'losses = progress.losses[: progress.step].cpu()'
    assert waits[0].pop(look) == 2  # after 20 steps, and at the end
    assert waits[1].pop(look) == 1
    assert waits[0] == waits[1]
    assert len(waits[0]) > 5


@pytest.mark.parametrize('nth', range(1, 4))
def test_a_save_that_fails_in_the_background_ends_the_run_and_keeps_the_former(
    waits_of, monkeypatch, tmp_path, nth
):
    """The nth of three, as the disk is full: the next save tells, or the end."""
    replace, states = os.replace, []

    def full(part, path):
        if path.name == 'last.pth':
            states.append(path)
            if len(states) == nth:
                raise OSError(28, 'No space left on device')
        replace(part, path)

    monkeypatch.setattr(os, 'replace', full)
    message = 'cannot write .*last.pth .No space left on device.; what was saved'
    with pytest.raises(runtime.UserError, match=message):
        waits_of(lambda: train(tmp_path, 16, '--epochs', '2', '--save_every', '1'))
    left = {path.name for path in (tmp_path / '16').iterdir()} - {'.lock', 'config.json'}
    whole = {f'model_{epoch}.pth' for epoch in range(nth)}
    if nth > 1:
        whole |= {'last.pth', 'log.csv'}
        log = read_table(tmp_path / '16' / 'log.csv', runs.LOG)
        assert log['epoch'].tolist() == [*range(nth - 1)]
        assert read_checkpoint(tmp_path / '16' / 'last.pth')['epoch'] == nth - 2
    assert left == whole


def test_images_in_host_memory_give_the_views_of_resident_ones(waits_of):
    def compare():
        images = torch.randint(256, (50, 3, 12, 12), dtype=torch.uint8)
        both = []
        for x in (images.to(CUDA), images):
            order = batches.Batches(50, 16, drop_last=False)
            both.append(batches.DeviceViews(x, order, 8, CUDA).epoch(1))
        for (views, index), (others, same) in zip(*both, strict=True):
            assert index.is_cuda
            assert torch.equal(index, same)
            for x, y in zip(views, others):
                assert torch.equal(x, y)

    waits_of(compare)


def test_collectives_of_two_ranks_see_the_device(waits_of, monkeypatch, tmp_path):
    """One of two ranks trains; the tensors of the other are always like its own."""
    seen = Counter()

    def all_reduce(x, op=None, group=None):
        seen[place_of(x), x.dtype] += 1

    def gather(whole, x, group=None):
        seen[place_of(whole), whole.dtype] += 1
        whole.copy_(torch.cat([x, x]))

    def reduce_scatter(part, whole, op=None, group=None):
        seen[place_of(whole), whole.dtype] += 1
        part.copy_(2 * whole.chunk(2)[0])

    answers = dict(
        is_initialized=lambda: True,
        get_world_size=lambda group=None: 2,
        get_rank=lambda group=None: 0,
        all_reduce=all_reduce,
        all_gather_single=gather,
        all_gather_into_tensor=gather,
        reduce_scatter_single=reduce_scatter,
        reduce_scatter_tensor=reduce_scatter,
        broadcast_object_list=lambda objects: None,
    )
    for name, value in answers.items():
        monkeypatch.setattr(torch.distributed, name, value, raising=False)

    def in_signals():
        return sys._getframe(1).f_code.co_name == 'check'

    monkeypatch.setattr(torch.cuda, 'is_available', in_signals)
    monkeypatch.setattr(runtime, 'distributed', lambda net, device: net)
    waits = [waits_of(lambda n=n: train(tmp_path, n, '--oracle')) for n in (4, 16)]
    assert waits[0] == waits[1]
    assert {place for place, _ in seen} == {'cuda'}
    # features and losses; labels and signals
    assert {dtype for _, dtype in seen} == {torch.float32, torch.int64}
