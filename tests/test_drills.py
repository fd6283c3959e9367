"""Processes: signals, two runs in one place, places that cannot be written, freed memory."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import Job, assert_same_outcome, outcome

from hardneg import runtime


def wait_for(condition, job, timeout=300):
    end = time.monotonic() + timeout
    while not condition() and job.process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


@pytest.fixture(scope='module')
def flags(tiny):
    return [*tiny, '--epochs', '3', '--results_dir']


@pytest.fixture(scope='module')
def whole(flags, run, tmp_path_factory):
    """The outcome of an uninterrupted run."""
    results = tmp_path_factory.mktemp('drills') / 'whole'
    assert run('main.py', [*flags, results]).code == 0
    return outcome(results)


@pytest.mark.parametrize(
    'signum, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_run_that_is_stopped_resumes_and_is_probed(flags, run, whole, tmp_path, signum, code):
    results = tmp_path / 'r'
    job = Job('main.py', [*flags, results])
    wait_for((results / 'model_0.pth').exists, job)  # later ones are written while it trains on
    job.process.send_signal(signum)
    if signum == signal.SIGTERM:  # from a scheduler to each process, and from torchrun once more
        time.sleep(0.02)
        job.process.send_signal(signum)
    job.finish()
    assert job.code == code
    assert job.err == ''
    assert job.out.splitlines()[-1].endswith('the same command continues')
    again = run('main.py', [*flags, results])
    assert again.code == 0
    assert 'Continuing' in again.out
    assert 'Finished' in again.out
    assert_same_outcome(results, whole)
    probe = run('linear.py', ['--model_path', results / 'model_3.pth', '--epochs', '2'])
    assert probe.code == 0
    assert 'linear probe' in probe.out.splitlines()[-1]
    assert len(pd.read_csv(results / 'model_3_linear.csv')) == 2


def test_a_second_run_in_one_directory_is_refused(flags, run, tmp_path):
    long = [*flags, tmp_path / 'r', '--epochs', '500', '--save_every', '500']
    first = Job('main.py', long)
    wait_for((tmp_path / 'r' / 'config.json').exists, first)
    second = run('main.py', long)
    assert first.process.poll() is None
    first.process.kill()
    first.finish()
    assert second.code == 1
    assert 'another run is writing in' in second.err
    assert second.err.count('\n') == 1


def test_a_terminal_without_letters_but_ascii_changes_nothing(tiny, run, tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'ascii')
    results = tmp_path / 'Ergebnisse ü 結果'
    command = [*tiny, '--epochs', '1', '--results_dir', results]
    job = run('main.py', command)
    assert job.code == 0
    assert job.err == ''
    assert job.out.splitlines()[-1].startswith('Finished')
    assert (results / 'model_1.pth').exists()


def test_a_place_that_cannot_be_written_is_named(flags, run, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'closed').mkdir(mode=0o500)
    closed = tmp_path / 'closed' / 'r'
    if os.getuid() == 0:  # root may write anywhere but where the kernel refuses
        closed = '/proc/results'
    for place in (tmp_path / 'file' / 'r', closed):
        job = run('main.py', [*flags, place])
        assert job.code == 1
        assert f'cannot write in {place}' in job.err
        assert 'choose another directory' in job.err
        assert job.err.count('\n') == 1


def test_damaged_images_end_a_run_before_training(tiny, run, tmp_path):
    for split in ('train', 'test'):
        for name in 'ab':
            directory = tmp_path / 'data' / split / name
            directory.mkdir(parents=True)
            (directory / 'broken.png').write_bytes(b'\x89PNG')
    command = [*tiny, '--root', tmp_path / 'data', '--results_dir', tmp_path / 'r']
    job = run('main.py', command)
    assert job.code == 1
    assert '4 images damaged or too large' in job.err
    assert 'Traceback' not in job.err
    assert not (tmp_path / 'r').exists()


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone is told')
def test_on_a_cpu_freed_memory_stays_for_what_comes_next():
    forkserver = multiprocessing.get_context('forkserver')
    with forkserver.Pool(1, maxtasksperchild=1) as fresh:  # a process for each
        alone = fresh.apply(memory_after_use, (False,))
        started = fresh.apply(memory_after_use, (True,))
    assert alone < 50
    assert started > 190


def memory_after_use(started):
    """The growth of the resident memory, in MB, after 200 MB were used and freed."""
    if started:
        runtime.start()

    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * 4096 / 1e6

    before = resident()
    x = torch.ones(50_000_000)
    del x
    return resident() - before
