"""The kept results: tables and figures of the pages are those of the kept logs."""

import re

import numpy as np
import pandas as pd
import pytest
from conftest import HOME

import label_free
import sweep
from photos import evaluate

RESULTS = HOME / 'results'
PAGE = (RESULTS / 'README.md').read_text()


@pytest.mark.parametrize(
    'name, seeds',
    [
        ('cifar10', 3),
        ('cifar10_temperature', 3),
        ('cifar10_labels', 1),
        ('cifar100', 3),
        ('imagenette_20_epochs', 2),
    ],
)
def test_tables_kept_are_those_of_the_logs_kept(name, seeds):
    kept = RESULTS / name
    table = sweep.make_table(kept)
    assert table.to_csv(index=False) == (kept / 'table.csv').read_text()
    assert table['seeds'].min() >= seeds
    rows, _, _ = sweep.markdown(table).partition('\n\n')
    assert rows in PAGE


def rows_of(kept, tuned):
    """Of each objective: accuracy, its gain over SimCLR at t = 0.5 and at a tuned t, twice."""
    own, best = (sweep.make_table(kept, against) for against in (0.5, tuned))
    assert best.to_csv(index=False) == (kept / 'table.csv').read_text()

    rows = []
    for (_, a), (_, b) in zip(own.iterrows(), best.iterrows()):
        title = a['objective']
        if a['temperature'] == tuned:
            title += ', tuned t'
        cells = [title, str(a['temperature']), str(a['seeds'])]
        for metric in 'knn', 'linear_cached':
            gain = f'{metric}_gain'
            cells += [sweep.cell(a, metric), sweep.cell(a, gain), sweep.cell(b, gain)]
        rows.append(f'| {" | ".join(cells)} |')
    return rows


def test_rows_of_both_pages_are_those_of_the_logs_kept():
    rows = rows_of(RESULTS / 'cifar10_30', tuned=0.1)
    first = (HOME / 'README.md').read_text().splitlines()
    assert sorted(line for line in first if ' ± ' in line and line[0] == '|') == sorted(rows)
    assert set(rows) <= set(PAGE.splitlines())


def test_figures_of_imagenette_are_those_of_the_logs_kept():
    """The rows, with the hours of a run, the untrained encoder, and the choice of a temperature."""
    kept = RESULTS / 'imagenette'
    hours = sweep.make_table(kept, 0.2)['minutes'] / 60
    for row, time in zip(rows_of(kept, tuned=0.2), hours):
        assert f'{row} {time:.1f} |' in PAGE
    text = ' '.join(PAGE.split())
    knn = pd.read_csv(kept / 'standard_0' / 'log.csv')['test_acc@1'][0]
    probe = pd.read_csv(kept / 'standard_0' / 'model_0_linear_cached.csv')['test_acc@1'].iloc[-1]
    assert f'The untrained encoder has {knn:.1f} % in kNN and {probe:.1f} % in the probe' in text
    found = []
    for t in '0.1', '0.2', '0.3':
        log = pd.read_csv(RESULTS / 'imagenette_held_out' / f't{t}' / 'standard_0' / 'log.csv')
        found.append(f'{log["test_acc@1"].iloc[-1]:.1f}')
    assert f'kNN is {found[0]}, {found[1]} and {found[2]} % at t = 0.1, 0.2 and 0.3' in text


def leads(kept, seeds):
    """HCL's kNN accuracy less SimCLR's, at the same temperature: a column for each seed, by epoch.

    In points.
    """
    return pd.concat([lead(kept, 'hard_b1', seed) for seed in range(seeds)], axis=1)


def lead(kept, name, seed):
    """An objective's kNN accuracy less SimCLR's, in points, by epoch."""
    simclr, other = (
        pd.read_csv(kept / f'{run}_{seed}' / 'log.csv', index_col='epoch')['test_acc@1']
        for run in ('standard', name)
    )
    return other - simclr


def test_the_lead_of_hcl_on_cifar10_shrinks_as_the_page_says():
    mean = leads(RESULTS / 'cifar10_30', seeds=3).mean(axis=1)
    at = [f'{mean[epoch]:.1f}' for epoch in (5, 15, 30)]
    text = f'{at[0]} points at epoch 5, {at[1]} at epoch 15 and {at[2]} at epoch 30'
    assert text in ' '.join(PAGE.split())


def test_hcl_leads_early_on_photos_and_gains_nothing_in_knn_in_the_end():
    kept = RESULTS / 'imagenette'
    own = leads(kept, seeds=2)
    mean = own.mean(axis=1)
    assert mean[[10, 20, 30, 60]].round().tolist() == [3, 3, 3, 1]
    late = [80, 90, 100]
    assert mean[late].abs().max() < 0.5
    least, most = own.loc[late].min(axis=None), own.loc[late].max(axis=None)
    assert f'single seeds by −{-least:.1f} to +{most:.1f}' in ' '.join(PAGE.split())
    row = sweep.make_table(kept, 0.5).set_index('estimator').loc['hard']
    knn, probe = (
        f'{row[f"{name}_gain"]:+.1f} ± {row[f"{name}_gain_std"]:.1f}'
        for name in ('knn', 'linear_cached')
    )
    text = ' '.join((HOME / 'README.md').read_text().split())
    assert f'{knn} in kNN, {probe} in the probe on fixed features' in text


