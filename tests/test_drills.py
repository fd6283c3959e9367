"""Faults against the real scripts as processes: kills, signals, full disks, two runs in one place."""

import fcntl
import itertools
import os
import pty
import random
import resource
import signal
import termios
import time

import pandas as pd
import pytest
import torch
from conftest import Job, assert_same_outcome, outcome

from model import read_checkpoint


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


@pytest.mark.parametrize('signum, code', [(signal.SIGTERM, 143),
                                          pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
                                          pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow)])
def test_train_stop_resume_probe(flags, run, whole, tmp_path, signum, code):
    job = Job('main.py', [*flags, tmp_path / 'r'])
    wait_for((tmp_path / 'r' / 'model_0.pth').exists, job)  # later ones are written while it trains on
    job.process.send_signal(signum)
    if signum == signal.SIGTERM:  # from a scheduler to each process, and from torchrun once more
        time.sleep(0.02)
        job.process.send_signal(signum)
    job.finish()
    assert job.code == code and job.err == '', job.err
    assert job.out.splitlines()[-1].endswith('the same command continues')
    again = run('main.py', [*flags, tmp_path / 'r'])
    assert again.code == 0 and 'Continuing' in again.out and 'Finished' in again.out
    assert_same_outcome(tmp_path / 'r', whole)
    probe = run('linear.py', ['--model_path', tmp_path / 'r' / 'model_3.pth', '--epochs', '2'])
    assert probe.code == 0 and 'linear probe' in probe.out.splitlines()[-1]
    assert len(pd.read_csv(tmp_path / 'r' / 'model_3_linear.csv')) == 2


def test_second_run_in_one_directory_is_refused(flags, run, tmp_path):
    flags = [*flags, tmp_path / 'r', '--epochs', '500', '--save_every', '500']
    first = Job('main.py', flags)
    wait_for((tmp_path / 'r' / 'config.json').exists, first)
    second = run('main.py', flags)
    assert first.process.poll() is None
    first.process.kill()
    first.finish()
    assert second.code == 1 and 'another run is writing in' in second.err and second.err.count('\n') == 1


@pytest.mark.parametrize('surroundings', [
    dict(env={'PYTHONIOENCODING': 'ascii'}), pytest.param(dict(
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))), marks=pytest.mark.slow)],
    ids=['ASCII', '64 files'])
def test_surroundings_that_change_nothing(tiny, run, tmp_path, surroundings):
    """No letters but ASCII to print with, 64 open files."""
    results = tmp_path / 'Ergebnisse ü 結果'
    job = run('main.py', [*tiny, '--epochs', '1', '--results_dir', results], **surroundings)
    assert job.code == 0 and job.err == '' and job.out.splitlines()[-1].startswith('Finished')
    assert (results / 'model_1.pth').exists()


LEFT = dict(RANK=['1', ''], WORLD_SIZE=['2'], LOCAL_RANK=['3'], MASTER_ADDR=['node1'], SLURM_PROCID=['1'],
            SLURM_NTASKS=['8'], SLURM_LOCALID=['3'], TORCHELASTIC_RUN_ID=['x'], HOME=[None, '/proc', '/nowhere', ''],
            XDG_CACHE_HOME=['/nowhere', '/proc'],
            MPLBACKEND=['module://matplotlib_inline.backend_inline', 'tkagg', 'x'],
            LC_ALL=['C', 'xx'], PYTHONUTF8=['0'], PYTHONIOENCODING=['ascii'], TERM=['dumb'], COLUMNS=['1'])


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
def test_environments_that_change_nothing(tiny, run, tmp_path, seed):
    """What schedulers, notebooks and containers leave behind, in part."""
    dice, results = random.Random(seed), tmp_path / 'Ergebnisse ü 結果'
    env = {name: dice.choice(values) for name, values in LEFT.items() if dice.random() < 0.6}
    for script, flags in (('main.py', [*tiny, '--epochs', '1', '--results_dir', results]),
                          ('misc/plot.py', ['curves', results])):
        job = run(script, flags, env=env, cwd=tmp_path)
        assert job.code == 0 and 'Traceback' not in job.err and (script != 'main.py' or job.err == ''), (env, job.err)
    assert (results / 'curves.png').exists() and [path.name for path in tmp_path.iterdir()] == [results.name]


@pytest.mark.slow
def test_closed_pipe_and_closed_terminal_save_or_lose_nothing(flags, whole, run, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)  # whoever read the output has ended
    job = Job('main.py', [*flags, tmp_path / 'pipe'], stdout=writer).finish()
    os.close(writer)
    assert job.code == 128 + signal.SIGPIPE and job.err == ''
    master, slave = pty.openpty()
    job = Job('main.py', [*flags, tmp_path / 'terminal'], stdin=slave, stdout=slave, stderr=slave,
              preexec_fn=lambda: (os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0)))
    os.close(slave)
    wait_for((tmp_path / 'terminal' / 'model_1.pth').exists, job)
    os.close(master)
    job.process.wait(60)
    for name in ('pipe', 'terminal'):
        assert run('main.py', [*flags, tmp_path / name]).code == 0
        assert_same_outcome(tmp_path / name, whole)


