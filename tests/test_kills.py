"""Probes and sweeps that are killed: the same command ends with the files of one that was left alone."""

import collections
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from conftest import Job, assert_same_outcome, outcome
from PIL import Image

from hardneg import runs
from hardneg.files import read_json
from model import read_checkpoint

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


def test_two_at_a_time_in_one_place_leave_whole_files_of_what_they_name(tiny, tree, encoder, run, tmp_path):
    """Probes of two sets of one name, embeddings, runs and sweeps, in pairs, for a minute or DRILL_SECONDS; then each
    alone ends with the bits of one that was always alone."""
    other, dice, counts = tmp_path / 'other' / tree.name, random.Random(0), collections.Counter()
    shutil.copytree(tree, other, ignore=shutil.ignore_patterns('.decoded'))
    Image.new('RGB', (16, 16)).save(other / 'test' / 'a' / '0.png')

    def commands(place):
        probe = ['linear.py', '--model_path', place / 'run' / 'model_1.pth', '--augment', 'none', '--epochs', '2']
        embed = ['misc/embed.py', '--model_path', encoder, '--out', place / 'f.npz', '--root']
        return dict(own=[*probe, '--root', tree], other=[*probe, '--root', other],
                    own_views=[*probe[:3], '--epochs', '2', '--seed', '1'],
                    train=['main.py', *tiny, '--epochs', '2', '--results_dir', place / 'trained'],
                    embed_train=[*embed, tree / 'train'], embed_test=[*embed, tree / 'test'],
                    sweep=['misc/sweep.py', *tiny, '--epochs', '1', '--objectives', 'hard_b1', '--seeds', '1',
                           '--probe', '--epochs 1', '--results_dir', place / 'sweep'])

    def found(place):
        """What each command left, if it has ended; files that are not whole raise an error."""
        left = {}
        for file in (place / 'run').glob('model_[01]_*.json'):
            about, name = read_json(file), file.stem.split('_', 2)[2]
            settings, row = runs.read_probe(place / 'run', int(file.stem[6]), name, about['data_digest'])
            left[file.name] = about['data_digest'], about['encoder'], settings['seed'], row.tolist()
        if (place / 'f.npz').exists():
            with np.load(place / 'f.npz') as file:
                root = json.loads(str(file['about']))['settings']['root']
                left[root] = file['names'].tolist(), file['features'].tobytes()
        for file in place.glob('*/**/*.pth'):
            read_checkpoint(file)
        for log in (*place.glob('trained/log.csv'), *place.glob('sweep/*/log.csv')):
            run = runs.read_run(log.parent)
            left[log.parent.name] = run['data_digest'], run['log'].drop(columns=['images/s', 'seconds']).to_csv()
        if (place / 'sweep' / 'table.csv').exists():
            table = pd.read_csv(place / 'sweep' / 'table.csv')
            left['table'] = table[['data', 'knn', 'linear']].to_csv()
        return left

    lone, wanted = tmp_path / 'lone', {}
    shutil.copytree(encoder.parent, lone / 'run', ignore=shutil.ignore_patterns('*linear*'))
    place = shutil.copytree(lone, tmp_path / 'shared')
    for command in commands(lone).values():
        assert run(command[0], command[1:]).code == 0
        wanted.update(found(lone))
    end = time.monotonic() + float(os.environ.get('DRILL_SECONDS', 60))
    while time.monotonic() < end:
        pair, jobs = [dice.choice([*commands(place)][:-1] * 3 + ['sweep']) for _ in range(2)], []
        pair = dice.choice([pair, pair[:1] * 2])
        for name in pair:
            script, *flags = commands(place)[name]
            call = dice.choice(['os.fsync', 'os.replace', 'os.unlink', 'files.lock', 'numpy.savez'])
            strike = (call, 1 + int(dice.expovariate(0.5)), signal.SIGKILL)
            jobs.append(Job(script, flags, strike=strike if dice.random() < 0.6 else None))
        children = []
        while any(job.process.poll() is None for job in jobs):
            for job in jobs:
                with contextlib.suppress(psutil.NoSuchProcess):
                    children += psutil.Process(job.process.pid).children(recursive=True)
            time.sleep(0.01)
        psutil.wait_procs({*children}, timeout=60)  # what a killed sweep had started goes on
        for name, job in zip(pair, jobs):
            job.finish()
            refused = job.code == 1 and 'another run is writing in' in job.err and len(job.err.splitlines()) == 1
            assert job.code in (0, -signal.SIGKILL) or refused, (name, job.code, job.err)
            counts[name, 'refused' if refused else 'killed' if job.code else 'ended'] += 1
        for name, values in found(place).items():
            whole = wanted[name]
            grows = name in ('trained', 'hard_b1_0') and values[0] == whole[0]
            assert values == whole or grows and whole[1].startswith(values[1].rstrip()), (pair, name, values, whole)
        if dice.random() < 0.3:
            for name in 'trained', 'sweep':
                shutil.rmtree(place / name, ignore_errors=True)
    print(dict(sorted(counts.items())))
    for command in commands(place).values():
        assert run(command[0], command[1:]).code == 0
    assert found(place) == found(lone)
    assert_same_outcome(place / 'trained', outcome(lone / 'trained'))
