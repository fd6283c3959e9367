"""Tables, pictures, pages and the example of sequences: what they show is what runs left."""

import ast
import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
from argparse import Namespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import HOME

import linear
import main
import model
import pictures
import plot
import sequences
import sweep
from hardneg import flags, runs
from hardneg.augment import normalize
from hardneg.files import crc, read_json, write_json, write_table
from hardneg.losses import contrastive_loss
from hardneg.runtime import UsageError, UserError
from utils import load_data

HARD = 'HCL, τ⁺ = 0.1, β = 0.5'
# Letters that Markdown, matplotlib, file systems or terminals treat in a way of their own
LETTERS = '_$|*~^{}\\%&#`<> ab\t\x01\x07\x1b\x7fé漢' + 'שע\u202e\u0301' + os.fsdecode(b'\xe9\xff')


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
def logs(run_of_one_epoch, tmp_path):
    """A directory of the logs of two objectives with two seeds each, and of their probes."""
    directory = tmp_path / 'logs'
    config = read_json(run_of_one_epoch / 'config.json')
    for estimator, beta, seed, knn, probe in (
        ('standard', 0.0, 0, 10, 30),
        ('standard', 0.0, 1, 20, 40),
        ('hard', 0.5, 1, 22, 38),
        ('hard', 0.5, 0, 14, 36),
    ):
        results = directory / f'{estimator}_{seed}'
        results.mkdir(parents=True)
        config['settings'] |= dict(estimator=estimator, beta=beta, seed=seed, epochs=2)
        config['settings']['tau_plus'] = 0.1 if beta else 0.0
        write_json(results / 'config.json', config)
        log = [
            {'epoch': 0, 'test_acc@1': 9},
            {'epoch': 1, 'train_loss': 5.0, 'seconds': 60.0},
            {'epoch': 2, 'train_loss': 4.0 + beta, 'test_acc@1': knn, 'seconds': 90.0},
        ]
        write_table(results / 'log.csv', log, runs.LOG)
        row = {**dict.fromkeys(runs.PROBE, 1), 'test_acc@1': probe}
        write_table(results / 'model_2_linear.csv', [row], runs.PROBE)
        about = dict(
            command='linear.py --lr 1',
            settings=dict(epochs=1, lr=1, model_path=str(results)),
            data_digest=config['data_digest'],
            encoder=None,
        )
        write_json(results / 'model_2_linear.json', about)
    return directory


def change(file, settings=None, **others):
    """Change values, and settings, in a JSON file."""
    content = read_json(file)
    content['settings'] |= settings or {}
    write_json(file, content | others)


def table_of(logs, *words):
    """What sweep.py writes as table.csv."""
    sweep.main(['--table_only', '--results_dir', str(logs), *words])
    return pd.read_csv(logs / 'table.csv')


# Tables


def test_a_table_has_means_deviations_and_paired_differences(logs, capsys):
    table = table_of(logs)
    assert table['objective'].tolist() == ['SimCLR', HARD]
    hard = table.iloc[1]
    found = hard[['seeds', 'knn', 'linear', 'minutes', 'epochs', 'beta']].tolist()
    assert found == [2, 18, 37, 2.5, 2, 0.5]
    assert hard['knn_gain'] == 3  # of 4 and 2: seed by seed
    assert hard['knn_gain_std'] == pytest.approx(2**0.5, abs=0.01)
    assert hard['linear_gain'] == 2  # of 6 and -2
    assert hard['linear_gain_std'] == pytest.approx(32**0.5, abs=0.01)
    assert hard['linear_command'] == 'linear.py --lr 1'
    text = (logs / 'table.md').read_text()
    assert f'| {HARD} | 2 | 18.00 ± 5.66 | +3.00 ± 1.41 | 37.00 ± 1.41 | +2.00 ± 5.66 |' in text
    assert '| SimCLR | 2 | 15.00 ± 7.07 |  | 35.00 ± 7.07 |  |' in text
    assert 'took 2 minutes a run, on average' in text
    assert 'resnet18' in text
    assert text in capsys.readouterr().out


