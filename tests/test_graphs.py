"""misc/graphs.py: its objectives, its reading of data sets, and what it writes."""

import io
import math
import random
import runpy
import shutil
import sys
from argparse import Namespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch_geometric as pyg

import graphs as g
import plot
from hardneg.runtime import UserError

SHAPES = dict(path=[(0, 1), (1, 2), (2, 3)], ring=[(0, 1), (1, 2), (2, 3), (3, 0)])
HEAD = 'data,digest,objective,beta,tau_plus,repeat,accuracy,seconds\n'


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)  # main() sets it for the whole process


def write_tu(root, name, graphs, labels=True):
    """Write the graphs, lists of edges, of classes 0, 1, 0, 1, ... as a TU data set."""
    raw = root / name / 'raw'
    raw.mkdir(parents=True)
    lines = dict(A=[], graph_labels=[], graph_indicator=[])
    if labels:
        lines['node_labels'] = []
    nodes = 0
    for i, graph in enumerate(graphs):
        size = 1 + max(max(edge) for edge in graph)
        for u, v in graph:
            lines['A'] += [f'{nodes + u + 1}, {nodes + v + 1}', f'{nodes + v + 1}, {nodes + u + 1}']
        nodes += size
        lines['graph_labels'].append(2 * (i % 2) - 1)
        lines['graph_indicator'] += [i + 1] * size
        if labels:
            lines['node_labels'] += [k % 3 for k in range(size)]
    for part, values in lines.items():
        (raw / f'{name}_{part}.txt').write_text(''.join(f'{value}\n' for value in values))
    return raw


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A data set TINY of 24 graphs, paths and rings of 4 to 6 nodes."""
    root = tmp_path_factory.mktemp('tu')
    graphs = []
    for i in range(12):
        tail = [(0, k) for k in range(4, 4 + i % 3)]
        graphs += [SHAPES['path'] + tail, SHAPES['ring'] + tail]
    write_tu(root, 'TINY', graphs)
    return root


@pytest.fixture
def tiny(root, tmp_path, monkeypatch):
    """Runs main() on TINY with 2 epochs and no search for C; returns the rows of its CSV file."""
    train = g.train
    monkeypatch.setattr(g, 'train', lambda *args, **options: train(*args, **options, epochs=2))
    monkeypatch.setattr(g, 'GridSearchCV', lambda svm, *args, **options: svm)

    def run(flags, *more, file='TINY.csv'):
        own = ['--dataset_name', 'TINY', '--root', str(root), '--results_dir', str(tmp_path)]
        g.main([*own, *flags.split(), *map(str, more)])
        return pd.read_csv(tmp_path / file)

    return run


# The objectives


def scores(*s):
    """A node (1, 1) and graphs (G, 1) of these scores; the node's own graph is the first."""
    graphs = torch.tensor(s, dtype=torch.float64)[:, None].requires_grad_()
    return torch.ones(1, 1, dtype=torch.float64), graphs, torch.tensor([0])


def softplus(x):
    return (1 + x.exp()).log()


def papers_loss(nodes, graphs, batch, tau_plus, beta):
    """The paper's form, one node and one graph at a time."""
    total = 0
    for node, own in zip(nodes, batch):
        R = W = 0
        for j, graph in enumerate(graphs):
            s = (node * graph).sum()
            if j == own:
                s_own = s
                continue
            R = R + (beta * s).exp() * softplus(s)
            W = W + (beta * s).exp()
        negative = torch.relu(R / W - tau_plus * softplus(s_own)) / (1 - tau_plus)
        total = total + softplus(-s_own) + negative
    return total / len(nodes)