def test_places_that_cannot_be_written(flags, run, tmp_path):
    (tmp_path / 'file').write_text('')
    job = run('main.py', [*flags, tmp_path / 'file' / 'r'])
    assert job.code == 1 and f'cannot write in {tmp_path}/file/r' in job.err and job.err.count('\n') == 1
    if os.getuid() == 0 and os.path.isdir('/proc/self'):  # root may write anywhere but where the kernel refuses
        job = run('main.py', [*flags, '/proc/results'])
    else:
        (tmp_path / 'closed').mkdir(mode=0o500)
        job = run('main.py', [*flags, tmp_path / 'closed' / 'r'])
    assert job.code == 1 and 'choose another directory' in job.err and job.err.count('\n') == 1


def test_unreadable_image_files_end_before_training(tree, tiny, run, tmp_path):
    root = tmp_path / 'data'
    for split in ('train', 'test'):
        for name in 'ab':
            (root / split / name).mkdir(parents=True)
            (root / split / name / 'broken.png').write_bytes(b'\x89PNG')
    flags = list(tiny)
    flags[flags.index('--root') + 1] = str(root)
    job = run('main.py', [*flags, '--results_dir', tmp_path / 'r'])
    assert job.code == 1 and '4 damaged images' in job.err and 'Traceback' not in job.err
    assert not (tmp_path / 'r').exists()


@pytest.mark.slow
@pytest.mark.parametrize('call', ['os.fsync', 'os.replace', 'step.train_step'])
def test_killed_at_every_call_the_same_command_ends_with_the_same_bits(flags, whole, run, tmp_path, call):
    """SIGKILL before each flush to the disk, each replacement of a file and each step."""
    for n in itertools.count(1):
        results = tmp_path / str(n)
        job = Job('main.py', [*flags, results], strike=(call, n, signal.SIGKILL)).finish()
        if job.code == 0:
            break
        for path in results.glob('*.pth'):
            read_checkpoint(path)
        assert job.code == -signal.SIGKILL and run('main.py', [*flags, results]).code == 0
        assert_same_outcome(results, whole)
        assert not [*results.glob('last.pth.*')]
    assert n > 9


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_bits(flags, whole, tmp_path):
    kills = 0
    while (job := Job('main.py', [*flags, tmp_path], strike=('os.replace', 4, signal.SIGKILL)).finish()).code:
        kills += job.code == -signal.SIGKILL
        assert kills < 9
    assert_same_outcome(tmp_path, whole)
    assert kills > 2


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('call, calls', [('data.load_data', 1), ('os.replace', 14), ('step.train_step', 9)])
def test_signals_at_every_call(flags, whole, run, tmp_path, call, calls, signum):
    """Until training begins there is nothing to save, and a signal ends the process as any; later it saves first."""
    for n in range(1, calls + 1):
        results = tmp_path / str(n)
        job = Job('main.py', [*flags, results], strike=(call, n, signum)).finish()
        if job.code:
            assert job.code in (-signum, 128 + signum)
        if call == 'step.train_step' and n < 9:  # after the last one there is nothing left to stop
            assert 'the same command continues' in job.out
        if 'the same command continues' in job.out:
            assert job.code == 128 + signum
            state = read_checkpoint(results / 'last.pth')
            assert f'in epoch {state["epoch"] + 1} after step {state["step"]}' in job.out
        assert run('main.py', [*flags, results]).code == 0
        assert_same_outcome(results, whole)


@pytest.mark.slow
def test_bit_flips_are_noticed(flags, run, tmp_path):
    """One flipped bit anywhere in last.pth is an error, or changes nothing that a run reads."""
    results = tmp_path / 'r'
    assert run('main.py', [*flags, results]).code == 0
    good, dice = (results / 'last.pth').read_bytes(), random.Random(2)
    expected, noticed = torch.load(results / 'last.pth', weights_only=True), 0
    for _ in range(30):
        bad, place = bytearray(good), dice.randrange(len(good))
        bad[place] ^= 1 << dice.randrange(8)
        (results / 'last.pth').write_bytes(bad)
        try:
            state = read_checkpoint(results / 'last.pth')
            assert all(torch.equal(value, state['model'][name]) for name, value in expected['model'].items())
        except ValueError as error:
            assert 'last.pth' in str(error)
            noticed += 1
    assert noticed >= 28
    (results / 'last.pth').write_bytes(good[:-1])
    job = run('main.py', [*flags, results])
    assert job.code == 1 and 'beside it is' in job.err and 'model_3.pth' in job.err and job.err.count('\n') == 1
