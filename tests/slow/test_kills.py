"""Probes and sweeps that are killed, and pairs of scripts in one place."""

import collections
import contextlib
import itertools
import os
import random
import shutil
import signal
import time

import pandas as pd
import psutil
import pytest
from conftest import Job, assert_same_outcome, outcome
from PIL import Image

from hardneg import runs
from hardneg.embedded import read_embedded
from hardneg.files import read_checkpoint, read_json


@pytest.fixture(scope='module')
def encoder(tiny, run, tmp_path_factory):
    results = tmp_path_factory.mktemp('kills') / 'run'
    assert run('main.py', [*tiny, '--epochs', '1', '--results_dir', results]).code == 0
    return results / 'model_1.pth'


def probes(encoder):
    """What the probes of the encoder and of the untrained one found; None if they did not end."""
    found = []
    for epoch in (1, 0):
        settings, row = runs.read_probe(encoder.parent, epoch, 'linear')
        if row is None:
            found.append(None)
        else:
            found.append((settings['seed'], *row))
    return found


@pytest.mark.parametrize(
    'call', ['os.fsync', 'os.replace', 'os.unlink', 'torch.nn.functional.cross_entropy']
)
def test_a_probe_killed_at_every_call_leaves_whole_probes(encoder, run, call):
    """SIGKILL before each flush to the disk, each file replaced or removed, and each batch.

    The next probe, of another seed, ends as one that was not killed.
    """
    wanted = []
    for seed in (0, 1):
        command = ['--model_path', encoder, '--epochs', '2', '--seed', seed]
        assert run('linear.py', command).code == 0
        wanted.append(probes(encoder))
    for n in itertools.count(1):
        seed = n % 2
        command = ['--model_path', encoder, '--epochs', '2', '--seed', seed]
        job = Job('linear.py', command, strike=(call, n, signal.SIGKILL)).finish()
        for found, *choices in zip(probes(encoder), *wanted):
            assert found is None or found in choices
        if job.code == 0:
            break
        assert job.code == -signal.SIGKILL
        assert run('linear.py', command).code == 0
        assert probes(encoder) == wanted[seed]
    assert n > 2


def test_a_sweep_killed_at_its_steps_ends_as_one_that_was_not(tiny, run, tmp_path):
    """During a run, which goes on, before its probe, and between the files of the table."""

    def command(name):
        sweep = ['--objectives', 'hard_b1', '--seeds', '1', '--probe', '--epochs 3']
        return [*tiny, '--epochs', '2', *sweep, '--results_dir', tmp_path / name]

    def table(name):
        found = pd.read_csv(tmp_path / name / 'table.csv')
        return found.drop(columns=['minutes', 'command', 'linear_command'])

    assert run('misc/sweep.py', command('whole')).code == 0
    job = Job('misc/sweep.py', command('killed'))
    log = tmp_path / 'killed' / 'hard_b1_0' / 'log.csv'
    while job.process.poll() is None and not log.exists():
        time.sleep(0.01)
    left = psutil.Process(job.process.pid).children()
    job.process.kill()
    psutil.wait_procs(left, timeout=60)
    for call, nth in (('subprocess.Popen', 2), ('os.replace', 2)):
        strike = call, nth, signal.SIGKILL
        job = Job('misc/sweep.py', command('killed'), strike=strike).finish()
        assert job.code == -signal.SIGKILL
    assert run('misc/sweep.py', command('killed')).code == 0
    pd.testing.assert_frame_equal(table('killed'), table('whole'))


# Two at a time


def commands(place, tiny, tree, other, encoder):
    """Scripts that write in one place: probes of two data sets, embeddings, a run, a sweep."""
    checkpoint = place / 'run' / 'model_1.pth'
    probe = ['linear.py', '--model_path', checkpoint, '--epochs', '2']
    embed = ['misc/embed.py', '--model_path', encoder]
    sweep = ['--objectives', 'hard_b1', '--seeds', '1', '--probe', '--epochs 1']
    return {
        'own': [*probe, '--cached', '--root', tree],
        'other': [*probe, '--cached', '--root', other],
        'own_views': [*probe, '--seed', '1'],
        'train': ['main.py', *tiny, '--epochs', '2', '--results_dir', place / 'trained'],
        'embed_train': [*embed, '--root', tree / 'train', '--out', place / 'train.npz'],
        'embed_test': [*embed, '--root', tree / 'test', '--out', place / 'test.npz'],
        'sweep': [
            'misc/sweep.py',
            *tiny,
            '--epochs',
            '1',
            *sweep,
            '--results_dir',
            place / 'sweep',
        ],
    }


