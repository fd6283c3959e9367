"""Damaged files are read right, or named in one line, and nothing on the disk is changed."""

import io
import json
import pickle
import random
import shutil
from argparse import Namespace

import pandas as pd
import pytest
import torch

import graphs
import linear
import main
import plot
import sweep
from hardneg import runs
from hardneg.files import read_checkpoint, read_json
from hardneg.runtime import UserError
from model import load_model


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A finished run of 2 epochs, seed 0, and its probe; and another of seed 1."""
    place = tmp_path_factory.mktemp('runs')
    for seed in '01':
        flags = ['--epochs', '2', '--seed', seed, '--results_dir', str(place / seed)]
        main.main([*tiny, *flags])
    checkpoint = str(place / '0' / 'model_2.pth')
    linear.main(['--model_path', checkpoint, '--cached', '--epochs', '2', '--precision', 'fp32'])
    return place


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished / '0', tmp_path / 'run')


def contents(directory):
    """The bytes of every file, by name, without locks."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != '.lock'}


def one_line(error, place):
    return '\n' not in str(error) and str(place) in str(error)


# Kinds of damage


def damaged_bytes(content, dice):
    """What disks, editors and transfers make of a file."""
    place = dice.randrange(len(content))
    before, after = content[:place], content[place:]
    flipped = bytes([content[place] ^ 1 << dice.randrange(8)])
    choices = [
        b'',
        before,
        after,
        content + before,
        before + flipped + after[1:],
        before + bytes(64) + after[64:],
        before + dice.randbytes(3) + after,
        dice.randbytes(200),
        b'[' * 100_000,
        b'\xef\xbb\xbf' + content,
        content.replace(b'\n', b'\r\n'),
        content.replace(b',', b';'),
        content.replace(b'1', b'NaN'),
        content.replace(b'2', b'"x"'),
        content.decode('latin-1').encode('utf-16'),
    ]
    return dice.choice(choices)


def damaged_json(content, dice):
    """A key lost, or a value of another kind, at any depth."""
    content = json.loads(content)
    node = content
    while True:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = dice.choice(keys)
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or dice.random() < 0.3:
            break
        node = child
    if dice.random() < 0.3:
        del node[key]
    else:
        node[key] = dice.choice([None, 'x', -1, 1e99, True, [], {}, [[[]]], float('nan')])
    return json.dumps(content).encode()


def damaged_csv(content, dice):
    """A column lost or renamed, a cell of another kind, a row lost, or rows turned round."""
    rows = [line.split(',') for line in content.decode().splitlines()]
    column, row = dice.randrange(len(rows[0])), dice.randrange(len(rows))
    kind = dice.choice(['column', 'name', 'cell', 'row', 'order'])
    if kind == 'column':
        rows = [cells[:column] + cells[column + 1 :] for cells in rows]
    elif kind == 'name':
        rows[0][column] = 'other'
    elif kind == 'cell':
        rows[row][column] = dice.choice(['x', '-1', '1e99', '"', '1,2'])
    elif kind == 'row':
        del rows[row]
    else:
        rows = [rows[0], *rows[:0:-1]]
    return '\n'.join(','.join(cells) for cells in rows).encode()


def damaged_state(state, dice):
    """A tensor lost, of another kind or shape, or not finite. The file's checksums are right."""
    state = dict(state)
    name = dice.choice(sorted(state))
    x = state.pop(name)
    choices = [
        None,
        3.0,
        x.double(),
        x[None],
        x.flatten()[:-1],
        x.float() * float('nan'),
        x.to('meta'),
        torch.zeros(()).expand(10**6),
        torch.zeros(5).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(4), 1, 0, torch.qint8),
    ]
    if dice.random() < 0.8:
        state[name] = dice.choice(choices)
    return state


# Tables and settings