def published_loss(nodes, graphs, batch, tau_plus, beta):
    """The released code's form, one node and one graph at a time."""
    G, total = len(graphs), 0
    zero = torch.zeros((), dtype=torch.float64)
    rows = [[(node * graph).sum() for graph in graphs] for node in nodes]
    owns = []
    for row, own in zip(rows, batch):
        owns.append(row[own])
        row[own] = zero
    top = max(abs(s) for row in rows for s in row)
    for row, s_own in zip(rows, owns):
        W = sum((-2 * beta * s / top).exp() for s in row) / G
        for s in row:
            if beta == 0:
                term = (softplus(s) - math.log(2)) / (1 - tau_plus)
            else:
                weight = (-2 * beta * s / top).exp() / W
                term = weight * softplus(s) / (1 - tau_plus) - math.log(2)
            total = total + term / (G - 1)
        for s in [s_own] + [zero] * (G - 1):
            total = total - (math.log(2) - softplus(-s) - tau_plus / (1 - tau_plus) * softplus(s))
    return total / len(nodes)


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize(
    'tau_plus, beta', [(0, 0), (0.1, 0), (0.5, 0), (0.5, 1), (0.1, 2), (0.3, 10), (0.5, -2)]
)
def test_value_and_gradient_are_those_of_the_double_loop(tau_plus, beta, published):
    generator = torch.Generator().manual_seed(0)
    nodes, graphs = (torch.randn(k, 3, generator=generator).double() for k in (11, 4))
    for x in nodes, graphs:
        x.requires_grad_()
    batch = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3])
    value = g.infograph_loss(nodes, graphs, batch, tau_plus, beta, published)
    slow = published_loss if published else papers_loss
    expected = slow(nodes, graphs, batch, tau_plus, beta)
    exact = dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(value, expected, **exact)
    gradients = torch.autograd.grad(value, (nodes, graphs))
    right = torch.autograd.grad(expected, (nodes, graphs))
    torch.testing.assert_close(gradients, right, **exact)


@pytest.mark.parametrize('published, stressed', [(False, 3), (True, 0)])
def test_papers_weights_stress_the_most_similar_negative_and_published_ones_the_least(
    published, stressed
):
    node, graphs, batch = scores(0, -1, 0, 0.5, 2)
    loss = g.infograph_loss(node, graphs, batch, 0, 10, published)
    (gradient,) = torch.autograd.grad(loss, graphs)
    shares = gradient[1:, 0].abs() / gradient[1:].abs().sum()
    assert shares[stressed] > 0.9


def without_positive(own, published):
    """The loss of negatives -1 and 2, without the own graph's part, for beta = 1."""
    loss = g.infograph_loss(*scores(own, -1, 2), 0, 1, published)
    return loss.item() - math.log1p(math.exp(-own))


def test_the_own_graph_is_no_negative_in_the_papers_form():
    assert without_positive(3, False) == pytest.approx(without_positive(-3, False), abs=1e-12)
    R = [math.exp(s) * math.log1p(math.exp(s)) for s in (-1, 2)]
    assert without_positive(3, False) == pytest.approx(sum(R) / (math.exp(-1) + math.exp(2)))


def test_the_own_graph_is_a_score_of_0_in_the_published_form():
    negatives = 0, -1, 2
    weights = [math.exp(-s) for s in negatives]  # 2 beta / max|s| is 1
    total = 0
    for weight, s in zip(weights, negatives):
        total += 3 * weight / sum(weights) * math.log1p(math.exp(s)) - math.log(2)
    assert without_positive(3, True) == pytest.approx(total / 2 - math.log(2))


@pytest.mark.parametrize('tau_plus', [0.1, 0.5])
def test_negatives_are_divided_by_the_prior_of_true_ones(tau_plus):
    loss = g.infograph_loss(*scores(-50, 1, 1), tau_plus, 1) - 50  # corrects nothing
    assert loss.item() == pytest.approx(math.log1p(math.e) / (1 - tau_plus))


def test_false_negatives_are_subtracted_down_to_0_in_the_papers_form():
    for own in 0, 2:
        loss = g.infograph_loss(*scores(own, 1, 1), 0.1, 0).item()
        negative = (math.log1p(math.e) - 0.1 * math.log1p(math.exp(own))) / 0.9
        assert loss == pytest.approx(math.log1p(math.exp(-own)) + negative)
    for own in 30, 40:
        loss = g.infograph_loss(*scores(own, 1, 1), 0.1, 0).item()
        assert loss == pytest.approx(0, abs=1e-9)


def test_false_negatives_are_added_in_the_published_form():
    losses = [g.infograph_loss(*scores(own, 1, 1), 0.1, 0, True).item() for own in (30, 40)]
    assert losses[1] - losses[0] == pytest.approx(10 * 0.1 / 0.9)


@pytest.mark.parametrize('published', [False, True])
def test_scores_of_thousands_give_finite_losses_and_gradients(published):
    node, graphs, batch = scores(-3000, -5000, 4000)
    loss = g.infograph_loss(node.float(), graphs.float(), batch, 0.5, 10, published)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, graphs)[0].isfinite().all()


