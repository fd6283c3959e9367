"""The table, the pictures and the example: what they show is what the logs left."""

import hashlib
import os
import random
import re
import shutil
import signal
import sys
import time
from argparse import Namespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import HOME, Job
from PIL import Image

import embed
from hardneg import files
from hardneg import flags
from hardneg import folder
import linear
import main
import model
import pictures
import plot
from hardneg import runs
import sequences
import sweep
from hardneg.augment import normalize
from data import load_data
from hardneg.decoding import decode
from hardneg.losses import contrastive_loss
from hardneg.runtime import UserError


@pytest.fixture(scope='module')
def run_of_one_epoch(tiny, tmp_path_factory):
    results = tmp_path_factory.mktemp('runs') / 'run'
    main.main([*tiny, '--epochs', '1', '--results_dir', str(results)])
    return results


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(plot.runtime, 'start', lambda: torch.device('cpu'))


@pytest.fixture
def logs(run_of_one_epoch, tmp_path):
    """Logs of two objectives with two seeds each, and their probes: kNN 10, 20; 14, 22; probes 30, 40; 36, 38."""
    config = files.read_json(run_of_one_epoch / 'config.json')
    for estimator, beta, seed, knn, probe in (('standard', 0.0, 0, 10, 30), ('standard', 0.0, 1, 20, 40),
                                              ('hard', 0.5, 1, 22, 38), ('hard', 0.5, 0, 14, 36)):
        directory = tmp_path / f'{estimator}_{seed}'
        directory.mkdir()
        config['settings'] |= dict(estimator=estimator, beta=beta, tau_plus=0.1 * (beta > 0), seed=seed, epochs=2)
        files.write_json(directory / 'config.json', config)
        rows = [{'epoch': 0, 'test_acc@1': 9}, {'epoch': 1, 'train_loss': 5.0, 'seconds': 60.0},
                {'epoch': 2, 'train_loss': 4.0 + beta, 'test_acc@1': knn, 'test_acc@5': 99, 'seconds': 90.0}]
        pd.DataFrame(rows, columns=runs.LOG).to_csv(directory / 'log.csv', index=False)
        row = dict.fromkeys(runs.PROBE, 1) | {'test_acc@1': probe}
        pd.DataFrame([row]).to_csv(directory / 'model_2_linear.csv', index=False)
        about = dict(command='linear.py --lr 1', settings=dict(epochs=1, lr=1, model_path=str(directory)))
        files.write_json(directory / 'model_2_linear.json', {**about, 'encoder': ''})
    return tmp_path


def test_table_has_means_deviations_and_paired_differences(logs, capsys):
    sweep.main(['--table_only', '--results_dir', str(logs)])
    table = pd.read_csv(logs / 'table.csv')
    assert list(table['objective']) == ['standard', 'hard, τ⁺ = 0.1, β = 0.5']
    hard = table.iloc[1]
    assert hard[['seeds', 'knn', 'linear', 'minutes', 'epochs', 'beta']].tolist() == [2, 18, 37, 2.5, 2, 0.5]
    assert hard['knn_gain'] == 3 and hard['linear_gain'] == 2  # of 4, 2 and of 6, -2: seed by seed
    assert hard['knn_gain_std'] == pytest.approx(2**0.5, abs=0.01)
    assert hard['linear_gain_std'] == pytest.approx(32**0.5, abs=0.01)
    assert hard['linear_command'] == 'linear.py --lr 1'
    text = (logs / 'table.md').read_text()
    assert '| hard, τ⁺ = 0.1, β = 0.5 | 2 | 18.00 ± 5.66 | +3.00 ± 1.41 | 37.00 ± 1.41 | +2.00 ± 5.66 |' in text
    assert '| standard | 2 | 15.00 ± 7.07 |  | 35.00 ± 7.07 |  |' in text and 'took 2 minutes a run, on average' in text
    assert 'resnet18' in text and text in capsys.readouterr().out


