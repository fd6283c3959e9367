"""Files that come back different: every one is read right, or ends in one line, and nothing on disk is changed."""

import copy
import hashlib
import io
import json
import pickle
import random
import shutil

import pandas as pd
import pytest
import torch

import graphs
import linear
import main
import plot
from hardneg import runs
import sweep
from hardneg.files import read_json
from model import load_model
from hardneg.runtime import UserError


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A finished run of 2 epochs, seed 0, and its probe; and another of seed 1."""
    place = tmp_path_factory.mktemp('runs')
    for seed in '01':
        main.main([*tiny, '--epochs', '2', '--seed', seed, '--results_dir', str(place / seed)])
    linear.main(['--model_path', str(place / '0' / 'model_2.pth'), '--augment', 'none', '--epochs', '2'])
    return place


def snapshot(results):
    return {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in results.iterdir() if path.name != '.lock'}


def damaged_bytes(content, dice):
    """What disks, editors and transfers make of a file."""
    place = dice.randrange(len(content))
    return dice.choice([
        lambda: content[:place], lambda: b'', lambda: content[place:], lambda: content + content[:place],
        lambda: content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1:],
        lambda: content[:place] + bytes(64) + content[place + 64:], lambda: dice.randbytes(200),
        lambda: b'\xef\xbb\xbf' + content, lambda: content.replace(b'\n', b'\r\n'), lambda: content.replace(b',', b';'),
        lambda: content[:place] + dice.randbytes(3) + content[place:],
        lambda: content.decode('latin-1').encode('utf-16'), lambda: b'[' * 100_000,
        lambda: content.replace(b'1', b'NaN'), lambda: content.replace(b'2', b'"x"')])()


def damaged_json(content, dice):
    """A key lost, or a value of another kind, at any depth."""
    content = json.loads(content)
    node = content
    while True:
        key = dice.choice(sorted(node) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key] or dice.random() < 0.3:
            break
        node = node[key]
    if dice.random() < 0.3:
        del node[key]
    else:
        node[key] = dice.choice([None, 'x', -1, 1e99, True, [], {}, [[[]]], float('nan'), float('inf')])
    return json.dumps(content).encode()


def damaged_csv(content, dice):
    """A column lost or renamed, a cell of another kind, rows lost, doubled or turned round."""
    rows = [line.split(',') for line in content.decode().splitlines()]
    column, row = dice.randrange(len(rows[0])), dice.randrange(len(rows))
    kind = dice.randrange(5)
    if kind == 0:
        rows = [cells[:column] + cells[column + 1:] for cells in rows]
    elif kind == 1:
        rows[0][column] = 'other'
    elif kind == 2:
        rows[row][column] = dice.choice(['x', '-1', '1e99', '"', '1,2'])
    elif kind == 3:
        rows = rows[:row] + rows[row + 1:]
    else:
        rows = [rows[0], *rows[:0:-1]]
    return '\n'.join(','.join(cells) for cells in rows).encode()


def read_all(results):
    """What the pictures, the table and the probe read of a run, without its encoder."""
    run = runs.read_run(results)
    plot.plt.close(plot.curves(plot.flags.argparse.Namespace(paths=[results])))
    table = sweep.make_table(results)
    return run['settings'], run['log'].round(6).to_csv(), table['linear_cached'].tolist()


@pytest.mark.parametrize('name, damage', [('model_0_linear_cached.json', damaged_json),
                                          ('model_0_linear_cached.csv', damaged_csv)])
def test_a_probe_is_read_as_it_was_or_named_or_does_not_count(finished, tmp_path, name, damage):
    dice, named = random.Random(name), 0
    shutil.copytree(finished / '0', tmp_path, dirs_exist_ok=True)
    content, digest = (tmp_path / name).read_bytes(), read_json(tmp_path / 'config.json')['data_digest']
    right, last = runs.read_probe(tmp_path, 0, 'linear_cached', digest)
    assert right and runs.read_probe(tmp_path, 0, 'linear_cached', digest[::-1]) == (None, None)
    for i in range(80):
        (tmp_path / name).write_bytes(damage(content, dice) if i % 2 else damaged_bytes(content, dice))
        try:
            settings, row = runs.read_probe(tmp_path, 0, 'linear_cached', digest)
            assert settings in (right, None) and (row is None or name.endswith('.csv') or row.equals(last))
        except UserError as error:
            named += 1
            assert '\n' not in str(error) and str(tmp_path) in str(error)
    assert named >= 35


def test_accuracies_of_graphs_are_read_or_named_and_none_is_lost(tmp_path, monkeypatch):
    rows = [f'A,d{i % 2},{objective},{beta},{tau_plus},{i // 2},{60 + i}.5,1.0\n' for i in range(8)
            for objective, beta, tau_plus in (('untrained', '', ''), ('infograph', '0', '0.1'))]
    content, dice, named = ('data,digest,objective,beta,tau_plus,repeat,accuracy,seconds\n' + ''.join(rows)).encode(
        ), random.Random(0), 0
    monkeypatch.setattr(graphs, 'load', lambda *args: ([], [], 'd0'))
    monkeypatch.setattr(graphs, 'train', lambda *args: 50.0)
    file = tmp_path / 'A.csv'
    for i in range(80):
        damaged = damaged_csv(content, dice) if i % 2 else damaged_bytes(content, dice)
        file.write_bytes(damaged)
        try:
            graphs.main(['--dataset_name', 'A', '--betas', '0', '--repeats', '4', '--results_dir', str(tmp_path)])
            there, now = (pd.read_csv(source, dtype=str, keep_default_na=False) for source in (
                io.BytesIO(damaged), file))
            columns = [*graphs.KEY, 'seconds']
            assert now[columns][:len(there)].equals(there[columns])
            if i % 4 == 1:
                plot.plt.close(plot.graphs(plot.flags.argparse.Namespace(paths=[tmp_path])))
        except UserError as error:
            named += 1
            assert '\n' not in str(error) and str(tmp_path) in str(error), damaged
            assert file.read_bytes() == damaged or 'holds no CSV files' in str(error)
    assert named >= 30
    file.write_bytes(content.replace(b'0.1', b'x'))
    with pytest.raises(UserError, match='holds no CSV files'):
        plot.graphs(plot.flags.argparse.Namespace(paths=[tmp_path]))


@pytest.mark.parametrize('name, damage', [('config.json', damaged_json), ('log.csv', damaged_csv),
                                          ('model_2_linear_cached.json', damaged_json),
                                          ('model_2_linear_cached.csv', damaged_csv)])
def test_tables_and_settings_are_read_right_or_named(finished, tmp_path, name, damage):
    """80 files of each kind: 320 in all."""
    dice, named = random.Random(name), 0
    for file in finished.glob('0/*'):
        if file.suffix in ('.csv', '.json') and 'model_0' not in file.name:
            shutil.copy(file, tmp_path)
    right, content = read_all(tmp_path), (tmp_path / name).read_bytes()
    for i in range(80):
        (tmp_path / name).write_bytes(damage(content, dice) if i % 2 else damaged_bytes(content, dice))
        before = snapshot(tmp_path)
        try:
            found = read_all(tmp_path)
            if found != right:  # numbers of a table that are possible ones, a probe or a run that is not finished
                assert name.endswith('.csv') and found[0] == right[0]
        except UserError as error:
            named += 1
            assert '\n' not in str(error) and str(tmp_path) in str(error)
        assert snapshot(tmp_path) == before
    assert named >= 35


def damaged_state(state, dice):
    """A value lost or of another kind at any depth of what torch.save wrote, whose checksums are right again."""
    state = copy.deepcopy(state)
    node = state
    while True:
        key = dice.choice(sorted(node, key=str) if isinstance(node, dict) else range(len(node)))
        if not isinstance(node[key], (dict, list)) or not node[key]:
            break
        node = node[key]
    if dice.random() < 0.2:
        del node[key]
    elif isinstance(node[key], torch.Tensor):
        x = node[key]
        node[key] = dice.choice([
            lambda: x.double(), lambda: x[None], lambda: x.flatten()[:1], lambda: x.float() * float('nan'),
            lambda: x + 1, lambda: torch.zeros(()).expand(10**6), lambda: torch.zeros(5).to_sparse(),
            lambda: x.to('meta'), lambda: 3.0, lambda: None,
            lambda: torch.quantize_per_tensor(torch.zeros(4), 1, 0, torch.qint8), lambda: [x]])()
    else:
        node[key] = dice.choice([None, 'x', -1, 10**9, 1e99, float('nan'), [], {}, [[[]]], torch.zeros(2)])
    return state


def test_states_are_read_right_or_named_and_nothing_is_written(finished, tiny, tmp_path, capsys):
    results, dice, named = tmp_path / 'r', random.Random(0), 0
    shutil.copytree(finished / '0', results)
    command = [*tiny, '--epochs', '2', '--results_dir', str(results)]
    content, state = (results / 'last.pth').read_bytes(), torch.load(results / 'last.pth', weights_only=True)
    for i in range(60):
        if i % 3:
            torch.save(damaged_state(state, dice), results / 'last.pth')
        else:
            (results / 'last.pth').write_bytes(damaged_bytes(content, dice))
        before = snapshot(results)
        try:
            main.main(command)
            assert 'holds this run, finished' in capsys.readouterr().out
        except UserError as error:
            named += 1
            assert '\n' not in str(error) and 'last.pth' in str(error)
        assert snapshot(results) == before
    assert named >= 50


def test_encoders_load_as_they_were_or_are_named(finished, tmp_path):
    dice, path, named = random.Random(0), tmp_path / 'model_2.pth', 0
    content = (finished / '0' / 'model_2.pth').read_bytes()
    state = torch.load(finished / '0' / 'model_2.pth', weights_only=True)
    for i in range(60):
        if i % 3:
            torch.save(damaged_state(state, dice), path)
        else:
            path.write_bytes(damaged_bytes(content, dice))
        try:
            load_model(path)  # plain finite weights of the right shapes may be anybody's
        except UserError as error:
            named += 1
            assert '\n' not in str(error) and str(path) in str(error)
    assert named >= 50


class Payload:
    def __reduce__(self):
        return exec, ('raise SystemError("the payload ran")',)


def test_pickles_are_refused_everywhere_and_not_run(finished, tiny, tmp_path):
    for name in ('last.pth', 'model_2.pth'):
        results = tmp_path / name
        shutil.copytree(finished / '0', results)
        (results / name).write_bytes(pickle.dumps(Payload()))
        with pytest.raises(UserError, match=name):
            if name == 'last.pth':
                main.main([*tiny, '--epochs', '2', '--results_dir', str(results)])
            else:
                linear.main(['--model_path', str(results / name)])


@pytest.mark.parametrize('name, message', [
    ('last.pth', 'last.pth is the state of another run'), ('config.json', r'other settings \(--seed 1 there, 0 here\)'),
    ('log.csv', 'log.csv is not the log of the run in last.pth')])
def test_file_of_another_run_is_named(finished, tiny, tmp_path, name, message):
    results = tmp_path / 'r'
    shutil.copytree(finished / '0', results)
    shutil.copy(finished / '1' / name, results / name)
    before = snapshot(results)
    with pytest.raises(UserError, match=message):
        main.main([*tiny, '--epochs', '2', '--results_dir', str(results)])
    assert snapshot(results) == before


def test_encoder_of_another_run_is_named_by_probe_and_pictures(finished, tmp_path):
    results = tmp_path / 'r'
    shutil.copytree(finished / '0', results)
    shutil.copy(finished / '1' / 'model_2.pth', results / 'model_2.pth')
    with pytest.raises(UserError, match=r'model_2.pth is not what the run in .* wrote'):
        linear.main(['--model_path', str(results / 'model_2.pth')])
    with pytest.raises(UserError, match=r'model_2.pth is not what the run in .* wrote'):
        plot.main(['neighbours', str(results / 'model_2.pth')])