# The encoder, the features and the views


def test_linear_layers_start_as_xavier(root):
    model = g.GIN(3)
    kinds = torch.nn.Linear, pyg.nn.Linear
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    assert len(layers) == 6 + 8
    for layer in layers:
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert not layer.bias.any()
        assert 0.8 * bound < layer.weight.abs().max() <= bound


def test_embeddings_of_graphs_are_sums_over_their_own_nodes(root):
    graphs, _, _ = g.load(root, 'TINY')
    b = pyg.data.Batch.from_data_list(graphs)
    model = g.GIN(3).eval()
    nodes, pooled = model(b.x, b.edge_index, b.batch, b.num_graphs)
    assert nodes.shape == (b.num_nodes, 96)  # three layers of 32
    assert pooled.shape == (24, 96)
    torch.testing.assert_close(pooled[5], nodes[b.batch == 5].sum(0))
    for i in range(3):  # no graph acts on another
        x = graphs[i].x
        _, alone = model(x, graphs[i].edge_index, torch.zeros(len(x), dtype=torch.int64), 1)
        torch.testing.assert_close(alone[0], pooled[i])


def test_nodes_without_features_get_their_degree_one_hot(tmp_path):
    write_tu(tmp_path, 'BARE', [SHAPES['path']] * 20, labels=False)
    graphs, _, _ = g.load(tmp_path, 'BARE')
    assert graphs[0].x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]


def test_nodes_with_constant_attributes_alone_get_their_degree(tmp_path):
    raw = write_tu(tmp_path, 'SAME', [SHAPES['path']] * 20, labels=False)
    (raw / 'SAME_node_attributes.txt').write_text('7.5\n' * 80)
    graphs, _, _ = g.load(tmp_path, 'SAME')
    assert graphs[0].x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]


def test_degrees_of_1000_and_more_are_standardised(tmp_path):
    star = [(0, k) for k in range(1, 1001)]
    write_tu(tmp_path, 'STAR', [star] + [SHAPES['path']] * 19, labels=False)
    graphs, _, _ = g.load(tmp_path, 'STAR')
    x = torch.cat([graph.x for graph in graphs])
    degrees = torch.tensor([1000.0] + [1] * 1000 + [1, 2, 2, 1] * 19)
    torch.testing.assert_close(x[:, 0], (degrees - degrees.mean()) / degrees.std())


@pytest.mark.parametrize('strength', [0.2, 1.0])
def test_views_change_each_graph_in_one_way_within_itself(root, strength):
    b = pyg.data.Batch.from_data_list(g.load(root, 'TINY')[0] * 10)
    torch.manual_seed(0)
    x, edges, batch = g.view(b, strength)
    assert (batch[edges[0]] == batch[edges[1]]).all()
    assert (edges[0] != edges[1]).all()
    assert batch.unique().tolist() == list(range(240))  # no graph is lost
    pairs = {tuple(pair) for pair in edges.T.tolist()}
    assert pairs == {(v, u) for u, v in pairs}
    kept = torch.bincount(batch, minlength=240)
    dropped = kept < b.ptr.diff()
    masked = torch.bincount(batch[x.sum(1) == 0], minlength=240) > 0
    assert dropped.any()
    assert masked.any()
    assert not (dropped & masked).any()
    assert not (dropped | masked).all()
    if strength == 1:
        assert (kept[dropped] == 1).all()  # the last node stays
        assert (masked == (pyg.utils.scatter(x.abs().sum(1), batch) == 0)).all()


def test_a_view_of_strength_0_is_the_graph(root):
    b = pyg.data.Batch.from_data_list(g.load(root, 'TINY')[0])
    x, edges, batch = g.view(b, 0.0)
    assert x.equal(b.x)
    assert batch.equal(b.batch)
    assert edges.equal(pyg.utils.coalesce(b.edge_index))


# Training


@pytest.fixture
def losses(monkeypatch):
    """The numbers of graphs and the values of infograph_loss's calls; no evaluation follows."""
    calls = []
    infograph_loss = g.infograph_loss

    def loss(nodes, graphs, *args):
        value = infograph_loss(nodes, graphs, *args)
        calls.append((len(graphs), value.item()))
        return value

    monkeypatch.setattr(g, 'infograph_loss', loss)
    monkeypatch.setattr(g, 'cross_val_score', lambda *args, **options: torch.zeros(10))
    return calls


