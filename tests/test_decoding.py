"""Slow drills of decoding: kills, more images than memory, two ranks on one copy, and the time of a second start."""

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

from data import load_data

pytestmark = pytest.mark.slow
LOAD = [sys.executable, '-c', f'import sys; sys.path.insert(0, {str(HOME)!r}); import data; '
        'data.load_data("folder", sys.argv[1], int(sys.argv[2]))']


def photographs(root, n, size=256):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).resize((size, size + 8))
    root.mkdir()
    for i in range(n):
        image.rotate(i).save(root / f'{i:05}.jpg')
    return root


@pytest.mark.parametrize('call, nth', [('decoding.decode_or_why', n) for n in (1, 60, 200)]
                         + [('numpy.savez', 1), ('os.fsync', 1), ('os.replace', 1)], ids=str)
def test_killed_anywhere_in_decoding_nothing_is_taken_for_whole(tmp_path, call, nth):
    root = photographs(tmp_path / 'x', 200, 64)
    job = Job('main.py', ['--dataset_name', 'folder', '--root', root, '--store_size', '48', '--results_dir', tmp_path],
              strike=(call, nth, signal.SIGKILL)).finish()
    assert job.code == -signal.SIGKILL and not list(root.glob('.decoded/*.npy'))
    whole = load_data('folder', root, 48, cache_dir=tmp_path / 'whole').train
    assert torch.equal(load_data('folder', root, 48).train, whole)
    assert not (root / '.decoded' / '48-crop.part').exists()


def test_five_times_more_images_than_memory_train_to_the_end(tmp_path):
    """Anonymous memory, which RLIMIT_DATA counts, may grow by a fifth of the images; those are mapped."""
    n, root = 32_000, photographs(tmp_path / 'x', 64, 64)
    for i in range(64, n):
        os.link(root / f'{i % 64:05}.jpg', root / f'{i:05}.jpg')
    flags = ['--dataset_name', 'folder', '--root', root, '--store_size', '144', '--image_size', '8', '--test_size', '8',
             '--batch_size', '64', '--arch', 'resnet18', '--width', '0.125', '--epochs', '1', '--results_dir']
    code = ('import resource, sys; import main; '
            'used = int(next(x for x in open("/proc/self/status") if x.startswith("VmData")).split()[1]) * 1024; '
            'limit = used + int(sys.argv.pop(1)); resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)); '
            'main.main(sys.argv[1:])')
    size = n * 3 * 144**2  # 2 GB
    run = subprocess.run([sys.executable, '-c', code, str(size // 5), *map(str, flags), str(tmp_path / 'r')],
                         cwd=HOME, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1',
                                                                        'MALLOC_ARENA_MAX': '2'})
    assert run.returncode == 0, run.stderr[-2000:]
    assert 'Finished' in run.stdout and (root / '.decoded' / '144-crop.npy').stat().st_size > size


def test_two_ranks_decode_once_and_hold_one_copy(tmp_path):
    root = photographs(tmp_path / 'x', 1000, 96)
    flags = ['--dataset_name', 'folder', '--root', root, '--store_size', '128', '--image_size', '8', '--test_size', '8',
             '--batch_size', '64', '--arch', 'resnet18', '--width', '0.125', '--epochs', '200', '--results_dir',
             tmp_path / 'r']
    job = Job('main.py', flags, torchrun=['--nproc_per_node', '2'])
    log = tmp_path / 'r' / 'log.csv'
    while not (log.exists() and log.read_text().count('\n') > 3) and job.process.poll() is None:  # two epochs
        time.sleep(0.1)
    children = subprocess.run(['pgrep', '-P', str(job.process.pid)], capture_output=True, text=True).stdout.split()
    total = 0
    for pid in children:
        smaps = open(f'/proc/{pid}/smaps').read()
        mapping = re.search(r'128-crop\.npy\n(?:.*\n)*?Pss: +(\d+) kB', smaps)
        assert mapping, 'the rank does not map the file'
        total += int(mapping[1]) * 1024
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    size = (root / '.decoded' / '128-crop.npy').stat().st_size
    assert len(children) == 2 and 0.9 * size < total < 1.2 * size


def test_a_parent_that_is_killed_leaves_no_process_behind(tmp_path):
    root = photographs(tmp_path / 'x', 600)
    with subprocess.Popen([*LOAD, root, '128'], stdout=subprocess.DEVNULL) as process:
        while not (root / '.decoded' / '128-crop.part').exists() and process.poll() is None:
            time.sleep(0.001)
        children = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True).stdout
        process.kill()
    assert children == ''
