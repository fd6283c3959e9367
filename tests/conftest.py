import importlib
import itertools
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

if 'TEST_CUDA' not in os.environ:
    os.environ['CUDA_VISIBLE_DEVICES'] = ''  # the facts below are of a CPU: exact bits, gloo, default flags

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hardneg import runtime

HOME = Path(__file__).parents[1]
os.environ.update(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(str(HOME / part) for part in ('', 'misc', 'tests')))
multiprocessing.set_forkserver_preload(['main', 'linear', 'sweep', 'test_distributed'])  # imported once, forked often
torch.set_num_threads(1)  # the tests' tensors are too small to share, and their bits must not depend on the machine


@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    """A folder data set of 3 classes that colour tells apart: 30 training and 9 test images of 16 px."""
    root, rng = tmp_path_factory.mktemp('tree'), np.random.default_rng(0)
    for split, count in (('train', 10), ('test', 3)):
        for c, name in enumerate('abc'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(120, size=(16, 16, 3), dtype=np.uint8)
                image[..., c] += 120
                Image.fromarray(image).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def tiny(tree):
    """The flags of a run of seconds: 3 steps an epoch."""
    return ['--dataset_name', 'folder', '--root', str(tree), '--store_size', '16', '--image_size', '8', '--batch_size',
            '8', '--arch', 'resnet18', '--width', '0.25', '--k', '5', '--knn_every', '2', '--save_every', '1']


class Job:
    """One of the scripts as a process of its own: forked from one that has imported torch, or, with torchrun, an
    environment or arguments of Popen, started anew.

    strike=('os.replace', n, signum) sends a forked one the signal when it calls the function for the nth time.
    """

    def __init__(self, script, flags, torchrun=(), env=None, cwd=None, strike=None, **kwargs):
        command = [str(HOME / script), *map(str, flags)]
        if not (torchrun or env or kwargs):
            self.process = Forked(command, cwd, strike)
            return
        start = [sys.executable]
        if torchrun:
            start += ['-m', 'torch.distributed.run', '--rdzv-backend=c10d', '--rdzv-endpoint=localhost:0', *torchrun]
        environment = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen([*start, *command], env=environment, cwd=cwd, **{**pipes, **kwargs})

    def finish(self, timeout=600):  # of a hang; compiling may take minutes
        try:
            self.out, self.err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            raise
        return self

    @property
    def code(self):
        return self.process.returncode


class Forked:
    """What a Job needs of subprocess.Popen, of a process that takes a tenth of a second to start."""

    def __init__(self, command, cwd, strike):
        self.texts = [Path(tempfile.mkstemp()[1]) for _ in range(2)]  # of stdout and stderr
        self.forked = multiprocessing.get_context('forkserver').Process(
            target=execute, args=(command, dict(os.environ), cwd or os.getcwd(), self.texts, strike))
        self.forked.start()
        self.pid, self.kill = self.forked.pid, self.forked.kill

    def poll(self):
        return self.forked.exitcode

    returncode = property(poll)

    def send_signal(self, signum):
        if self.poll() is None:
            os.kill(self.pid, signum)

    def communicate(self, timeout):
        self.forked.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        said = [path.read_text(errors='replace') for path in self.texts]
        for path in self.texts:
            path.unlink()
        return said


def execute(command, environment, cwd, texts, strike):
    """Become `python COMMAND`."""
    for descriptor, path in zip((1, 2), texts):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, 'w', closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    if strike:
        call, nth, signum = strike
        module, name = importlib.import_module(call.rpartition('.')[0]), call.rpartition('.')[2]
        function, calls = getattr(module, name), itertools.count(1)

        def struck(*args, **kwargs):
            if next(calls) == nth:
                os.kill(os.getpid(), signum)
            return function(*args, **kwargs)
        setattr(module, name, struck)
        if hasattr(pathlib, '_NormalAccessor'):  # Python 3.10, whose Path keeps the functions of os
            setattr(pathlib._NormalAccessor, name, staticmethod(struck))
    runpy.run_path(command[0], run_name='__main__')


def skip_if_not_compiled(said):
    """Skip the test if the output of main.py says that an early torch could not compile the network."""
    if 'Not compiled' in said and torch.__version__ < '2.7':
        pytest.skip('this torch fails to compile so small a network on a CPU')


@pytest.fixture(scope='session')
def run():
    """run(script, flags) -> the finished Job"""
    return lambda script, flags, **kwargs: Job(script, flags, **kwargs).finish()


def outcome(results):
    """What a run on a CPU determines bit by bit: its log without times, and its tensors."""
    log = pd.read_csv(results / 'log.csv').drop(columns=['images/s', 'seconds'])
    states = {}
    for path in sorted(results.glob('model_*.pth')):
        states[path.name] = torch.load(path, weights_only=True)
    last = torch.load(results / 'last.pth', weights_only=True)
    states['last'] = last['model']
    states['scaler'] = {name: torch.as_tensor(x) for name, x in (*last['scaler'].items(), ('skipped', last['skipped']))}
    states['optimizer'] = {f'{i}.{name}': value for i, values in last['optimizer']['state'].items()
                           for name, value in values.items()}
    return log, states


def assert_same_outcome(results, expected):
    log, states = outcome(results)
    other_log, other_states = expected
    pd.testing.assert_frame_equal(log, other_log, check_exact=True)
    assert states.keys() == other_states.keys()
    for file, state in states.items():
        assert state.keys() == other_states[file].keys()
        for name, value in state.items():
            assert torch.equal(value, other_states[file][name]), (file, name)


def stop_after(checks, monkeypatch):
    """Ask the run to stop at the next look after so many: the first five are of the untrained encoder's measures."""
    seen = iter([False] * checks + [True])

    def check(self, due=False):
        if next(seen, False):
            raise runtime.Stopped(signal.SIGTERM)

    monkeypatch.setattr(runtime.Signals, 'check', check)