def read_all(results):
    """What the pictures, the table and the probe read of a run, without its encoder."""
    run = runs.read_run(results)
    plot.plt.close(plot.curves(Namespace(paths=[results])))
    table = sweep.make_table(results)
    return run['settings'], run['log'].round(6).to_csv(), table['linear_cached'].tolist()


@pytest.mark.parametrize(
    'name, damage',
    [
        ('config.json', damaged_json),
        ('log.csv', damaged_csv),
        ('model_2_linear_cached.json', damaged_json),
        ('model_2_linear_cached.csv', damaged_csv),
    ],
)
def test_a_damaged_table_or_setting_is_read_or_named(finished, tmp_path, name, damage):
    """24 files of each kind. A user may edit a file, so another number is no damage."""
    dice, named = random.Random(name), 0
    for file in (finished / '0').glob('*'):
        if file.suffix in ('.csv', '.json') and 'model_0' not in file.name:
            shutil.copy(file, tmp_path)
    content = (tmp_path / name).read_bytes()
    for i in range(24):
        kind = damage if i % 2 else damaged_bytes
        (tmp_path / name).write_bytes(kind(content, dice))
        before = contents(tmp_path)
        try:
            read_all(tmp_path)
        except UserError as error:
            named += 1
            assert one_line(error, tmp_path)
        assert contents(tmp_path) == before
    assert named >= 9


@pytest.mark.parametrize('name', ['config.json', 'model_2_linear_cached.json'])
def test_a_json_without_what_a_run_writes_is_named(copied, name):
    content = read_json(copied / name)
    del content['settings']
    (copied / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f'{name} is damaged or not of a run: settings is missing'):
        read_all(copied)


@pytest.mark.parametrize('name', ['config.json', 'log.csv'])
def test_what_lies_in_the_place_of_a_runs_file_is_named(copied, name):
    (copied / name).write_text('{"a": 1}')
    with pytest.raises(UserError, match=f"{name} is missing or another program's"):
        read_all(copied)


def test_a_probe_of_other_data_or_of_another_encoder_does_not_count(finished, copied):
    digest = read_json(copied / 'config.json')['data_digest']
    settings, last = runs.read_probe(copied, 2, 'linear_cached', digest)
    assert settings['probe'] == 'linear'
    assert last['epoch'] == 2
    assert runs.read_probe(copied, 2, 'linear_cached', digest[::-1]) == (None, None)
    shutil.copy(finished / '1' / 'model_2.pth', copied)
    assert runs.read_probe(copied, 2, 'linear_cached', digest) == (None, None)
    (copied / 'model_2.pth').unlink()  # the probe of an encoder that is gone counts
    assert runs.read_probe(copied, 2, 'linear_cached', digest)[0] == settings


GRAPHS = 'data,digest,objective,beta,tau_plus,repeat,accuracy,seconds\n'


def test_accuracies_of_graphs_are_read_or_named_and_none_is_lost(tmp_path, monkeypatch):
    text = GRAPHS
    for i in range(8):
        for what in ('untrained,,', 'infograph,0,0.1'):
            text += f'A,d{i % 2},{what},{i // 2},{60 + i}.5,1.0\n'
    content, file = text.encode(), tmp_path / 'A.csv'
    dice, named = random.Random(0), 0
    monkeypatch.setattr(graphs, 'load', lambda *args: ([], [], 'd0'))
    monkeypatch.setattr(graphs, 'train', lambda *args, **options: 50.0)
    command = ['--dataset_name', 'A', '--betas', '0', '--repeats', '4']
    for i in range(40):
        kind = damaged_csv if i % 2 else damaged_bytes
        damaged = kind(content, dice)
        file.write_bytes(damaged)
        try:
            graphs.main([*command, '--results_dir', str(tmp_path)])
            there = pd.read_csv(io.BytesIO(damaged), dtype=str, keep_default_na=False)
            now = pd.read_csv(file, dtype=str, keep_default_na=False)
            columns = [*graphs.KEY, 'seconds']
            assert now[columns][: len(there)].equals(there[columns])
            plot.plt.close(plot.graphs(Namespace(paths=[tmp_path])))
        except UserError as error:
            named += 1
            assert one_line(error, tmp_path)
            if 'holds no CSV files' not in str(error):
                assert file.read_bytes() == damaged
    assert named >= 13