def test_a_last_graph_alone_joins_the_batch_before(root, losses):
    graphs, y, _ = g.load(root, 'TINY')
    for size in 23, 12, 11:
        g.train(graphs, y, 'infograph', 1.0, 0.1, seed=0, epochs=1, batch_size=size)
    assert [n for n, _ in losses] == [24, 12, 12, 11, 11, 2]


def test_training_lowers_the_loss(root, losses):
    graphs, y, _ = g.load(root, 'TINY')
    g.train(graphs, y, 'infograph', 1.0, 0.1, seed=0, epochs=30)
    assert len(losses) == 30
    assert losses[-1][1] < 0.5 * losses[0][1]


def test_accuracy_is_an_rbf_svms_over_10_shuffled_folds_with_c_from_5_inner_ones(root, monkeypatch):
    seen = []
    cross_val_score = g.cross_val_score

    def watched(*args, **options):
        seen.append((*args, options['cv']))
        return cross_val_score(*args, **options)

    monkeypatch.setattr(g, 'cross_val_score', watched)
    graphs, classes, _ = g.load(root, 'TINY')
    accuracy = g.train(graphs, classes, 'untrained', 0.0, 0.0, seed=3)
    svm, z, y, folds = seen[0]
    assert svm.param_grid == {'C': [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]}
    assert svm.cv == 5
    assert svm.estimator.get_params() == g.SVC().get_params()
    assert (folds.n_splits, folds.shuffle, folds.random_state) == (10, True, 3)
    assert z.shape == (24, 96)
    assert sorted(y) == [0] * 12 + [1] * 12
    assert list(y) != [0, 1] * 12
    assert 50 < accuracy <= 100


def test_graphcl_has_its_own_file_and_takes_two_views_to_contrastive_loss(tiny, monkeypatch):
    seen = []
    contrastive_loss = g.contrastive_loss

    def watched(z1, z2, **objective):
        seen.append((z1, z2, objective))
        return contrastive_loss(z1, z2, **objective)

    monkeypatch.setattr(g, 'contrastive_loss', watched)
    rows = tiny('--objective graphcl --betas 1 --repeats 1', file='TINY_graphcl.csv')
    assert rows['objective'].tolist() == ['untrained', 'graphcl']
    assert len(seen) == 2
    z1, z2, objective = seen[0]
    assert objective == dict(temperature=0.2, tau_plus=0.1, beta=1.0)
    assert z1.shape == z2.shape == (24, 96)
    assert not z1.equal(z2)


# Tables and pictures


def test_the_same_line_gives_the_same_csv_but_for_seconds(tiny, tmp_path):
    first = tiny('--betas 0 2 --repeats 1')
    (tmp_path / 'TINY.csv').unlink()
    second = tiny('--betas 0 2 --repeats 1')
    assert ','.join(first) + '\n' == HEAD
    assert set(first['data']) == {'TINY'}
    assert first['digest'].nunique() == 1
    pd.testing.assert_frame_equal(first.drop(columns='seconds'), second.drop(columns='seconds'))
    assert first['objective'].tolist() == ['untrained', 'infograph', 'infograph']
    assert first['beta'].isna().tolist() == [True, False, False]
    assert first['tau_plus'].isna().tolist() == [True, False, False]


def test_a_line_given_again_continues_and_a_finished_one_trains_nothing(
    tiny, tmp_path, monkeypatch, capsys
):
    file = 'TINY_published.csv'
    flags = '--published --betas 0 --repeats'
    first = tiny(flags, 1, file=file)
    both = tiny(flags, 2, file=file)
    pd.testing.assert_frame_equal(first, both[:2])  # seconds too: nothing ran twice
    assert both['repeat'].tolist() == [0, 0, 1, 1]
    assert both['tau_plus'].tolist()[1::2] == [0.5, 0.5]
    (tmp_path / file).unlink()
    whole = tiny(flags, 2, file=file)
    pd.testing.assert_frame_equal(both.drop(columns='seconds'), whole.drop(columns='seconds'))
    monkeypatch.setattr(g, 'train', None)
    tiny(flags, 2, file=file)
    assert (tmp_path / 'table.md').read_text() in capsys.readouterr().out


