"""Sweeps as processes; scripts on names of any letters; features by several ranks."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HOME, Job
from nbclient import NotebookClient
from PIL import Image
from ranks import on_ranks
from test_misc import some_names

import bench
import embed
import linear
import main
import pictures
import plot
import sequences
import sweep
from hardneg.files import read_json, write_json, write_tensors
from hardneg.folder import nfc
from model import Model


def test_a_sweep_trains_probes_and_continues(tiny, tmp_path, run):
    results = tmp_path / 'r'
    flags = [*tiny, '--epochs', '1', '--results_dir', results]
    flags += ['--objectives', 'standard', 'hard_b2', '--seeds', '2', '--jobs', '2']
    probed = [*flags, '--probe', '--epochs 2']
    first = run('misc/sweep.py', probed, cwd=tmp_path)
    assert first.code == 0, first.err
    table = (results / 'table.csv').read_bytes()
    assert pd.read_csv(results / 'table.csv')['beta'].tolist() == [0, 2]
    assert first.out.count('linear probe') >= 4

    # What is missing or of another encoder is done again, and nothing else.
    (results / 'standard_1' / 'model_1_linear.csv').unlink()
    about = results / 'hard_b2_0' / 'model_1_linear.json'
    write_json(about, {**read_json(about), 'encoder': 1})
    again = run('misc/sweep.py', probed, cwd=tmp_path)
    assert again.code == 0, again.err
    assert again.out.count('probed before') == 2
    assert (results / 'table.csv').read_bytes() == table

    other = run('misc/sweep.py', [*flags, '--probe', '--epochs 2 --lr 0.1'], cwd=tmp_path)
    assert other.out.count('probed before') == 0
    broken = run('misc/sweep.py', [*probed, '--batch_size', '31'], cwd=tmp_path)
    assert broken.code == 1
    assert '--batch_size' in broken.err
    assert 'Traceback' not in broken.err


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_sweep_lets_its_runs_save(tiny, tmp_path, signum):
    flags = [*tiny, '--epochs', '400', '--save_every', '400', '--results_dir', tmp_path]
    flags += ['--objectives', 'standard', 'hard_b2', '--jobs', '2']
    job = Job('misc/sweep.py', flags, cwd=tmp_path)
    logs = [tmp_path / name / 'log.csv' for name in ('standard_0', 'hard_b2_0')]

    def trains(log):
        return log.exists() and log.read_text().count('\n') > 2

    while job.process.poll() is None and not all(trains(log) for log in logs):
        time.sleep(0.01)
    job.process.send_signal(signum)
    job.finish()
    assert job.code == 128 + signum
    assert job.err == 'Stopped; the same command continues the sweep\n'
    for log in logs:  # without the signal, the state saved would be that of the beginning
        saved = torch.load(log.with_name('last.pth'), weights_only=True)
        assert saved['epoch'] == pd.read_csv(log)['epoch'].max() > 0
    assert not (tmp_path / 'standard_1').exists()


def test_several_ranks_write_the_features_of_one(tree, tmp_path, run):
    torch.manual_seed(0)
    write_tensors(tmp_path / 'model.pth', Model(8, 'resnet18', width=0.25).state_dict())
    root = tmp_path / 'images'
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(600):  # more than a block of each rank
        pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f'{i}.png')
    (root / '300.png').write_bytes(b'no image')
    found = []
    for name, torchrun in (('one.npz', ()), ('three.npz', ('--nproc_per_node', '3'))):
        flags = ['--model_path', tmp_path / 'model.pth', '--root', root, '--out', tmp_path / name]
        job = run('misc/embed.py', flags, torchrun=torchrun)
        assert job.code == 0, job.err
        assert '599 features of 128 numbers' in job.out
        found.append(np.load(tmp_path / name))
    one, three = found
    assert one['names'].tolist() == three['names'].tolist()
    assert np.abs(one['features'] - three['features']).max() < 1e-6


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.filterwarnings('error::UserWarning', 'ignore:Glyph')
def test_names_of_any_letters_are_directories_classes_and_files(
    tiny, tmp_path, monkeypatch, seed, capsys
):
    sys.stdout.reconfigure(errors='backslashreplace')  # as runtime.run() does
    monkeypatch.setattr(pictures, 'BATCH', 6)
    monkeypatch.chdir(tmp_path)
    names = []
    for name in some_names(seed, 40, 30):
        if name.strip() == name and name[0] not in '.~':
            names.append(name)
    names[0] += 'x' * (250 - len(os.fsencode(names[0])))
    roots, classes, files, runs, out = names[:2], names[2:5], names[5:8], names[8:10], names[10]

    for root in roots:
        for part in 'train', 'test':
            for name in classes:
                place = f'{root}/{part}/{name}'
                os.makedirs(place)
                for i, file in enumerate(files):
                    rng = np.random.default_rng(len(root) + i)
                    pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(f'{place}/{file}.png')
    for root, name in zip(roots, runs):
        main.main([*tiny, '--root', root, '--epochs', '1', '--results_dir', f'runs/{name}'])
    results = sorted((tmp_path / 'runs').iterdir())
    checkpoint = str(results[0] / 'model_1.pth')
    for root in roots:
        linear.main(['--model_path', checkpoint, '--epochs', '1', '--root', root])
    assert len(list(results[0].glob('model_1_linear*.csv'))) == 2
    assert len(results) == 2
    weights = torch.load(results[0] / 'model_1_linear.pth', weights_only=True)
    assert weights['classes'] == sorted(map(nfc, classes))

    plot.main(['curves', *map(str, results)])
    for what in 'neighbours', 'similarity', 'negatives':
        plot.main([what, checkpoint])
    sweep.main(['--table_only', '--results_dir', 'runs'])
    table = pd.read_csv('runs/table.csv', encoding_errors='surrogateescape')
    assert sorted(table['data']) == sorted(roots)
    embed.main(['--model_path', checkpoint, '--root', roots[0], '--out', f'{out}.npz'])
    assert f'train/{classes[0]}/{files[0]}.png' in np.load(f'{out}.npz')['names'].tolist()


MINE = """def mine(z, labels, settings):
    z1, z2 = z
    return (z1 - z2).square().sum(1).mean() / settings.temperature