def test_gains_may_be_over_standard_at_a_temperature_of_its_own(logs):
    for name in 'standard_0', 'standard_1', 'hard_0':
        low = dict(temperature=0.1, knn_temperature=0.1)
        change(logs / name / 'config.json', low)
    table = table_of(logs, '--against', '0.1').set_index(['estimator', 'temperature'])
    assert table['knn_gain'].dropna().to_dict() == {('hard', 0.1): 4, ('hard', 0.5): 2}
    assert '| gain over SimCLR, t = 0.1 |' in (logs / 'table.md').read_text()
    change(logs / 'standard_1' / 'config.json', dict(temperature=0.5, knn_temperature=0.5))
    table = table_of(logs, '--against', '0.1').set_index(['estimator', 'temperature'])
    assert table['knn_gain'].dropna().to_dict() == {('hard', 0.1): 4}


def test_settings_of_a_probe_are_no_column_as_a_row_lacks_the_probe(logs):
    for seed in 0, 1:
        (logs / f'hard_{seed}' / 'model_2_linear.json').unlink()
    table_of(logs)
    text = (logs / 'table.md').read_text()
    assert '| objective | seeds | kNN, % |' in text
    assert ', linear_how batch_size' in text


def test_gains_over_two_runs_of_one_seed_are_refused(logs):
    change(logs / 'standard_0' / 'config.json', dict(temperature=0.1, knn_temperature=0.1))
    same = dict(temperature=0.1, knn_temperature=0.5, seed=0)
    change(logs / 'standard_1' / 'config.json', same)
    with pytest.raises(UserError, match='--against 0.1: its SimCLR runs differ in --knn_temp'):
        table_of(logs, '--against', '0.1')


def test_a_table_keeps_other_settings_apart_and_leaves_unfinished_runs_out(logs, capsys):
    change(logs / 'hard_0' / 'config.json', dict(batch_size=16))
    change(logs / 'hard_1' / 'config.json', dict(epochs=3))
    (logs / 'began').mkdir()
    shutil.copy(logs / 'hard_0' / 'config.json', logs / 'began')  # stopped before its log
    table = table_of(logs)
    found = table[['objective', 'batch_size', 'seeds']].values.tolist()
    assert found == [['SimCLR', 8, 2], [HARD, 16, 1]]
    assert np.isnan(table['knn_gain'][1])  # there is no standard run at that batch size
    error = capsys.readouterr().err
    assert 'hard_1: not finished' in error
    assert 'began: no log.csv' in error
    assert '| objective | batch_size | seeds |' in (logs / 'table.md').read_text()


def test_a_table_refuses_what_would_count_twice(logs):
    shutil.copytree(logs / 'standard_0', logs / 'backup')
    with pytest.raises(UserError, match='holds the same run twice'):
        table_of(logs)


@pytest.mark.parametrize('seed', range(3))
def test_linked_runs_count_once_and_loops_of_links_end(logs, tmp_path, seed):
    """Two links to each run, and one to each directory of the links, anywhere among them."""
    dice = random.Random(seed)
    places = [tmp_path / 'links' / name for name in ('', 'a', 'a/b', 'c')]
    targets = [*logs.iterdir(), *logs.iterdir(), *places]
    expected = table_of(logs)
    for place in places:
        place.mkdir()
    for i, target in enumerate(targets):
        (dice.choice(places) / f'link {i}').symlink_to(target)
    pd.testing.assert_frame_equal(table_of(places[0]), expected)


def test_a_directory_without_finished_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match='holds no finished run'):
        table_of(tmp_path)


def test_a_table_tells_of_how_many_seeds_a_mean_is(logs):
    file = logs / 'standard_0' / 'model_2_linear.json'
    change(file, dict(epochs=9))  # its CSV ends after 1
    table = table_of(logs)
    assert table['seeds'].tolist() == [2, 2]
    assert table['linear_seeds'].tolist() == [1, 2]
    assert table['linear'].tolist() == [40, 37]
    assert table['linear_gain'][1] == -2
    assert table['knn_gain'][1] == 3
    assert '-2.00 (1 of 2 seeds)' in (logs / 'table.md').read_text()


