"""Probes and sweeps killed at random moments: the same command ends with the files of one that was left alone."""

import random
import time

import pandas as pd
import pytest
from conftest import Job

pytestmark = pytest.mark.slow


def table(path):
    return pd.read_csv(path).drop(columns=['minutes', 'command', 'linear_command'], errors='ignore')


@pytest.fixture(scope='module')
def encoder(tiny, run, tmp_path_factory):
    results = tmp_path_factory.mktemp('kills') / 'run'
    assert run('main.py', [*tiny, '--epochs', '1', '--results_dir', results]).code == 0
    return results / 'model_1.pth'


@pytest.mark.parametrize('script, kills', [('linear.py', 30), ('misc/sweep.py', 12)])
def test_killed_probe_or_sweep_ends_as_one_that_was_not(tiny, encoder, tmp_path, script, kills):
    def command(i):
        if script == 'linear.py':
            return ['--model_path', encoder, '--epochs', '40'], encoder.with_name('model_1_linear.csv')
        return [*tiny, '--epochs', '2', '--objectives', 'hard_b1', '--seeds', '1', '--probe', '--epochs 3',
                '--results_dir', tmp_path / f'sweep{i}'], tmp_path / f'sweep{i}' / 'table.csv'

    dice, began = random.Random(script), time.monotonic()
    flags, result = command(0)
    assert Job(script, flags).finish().code == 0
    whole, duration, done = table(result), time.monotonic() - began, 0
    for _ in range(kills):
        flags, result = command(done + 1)
        job = Job(script, flags)
        if job_ended(job, dice.uniform(1, duration)) is None:
            job.process.kill()
        job.finish()
        if job.code == 0:
            pd.testing.assert_frame_equal(table(result), whole)
            done += 1
    flags, result = command(done + 1)
    assert Job(script, flags).finish().code == 0
    pd.testing.assert_frame_equal(table(result), whole)
    assert done < kills / 2


def job_ended(job, seconds):
    """The job's exit code, or None if it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while job.process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    return job.process.poll()