def test_gains_over_standard_at_a_temperature_of_its_own(logs):
    for name in 'standard_0', 'standard_1', 'hard_0':
        config = files.read_json(logs / name / 'config.json')
        config['settings'] |= dict(temperature=0.1, knn_temperature=0.1)
        files.write_json(logs / name / 'config.json', config)
    sweep.main(['--table_only', '--against', '0.1', '--results_dir', str(logs)])
    table = pd.read_csv(logs / 'table.csv').set_index(['estimator', 'temperature'])
    assert table['knn_gain'].dropna().to_dict() == {('hard', 0.1): 4, ('hard', 0.5): 2}
    assert ' against standard, t = 0.1 ' in (logs / 'table.md').read_text()


def test_table_keeps_other_settings_apart_and_leaves_unfinished_runs_out(logs, capsys):
    for name, change in (('hard_0', dict(batch_size=16)), ('hard_1', dict(epochs=3))):
        config = files.read_json(logs / name / 'config.json')
        config['settings'] |= change
        files.write_json(logs / name / 'config.json', config)
    sweep.main(['--table_only', '--results_dir', str(logs)])
    table = pd.read_csv(logs / 'table.csv')
    assert table[['objective', 'batch_size', 'seeds']].values.tolist() == [
        ['standard', 8, 2], ['hard, τ⁺ = 0.1, β = 0.5', 16, 1]]
    assert np.isnan(table['knn_gain'][1])  # there is no standard run at that batch size
    assert 'hard_1: not finished' in capsys.readouterr().err
    assert '| objective | batch_size | seeds |' in (logs / 'table.md').read_text()


def test_table_refuses_what_would_count_twice_or_is_not_finished(logs, capsys):
    shutil.copytree(logs / 'standard_0', logs / 'backup')
    with pytest.raises(UserError, match='holds the same run twice'):
        sweep.main(['--table_only', '--results_dir', str(logs)])
    shutil.rmtree(logs / 'backup')
    files.write_json(logs / 'standard_0' / 'model_2_linear.json', dict(
        command='linear.py --epochs 9', settings=dict(epochs=9, lr=1), encoder=''))  # its CSV ends after 1
    sweep.main(['--table_only', '--results_dir', str(logs)])
    table = pd.read_csv(logs / 'table.csv')
    assert table['seeds'].tolist() == [2, 2] and table['linear_seeds'].tolist() == [1, 2]
    assert table['linear'].tolist() == [40, 37] and table['linear_gain'][1] == -2 and table['knn_gain'][1] == 3
    assert '-2.00 (1 of 2 seeds)' in (logs / 'table.md').read_text()


def test_probe_of_another_encoder_does_not_count(logs):
    (logs / 'hard_0' / 'model_2.pth').write_bytes(b'retrained')
    file = logs / 'standard_0' / 'model_2_linear.json'
    (logs / 'standard_0' / 'model_2.pth').write_bytes(b'')
    files.write_json(file, {**files.read_json(file), 'encoder': hashlib.sha256().hexdigest()})
    (logs / 'began').mkdir()
    shutil.copy(logs / 'hard_0' / 'config.json', logs / 'began')  # stopped before its log
    assert sweep.make_table(logs)['linear_seeds'].tolist() == [2, 1]


def test_a_probe_with_later_flags_at_their_defaults_is_like_one_without(logs):
    before, file = sweep.make_table(logs), logs / 'hard_0' / 'model_2_linear.json'
    about = files.read_json(file)
    about['settings'] |= dict(fit='crop', label_fraction=1.0, cache_dir='elsewhere')
    files.write_json(file, about)
    pd.testing.assert_frame_equal(sweep.make_table(logs), before)


def test_a_probe_that_left_no_row_does_not_count(logs):
    (logs / 'hard_0' / 'model_2_linear.csv').write_text(','.join(runs.PROBE) + '\n')
    assert sweep.make_table(logs)['linear_seeds'].tolist() == [2, 1]