def test_a_probe_of_another_encoder_does_not_count(logs):
    (logs / 'hard_0' / 'model_2.pth').write_bytes(b'retrained')
    own = logs / 'standard_0' / 'model_2.pth'
    own.write_bytes(b'probed')
    change(own.with_name('model_2_linear.json'), encoder=crc(own))
    assert sweep.make_table(logs)['linear_seeds'].tolist() == [2, 1]


def test_a_probe_on_other_data_does_not_count(logs):
    change(logs / 'hard_0' / 'model_2_linear.json', data_digest='another')
    assert sweep.make_table(logs)['linear_seeds'].tolist() == [2, 1]


def test_a_probe_that_left_no_row_does_not_count(logs):
    write_table(logs / 'hard_0' / 'model_2_linear.csv', [], runs.PROBE)
    assert sweep.make_table(logs)['linear_seeds'].tolist() == [2, 1]


def test_a_probe_with_later_flags_at_their_defaults_is_like_one_without(logs):
    before = sweep.make_table(logs)
    assert before['linear_how'].str.contains('; ').sum() == 0
    later = dict(fit='crop', label_fraction=1.0, cached=False, cache_dir='elsewhere')
    change(logs / 'hard_0' / 'model_2_linear.json', later)
    pd.testing.assert_frame_equal(sweep.make_table(logs), before)
    change(logs / 'hard_0' / 'model_2_linear.json', dict(label_fraction=0.5))
    assert 'label_fraction 0.5' in sweep.make_table(logs)['linear_how'][1]


def test_a_run_from_before_a_flag_is_like_one_with_its_default(logs):
    before = sweep.make_table(logs)
    file = logs / 'hard_0' / 'config.json'
    config = read_json(file)
    for name in 'fit', 'holdout', 'crop_min', 'vertical_flip', 'micro_batch', 'init':
        del config['settings'][name]
    write_json(file, config)
    found = sweep.make_table(logs)
    pd.testing.assert_frame_equal(found, before, check_like=True)
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    assert len(figure.axes[0].lines) == 2
    change(logs / 'hard_1' / 'config.json', dict(crop_min=0.4))
    assert sweep.make_table(logs)['crop_min'].tolist() == [0.08, 0.08, 0.4]


def test_a_table_of_runs_by_several_versions_of_the_code_says_so(logs, capsys):
    """Runs from before the digest are told nothing."""
    said = []
    for codes in ([None, None], ['a', None], ['a', 'a'], ['a', 'b']):
        for file, code in zip(sorted(logs.glob('*/config.json')), [*codes, None, None]):
            config = json.loads(file.read_text())
            config.pop('code', None)
            if code:
                config['code'] = code
            file.write_text(json.dumps(config))
        sweep.make_table(logs)
        said.append('trained by 2 versions of the code' in capsys.readouterr().err)
    assert said == [False, False, False, True]


@pytest.mark.parametrize('setting', [dict(positives='label'), dict(oracle=True)], ids=str)
def test_gains_with_labels_are_over_standard_with_labels(logs, setting):
    for file in logs.glob('*/config.json'):
        change(file, setting)
    table = sweep.make_table(logs)
    assert table['knn_gain'].isna().tolist() == [True, False]
    assert table['knn_gain'][1] == 3
    change(logs / 'standard_0' / 'config.json', dict(positives='view', oracle=False))
    assert sweep.make_table(logs)['knn_gain_seeds'].max() == 1


@pytest.mark.parametrize('other', [dict(ranks=8), dict(images=dict(train=31, test=9))], ids=str)
def test_ranks_and_data_sets_are_kept_apart(logs, other):
    change(logs / 'hard_1' / 'config.json', **other)
    assert sweep.make_table(logs)['seeds'].tolist() == [2, 1, 1]
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    assert len(figure.axes[0].lines) == 3