def test_the_table_tells_means_deviations_and_gains_repeat_by_repeat(tiny, tmp_path, capsys):
    (tmp_path / 'any.csv').write_text(
        f'{HEAD}A_B,1,untrained,,,0,80,1\nA_B,1,graphcl,0,0.1,0,81,1\n'
        'A_B,1,graphcl,2,0.1,0,85,1\nA_B,1,untrained,,,1,70,1\n'
        'A_B,1,graphcl,0,0.1,1,73,1\nA_B,1,graphcl,2,0.1,1,79,1\n'
    )
    (tmp_path / 'other.csv').write_text(
        f'{HEAD}A_B,1,untrained,,,0,80,2\nA_B,1,untrained,,,1,70,2\n'
    )
    tiny('--repeats 1 --betas 0')
    table = capsys.readouterr().out
    assert '| A_B | untrained |  |  | 2 | 75.0 ± 7.1 |  |  |' in table
    assert '| A_B | graphcl | 2 | 0.1 | 2 | 82.0 ± 4.2 | +5.0 ± 1.4 | +7.0 ± 2.8 |' in table


def test_the_picture_has_a_dot_for_each_repeat_beside_mean_and_deviation(tmp_path):
    rows = [
        ('A', 1, 'untrained', '', '', (80, 70)),
        ('A', 1, 'graphcl', 0, 0.1, (81, 73)),
        ('A', 1, 'graphcl', 2, 0.1, (85, 79)),
        ('A', 1, 'graphcl', 2, 0.2, (75, 76)),
        ('A', '2e1', 'untrained', '', '', (10, 11)),
        ('B', 3, 'untrained', '', '', (50, 51)),
    ]
    text = HEAD
    for *key, accuracies in rows:
        for repeat, accuracy in enumerate(accuracies):
            text += ','.join(map(str, (*key, repeat, accuracy, 1))) + '\n'
    for name in 'x', 'y':  # the same rows in two files count once
        (tmp_path / f'{name}.csv').write_text(text)
    figure = plot.graphs(Namespace(paths=[tmp_path]))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert list(panels) == ['A 1', 'A 2e1', 'B']
    axes = panels['A 1']
    texts = [label.get_text() for label in axes.get_xticklabels()]
    assert texts == ['untrained', '0', '2']
    found = []
    for dots in axes.collections:
        heights = tuple(dots.get_offsets()[:, 1])
        if len(heights) == 2:
            found.append(heights)
    assert found == [accuracies for *_, accuracies in rows[:4]]
    bars = [container.lines for container in axes.containers]
    assert [bar[0].get_ydata()[0] for bar in bars] == [75, 77, 82, 75.5]
    low, high = bars[2][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((82 - 18**0.5, 82 + 18**0.5))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['GraphCL, τ⁺ = 0.1', 'GraphCL, τ⁺ = 0.2']
    # One scale for all panels, which shows every dot
    spans = [np.ptp(panel.get_ylim()) for panel in figure.axes]
    assert spans == pytest.approx([15 + 2] * 3)
    low, high = axes.get_ylim()
    assert low < 70 < 85 < high


# Data sets


def test_data_of_one_name_are_told_apart_by_their_digests(tiny, root, tmp_path, capsys):
    shutil.copytree(root / 'TINY' / 'raw', tmp_path / 'TINY' / 'raw')
    file = tmp_path / 'TINY' / 'raw' / 'TINY_graph_labels.txt'
    lines = file.read_text().splitlines(True)
    file.write_text(''.join(random.Random(0).sample(lines, len(lines))))
    flags = '--betas 0 --repeats 1 --root'
    tiny(flags, tmp_path)
    rows = tiny(flags, root)
    assert len(rows) == 4
    shuffled, true = (own['accuracy'].iloc[0] for _, own in rows.groupby('digest', sort=False))
    assert shuffled < true - 10
    table = capsys.readouterr().out
    for digest, accuracy in zip(rows['digest'].unique(), (shuffled, true)):
        assert f'| TINY {digest} | untrained |  |  | 1 | {accuracy:.1f} ± nan |' in table


def test_the_digest_is_that_of_edges_classes_and_labels(root, tmp_path):
    digests = {g.load(root, 'TINY')[2]}
    changes = dict(
        graph_labels=lambda lines: lines[::-1],
        A=lambda lines: lines[2:],
        node_labels=lambda lines: [*lines[:-1], '1\n'],
    )
    for part, change in changes.items():
        raw = tmp_path / part / 'TINY' / 'raw'
        shutil.copytree(root / 'TINY' / 'raw', raw)
        file = raw / f'TINY_{part}.txt'
        file.write_text(''.join(change(file.read_text().splitlines(True))))
        digests.add(g.load(tmp_path / part, 'TINY')[2])
    assert len(digests) == 4


def test_attributes_are_features_standardised(tmp_path):
    write_tu(tmp_path, 'BARE', [SHAPES['ring']] * 40)
    raw = write_tu(tmp_path, 'ATTR', [SHAPES['ring']] * 40)
    graphs, y, _ = g.load(tmp_path, 'BARE')
    bare = g.train(graphs, y, 'untrained', 0, 0, seed=0)
    dice = random.Random(0)
    lines = []
    for i in range(40):
        value = 1000 + 50 * (i % 2) + dice.random()
        lines += [f'{value}, 7.5\n'] * 4
    (raw / 'ATTR_node_attributes.txt').write_text(''.join(lines))
    graphs, y, _ = g.load(tmp_path, 'ATTR')
    x = torch.cat([graph.x for graph in graphs])
    assert x.shape == (160, 1 + 3)  # nothing of the constant
    torch.testing.assert_close(x[:, 0].mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 0].std(), torch.tensor(1.0))
    assert x[:, 1:].equal(torch.eye(3)[torch.arange(4).repeat(40) % 3])
    # They tell classes apart that the labels of nodes do not.
    assert g.train(graphs, y, 'untrained', 0, 0, seed=0) == 100 > bare + 30


