"""The processes behind --augment pil: views do not depend on them, nor do signals end them."""

import os
import pickle
import signal
import threading
from argparse import Namespace

import pytest
import torch

from hardneg import runtime
from hardneg.batches import Batches
from hardneg.runtime import STOP_SIGNALS, UserError
from utils import ReferenceViews

IMAGES = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8)


@pytest.fixture
def views():
    """Sixteen batches by two workers."""
    return ReferenceViews(IMAGES, Batches(64, 4), 8, workers=2)


def test_workers_change_no_view():
    alone = ReferenceViews(IMAGES, Batches(64, 16), 8, workers=0)
    two = ReferenceViews(IMAGES, Batches(64, 16), 8, workers=2)
    for epoch in (1, 2):
        batches = zip(alone.epoch(epoch), two.epoch(epoch), strict=True)
        for ((x1, x2), index), ((y1, y2), other_index) in batches:
            assert torch.equal(x1, y1)
            assert torch.equal(x2, y2)
            assert torch.equal(index, other_index)


def test_views_can_be_sent_to_workers_that_are_not_forked():
    dataset = ReferenceViews(IMAGES, Batches(64, 16), 8).loader.dataset
    sent = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(sent[1, 2, 3][0], dataset[1, 2, 3][0])


def test_shared_memory_that_is_too_small_for_the_workers_is_named(monkeypatch):
    # 3 ranks with 2 workers each, 2 batches ahead, of 16 images with 2 views
    needed = 3 * 2 * 2 * 16 * 2 * 3 * 8 * 8
    monkeypatch.setattr('utils.ranks', lambda: runtime.Ranks(0, 3, 0, 3))

    def with_free(free):
        monkeypatch.setattr('shutil.disk_usage', lambda path: Namespace(free=free))
        ReferenceViews(IMAGES, Batches(64, 16), 8, workers=2)

    with_free(needed)
    with pytest.raises(UserError, match=r'/dev/shm has no room .* --workers 0'):
        with_free(needed - 1)


def test_a_socket_that_workers_cannot_open_is_named(monkeypatch):
    """As where TMPDIR has a long name: on Linux a socket's has 107 characters at most."""

    def refuse(family):
        raise OSError('AF_UNIX path too long')

    monkeypatch.setattr('utils.Listener', refuse)
    with pytest.raises(UserError, match=r'socket in .* \(AF_UNIX path too long\).* --workers 0'):
        ReferenceViews(IMAGES, Batches(64, 16), 8, workers=2)


def test_a_signal_is_answered_while_workers_stand_still(views):
    batches, workers = started(views)
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)

    def wait_for_batches():
        with runtime.Signals() as signals:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
            with pytest.raises(runtime.Stopped):
                list(signals.awaited(batches))

    runtime.run(wait_for_batches)
    assert_ended(workers)


def started(views):
    """The batches of an epoch but the first two, and the workers, each of which has made one."""
    batches = views.epoch(1)
    next(batches)
    next(batches)
    return batches, views.loader._iterator._workers


def test_workers_go_on_when_a_stop_signal_reaches_the_whole_group(views):
    batches, workers = started(views)
    for worker in workers:
        for signum in STOP_SIGNALS:
            os.kill(worker.pid, signum)
    assert len(list(batches)) == 14
    assert all(worker.is_alive() for worker in workers)


def test_a_killed_worker_ends_the_script_in_one_line(views):
    batches, workers = started(views)
    os.kill(workers[0].pid, signal.SIGKILL)
    message = r'^error: a worker of --augment pil was killed.* use fewer --workers.*'
    with pytest.raises(SystemExit, match=message):
        runtime.run(lambda: list(batches))
    assert_ended(workers)


def test_workers_end_with_the_script_and_no_word_about_them(views, capsys):
    _, workers = started(views)

    def main():
        raise UserError('of something else')

    with pytest.raises(SystemExit):
        runtime.run(main)
    assert capsys.readouterr().err == 'error: of something else\n'
    assert_ended(workers)


def assert_ended(workers):
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