@pytest.mark.parametrize(
    'words, message',
    [
        (['--seeds', '0'], '--seeds'),
        (['--betas', '3'], '--betas'),
        (['--beta', '1'], 'the sweep sets --estimator, --debiased, --beta, --seed itself'),
        (['--tau_plus', '2'], '--tau_plus'),
        (['--probe', '--lr 0'], '--lr'),
        (['--objectives', 'soft'], 'soft'),
        (['--warmup', '400'], '--warmup 400 must be less than --epochs 400'),
        (['--probe', '"'], 'No closing quotation'),
        (['--probe', '--model_path x'], 'sets --model_path itself'),
        (['--probe=--root=x'], 'sets --root itself'),
        (['--probe', '--label_fraction 0.1'], 'no column for --label_fraction'),
        (['--probe', '--cached --bn train'], '--bn train needs random views'),
        (['--table_only'], '--table_only trains nothing'),
    ],
    ids=str,
)
def test_wrong_flags_end_the_sweep_before_it_begins(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['sweep.py'])
    results = tmp_path / 'r'
    sweep_flags = ['--dataset_name', 'shapes', '--results_dir', str(results)]
    with pytest.raises(SystemExit) as stop:
        sweep.runtime.run(lambda: sweep.main([*sweep_flags, '--objectives', 'hard_b1', *words]))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count('\n') == 1
    assert not results.exists()


def test_a_run_that_ends_is_told_at_once_and_after_an_error_none_begins(monkeypatch, capsys):
    begun, told = [], threading.Event()

    def train_and_probe(self, directory, words):
        begun.append(directory)
        if directory == 'fails':
            raise UserError('it fails')
        if directory == 'short':
            return 'short: ended'
        assert told.wait(60)
        return 'long: ended'

    def tell(line, **options):
        assert line == 'short: ended'
        told.set()
        raise UserError('enough')

    monkeypatch.setattr(sweep.Sweep, 'train_and_probe', train_and_probe)
    monkeypatch.setattr(sweep, 'print', tell, raising=False)
    with pytest.raises(UserError, match='enough'):
        sweep.train_all([('long', []), ('short', [])], [], jobs=2)
    begun.clear()
    with pytest.raises(UserError, match='it fails'):
        sweep.train_all([('fails', []), *[('long', [])] * 50], [], jobs=1)
    assert len(begun) < 5


# Pictures


def arguments(*paths, **others):
    """What plot.py parses, with other defaults that suit few images."""
    values = dict.fromkeys([*flags.DATA, 'prefix', 'arch', 'query']) | dict(
        seed=0, images=9, memory=99
    )
    return Namespace(paths=list(paths), **{**values, **others})


def test_curves_are_means_over_seeds(logs):
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    loss, accuracy = figure.axes
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ['SimCLR', HARD]
    assert lines[HARD].get_ydata().tolist() == [5, 4.5]
    assert lines['SimCLR'].get_color() == pictures.OWN['SimCLR']
    assert lines[HARD].get_color() != lines['SimCLR'].get_color()
    found = [line.get_xydata().tolist() for line in accuracy.lines]
    assert found == [[[0, 9], [2, 15]], [[0, 9], [2, 18]]]
    assert loss.get_xlabel() == 'epoch'
    assert '%' in accuracy.get_ylabel()


def test_curves_without_classes_show_label_free_measures(logs):
    for file in logs.glob('*/config.json'):
        change(file, classes=[])
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    texts = [axes.get_ylabel().split()[0] for axes in figure.axes]
    assert texts == ['training', 'alignment', 'uniformity', 'RankMe']


def test_long_names_stay_within_the_picture(logs):
    change(logs / 'hard_0' / 'config.json', dict(temperature=0.25, batch_size=128))
    change(logs / 'hard_1' / 'config.json', dict(temperature=0.1))
    figure = plot.curves(arguments(*sorted(logs.iterdir())))
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 3
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_more_runs_than_colours_are_refused(logs):
    for batch_size in range(2, 11):
        copied = shutil.copytree(logs / 'hard_0', logs / f'hard_0_{batch_size}')
        change(copied / 'config.json', dict(batch_size=100 * batch_size))
    with pytest.raises(UserError, match='11 different runs, and 8 colours'):
        plot.curves(arguments(*sorted(logs.iterdir())))


