"""Runs that are killed, stopped or cut off: the same command ends with the same bits."""

import fcntl
import itertools
import os
import pty
import random
import resource
import signal
import termios

import pytest
import torch
from conftest import Job, assert_same_outcome
from test_drills import flags, wait_for, whole  # noqa: F401

from hardneg.files import read_checkpoint
from hardneg.runtime import UserError


@pytest.mark.parametrize('call', ['os.fsync', 'os.replace', 'hardneg.losses.contrastive_loss'])
def test_killed_at_every_call(flags, whole, run, tmp_path, call):  # noqa: F811
    """SIGKILL before each flush to the disk, each replacement of a file and each step."""
    for n in itertools.count(1):
        results = tmp_path / str(n)
        job = Job('main.py', [*flags, results], strike=(call, n, signal.SIGKILL)).finish()
        if job.code == 0:
            break
        assert job.code == -signal.SIGKILL
        for path in results.glob('*.pth'):
            read_checkpoint(path)
        assert run('main.py', [*flags, results]).code == 0
        assert_same_outcome(results, whole)
        assert not list(results.glob('*.part'))
    assert n > 9


def test_killed_again_and_again(flags, whole, tmp_path):  # noqa: F811
    kills = 0
    while True:
        strike = 'os.replace', 4, signal.SIGKILL
        job = Job('main.py', [*flags, tmp_path], strike=strike).finish()
        if job.code == 0:
            break
        assert job.code == -signal.SIGKILL
        kills += 1
        assert kills < 9
    assert_same_outcome(tmp_path, whole)
    assert kills > 2


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    'call, calls',
    [('utils.load_data', 1), ('os.replace', 14), ('hardneg.losses.contrastive_loss', 9)],
)
def test_signals_at_every_call(flags, whole, run, tmp_path, call, calls, signum):  # noqa: F811
    """Before training a signal ends the process as any; later the run saves first."""
    for n in range(1, calls + 1):
        results = tmp_path / str(n)
        job = Job('main.py', [*flags, results], strike=(call, n, signum)).finish()
        assert job.code in (0, -signum, 128 + signum)
        if (
            call == 'hardneg.losses.contrastive_loss' and n < 9
        ):  # after the last nothing is left to stop
            assert 'the same command continues' in job.out
        if 'the same command continues' in job.out:
            assert job.code == 128 + signum
            state = read_checkpoint(results / 'last.pth')
            assert f'in epoch {state["epoch"] + 1} after step {state["step"]}' in job.out
        assert run('main.py', [*flags, results]).code == 0
        assert_same_outcome(results, whole)


def test_a_closed_pipe_loses_nothing(flags, whole, run, tmp_path):  # noqa: F811
    reader, writer = os.pipe()
    os.close(reader)  # whoever read the output has ended
    job = Job('main.py', [*flags, tmp_path], stdout=writer).finish()
    os.close(writer)
    assert job.code == 128 + signal.SIGPIPE
    assert job.err == ''
    assert run('main.py', [*flags, tmp_path]).code == 0
    assert_same_outcome(tmp_path, whole)


def test_a_closed_terminal_loses_nothing(flags, whole, run, tmp_path):  # noqa: F811
    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    master, slave = pty.openpty()
    streams = dict(stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal)
    job = Job('main.py', [*flags, tmp_path], **streams)
    os.close(slave)
    wait_for((tmp_path / 'model_1.pth').exists, job)
    os.close(master)
    job.process.wait(60)
    assert run('main.py', [*flags, tmp_path]).code == 0
    assert_same_outcome(tmp_path, whole)


LEFT_BEHIND = dict(
    RANK=['1', ''],
    WORLD_SIZE=['2'],
    LOCAL_RANK=['3'],
    MASTER_ADDR=['node1'],
    SLURM_PROCID=['1'],
    SLURM_NTASKS=['8'],
    SLURM_LOCALID=['3'],
    TORCHELASTIC_RUN_ID=['x'],
    HOME=[None, '/proc', '/nowhere', ''],
    XDG_CACHE_HOME=['/nowhere', '/proc'],
    MPLBACKEND=['module://matplotlib_inline.backend_inline', 'tkagg', 'x'],
    LC_ALL=['C', 'xx'],
    PYTHONUTF8=['0'],
    PYTHONIOENCODING=['ascii'],
    TERM=['dumb'],
    COLUMNS=['1'],
)


@pytest.mark.parametrize('seed', range(3))
def test_environments_that_change_nothing(tiny, run, tmp_path, seed):
    """What schedulers, notebooks and containers leave behind, in part."""
    dice = random.Random(seed)
    env = {}
    for name, values in LEFT_BEHIND.items():
        if dice.random() < 0.6:
            env[name] = dice.choice(values)
    results = tmp_path / 'Ergebnisse ü 結果'
    training = [*tiny, '--epochs', '1', '--results_dir', results]
    job = run('main.py', training, env=env, cwd=tmp_path)
    assert job.code == 0, (env, job.err)
    assert job.err == '', env
    job = run('misc/plot.py', ['curves', results], env=env, cwd=tmp_path)
    assert job.code == 0, (env, job.err)
    assert 'Traceback' not in job.err, env
    assert (results / 'curves.png').exists()
    assert list(tmp_path.iterdir()) == [results]


def test_few_open_files_change_nothing(tiny, run, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    command = [*tiny, '--epochs', '1', '--results_dir', tmp_path]
    job = run('main.py', command, preexec_fn=limit)
    assert job.code == 0
    assert job.err == ''


def test_flipped_bits_are_noticed(flags, run, tmp_path):  # noqa: F811
    """One flipped bit anywhere in last.pth is an error, or changes nothing that a run reads."""
    assert run('main.py', [*flags, tmp_path]).code == 0
    file = tmp_path / 'last.pth'
    good, dice, noticed = file.read_bytes(), random.Random(2), 0
    expected = torch.load(file, weights_only=True)['model']
    for _ in range(30):
        bad, place = bytearray(good), dice.randrange(len(good))
        bad[place] ^= 1 << dice.randrange(8)
        file.write_bytes(bad)
        try:
            found = read_checkpoint(file)['model']
            for name, x in expected.items():
                assert torch.equal(x, found[name])
        except UserError as error:
            assert 'last.pth' in str(error)
            noticed += 1
    assert noticed >= 28
    file.write_bytes(good[:-1])
    job = run('main.py', [*flags, tmp_path])
    assert job.code == 1
    assert 'beside it is' in job.err
    assert 'model_3.pth' in job.err
    assert job.err.count('\n') == 1
