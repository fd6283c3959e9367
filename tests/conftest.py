"""Fixtures and helpers: a tiny data set, scripts as processes, runs that are compared."""

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
    # The facts in the tests are of a CPU: exact bits, gloo, default flags.
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hardneg import decoding, runtime

HOME = Path(__file__).parents[1]
CACHE = tempfile.TemporaryDirectory()  # the user's is never written; deleted when this process ends
os.environ['XDG_CACHE_HOME'] = CACHE.name
os.environ['OMP_NUM_THREADS'] = '1'
os.fsync = lambda descriptor: None  # it is slow, and no test ends in a power cut
os.environ['PYTHONPATH'] = os.pathsep.join(str(HOME / part) for part in ('', 'misc', 'tests'))
# The tensors of the tests are too small to share, and their bits must not depend on the machine.
torch.set_num_threads(1)
# Imported once in a process that forks the scripts
multiprocessing.set_forkserver_preload(['main', 'linear', 'sweep', 'ranks'])


@pytest.fixture(scope='session')
def tree(tmp_path_factory):
    """A folder of 3 classes that differ in colour: 30 training and 9 test images of 16 px."""
    root = tmp_path_factory.mktemp('tree')
    rng = np.random.default_rng(0)
    for split, count in (('train', 10), ('test', 3)):
        for channel, name in enumerate('abc'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = rng.integers(120, size=(16, 16, 3), dtype=np.uint8)
                image[..., channel] += 120
                Image.fromarray(image).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded from here on."""
    names = []
    decode = decoding.decode

    def spy(path, *args):
        names.append(path.name)
        return decode(path, *args)

    monkeypatch.setattr(decoding, 'decode', spy)
    return names


@pytest.fixture(scope='session')
def tiny(tree):
    """The flags of a run of seconds: 3 steps an epoch."""
    flags = (
        f'--dataset_name folder --root {tree} --store_size 16 --image_size 8 --batch_size 8 '
        '--arch resnet18 --width 0.25 --precision fp32 --k 5 --knn_every 2 --save_every 1'
    )
    return flags.split()


class Job:
    """One of the scripts as a process of its own.

    It is forked from a process that has imported torch. With torchrun, an environment or arguments
    of Popen it is started anew.

    Args:
        script: path below the project.
        flags: its arguments.
        torchrun: flags of torchrun, which starts the script.
        env: changes of the environment; None removes a variable.
        cwd: its working directory.
        strike: (call, n, signum) sends a forked script the signal when it calls the function of
            this name, such as 'os.replace', for the nth time.
    """

    def __init__(self, script, flags, torchrun=(), env=None, cwd=None, strike=None, **popen):
        command = [str(HOME / script), *map(str, flags)]
        if not (torchrun or env or popen):
            self.process = Forked(command, cwd, strike)
            return
        start = [sys.executable]
        if torchrun:
            start += ['-m', 'torch.distributed.run', '--rdzv-backend=c10d']
            start += ['--rdzv-endpoint=localhost:0', *torchrun]
        environment = dict(os.environ)
        for name, value in (env or {}).items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.process = subprocess.Popen(
            [*start, *command], env=environment, cwd=cwd, **{**pipes, **popen}
        )

    def finish(self, timeout=600):  # against hangs alone: compiling may take minutes
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
    """What a Job needs of subprocess.Popen, of a process that starts in a tenth of a second."""

    def __init__(self, command, cwd, strike):
        self.texts = [Path(tempfile.mkstemp()[1]) for _ in range(2)]  # of stdout and stderr
        forkserver = multiprocessing.get_context('forkserver')
        arguments = command, dict(os.environ), cwd or os.getcwd(), self.texts, strike
        self.forked = forkserver.Process(target=execute, args=arguments)
        self.forked.start()
        self.pid = self.forked.pid
        self.kill = self.forked.kill

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
        said = []
        for path in self.texts:
            said.append(path.read_text(errors='replace'))
            path.unlink()
        return said


def execute(command, environment, cwd, texts, strike):
    """Become `python COMMAND`."""
    for descriptor, path in zip((1, 2), texts):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
    encoding = environment.get('PYTHONIOENCODING')  # which Python reads as it starts
    sys.stdout = open(1, 'w', encoding=encoding, closefd=False)
    sys.stderr = open(2, 'w', encoding=encoding, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    # A process in the background may have been told to ignore them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    if strike:
        strike_at(*strike)
    runpy.run_path(command[0], run_name='__main__')


def strike_at(call, nth, signum):
    """Send this process the signal at the nth call of a function."""
    module_name, _, name = call.rpartition('.')
    module = importlib.import_module(module_name)
    function = getattr(module, name)
    calls = itertools.count(1)

    def struck(*args, **kwargs):
        if next(calls) == nth:
            os.kill(os.getpid(), signum)
        return function(*args, **kwargs)

    setattr(module, name, struck)
    if hasattr(pathlib, '_NormalAccessor'):  # Python 3.10, whose Path keeps the functions of os
        setattr(pathlib._NormalAccessor, name, staticmethod(struck))


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
    states['scaler'] = {name: torch.as_tensor(x) for name, x in last['scaler'].items()}
    states['optimizer'] = {}
    for i, moments in last['optimizer']['state'].items():
        for name, x in moments.items():
            states['optimizer'][f'{i}.{name}'] = x
    return log, states


def assert_same_outcome(results, expected):
    log, states = outcome(results)
    expected_log, expected_states = expected
    pd.testing.assert_frame_equal(log, expected_log, check_exact=True)
    assert states.keys() == expected_states.keys()
    for file, state in states.items():
        assert state.keys() == expected_states[file].keys()
        for name, x in state.items():
            assert torch.equal(x, expected_states[file][name]), (file, name)


def stop_after(checks, monkeypatch):
    """Ask a run to stop at the next look for signals after so many.

    The first five are between the measures of the untrained encoder; a step on a CPU has one.
    """
    seen = itertools.count()

    def check(self, due=False):
        if next(seen) == checks:
            raise runtime.Stopped(signal.SIGTERM)

    monkeypatch.setattr(runtime.Signals, 'check', check)


def skip_if_not_compiled(said):
    """Skip the test if main.py's output says that an early torch could not compile the network."""
    if 'Not compiled' in said and torch.__version__ < '2.7':
        pytest.skip('this torch fails to compile so small a network on a CPU')