def found(place):
    """What each command left, if it has ended. A file that is not whole raises an error."""
    left = {}
    for file in (place / 'run').glob('model_[01]_*.json'):
        about = read_json(file)
        _, epoch, name = file.stem.split('_', 2)
        digest = about['data_digest']
        settings, row = runs.read_probe(place / 'run', int(epoch), name, digest)
        left[file.name] = digest, about['encoder'], settings['seed'], row.tolist()
    for file in place.glob('*.npz'):
        embedded = read_embedded(file)
        left[file.name] = embedded.names.tolist(), embedded.features.tobytes()
    for file in place.glob('*/**/*.pth'):
        read_checkpoint(file)
    for log in (*place.glob('trained/log.csv'), *place.glob('sweep/*/log.csv')):
        run = runs.read_run(log.parent)
        rows = run['log'].drop(columns=['images/s', 'seconds'])
        left[log.parent.name] = run['data_digest'], rows.to_csv()
    if (place / 'sweep' / 'table.csv').exists():
        table = pd.read_csv(place / 'sweep' / 'table.csv')
        left['table'] = table[['data', 'knn', 'linear']].to_csv()
    return left


def started(command, dice):
    """The command as a Job, which in most cases is killed at one of its writes."""
    calls = ['os.fsync', 'os.replace', 'os.unlink', 'hardneg.files.lock', 'numpy.savez']
    strike = None
    if dice.random() < 0.6:
        strike = dice.choice(calls), 1 + int(dice.expovariate(0.5)), signal.SIGKILL
    return Job(command[0], command[1:], strike=strike)


def finish(jobs):
    """Wait for the jobs, and for what a killed sweep had started, which goes on."""
    children = set()
    while any(job.process.poll() is None for job in jobs):
        for job in jobs:
            with contextlib.suppress(psutil.NoSuchProcess):
                children.update(psutil.Process(job.process.pid).children(recursive=True))
        time.sleep(0.01)
    psutil.wait_procs(children, timeout=60)
    for job in jobs:
        job.finish()


def test_two_at_a_time_in_one_place_leave_whole_files(tiny, tree, encoder, run, tmp_path):
    """For a minute, or DRILL_SECONDS; then each alone ends with the bits of one never disturbed."""
    other = tmp_path / 'other' / tree.name
    shutil.copytree(tree, other)
    Image.new('RGB', (16, 16)).save(other / 'test' / 'a' / '0.png')
    lone = tmp_path / 'lone'
    shutil.copytree(encoder.parent, lone / 'run', ignore=shutil.ignore_patterns('*linear*'))
    place = shutil.copytree(lone, tmp_path / 'shared')
    wanted = {}
    for command in commands(lone, tiny, tree, other, encoder).values():
        assert run(command[0], command[1:]).code == 0
        wanted.update(found(lone))

    dice, counts = random.Random(0), collections.Counter()
    ours = commands(place, tiny, tree, other, encoder)
    likely = [name for name in ours if name != 'sweep'] * 3 + ['sweep']
    end = time.monotonic() + float(os.environ.get('DRILL_SECONDS', 60))
    while time.monotonic() < end:
        first, second = dice.choice(likely), dice.choice(likely)
        if dice.random() < 0.5:
            second = first
        pair = {0: first, 1: second}
        jobs = [started(ours[name], dice) for name in pair.values()]
        finish(jobs)
        for name, job in zip(pair.values(), jobs):
            counts[name, ending(job)] += 1
        for name, values in found(place).items():
            assert is_as_wanted(name, values, wanted[name]), (pair, name)
        if dice.random() < 0.3:
            for name in ('trained', 'sweep'):
                shutil.rmtree(place / name, ignore_errors=True)
    print(dict(sorted(counts.items())))
    for command in ours.values():
        assert run(command[0], command[1:]).code == 0
    assert found(place) == found(lone)
    assert_same_outcome(place / 'trained', outcome(lone / 'trained'))


def ending(job):
    """How a job ended: by itself, killed, or refused in one line as the other was writing."""
    if job.code == 0:
        return 'ended'
    if job.code == -signal.SIGKILL:
        return 'killed'
    assert job.code == 1, job.err
    assert 'another run is writing in' in job.err
    assert len(job.err.splitlines()) == 1
    return 'refused'


def is_as_wanted(name, values, whole):
    """Whether a command left what it leaves alone. A log may have fewer epochs yet."""
    if name in ('trained', 'hard_b1_0'):
        same_data = values[0] == whole[0]
        return same_data and whole[1].startswith(values[1].rstrip())
    return values == whole