def test_accuracies_by_temperature_are_those_of_the_logs(logs):
    low = dict(temperature=0.1, knn_temperature=0.1)
    change(logs / 'hard_1' / 'config.json', low)
    knn, probe = plot.temperature(arguments(*sorted(logs.iterdir()))).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in knn.lines}
    assert lines == {'SimCLR': [[0.5, 15]], HARD: [[0.1, 22], [0.5, 14]]}
    lines = {line.get_label(): line.get_xydata().tolist() for line in probe.lines}
    assert lines == {'SimCLR': [[0.5, 35]], HARD: [[0.1, 38], [0.5, 36]]}
    dots = np.concatenate([dots.get_offsets()[:, 1] for dots in knn.collections])
    assert sorted(dots) == [10, 14, 20, 22]


@torch.no_grad()
def test_similarity_counts_every_pair_of_test_images(run_of_one_epoch, tree):
    checkpoint = run_of_one_epoch / 'model_1.pth'
    panels = pictures.similarity(arguments(checkpoint)).axes
    data = load_data('folder', tree, store_size=16)
    i, j = torch.triu_indices(9, 9, 1)
    same = data.test_labels[i] == data.test_labels[j]
    net = model.load_model(checkpoint).eval()
    for panel, what, x in zip(panels, 'fz', net(normalize(data.test))):
        cosine = (x @ x.T)[i, j]
        means = [line.get_xdata()[0] for line in panel.lines]
        expected = [cosine[same].mean().item(), cosine[~same].mean().item()]
        assert means == pytest.approx(expected, abs=1e-5)
        # The area under ROC: how often a pair of one class is more similar. There are no ties.
        wins = (cosine[same][:, None] > cosine[~same]).double().mean().item()
        assert f'{what}: area under ROC {wins:.3f}' in panel.get_title()


def frames(block):
    """Whether the frame of each panel is that of an image of the query's class."""
    found = []
    for panel in block.flat:
        edge = panel.spines['left'].get_edgecolor()
        found.append(plt.matplotlib.colors.to_hex(edge) == pictures.RIGHT.lower())
    return np.reshape(found, block.shape)


@torch.no_grad()
@pytest.mark.parametrize('encoders', [1, 2])
def test_neighbours_are_the_nearest_and_framed_by_class(run_of_one_epoch, tree, encoders):
    checkpoints = [run_of_one_epoch / f'model_{1 - i}.pth' for i in range(encoders)]
    figure = pictures.neighbours(arguments(*checkpoints))
    data = load_data('folder', tree, store_size=16)
    chosen = pictures.some(9, 5, 0)
    columns = 10 // encoders
    panels = np.array(figure.axes).reshape(5, -1)
    for i, checkpoint in enumerate(checkpoints):
        net = model.load_model(checkpoint).eval()
        queries, _ = net(normalize(data.test[chosen]))
        known, _ = net(normalize(data.train))
        found = (queries @ known.T).topk(columns).indices  # (5, columns)
        right = data.train_labels[found] == data.test_labels[chosen][:, None]
        first = 2 + i * (columns + 1)
        block = panels[:, first : first + columns]
        assert (frames(block) == right.numpy()).all()
        assert f': {right.sum()} of {right.numel()} ' in block[0, 0].texts[0].get_text()
        for panel, index in zip(block.flat, found.flatten()):
            image = torch.tensor(panel.images[0].get_array()).permute(2, 0, 1)
            assert torch.equal(image, data.train[index])


def test_push_is_the_derivative_of_the_loss_by_a_cosine():
    """By finite differences: the Gram matrix of the views, one cosine moved, factorised again."""
    torch.manual_seed(0)
    z = F.normalize(torch.randn(8, 16, dtype=torch.float64), dim=1)
    objective = dict(temperature=0.3, tau_plus=0.1, beta=2)
    found = pictures.push(z.chunk(2), **objective)
    for i, j in ((0, 1), (2, 7), (3, 0)):
        values = []
        for step in 1e-5, -1e-5:
            gram = z @ z.T
            gram[i, j] += step
            gram[j, i] += step
            moved = torch.linalg.cholesky(gram)
            values.append(contrastive_loss(*moved.chunk(2), **objective).item())
        assert found[i, j].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize('tau_plus, beta', [(0, 0), (0.1, 0), (0.1, 1)])