@pytest.mark.parametrize('change', [dict(positives='label'), dict(oracle=True)], ids=str)
def test_gains_with_labels_are_over_standard_with_labels(logs, change):
    for file in logs.glob('*/config.json'):
        config = files.read_json(file)
        files.write_json(file, {**config, 'settings': {**config['settings'], **change}})
    table = sweep.make_table(logs)
    assert table['knn_gain'].isna().tolist() == [True, False] and table['knn_gain'][1] == 3


def test_ranks_and_data_sets_are_kept_apart(logs):
    for change in (dict(ranks=8), dict(images=dict(train=31, test=9))):
        config = files.read_json(logs / 'hard_1' / 'config.json')
        files.write_json(logs / 'hard_1' / 'config.json', config | change)
        assert sweep.make_table(logs)['seeds'].tolist() == [2, 1, 1]
        assert len(plot.curves(arguments(*sorted(logs.iterdir()))).axes[0].lines) == 3


def test_readme_is_short_and_whole():
    text = (HOME / 'README.md').read_text()
    assert text.count('\n') <= 150 and len(text) <= 10_500 and not re.search('@[A-Z]+@', text)


def test_readmes_python_gives_what_its_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results' / 'mine').mkdir(parents=True)
    torch.save(model.Model(128, 'resnet18', width=0.125).state_dict(), 'results/mine/model_400.pth')
    pages = (HOME / 'README.md').read_text() + (HOME / 'misc' / 'own_images.md').read_text()
    loss, encoder, search, views = re.findall('```python\n(.*?)```', pages, re.S)
    names = dict(zip(('z1', 'z2', 'images', 'texts'), torch.randn(4, 6, 8)))
    exec(loss, names)
    assert names['loss'].shape == () and names['loss'].isfinite()
    names = dict(torch=torch, images=torch.randint(256, (6, 3, 40, 48), dtype=torch.uint8))
    exec(views, names)
    for x in names['x1'], names['x2']:
        assert x.shape == (6, 3, 32, 32) and x.dtype == torch.float32 and -3 < x.min() < x.max() < 3
    exec(encoder, names)
    for x, width in (names['features'], 64), (names['z'], 128):
        assert x.shape == (6, width) and torch.allclose(x.norm(dim=1), torch.ones(6))
    plt.imsave('photo.jpg', np.random.default_rng(0).random((256, 256, 3)))
    pixels, *_ = decode('photo.jpg', 256)
    own = names['net'](normalize(torch.from_numpy(pixels)[None]))[0].detach().numpy()
    np.savez('features.npz', names=['other', 'same', 'opposite'], features=np.concatenate([0.5 * own, own, -own]))
    exec(search, {})
    assert capsys.readouterr().out == "['same' 'other' 'opposite']\n"


@pytest.mark.parametrize('name, seeds', [('cifar10', 3), ('cifar10_temperature', 3), ('cifar10_labels', 1),
                                         ('cifar100', 3)])
def test_tables_kept_are_those_of_the_logs_kept(name, seeds):
    kept = HOME / 'results' / name
    table = sweep.make_table(kept)
    assert table.to_csv(index=False) == (kept / 'table.csv').read_text()
    assert table['seeds'].min() >= seeds
    assert sweep.markdown(table).partition('\n\n')[0] in (HOME / 'results' / 'README.md').read_text()


def test_rows_of_both_pages_are_those_of_the_logs_kept():
    """Of each objective: accuracy, its difference to standard at t = 0.5, and to standard at t = 0.1, twice."""
    kept, rows = HOME / 'results' / 'cifar10_30', []
    own, tuned = (sweep.make_table(kept, against) for against in (0.5, 0.1))
    assert tuned.to_csv(index=False) == (kept / 'table.csv').read_text()
    for (_, a), (_, b) in zip(own.iterrows(), tuned.iterrows()):
        told = [f'{row[name]:{sign}.2f} ± {row[f"{name}_std"]:.2f}' if row[name] == row[name] else ''
                for metric in ('knn', 'linear_cached')
                for row, name, sign in ((a, metric, ''), (a, f'{metric}_gain', '+'), (b, f'{metric}_gain', '+'))]
        title = a['objective'] + ', tuned t' * (a['temperature'] == 0.1)
        rows.append(' | '.join([f'| {title} | {a["temperature"]} | {a["seeds"]}', *told]) + ' |')
    first, results = ((HOME / place / 'README.md').read_text().splitlines() for place in ('', 'results'))
    assert sorted(line for line in first if ' ± ' in line and line[0] == '|') == sorted(rows)
    assert {*rows} <= {*results}