def test_the_leads_of_all_objectives_after_20_epochs_are_those_of_the_logs_kept():
    kept = RESULTS / 'imagenette_20_epochs'
    behind = [f'{-lead(kept, "debiased", seed)[20]:.1f}' for seed in range(2)]
    hcl = []
    for directory in kept.glob('hard_*'):
        hcl.append(lead(kept, *directory.name.rsplit('_', 1)))
    assert len(hcl) == 6
    hcl = pd.concat(hcl, axis=1).round()
    assert (hcl.loc[10].min(), hcl.loc[10].max()) == (3, 6)
    assert (hcl.loc[20].min(), hcl.loc[20].max()) == (1, 2)
    page = ' '.join(PAGE.split())
    assert f'at epoch 20, by {behind[0]} points with one seed and {behind[1]} with the' in page
    row = sweep.make_table(kept).set_index('estimator').loc['debiased']
    text = ' '.join((HOME / 'README.md').read_text().split())
    assert f'DCL was {-row["knn_gain"]:.1f} ± {row["knn_gain_std"]:.1f} points behind' in text
    in_bf16 = leads(RESULTS / 'imagenette', seeds=2).loc[20]
    assert f'{in_bf16.min():.1f} and {in_bf16.max():.1f} points at epoch 20' in page


def test_probes_on_random_views_are_those_of_the_logs_kept():
    kept = RESULTS / 'imagenette'
    encoders = {
        'SimCLR, t = 0.5': 'standard_0/model_100',
        'SimCLR, t = 0.2': 't0.2/standard_0/model_100',
        'HCL, β = 1': 'hard_b1_0/model_100',
        'untrained': 'hard_b1_0/model_0',
    }
    for title, encoder in encoders.items():
        cells = [title]
        for probe in 'linear_cached', 'linear', 'linear_bn_train':
            file = kept / f'{encoder}_{probe}.csv'
            found = ''
            if file.exists():
                found = f'{pd.read_csv(file)["test_acc@1"].iloc[-1]:.2f}'
            cells.append(found)
        assert f'| {" | ".join(cells)} |' in PAGE
    last, mean = [], []
    for name in 'standard_0', 'hard_b1_0':
        accuracies = pd.read_csv(kept / name / 'model_100_linear.csv')['test_acc@1']
        last.append(accuracies.iloc[-1])
        mean.append(accuracies[-20:].mean())
    page = ' '.join(PAGE.split())
    assert f'by {last[1] - last[0]:.1f} points after the last epoch' in page
    apart = f'{mean[1] - mean[0]:.1f}'
    words = f'{mean[0]:.1f} % for SimCLR and {mean[1]:.1f} % for HCL, {apart} points apart'
    assert f'last twenty epochs is {words}' in page
    first = ' '.join((HOME / 'README.md').read_text().split())
    assert f'{apart} in the probe on random views (one seed, the mean of its last 20' in first


def test_figures_of_digits_and_sequences_are_those_that_were_printed():
    digits = (RESULTS / 'timings' / 'two_towers.txt').read_text()
    clip, half, one, _ = re.findall(r'[\d.]+ ± [\d.]+', digits)
    recipes = ' '.join((HOME / 'docs' / 'recipes.md').read_text().split())
    told = f'{clip} % over five seeds (chance: 0.2 %), against {half} with β = 0.5 and {one} with'
    assert told in recipes
    sequences = (RESULTS / 'timings' / 'sequences.txt').read_text()
    for figures in re.findall(r'kNN ([\d.]+ ± [\d.]+)', sequences):
        assert figures in ' '.join(PAGE.split())


# What alignment, uniformity and RankMe say


@pytest.mark.parametrize(
    'title, names',
    [
        ('CIFAR-10, 5 epochs', ['cifar10', 'cifar10_temperature']),
        ('CIFAR-10, 30 epochs', ['cifar10_30']),
        ('Imagenette, held out, 20 epochs', ['imagenette_held_out']),
        ('Imagenette, 20 epochs', ['imagenette_20_epochs']),
        ('Imagenette, 100 epochs', ['imagenette']),
    ],
)
def test_the_choice_without_labels_is_that_of_the_logs_kept(title, names):
    means = label_free.means_over_seeds([RESULTS / name for name in names])
    for cells in label_free.compare(means)[1:]:
        assert f'| {title} | {" | ".join(map(str, cells))} |' in PAGE


def test_a_measure_that_orders_the_losses_as_knn_does_chooses_the_best():
    means = pd.DataFrame(
        dict(knn=[50, 60, 70], alignment=[3, 2, 1], uniformity=[-3, -2, -1], rankme=[1, 9, 8]),
        index=['a', 'b', 'c'],
        dtype=float,
    )
    assert label_free.compare(means)[1:] == [
        ['alignment', 3, '+1.00', 'c', '0.0', 'c'],
        ['uniformity', 3, '-1.00', 'a', '20.0', 'c'],
        ['RankMe', 3, '+0.50', 'b', '10.0', 'c'],
    ]


# Near-duplicates


def test_the_best_f1_of_pairs_is_that_of_the_best_threshold():
    belong = np.array([True, False, True, False])
    assert evaluate.best_f1(np.array([0.9, 0.8, 0.7, 0.1]), belong) == pytest.approx(4 / 5)
    # A threshold does not separate pairs of equal similarity
    assert evaluate.best_f1(np.array([0.9, 0.9, 0.1, 0.1]), belong) == pytest.approx(2 / 3)


def test_groups_count_by_pairs_and_as_wholes():
    group = np.array([0, 0, 1, 1, 1, 2])  # what belongs together
    label = np.array([0, 0, 1, 1, 2, 2])  # what was found
    precision, recall, f1, whole = evaluate.scores(label, group, np.full(6, True))
    assert (precision, recall) == pytest.approx((2 / 3, 2 / 4))
    assert f1 == pytest.approx(4 / 7)
    assert whole == 1 / 2