"""


def test_a_method_of_ones_own_is_a_function_and_an_entry(tiny, tmp_path):
    """In a copy of the project. It is trained, probed and tabulated beside the others."""
    for name in ('main.py', 'linear.py', 'model.py', 'utils.py'):
        shutil.copy(HOME / name, tmp_path)
    for name in ('hardneg', 'misc'):
        shutil.copytree(HOME / name, tmp_path / name)
    code = (tmp_path / 'main.py').read_text()
    code = code.replace('# The values of --estimator', f'{MINE}# The values of --estimator')
    code = code.replace(
        "    'hard': contrastive,\n", "    'hard': contrastive,\n    'mine': mine,\n"
    )
    (tmp_path / 'main.py').write_text(code)

    def job(*words):
        environment = dict(os.environ, PYTHONPATH='')
        command = [sys.executable, *words]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert '{hard,mine,debiased' in job('main.py', '--help').stdout
    flags = [*tiny, '--epochs', '2', '--results_dir', 'r', '--seeds', '1', '--probe=--cached']
    swept = job('misc/sweep.py', *flags, '--objectives', 'mine', 'standard')
    assert swept.returncode == 0, swept.stderr
    table = pd.read_csv(tmp_path / 'r' / 'table.csv')
    assert sorted(table['objective']) == ['SimCLR', 'mine']
    assert table['linear_cached'].notna().all()
    config = read_json(tmp_path / 'r' / 'mine_0' / 'config.json')
    assert config['settings']['estimator'] == 'mine'
    before = pd.read_csv(tmp_path / 'r' / 'mine_0' / 'log.csv')['train_loss'][2]

    (tmp_path / 'main.py').write_text(code.replace('.mean() / settings', '.mean() + settings'))
    again = job('main.py', *flags[:-5], '--results_dir', 'r/mine_0', '--estimator', 'mine')
    assert 'the code has changed since this run began' in again.stdout, again.stderr
    assert pd.read_csv(tmp_path / 'r' / 'mine_0' / 'log.csv')['train_loss'][2] == before


def test_the_notebook_runs_and_its_encoder_learns():
    notebook = nbformat.read(HOME / 'docs' / 'quickstart.ipynb', 4)
    NotebookClient(notebook, timeout=600).execute()
    text = ''
    for cell in notebook.cells:
        for output in cell.get('outputs', []):
            text += output.get('text', '')
    before, after = re.search(r'probe: (.*) % untrained, (.*) % trained', text).groups()
    assert float(after) > float(before) + 10


def test_hard_negatives_help_on_sequences():
    hard, standard = sequences.OBJECTIVES['HCL, β = 2'], sequences.OBJECTIVES['SimCLR']
    for seed in 0, 1:
        gain = sequences.accuracy(seed, 60, **hard) - sequences.accuracy(seed, 60, **standard)
        assert gain > 2


# The bench


def memory_of_100_megabytes(rank, world):
    """What peak_memory() says of them, after more was held and reset, in a process of its own."""
    device = torch.device('cpu')
    torch.ones(50_000_000)
    before = bench.peak_memory(device, reset=True)
    torch.ones(25_000_000)
    return bench.peak_memory(device) - before


@pytest.mark.skipif(
    not bench.Path('/proc/self/clear_refs').exists(), reason='only Linux tells the most memory'
)
def test_the_most_memory_is_that_since_the_reset(tmp_path):
    (found,) = on_ranks(1, memory_of_100_megabytes, tmp_path)
    assert 90e6 < found < 150e6


def test_all_keeps_the_rows_of_every_bench(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'LOSS_SIZES', (16,))
    monkeypatch.setattr(bench, 'LARGE_LOSS', 64)
    monkeypatch.setattr(bench, 'AUGMENT_SIZE', 32)
    threads = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    file = tmp_path / 'rows.csv'
    bench.main(['all', '--device', 'cpu', '--repeat', '1', '--csv', str(file), *tiny])
    assert threads == [1, 2]  # one for the views alone
    rows, printed = pd.read_csv(file), capsys.readouterr().out
    for part, count in (('loss', 4), ('views', 3), ('step', 2), ('main.py', 1)):
        assert rows['what'].str.contains(part).sum() >= count, part
    assert (rows['ours_ms'] > 0).all()
    assert rows['ratio'].isna().sum() == 1  # the loss that nothing else can compute
    expected = rows['reference_ms'] / rows['ours_ms']
    assert rows['ratio'].dropna().tolist() == pytest.approx(expected.dropna().tolist())
    for what, ratio in zip(rows['what'][1:], rows['ratio'][1:]):
        assert f'{what}, ' in printed
        assert f'ratio {ratio:.3g}' in printed
