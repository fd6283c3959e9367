"""Probes and sweeps that are killed: the same command ends with the files of one that was left alone."""

import itertools
import signal
import time

import pandas as pd
import psutil
import pytest
from conftest import Job

import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def encoder(tiny, run, tmp_path_factory):
    results = tmp_path_factory.mktemp('kills') / 'run'
    assert run('main.py', [*tiny, '--epochs', '1', '--results_dir', results]).code == 0
    return results / 'model_1.pth'


def probes(encoder):
    """What the probes of the encoder and of the untrained one found, if they have ended."""
    found = [runs.read_probe(encoder.parent, epoch, 'linear') for epoch in (1, 0)]
    return [row if row is None else (settings['seed'], *row) for settings, row in found]


@pytest.mark.parametrize('call', ['os.fsync', 'os.replace', 'os.unlink', 'evaluate.hits'])
def test_a_probe_killed_at_every_call_leaves_whole_probes_and_ends_as_another(encoder, run, call):
    """SIGKILL before each flush to the disk, each replacement or removal of a file and each batch."""
    wanted = []
    for seed in 0, 1:
        assert run('linear.py', ['--model_path', encoder, '--epochs', '2', '--seed', seed]).code == 0
        wanted.append(probes(encoder))
    for n in itertools.count(1):
        flags = ['--model_path', encoder, '--epochs', '2', '--seed', n % 2]
        job = Job('linear.py', flags, strike=(call, n, signal.SIGKILL)).finish()
        assert all(found in (None, *choices) for found, *choices in zip(probes(encoder), *wanted))
        if job.code == 0:
            break
        assert job.code == -signal.SIGKILL and run('linear.py', flags).code == 0
        assert probes(encoder) == wanted[n % 2]
    assert n > 2


def test_a_sweep_killed_at_its_steps_ends_as_one_that_was_not(tiny, run, tmp_path):
    """During a run, which goes on, before its probe, and between the files of the table."""
    def flags(name):
        return [*tiny, '--epochs', '2', '--objectives', 'hard_b1', '--seeds', '1', '--probe', '--epochs 3',
                '--results_dir', tmp_path / name]

    def table(name):
        return pd.read_csv(tmp_path / name / 'table.csv').drop(columns=['minutes', 'command', 'linear_command'])

    assert run('misc/sweep.py', flags('whole')).code == 0
    job, log = Job('misc/sweep.py', flags('killed')), tmp_path / 'killed' / 'hard_b1_0' / 'log.csv'
    while job.process.poll() is None and not log.exists():
        time.sleep(0.01)
    left = psutil.Process(job.process.pid).children()
    job.process.kill()
    psutil.wait_procs(left, timeout=60)
    for call, nth in (('subprocess.Popen', 4), ('os.replace', 2)):
        job = Job('misc/sweep.py', flags('killed'), strike=(call, nth, signal.SIGKILL)).finish()
        assert job.code == -signal.SIGKILL
    assert run('misc/sweep.py', flags('killed')).code == 0
    pd.testing.assert_frame_equal(table('killed'), table('whole'))
