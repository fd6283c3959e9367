"""The processes behind --augment pil are gone when their run is, however it ends."""

import signal
import subprocess
import time

import psutil
import pytest
from conftest import Job


def workers_of(parent):
    workers = []
    for child in parent.children():
        try:
            if 'main.py' in ' '.join(child.cmdline()):
                workers.append(child)
        except psutil.Error:  # another child, which has just ended
            pass
    return workers


@pytest.mark.parametrize('victim', ['parent', 'worker'])
def test_no_process_is_left_when_one_is_killed(tiny, tmp_path, victim):
    flags = [*tiny, '--epochs', '500', '--augment', 'pil', '--workers', '2']
    # started anew, not forked, as its standard input is given
    job = Job('main.py', [*flags, '--results_dir', tmp_path], stdin=subprocess.DEVNULL)
    parent = psutil.Process(job.process.pid)
    workers = []
    while len(workers) < 2 or not (tmp_path / 'log.csv').exists():
        assert job.process.poll() is None
        time.sleep(0.05)
        workers = workers_of(parent)
    if victim == 'parent':
        parent.send_signal(signal.SIGKILL)
        job.finish()
        assert job.code == -signal.SIGKILL
    else:
        workers[0].send_signal(signal.SIGKILL)
        job.finish()
        assert job.code == 1
        assert 'a worker of --augment pil was killed' in job.err.splitlines()[-1]
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
