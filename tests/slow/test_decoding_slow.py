"""Decoding under kills, with more images than memory, and by two ranks."""

import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import HOME, Job
from PIL import Image

from hardneg.decoding import index_file
from utils import load_data

SMALL = '--image_size 8 --test_size 8 --batch_size 64 --arch resnet18 --width 0.25'


def rows_of(root, size):
    """The files of rows of a folder, which may be half-written."""
    return list(index_file(root, size, 'crop').parent.glob(f'{size}-crop-*.rows'))


def photographs(root, n, size=256):
    rng = np.random.default_rng(0)
    array = rng.integers(256, size=(size, size, 3), dtype=np.uint8)
    image = Image.fromarray(array).resize((size, size + 8))
    root.mkdir()
    for i in range(n):
        image.rotate(i).save(root / f'{i:05}.jpg')
    return root


@pytest.mark.parametrize(
    'call, nth',
    [
        ('hardneg.decoding.decode_or_why', 1),
        ('hardneg.decoding.decode_or_why', 60),
        ('hardneg.decoding.decode_or_why', 200),
        ('os.fsync', 1),
        ('os.fsync', 2),
        ('os.replace', 1),
    ],
)
def test_killed_anywhere_in_decoding_nothing_is_taken_for_whole(tmp_path, monkeypatch, call, nth):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))  # without rows of other tests
    root = photographs(tmp_path / 'x', 200, 64)
    flags = ['--dataset_name', 'folder', '--root', root, '--store_size', '48']
    strike = call, nth, signal.SIGKILL
    job = Job('main.py', [*flags, '--results_dir', tmp_path], strike=strike).finish()
    assert job.code == -signal.SIGKILL
    assert not index_file(root, 48, 'crop').exists()
    whole = load_data('folder', root, store_size=48, cache_dir=tmp_path / 'whole').train
    assert torch.equal(load_data('folder', root, store_size=48).train, whole)
    (rows,) = rows_of(root, 48)
    assert rows.stat().st_size == whole.numel()


LIMITED = """
import resource, sys
import main
for line in open('/proc/self/status'):
    if line.startswith('VmData'):
        used = 1024 * int(line.split()[1])
limit = used + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
main.main(sys.argv[1:])
"""


def test_five_times_more_images_than_memory_train_to_the_end(tmp_path):
    """Anonymous memory, which RLIMIT_DATA counts, may grow by a fifth of the images' size."""
    n = 32_000
    root = photographs(tmp_path / 'x', 64, 64)
    for i in range(64, n):
        os.link(root / f'{i % 64:05}.jpg', root / f'{i:05}.jpg')
    size = n * 3 * 144**2  # 2 GB
    flags = ['--dataset_name', 'folder', '--root', root, '--store_size', '144', *SMALL.split()]
    flags += ['--epochs', '1', '--results_dir', tmp_path / 'r']
    run = subprocess.run(
        [sys.executable, '-c', LIMITED, str(size // 5), *map(str, flags)],
        cwd=HOME,
        capture_output=True,
        text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'MALLOC_ARENA_MAX': '2'},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'Finished' in run.stdout
    (rows,) = rows_of(root, 144)
    assert rows.stat().st_size == size


def children(pid):
    listed = subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True)
    return listed.stdout.split()


def test_two_ranks_decode_once_and_hold_one_copy(tmp_path):
    root = photographs(tmp_path / 'x', 1000, 96)
    flags = ['--dataset_name', 'folder', '--root', root, '--store_size', '128', *SMALL.split()]
    flags += ['--epochs', '200', '--results_dir', tmp_path / 'r']
    job = Job('main.py', flags, torchrun=['--nproc_per_node', '2'])
    log = tmp_path / 'r' / 'log.csv'
    epochs = 0
    while epochs < 2:
        assert job.process.poll() is None
        time.sleep(0.1)
        if log.exists():
            epochs = log.read_text().count('\n') - 2  # without the header and the epoch 0
    ranks = children(job.process.pid)
    (rows,) = rows_of(root, 128)
    held = 0
    for pid in ranks:
        smaps = open(f'/proc/{pid}/smaps').read()
        share = re.search(rf'{rows.name}\n(?:.*\n)*?Pss: +(\d+) kB', smaps)
        assert share, 'the rank does not map the file'
        held += 1024 * int(share[1])
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    assert len(ranks) == 2
    size = rows.stat().st_size
    assert 0.9 * size < held < 1.2 * size


LOAD = """
import sys
from utils import load_data
load_data('folder', sys.argv[1], store_size=128)
"""


def test_decoding_that_is_killed_leaves_no_process_behind(tmp_path):
    root = photographs(tmp_path / 'x', 600)
    command = [sys.executable, '-c', LOAD, root]
    with subprocess.Popen(command, cwd=HOME, stdout=subprocess.DEVNULL) as process:
        while not rows_of(root, 128):
            assert process.poll() is None
            time.sleep(0.001)
        started = children(process.pid)
        process.kill()
    assert started == []