def test_sets_are_downloaded(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pyg.datasets.TUDataset, 'url', tmp_path.as_uri())
    shutil.copytree(root / 'TINY/raw', tmp_path / 'zip/TINY')
    shutil.make_archive(tmp_path / 'TINY', 'zip', tmp_path / 'zip')
    graphs, y, digest = g.load(tmp_path / 'new', 'TINY')
    assert digest == g.load(root, 'TINY')[2]
    assert len(graphs) == len(y) == 24
    (tmp_path / 'TINY.zip').unlink()
    assert g.load(tmp_path / 'new', 'TINY')[2] == digest


def test_data_that_are_missing_or_damaged_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pyg.datasets.TUDataset, 'url', tmp_path.as_uri())
    raw = write_tu(tmp_path, 'BAD', [SHAPES['ring']] * 24)
    (raw / 'BAD_graph_labels.txt').write_text('<!DOCTYPE html>\n')
    out = tmp_path / 'out'
    for name in 'NONE', 'BAD':
        with pytest.raises(UserError, match=f'cannot download or read {name} in ') as error:
            g.main(['--dataset_name', name, '--root', str(tmp_path), '--results_dir', str(out)])
        assert '\n' not in str(error.value)
        assert not (out / f'{name}.csv').exists()


def test_classes_of_few_graphs_are_one_line(tmp_path):
    write_tu(tmp_path, 'FEW', [SHAPES['ring']] * 18)
    with pytest.raises(UserError, match='FEW must have two classes or more, each of 10 graphs'):
        g.load(tmp_path, 'FEW')


# What users do wrong


@pytest.mark.parametrize(
    'flags',
    [
        '--repeats 0',
        '--tau_plus 1',
        '--betas nan',
        '--betas x',
        '--objective graphcl --betas -1',
        '--objective jsd',
        '--published --objective graphcl',
        '--dataset_name a/b',
    ],
)
def test_wrong_flags_end_with_one_line_and_code_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        g.main(flags.split())
    assert stop.value.code == 2
    assert capsys.readouterr().err.count('\n') == 1


def test_a_foreign_csv_file_is_one_line_and_stays(tiny, tmp_path):
    (tmp_path / 'TINY.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UserError, match='holds a CSV file of something else'):
        tiny('')
    assert (tmp_path / 'TINY.csv').read_text() == 'a,b\n1,2\n'


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_geometric', None)
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    message = '^error: torch_geometric is missing: pip install torch_geometric$'
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(g.__file__)