@pytest.mark.parametrize('flags, message', [
    (['--seeds', '0'], '--seeds'), (['--betas', '3'], '--betas'), (['--beta', '1'], '--beta'),
    (['--tau_plus', '2'], '--tau_plus'), (['--probe', '--lr 0'], '--lr'), (['--objectives', 'soft'], 'soft'),
    (['--probe', '"'], 'No closing quotation'), (['--probe', '--model_path x'], 'sets --model_path itself'),
    (['--probe', '--root x'], 'sets --root itself'),
    (['--table_only'], '--table_only trains nothing')], ids=str)
def test_wrong_flags_end_the_sweep_before_it_begins(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(['--dataset_name', 'shapes', '--results_dir', str(tmp_path / 'r'), '--objectives', 'hard_b1',
                    *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count('\n') == 1
    assert not (tmp_path / 'r').exists()


@pytest.mark.slow
def test_sweep_trains_probes_and_continues(tiny, tmp_path, run):
    flags = [*tiny, '--epochs', '1', '--results_dir', tmp_path / 'r', '--objectives', 'standard', 'hard_b2', '--seeds',
             '2', '--jobs', '2', '--probe', '--epochs 2']
    first = run('misc/sweep.py', flags, cwd=tmp_path)
    assert first.code == 0, first.err
    table = (tmp_path / 'r' / 'table.csv').read_bytes()
    assert pd.read_csv(tmp_path / 'r' / 'table.csv')['beta'].tolist() == [0, 2]
    assert first.out.count('linear probe') >= 4
    (tmp_path / 'r' / 'standard_1' / 'model_1_linear.csv').unlink()
    about = tmp_path / 'r' / 'hard_b2_0' / 'model_1_linear.json'
    files.write_json(about, {**files.read_json(about), 'encoder': 'another'})
    again = run('misc/sweep.py', flags, cwd=tmp_path)
    assert again.code == 0 and again.out.count('probed before') == 2
    assert (tmp_path / 'r' / 'table.csv').read_bytes() == table
    assert run('misc/sweep.py', [*flags[:-1], '--epochs 2 --lr 0.1'], cwd=tmp_path).out.count('probed before') == 0
    broken = run('misc/sweep.py', [*flags, '--batch_size', '31'], cwd=tmp_path)
    assert broken.code == 1 and '--batch_size' in broken.err and 'Traceback' not in broken.err


@pytest.mark.slow
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_sweep_lets_its_runs_save(tiny, tmp_path, run, signum):
    flags = [*tiny, '--epochs', '400', '--results_dir', tmp_path, '--objectives', 'standard', 'hard_b2', '--jobs', '2',
             '--save_every', '400']
    job = Job('misc/sweep.py', flags, cwd=tmp_path)
    logs = [tmp_path / name / 'log.csv' for name in ('standard_0', 'hard_b2_0')]
    while job.process.poll() is None and not all(log.exists() and log.read_text().count('\n') > 2 for log in logs):
        time.sleep(0.01)
    job.process.send_signal(signum)
    job.finish()
    assert job.code == 128 + signum and job.err == 'Stopped; the same command continues the sweep\n'
    for log in logs:  # without the signal, the state saved would be that of the beginning
        assert torch.load(log.with_name('last.pth'), weights_only=True)['epoch'] == pd.read_csv(log)['epoch'].max() > 0
    assert not (tmp_path / 'standard_1').exists()


def arguments(*paths, **kwargs):
    data = {flag[2:]: None for flag, *_ in flags.DATA}
    return Namespace(paths=list(paths), **{**data, 'seed': 0, 'images': 9, 'query': None, 'memory': 99, **kwargs})


def test_curves_are_means_over_seeds(logs):
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    loss, accuracy = figure.axes
    lines = {line.get_label(): line for line in loss.lines}
    assert set(lines) == {'standard', 'hard, τ⁺ = 0.1, β = 0.5'}
    assert lines['hard, τ⁺ = 0.1, β = 0.5'].get_ydata().tolist() == [5, 4.5]
    assert lines['standard'].get_color() == pictures.OWN['standard'] != lines['hard, τ⁺ = 0.1, β = 0.5'].get_color()
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[0, 9], [2, 15]], [[0, 9], [2, 18]]]
    assert loss.get_xlabel() == 'epoch' and '%' in accuracy.get_ylabel()


def test_long_names_stay_within_the_picture(logs):
    for name, changes in (('hard_0', dict(temperature=0.25, batch_size=128)), ('hard_1', dict(temperature=0.1))):
        config = files.read_json(logs / name / 'config.json')
        config['settings'] |= changes
        files.write_json(logs / name / 'config.json', config)
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    figure.canvas.draw()
    legend, = figure.legends
    assert len(legend.get_texts()) == 3 and legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_accuracies_by_temperature_are_those_of_the_logs(logs):
    config = files.read_json(logs / 'hard_1' / 'config.json')
    config['settings'] |= dict(temperature=0.1, knn_temperature=0.1)
    files.write_json(logs / 'hard_1' / 'config.json', config)
    knn, probe = plot.temperature(arguments(*sorted(logs.iterdir()))).axes
    for axes, standard, hard in ((knn, [15], [22, 14]), (probe, [35], [38, 36])):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert lines == {'standard': [[0.5, *standard]], 'hard, τ⁺ = 0.1, β = 0.5': [[0.1, hard[0]], [0.5, hard[1]]]}
    dots = sorted(y for dots in knn.collections for _, y in dots.get_offsets().tolist())
    assert dots == [10, 14, 20, 22]


def test_similarity_counts_every_pair_of_test_images(run_of_one_epoch, tree, on_the_cpu):
    checkpoint = run_of_one_epoch / 'model_1.pth'
    panels = pictures.similarity(arguments(checkpoint)).axes
    net, data = model.load_model(checkpoint).eval(), load_data('folder', tree, 16)
    labels = data.test_labels
    i, j = torch.triu_indices(9, 9, 1)
    same = labels[i] == labels[j]
    for panel, x in zip(panels, net(normalize(data.test))):  # f, then z
        cosine = (x @ x.T)[i, j]
        means = [line.get_xdata()[0] for line in panel.lines]
        assert means == pytest.approx([cosine[same].mean().item(), cosine[~same].mean().item()], abs=1e-5)
        wins = (cosine[same][:, None] > cosine[~same]).float().mean().item()  # area under ROC, no ties
        assert f'{wins:.3f}' in panel.get_title()


@pytest.mark.parametrize('encoders', [1, 2])
def test_neighbours_are_framed_by_class(run_of_one_epoch, tree, on_the_cpu, encoders):
    checkpoints = [run_of_one_epoch / f'model_{1 - i}.pth' for i in range(encoders)]
    figure, data = pictures.neighbours(arguments(*checkpoints)), load_data('folder', tree, 16)
    chosen, columns, panels = pictures.some(9, 5, 0), 10 // encoders, np.array(figure.axes).reshape(5, -1)
    for i, checkpoint in enumerate(checkpoints):
        f = model.load_model(checkpoint).eval().f
        x, y = (F.normalize(f(normalize(images)).flatten(1)) for images in (data.test[chosen], data.train))
        found = (x @ y.T).topk(columns).indices
        right = data.train_labels[found] == data.test_labels[chosen][:, None]
        block = panels[:, 2 + i * (columns + 1):][:, :columns]
        framed = [[plt.matplotlib.colors.to_hex(axes.spines['left'].get_edgecolor()) == pictures.RIGHT.lower()
                   for axes in line] for line in block]
        assert framed == right.tolist()
        assert f': {right.sum()} of {right.numel()} ' in block[0, 0].texts[0].get_text()
        for line, row in zip(block, found):
            for axes, index in zip(line, row):
                shown = torch.tensor(axes.images[0].get_array()).permute(2, 0, 1)
                assert torch.equal(shown, data.train[index])


def test_push_is_the_derivative_of_the_loss_by_a_cosine():
    """Against finite differences: the Gram matrix of the views with one pair's cosine moved, factorised again."""
    torch.manual_seed(0)
    z = F.normalize(torch.randn(8, 16, dtype=torch.float64), dim=1)
    objective = dict(temperature=0.3, tau_plus=0.1, beta=2)
    found = pictures.push(z.chunk(2), **objective)
    for i, j in ((0, 1), (2, 7), (3, 0)):
        values = []
        for step in (1e-5, -1e-5):
            gram = z @ z.T
            gram[i, j] += step
            gram[j, i] += step
            values.append(contrastive_loss(*torch.linalg.cholesky(gram).chunk(2), **objective))
        assert found[i, j].item() == pytest.approx((values[0] - values[1]).item() / 2e-5, rel=1e-5)


def test_every_picture_is_written(run_of_one_epoch, logs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pictures, 'BATCH', 9)
    checkpoint = str(run_of_one_epoch / 'model_1.pth')
    names = [what for what in plot.PICTURES if what != 'graphs']  # that one has a test beside misc/graphs.py's
    for what in names:
        out = tmp_path / f'{what}.png'
        plot.main([what, str(run_of_one_epoch) if what in plot.WHOLE else checkpoint, '--out', str(out)])
        pixels = plt.imread(out)
        assert pixels.shape[1] == dict(similarity=640, temperature=800, neighbours=880).get(what, 1280)
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50  # a picture, not a blank sheet
    said = [line for line in capsys.readouterr().out.splitlines() if line.endswith('.png')]
    assert said == [str(tmp_path / f'{what}.png') for what in names]


@pytest.mark.parametrize('flags, message', [
    (['curves', 'nowhere'], 'nowhere is not the directory of a run: config.json is missing'),
    (['similarity', 'nowhere/model_1.pth'], 'nowhere/model_1.pth: no such file'),
    (['neighbours', '{foreign}'], 'foreign.pth: '),
    (['curves', '{run}', '--out', 'nowhere/a.png'], 'cannot write nowhere/a.png'),
    (['negatives', '{run}/model_1.pth'], '9 images')], ids=lambda value: value[0] if len(value) < 9 else '')
def test_pictures_of_nothing_are_refused(run_of_one_epoch, tmp_path, flags, message):
    (tmp_path / 'foreign.pth').write_text('hello')
    places = dict(run=run_of_one_epoch, foreign=tmp_path / 'foreign.pth')
    with pytest.raises(UserError, match=re.escape(message)):
        plot.main([flag.format(**places) for flag in flags])


@pytest.mark.parametrize('flags', [['curves', 'a' * 300], ['graphs', 'a' * 300], ['curves', 'r', '--out', 'a' * 300]],
                         ids=['run', 'graphs', 'out'])
def test_names_that_no_file_can_have_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(flags)
    assert stop.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_picture_that_cannot_be_written_leaves_the_old_one(run_of_one_epoch, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'a.png'
    out.write_text('old')
    monkeypatch.setattr(plot.plt.Figure, 'savefig', lambda self, file: file.write(b'new') and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.main(['curves', str(run_of_one_epoch), '--out', str(out)])
    assert out.read_text() == 'old'
    with pytest.raises(SystemExit) as stop:
        plot.main(['curves', str(run_of_one_epoch), '--out', str(tmp_path / 'a.pdf')])
    assert stop.value.code == 2 and 'PNG' in capsys.readouterr().err


def test_hard_negatives_help_on_sequences():
    hard, standard = sequences.OBJECTIVES['hard, β = 2'], sequences.OBJECTIVES['standard']
    gains = [sequences.accuracy(seed, 60, **hard) - sequences.accuracy(seed, 60, **standard) for seed in (0, 1)]
    assert min(gains) > 2


LETTERS = '_$|*~^{}\\%&#`<> ab\t\x01\x07\x1b\x7fé漢' + 'שע\u202e\u0301' + os.fsdecode(b'\xe9\xff')


def some_names(seed, count, most=12):
    dice = random.Random(seed)
    return [''.join(dice.choice(LETTERS) for _ in range(dice.randint(1, most))) for _ in range(count)]


@pytest.mark.filterwarnings('error', 'ignore:Glyph')
def test_names_of_any_letters_stay_as_they_are_in_pictures_and_tables(tmp_path):
    names, figure = ['_', '$', '$$', '__x', '$10-$20', 'Ba$$in', 'a\\', *some_names(0, 80)], plt.figure(layout='none')
    lines = [figure.gca().plot([], [], label=pictures.shown(name))[0] for name in names]
    legend = figure.gca().legend()
    figure.draw_without_rendering()
    assert len(legend.get_texts()) == len(names) == len(lines)
    for name, text in zip(names, legend.get_texts()):
        string, mathematics = text._preprocess_math(text.get_text())
        assert not mathematics and string.removeprefix(' ' * (name[0] == '_')) == name.encode(errors='replace').decode()
    plt.close(figure)
    table = runs.markdown([('a', 'b'), *((name, f'{name}\r\n{name}') for name in names)])
    assert [len(re.split(r'(?<!\\)\|', line)) for line in table.split('\n')[:-1]] == [4] * (len(names) + 2)
    files.write_table(tmp_path / 'a.csv', dict(name=names), ['name'])
    found = pd.read_csv(tmp_path / 'a.csv', keep_default_na=False, encoding_errors='surrogateescape')
    assert found['name'].tolist() == names


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.filterwarnings('error', 'ignore:Glyph')
def test_names_of_any_letters_are_directories_classes_and_files(tiny, tmp_path, monkeypatch, on_the_cpu, seed, capsys):
    sys.stdout.reconfigure(errors='backslashreplace')  # as runtime.run() does
    names = [name for name in some_names(seed, 40, 30) if name.strip() == name and name[0] not in '.~']
    names[0] += 'x' * (250 - len(os.fsencode(names[0])))
    monkeypatch.setattr(pictures, 'BATCH', 6)
    monkeypatch.chdir(tmp_path)
    for run, where in zip(names[9:], names[:2]):
        for place in (f'{where}/{part}/{name}' for part in ('train', 'test') for name in names[2:5]):
            os.makedirs(place)
            for i in range(3):
                pixels = np.random.default_rng(len(where) + i).integers(256, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(os.path.join(place, f'{names[5 + i]}.png'))
        words = [where if before == '--root' else word for before, word in zip(['', *tiny], tiny)]
        main.main([*words, '--epochs', '1', '--results_dir', f'runs/{run}'])
    results = sorted((tmp_path / 'runs').iterdir())
    probe = ['--model_path', str(results[0] / 'model_1.pth'), '--epochs', '1']
    for root in names[:2]:
        linear.main([*probe, '--root', root])
    assert len([*results[0].glob('model_1_linear*.csv')]) == 2 and len(results) == 2
    plot.main(['curves', *map(str, results)])
    for what in 'neighbours', 'similarity', 'negatives':
        plot.main([what, str(results[0] / 'model_1.pth')])
    sweep.main(['--table_only', '--results_dir', 'runs'])
    table = pd.read_csv('runs/table.csv', encoding_errors='surrogateescape')
    assert sorted(table['data']) == sorted(names[:2])
    weights = torch.load(results[0] / 'model_1_linear.pth', weights_only=True)
    assert weights['classes'] == sorted(map(folder.nfc, names[2:5]))
    embed.main([*probe[:2], '--root', names[0], '--out', f'{names[12]}.npz'])
    assert f'train/{names[2]}/{names[5]}.png' in np.load(f'{names[12]}.npz')['names'].tolist()