def test_the_push_on_the_circle_is_the_derivative_of_one_images_loss(tau_plus, beta):
    """By the papers' equations, of the cosines alone."""
    t = 0.5
    image, positive, negatives = (pictures.on_circle(x) for x in ([0], [9], [-40, 60, 100, 170]))
    cosine = (negatives @ image[0]).requires_grad_()  # (K,)
    s = cosine / t
    P = (positive @ image[0] / t).exp()
    R = len(s) * ((1 + beta) * s).exp().sum() / (beta * s).exp().sum()
    Ng = (R - tau_plus * len(s) * P) / (1 - tau_plus)
    assert Ng > len(s) * math.exp(-1 / t)
    (-(P / (P + Ng)).log()).backward()
    objective = dict(temperature=t, tau_plus=tau_plus, beta=beta)
    found = pictures.push_of_one(image, positive, negatives, **objective)
    torch.testing.assert_close(found, cosine.grad)


def test_negatives_that_the_loss_pulls_are_hollow_and_no_part_of_the_push():
    figure = pictures.circle(None)
    hollow, shares = [], []
    for panel in figure.axes:
        points = [points for points in panel.collections if len(points.get_facecolors()) == 0]
        hollow.append(sum(len(some.get_offsets()) for some in points))
        shares.append(panel.texts[0].get_text().partition('\n')[0])
    assert hollow == [0, 0, 17]  # of SimCLR, DCL and HCL
    assert shares == ['68 % of the push', '68 % of the push', '98 % of the push']


def test_the_circle_needs_no_run(tmp_path):
    plot.main(['circle', '--out', str(tmp_path / 'circle.png')])
    assert plt.imread(tmp_path / 'circle.png').shape[1] == 1280


# That of graphs has a test in test_graphs.py.
@pytest.mark.parametrize(
    'what', [what for what in plot.PICTURES if what not in ('graphs', 'circle')]
)
def test_every_picture_is_written(run_of_one_epoch, tmp_path, monkeypatch, capsys, what):
    monkeypatch.setattr(pictures, 'BATCH', 9)
    path = run_of_one_epoch / 'model_1.pth'
    if what in plot.OF_DIRECTORIES:
        path = run_of_one_epoch
    out = tmp_path / f'{what}.png'
    plot.main([what, str(path), '--out', str(out)])
    pixels = plt.imread(out)
    widths = dict(similarity=640, temperature=800, neighbours=1320)
    assert pixels.shape[1] == widths.get(what, 1280)
    different = np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)
    assert len(different) > 50  # a picture, not a blank sheet
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


def test_a_picture_lies_beside_its_run_or_checkpoint(run_of_one_epoch, tmp_path):
    results = shutil.copytree(run_of_one_epoch, tmp_path / 'results')
    plot.main(['curves', str(results)])
    plot.main(['similarity', str(results / 'model_1.pth')])
    found = sorted(path.name for path in results.glob('*.png'))
    assert found == ['curves.png', 'similarity.png']
    with pytest.raises(UsageError, match='--results_dir is for timm/NAME'):
        plot.main(['similarity', str(results / 'model_1.pth'), '--results_dir', str(tmp_path)])


@pytest.mark.parametrize(
    'words, message',
    [
        ('curves nowhere', 'nowhere is not the directory of a run: config.json is missing'),
        ('similarity nowhere/model_1.pth', 'nowhere/model_1.pth: no such file'),
        ('neighbours {foreign}', 'foreign.pth: '),
        ('curves {run} --out nowhere/a.png', 'cannot write nowhere/a.png'),
        ('negatives {run}/model_1.pth', '9 images'),
        ('graphs {run}', 'holds no CSV files of misc/graphs.py, or others'),
    ],
)
def test_pictures_of_nothing_are_refused(run_of_one_epoch, tmp_path, words, message):
    (tmp_path / 'foreign.pth').write_text('hello')
    places = dict(run=run_of_one_epoch, foreign=tmp_path / 'foreign.pth')
    with pytest.raises(UserError, match=re.escape(message)):
        plot.main(words.format(**places).split())