# Checkpoints


@pytest.mark.parametrize('name', ['last.pth', 'model_2.pth'])
def test_damaged_bytes_of_a_checkpoint_are_noticed(copied, tiny, name):
    dice, named = random.Random(0), 0
    content = (copied / name).read_bytes()
    right = read_checkpoint(copied / name)
    for _ in range(30):
        (copied / name).write_bytes(damaged_bytes(content, dice))
        try:
            found = read_checkpoint(copied / name)
            weights = found.get('model', found)
            for key, x in right.get('model', right).items():
                assert torch.equal(x, weights[key])
        except UserError as error:
            named += 1
            assert one_line(error, copied)
    assert named >= 25


def test_encoders_load_as_they_were_or_are_named(copied, tmp_path):
    dice, path, named = random.Random(0), tmp_path / 'model_2.pth', 0
    state = read_checkpoint(copied / 'model_2.pth')
    for _ in range(30):
        torch.save(damaged_state(state, dice), path)
        try:
            load_model(path)
        except UserError as error:
            named += 1
            assert one_line(error, path)
    assert named >= 24


def test_a_state_is_restored_whole_or_named_and_nothing_is_written(copied, tiny, capsys):
    dice, named = random.Random(1), 0
    flags = [*tiny, '--epochs', '2', '--results_dir', str(copied)]
    state = read_checkpoint(copied / 'last.pth')
    for _ in range(15):
        damaged = {**state, 'model': damaged_state(state['model'], dice)}
        torch.save(damaged, copied / 'last.pth')
        before = contents(copied)
        try:
            main.main(flags)
            assert 'holds this run, finished' in capsys.readouterr().out
        except UserError as error:
            named += 1
            assert one_line(error, 'last.pth')
        after = contents(copied)
        assert after == before
    assert named >= 10


@pytest.mark.parametrize('part', runs.STATE)
def test_a_state_without_one_of_its_parts_is_named(copied, tiny, part):
    state = read_checkpoint(copied / 'last.pth')
    del state[part]
    torch.save(state, copied / 'last.pth')
    with pytest.raises(UserError, match='last.pth is not the state of a run. The run cannot be'):
        main.main([*tiny, '--epochs', '2', '--results_dir', str(copied)])


class Payload:
    def __reduce__(self):
        return exec, ('raise SystemError("the payload ran")',)


@pytest.mark.parametrize('name', ['last.pth', 'model_2.pth'])
def test_a_pickle_is_refused_and_not_run(copied, tiny, name):
    (copied / name).write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=name):
        if name == 'last.pth':
            main.main([*tiny, '--epochs', '2', '--results_dir', str(copied)])
        else:
            linear.main(['--model_path', str(copied / name)])


# Files of another run


@pytest.mark.parametrize(
    'name, message',
    [
        ('last.pth', r'last.pth holds a run with other settings \(--seed 1 there, 0 here\)'),
        ('config.json', r'other settings \(--seed 1 there, 0 here\)'),
    ],
)
def test_a_file_of_another_run_is_named(finished, copied, tiny, name, message):
    shutil.copy(finished / '1' / name, copied / name)
    before = contents(copied)
    with pytest.raises(UserError, match=message):
        main.main([*tiny, '--epochs', '2', '--results_dir', str(copied)])
    assert contents(copied) == before


def test_a_log_of_another_run_is_written_anew(finished, copied, tiny):
    right = (copied / 'log.csv').read_bytes()
    shutil.copy(finished / '1' / 'log.csv', copied)
    main.main([*tiny, '--epochs', '2', '--results_dir', str(copied)])
    assert (copied / 'log.csv').read_bytes() == right
