"""The processes behind --augment pil: deaf to the signals that stop a run, and gone when it is."""

import multiprocessing
import os
import signal
import subprocess
import time
from contextlib import suppress
from multiprocessing.resource_sharer import DupFd

import psutil
import pytest
import torch
from conftest import Job

from hardneg.batches import Batches, ReferenceViews
from hardneg.runtime import STOP_SIGNALS


@pytest.fixture
def views():
    """Sixteen batches by one worker."""
    return ReferenceViews(torch.zeros(64, 3, 8, 8, dtype=torch.uint8), Batches(64, 4), 8, workers=1)


def test_workers_go_on_when_a_stop_signal_reaches_the_whole_group(views):
    batches = views.epoch(1)
    next(batches)
    worker, = views.loader._iterator._workers
    for signum in STOP_SIGNALS:
        os.kill(worker.pid, signum)
    assert len(list(batches)) == 15 and worker.is_alive()


@pytest.mark.parametrize('error', [ConnectionResetError, ConnectionRefusedError, BrokenPipeError, EOFError])
def test_a_worker_killed_as_it_hands_over_a_batch_is_named(views, error, monkeypatch):
    batches, whole = views.epoch(1), DupFd.detach
    next(batches)

    def broken(self):
        os.close(whole(self))
        raise error

    monkeypatch.setattr(DupFd, 'detach', broken)
    with pytest.raises(RuntimeError, match='DataLoader worker'):  # of which run() makes the line
        list(batches)


def test_a_worker_ends_at_once_if_its_run_was_killed_as_it_began(views):
    start = views.loader.worker_init_fn

    def code(target, *arguments):
        child = multiprocessing.get_context('fork').Process(target=target, args=arguments)
        child.start()
        child.join()
        return child.exitcode

    assert code(start, 0) == 0
    assert code(lambda: os._exit(code(start, 0))) == 1  # a child of another process


def is_worker(child):
    with suppress(psutil.Error):  # another child, which has just ended
        return 'main.py' in ' '.join(child.cmdline())


@pytest.mark.slow
@pytest.mark.parametrize('victim', ['parent', 'worker'])
def test_no_process_is_left_when_one_is_killed(tiny, tmp_path, victim):
    job = Job('main.py', [*tiny, '--epochs', '500', '--augment', 'pil', '--workers', '2', '--results_dir', tmp_path],
              stdin=subprocess.DEVNULL)  # started anew, not forked
    parent = psutil.Process(job.process.pid)
    workers = []
    while not (tmp_path / 'log.csv').exists() or len(workers) < 2:
        assert job.process.poll() is None
        time.sleep(0.05)
        workers = list(filter(is_worker, parent.children()))
    (parent if victim == 'parent' else workers[0]).send_signal(signal.SIGKILL)
    job.finish()
    assert job.code == (-signal.SIGKILL if victim == 'parent' else 1)
    assert victim == 'parent' or 'a worker of --augment pil was killed' in job.err.splitlines()[-1], job.err
    assert not psutil.wait_procs(workers, timeout=20)[1]