@pytest.mark.parametrize(
    'words',
    [['curves', 'a' * 300], ['graphs', 'a' * 300], ['curves', 'r', '--out', 'a' * 300]],
    ids=['run', 'graphs', 'out'],
)
def test_names_that_no_file_can_have_are_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_a_picture_of_another_kind_of_file_is_a_usage_error(run_of_one_epoch, capsys):
    with pytest.raises(SystemExit) as stop:
        plot.main(['curves', str(run_of_one_epoch), '--out', 'a.pdf'])
    assert stop.value.code == 2
    assert 'PNG' in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(run_of_one_epoch, tmp_path, monkeypatch):
    out = tmp_path / 'a.png'
    out.write_text('old')

    def savefig(figure, file):
        file.write(b'new')
        raise ZeroDivisionError

    monkeypatch.setattr(plot.plt.Figure, 'savefig', savefig)
    with pytest.raises(ZeroDivisionError):
        plot.main(['curves', str(run_of_one_epoch), '--out', str(out)])
    assert out.read_text() == 'old'


# Names


def some_names(seed, count, most=12):
    """Names of up to so many of LETTERS."""
    dice = random.Random(seed)
    names = []
    for _ in range(count):
        names.append(''.join(dice.choices(LETTERS, k=dice.randint(1, most))))
    return names


NAMES = ['_', '$', '$$', '__x', '$10-$20', 'Ba$$in', 'a\\', *some_names(0, 80)]


@pytest.mark.filterwarnings('error::UserWarning', 'ignore:Glyph')
def test_names_of_any_letters_stay_as_they_are_in_pictures():
    figure = plt.figure(layout='none')
    axes = figure.gca()
    for name in NAMES:
        axes.plot([], [], label=pictures.shown(name))
    legend = axes.legend()
    figure.draw_without_rendering()
    assert len(legend.get_texts()) == len(NAMES)
    for name, text in zip(NAMES, legend.get_texts()):
        string, mathematics = text._preprocess_math(text.get_text())
        if name[0] == '_':
            string = string.removeprefix(' ')
        assert not mathematics
        assert string == name.encode(errors='replace').decode()


def test_names_of_any_letters_fill_one_cell_of_a_table():
    rows = [(name, f'{name}\r\n{name}') for name in NAMES]
    table = runs.markdown([('a', 'b'), *rows])
    lines = table.split('\n')[:-1]
    assert len(lines) == len(NAMES) + 2
    for line in lines:
        assert len(re.split(r'(?<!\\)\|', line)) == 4


def test_names_of_any_letters_are_read_back_from_a_csv_file(tmp_path):
    # With another column, as a line of white space alone would not be read
    write_table(tmp_path / 'a.csv', enumerate(NAMES), ['number', 'name'])
    found = pd.read_csv(
        tmp_path / 'a.csv', keep_default_na=False, encoding_errors='surrogateescape'
    )
    assert found['name'].tolist() == NAMES


# Pages


PAGES = [HOME / 'README.md', HOME / 'results' / 'README.md', *sorted((HOME / 'docs').glob('*.md'))]


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_links_of_a_page_lead_to_files(page):
    text = page.read_text()
    assert not re.search('@[A-Z]+@', text)  # a number to be filled in
    links = re.findall(r'\]\(([^)]+)\)', text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        file = link.partition('#')[0]
        if file and not link.startswith('http'):
            assert (page.parent / file).exists(), link


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(HOME)))
def test_commands_of_a_page_name_scripts_and_flags_that_exist(page):
    shared = (HOME / 'hardneg' / 'flags.py').read_text()
    for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.S):
        for line in block.replace('\\\n', ' ').splitlines():
            command = line.partition('  #')[0]
            script = re.search(r'(?:python |^torchrun .*?)([\w/]+\.py)(.*)', command)
            if not script:
                continue
            known = (HOME / script[1]).read_text() + shared
            if script[1] in ('misc/sweep.py', 'misc/bench.py', 'misc/finetune.py'):
                known += (HOME / 'main.py').read_text() + (HOME / 'linear.py').read_text()
            for flag in re.findall(r'--\w+', script[2]):
                assert f"'{flag}'" in known, command


def test_python_of_the_pages_gives_what_their_comments_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'results' / 'nothing').mkdir(parents=True)
    torch.save(
        model.Model(128, 'resnet18', width=0.25).state_dict(), 'results/nothing/model_400.pth'
    )
    (loss,) = re.findall('```python\n(.*?)```', (HOME / 'README.md').read_text(), re.S)
    own_images = (HOME / 'docs' / 'own_images.md').read_text()
    # The first needs faiss, the second a file of features.
    _, _, encoder, views = re.findall('```python\n(.*?)```', own_images, re.S)

    exec(loss, {})
    printed = re.findall(r'tensor\((.*)\)', capsys.readouterr().out)
    told = re.findall(r': (\d\.\d{4})$', loss, re.M)
    assert len(told) == 4
    assert [f'{float(value):.3f}' for value in printed] == [f'{float(x):.3f}' for x in told]

    names = dict(torch=torch, images=torch.randint(256, (6, 3, 40, 48), dtype=torch.uint8))
    exec(views, names)
    for x in names['x1'], names['x2']:
        assert x.shape == (6, 3, 32, 32)
        assert x.dtype == torch.float32
        assert -3 < x.min() < x.max() < 3

    exec(encoder, names)
    for x in names['features'], names['z']:
        assert x.shape == (6, 128)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(6))


def test_the_published_reproduction_trains_and_probes_with_the_authors_settings(tmp_path):
    """The commands of misc/published.sh, by a python that writes down what it is asked."""
    fake = tmp_path / 'python'
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    fake.chmod(0o755)
    environment = dict(os.environ, PATH=f'{tmp_path}:{os.environ["PATH"]}')
    command = ['bash', str(HOME / 'misc' / 'published.sh'), 'results/b2', '--beta', '2']
    subprocess.run(command, env=environment, cwd=tmp_path, check=True)
    train, probe = (tmp_path / 'asked').read_text().splitlines()
    args = main.parse(train.split()[1:])
    assert (args.micro_batch, args.precision, args.augment, args.beta) == (128, 'fp32', 'pil', 2)
    probe_args = linear.arguments(probe.split()[1:])
    assert probe_args.model_path == f'results/b2/model_{args.epochs}.pth'
    assert probe_args.bn == 'train'


# The house


def imports(file):
    """The names of the modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition('.')[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.partition('.')[0])
    return names


def test_the_package_imports_no_script_and_the_root_none_of_misc():
    misc = {path.stem for path in (HOME / 'misc').glob('*.py')}
    root = {path.stem for path in HOME.glob('*.py')}
    for file in (HOME / 'hardneg').glob('*.py'):
        assert not imports(file) & (misc | root), file
    for file in HOME.glob('*.py'):
        assert not imports(file) & misc, file


# The example of sequences


def test_a_view_of_a_sequence_is_a_window_with_a_fifth_of_its_symbols_replaced():
    torch.manual_seed(0)
    symbols = torch.arange(sequences.LENGTH) // 64  # 64 times 0, 64 times 1
    found = sequences.view(sequences.one_hot(symbols.repeat(2000, 1))).argmax(1)  # (2000, WINDOW)
    assert found.shape == (2000, sequences.WINDOW)
    kept = (found < 2).double().mean().item()
    assert kept == pytest.approx(0.8 + 0.2 * 2 / 8, abs=0.01)
    # Windows begin anywhere: the middle one is as often before the change as after it.
    first = found[:, sequences.WINDOW // 2]
    assert (first == 0).sum().item() == pytest.approx((first == 1).sum().item(), rel=0.15)
