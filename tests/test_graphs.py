import io
import math
import random
import runpy
import shutil
import sys
from argparse import Namespace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch_geometric as pyg

import graphs as g
import plot
from hardneg.runtime import UserError

SHAPES = dict(path=[(0, 1), (1, 2), (2, 3)], ring=[(0, 1), (1, 2), (2, 3), (3, 0)])


@pytest.fixture(autouse=True)
def denormals():
    yield
    torch.set_flush_denormal(False)  # main() sets it for the whole process


def write_tu(root, name, graphs, labels=True):
    """Write the graphs, lists of edges, of classes 0, 1, 0, 1, ... as a TU data set."""
    raw = root / name / 'raw'
    raw.mkdir(parents=True)
    edges, nodes = [], 0
    sizes = [1 + max(map(max, graph)) for graph in graphs]
    for graph, size in zip(graphs, sizes):
        edges += [(nodes + a + 1, nodes + b + 1) for u, v in graph for a, b in ((u, v), (v, u))]
        nodes += size
    lines = dict(A=[f'{u}, {v}' for u, v in edges], graph_labels=[2 * (i % 2) - 1 for i in range(len(graphs))],
                 graph_indicator=[i + 1 for i, size in enumerate(sizes) for _ in range(size)])
    if labels:
        lines['node_labels'] = [k % 3 for size in sizes for k in range(size)]
    for part, values in lines.items():
        (raw / f'{name}_{part}.txt').write_text(''.join(f'{value}\n' for value in values))
    return raw


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """A data set of 24 graphs, paths and rings of 4 to 6 nodes."""
    root = tmp_path_factory.mktemp('tu')
    write_tu(root, 'TINY', [SHAPES[kind] + [(0, k) for k in range(4, 4 + i % 3)] for i in range(12) for kind in SHAPES])
    return root


@pytest.fixture
def tiny(root, tmp_path, monkeypatch):
    """Run main() on TINY with 2 epochs and without the search for C; returns the rows of the CSV file."""
    monkeypatch.setattr(g, 'train', partial(g.train, epochs=2))
    monkeypatch.setattr(g, 'GridSearchCV', lambda svm, *args, **kwargs: svm)

    def run(*flags, file='TINY.csv'):
        g.main(['--dataset_name', 'TINY', '--root', str(root), '--results_dir', str(tmp_path), *flags])
        return pd.read_csv(tmp_path / file)
    return run


# The objectives

def scores(*s):
    """A node (1, 1) and graphs (G, 1) of these scores; the node's own graph is the first."""
    return torch.ones(1, 1).double(), torch.tensor(s).double()[:, None].requires_grad_(), torch.tensor([0])


def double_loop(nodes, graphs, batch, tau_plus, beta, published):
    """Both objectives, one node and one graph at a time."""
    def softplus(x):
        return (1 + x.exp()).log()
    n, G, total = len(nodes), len(graphs), 0
    s = [[(node * graph).sum() for graph in graphs] for node in nodes]
    negatives = [[x for j, x in enumerate(row) if j != batch[i]] for i, row in enumerate(s)]
    top = max(abs(x) for row in negatives for x in row)
    for i in range(n):
        own, R, W = s[i][batch[i]], 0, 0
        if not published:
            for x in negatives[i]:
                R, W = R + (beta * x).exp() * softplus(x), W + (beta * x).exp()
            total = total + softplus(-own) + torch.relu(R / W - tau_plus * softplus(own)) / (1 - tau_plus)
            continue
        zero = torch.zeros((), dtype=torch.float64)
        row = [*negatives[i], zero]
        W = sum((-2 * beta * x / top).exp() for x in row) / G
        for x in row:
            term = softplus(x) - math.log(2) if beta == 0 else (-2 * beta * x / top).exp() / W * softplus(x)
            total = total + (term / (1 - tau_plus) - (math.log(2) if beta else 0)) / (G - 1)
        for x in [own, *[zero] * (G - 1)]:
            total = total - (math.log(2) - softplus(-x) - tau_plus / (1 - tau_plus) * softplus(x))
    return total / n


@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('tau_plus, beta', [(0, 0), (0.1, 0), (0.5, 0), (0.5, 1), (0.1, 2), (0.3, 10), (0.5, -2)])
def test_value_and_gradient_are_those_of_the_double_loop(tau_plus, beta, published):
    generator = torch.Generator().manual_seed(0)
    nodes, graphs = (torch.randn(k, 3, generator=generator, dtype=torch.float64, requires_grad=True) for k in (11, 4))
    batch = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3])
    results = []
    for loss in (g.infograph_loss, double_loop):
        value = loss(nodes, graphs, batch, tau_plus, beta, published)
        results.append((value.detach(), *torch.autograd.grad(value, (nodes, graphs))))
    for fast, slow in zip(*results):
        torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)


def shares(published):
    """The shares of the gradient of four negatives, of scores -1, 0, 0.5 and 2, with beta = 10."""
    node, graphs, batch = scores(0, -1, 0, 0.5, 2)
    grad, = torch.autograd.grad(g.infograph_loss(node, graphs, batch, 0, 10, published), graphs)
    return grad[1:, 0].abs() / grad[1:].abs().sum()


def test_papers_weights_stress_the_most_similar_negative_and_published_ones_the_least():
    assert shares(published=False).argmax() == 3 and shares(published=False)[3] > 0.9
    assert shares(published=True).argmax() == 0 and shares(published=True)[0] > 0.9


def test_own_graph_is_no_negative_in_the_papers_form_and_a_score_of_0_in_the_published_one():
    def rest(own, published, tau_plus=0.0):  # the loss without the own graph's part
        loss = g.infograph_loss(*scores(own, -1, 2), tau_plus, 1, published)
        return (loss - math.log1p(math.exp(-own))).item()
    assert rest(3, False) == pytest.approx(rest(-3, False), abs=1e-12)
    R = [math.exp(x) * math.log1p(math.exp(x)) for x in (-1, 2)]
    assert rest(3, False) == pytest.approx(sum(R) / (math.exp(-1) + math.exp(2)))
    w = [math.exp(-x) for x in (0, -1, 2)]  # 2 beta / max|s| is 1
    R = [3 * a / sum(w) * math.log1p(math.exp(x)) - math.log(2) for a, x in zip(w, (0, -1, 2))]
    assert rest(3, True) == pytest.approx(sum(R) / 2 - math.log(2))


def test_negatives_are_divided_by_the_prior_of_true_ones():
    for tau_plus in (0.1, 0.5):  # an own score of -50 corrects nothing
        loss = g.infograph_loss(*scores(-50, 1, 1), tau_plus, 1) - 50
        assert loss.item() == pytest.approx(math.log1p(math.e) / (1 - tau_plus))


def test_false_negatives_are_subtracted_down_to_0_in_the_papers_form_and_added_in_the_published_one():
    losses = [[g.infograph_loss(*scores(own, 1, 1), 0.1, 0, published).item() for own in (0, 2, 30, 40)]
              for published in (False, True)]
    terms = [(math.log1p(math.e) - 0.1 * math.log1p(math.exp(own))) / 0.9 for own in (0, 2)]
    assert losses[0] == pytest.approx([math.log(2) + terms[0], math.log1p(math.exp(-2)) + terms[1], 0, 0], abs=1e-9)
    assert losses[1][3] - losses[1][2] == pytest.approx(10 * 0.1 / 0.9)


def test_scores_of_thousands_give_finite_losses_and_gradients():
    for published in (False, True):
        node, graphs, batch = scores(-3000, -5000, 4000)
        loss = g.infograph_loss(node.float(), graphs.float(), batch, 0.5, 10, published)
        assert loss.isfinite() and torch.autograd.grad(loss, graphs)[0].isfinite().all()


# The encoder, the data and the views

def test_linear_layers_start_as_xavier_and_embeddings_are_sums_over_nodes_of_three_layers(root):
    graphs, *_ = g.load(root, 'TINY')
    b = pyg.data.Batch.from_data_list(graphs)
    model = g.GIN(3)
    linear = [m for m in model.modules() if isinstance(m, (torch.nn.Linear, pyg.nn.Linear))]
    assert len(linear) == 6 + 8
    for m in linear:
        bound = math.sqrt(6 / sum(m.weight.shape))
        assert not m.bias.any() and 0.8 * bound < m.weight.abs().max() <= bound
    nodes, pooled = model(b.x, b.edge_index, b.batch, b.num_graphs)
    assert nodes.shape == (b.num_nodes, 96) and pooled.shape == (24, 96)
    torch.testing.assert_close(pooled[5], nodes[b.batch == 5].sum(0))
    model.eval()(b.x, b.edge_index, b.batch, 24)
    first = torch.cat([model(x.x, x.edge_index, torch.zeros(len(x.x)).long(), 1)[1] for x in graphs[:3]])
    torch.testing.assert_close(first, model(b.x, b.edge_index, b.batch, 24)[1][:3])  # no graph acts on another


def test_nodes_without_features_get_their_degree_one_hot_or_standardised_above_1000(tmp_path):
    write_tu(tmp_path, 'BARE', [SHAPES['path']] * 20, labels=False)
    graphs, *_ = g.load(tmp_path, 'BARE')
    assert graphs[0].x.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 1], [0, 1, 0]]
    star = [(0, k) for k in range(1, 1001)]
    write_tu(tmp_path, 'STAR', [star] + [SHAPES['path']] * 19, labels=False)
    x = torch.cat([graph.x for graph in g.load(tmp_path, 'STAR')[0]])
    degrees = torch.tensor([1000.] + [1] * 1000 + [1, 2, 2, 1] * 19)
    torch.testing.assert_close(x[:, 0], (degrees - degrees.mean()) / degrees.std())


def test_views_change_each_graph_in_one_way_within_itself(root):
    b = pyg.data.Batch.from_data_list(g.load(root, 'TINY')[0] * 10)
    torch.manual_seed(0)
    for strength in (0.2, 1.0):
        x, edges, batch = g.view(b, strength)
        assert (batch[edges[0]] == batch[edges[1]]).all() and (edges[0] != edges[1]).all()
        assert batch.unique().tolist() == list(range(240))
        flat = {*map(tuple, edges.T.tolist())}
        assert flat == {(v, u) for u, v in flat}
        kept = torch.bincount(batch, minlength=240)
        dropped, masked = kept < b.ptr.diff(), torch.bincount(batch[x.sum(1) == 0], minlength=240) > 0
        assert not (dropped & masked).any() and dropped.any() and masked.any() and not (dropped | masked).all()
    assert set(kept[dropped].tolist()) == {1}  # with a strength of 1 the last node stays
    assert (masked == (pyg.utils.scatter(x.abs().sum(1), batch) == 0)).all()
    x, edges, batch = g.view(b, 0.0)
    assert x.equal(b.x) and batch.equal(b.batch) and edges.equal(pyg.utils.coalesce(b.edge_index))


# The script

def test_same_line_gives_the_same_csv_but_for_seconds(tiny, tmp_path):
    first = tiny('--betas', '0', '2', '--repeats', '1')
    (tmp_path / 'TINY.csv').unlink()
    second = tiny('--betas', '0', '2', '--repeats', '1')
    assert list(first) == ['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat', 'accuracy', 'seconds']
    assert {*first['data']} == {'TINY'} and first['digest'].nunique() == 1
    pd.testing.assert_frame_equal(first.drop(columns='seconds'), second.drop(columns='seconds'))
    assert first['objective'].tolist() == ['untrained', 'infograph', 'infograph']
    assert first[['beta', 'tau_plus']].isna().all(axis=1).tolist() == [True, False, False]


def test_a_line_given_again_continues_and_a_finished_one_trains_nothing(tiny, tmp_path, monkeypatch, capsys):
    first = tiny('--published', '--betas', '0', '--repeats', '1', file='TINY_published.csv')
    both = tiny('--published', '--betas', '0', '--repeats', '2', file='TINY_published.csv')
    pd.testing.assert_frame_equal(first, both[:2])  # seconds too: nothing ran twice
    assert both['repeat'].tolist() == [0, 0, 1, 1] and both['tau_plus'].tolist()[1::2] == [0.5, 0.5]
    (tmp_path / 'TINY_published.csv').unlink()
    whole = tiny('--published', '--betas', '0', '--repeats', '2', file='TINY_published.csv')
    pd.testing.assert_frame_equal(both.drop(columns='seconds'), whole.drop(columns='seconds'))
    monkeypatch.setattr(g, 'train', None)
    tiny('--published', '--betas', '0', '--repeats', '2', file='TINY_published.csv')
    assert (tmp_path / 'table.md').read_text() in capsys.readouterr().out


def test_graphcl_has_its_own_file_and_takes_contrastive_loss(tiny, monkeypatch):
    seen = []
    real = g.contrastive_loss
    monkeypatch.setattr(g, 'contrastive_loss', lambda z1, z2, **kw: seen.append((z1, z2, kw)) or real(z1, z2, **kw))
    rows = tiny('--objective', 'graphcl', '--betas', '1', '--repeats', '1', file='TINY_graphcl.csv')
    assert rows['objective'].tolist() == ['untrained', 'graphcl'] and len(seen) == 2
    z1, z2, kw = seen[0]
    assert kw == dict(temperature=0.2, tau_plus=0.1, beta=1.0) and z1.shape == (24, 96) and not z1.equal(z2)


@pytest.fixture
def losses(monkeypatch):
    """The numbers of graphs and the values of infograph_loss's calls, without the evaluation after training."""
    calls, real = [], g.infograph_loss

    def loss(nodes, graphs, *args):
        calls.append((len(graphs), real(nodes, graphs, *args)))
        return calls[-1][1]
    monkeypatch.setattr(g, 'infograph_loss', loss)
    monkeypatch.setattr(g, 'cross_val_score', lambda *args, **kwargs: torch.zeros(10))
    return calls


def test_a_last_graph_alone_joins_the_batch_before(root, losses):
    for batch in (23, 12, 11):
        g.train(*g.load(root, 'TINY')[:2], 'infograph', 1.0, 0.1, 0, epochs=1, batch=batch)
    assert [size for size, _ in losses] == [24, 12, 12, 11, 11, 2]


def test_training_lowers_the_loss(root, losses):
    g.train(*g.load(root, 'TINY')[:2], 'infograph', 1.0, 0.1, 0, epochs=30)
    assert len(losses) == 30 and losses[-1][1] < 0.5 * losses[0][1]


def test_accuracy_is_an_rbf_svms_over_10_shuffled_folds_with_c_from_5_inner_ones(root, monkeypatch):
    seen = []
    real = g.cross_val_score
    monkeypatch.setattr(g, 'cross_val_score', lambda *args, **kw: seen.append((*args, kw)) or real(*args, **kw))
    accuracy = g.train(*g.load(root, 'TINY')[:2], 'untrained', 0.0, 0.0, 3)
    svm, z, y, kwargs = seen[0]
    assert svm.param_grid == {'C': [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]} and svm.cv == 5
    assert svm.estimator.get_params() == g.SVC().get_params()
    assert (kwargs['cv'].n_splits, kwargs['cv'].shuffle, kwargs['cv'].random_state) == (10, True, 3)
    assert z.shape == (24, 96) and sorted(y) == [0] * 12 + [1] * 12 and list(y) != [0, 1] * 12
    assert 50 < accuracy <= 100


HEAD = 'data,digest,objective,beta,tau_plus,repeat,accuracy,seconds\n'


def test_table_tells_means_deviations_and_gains_repeat_by_repeat(tiny, tmp_path, capsys):
    (tmp_path / 'any.csv').write_text(HEAD + 'A_B,1,untrained,,,0,80,1\nA_B,1,graphcl,0,0.1,0,81,1\n'
                                      'A_B,1,graphcl,2,0.1,0,85,1\nA_B,1,untrained,,,1,70,1\n'
                                      'A_B,1,graphcl,0,0.1,1,73,1\nA_B,1,graphcl,2,0.1,1,79,1\n')
    (tmp_path / 'other.csv').write_text(HEAD + 'A_B,1,untrained,,,0,80,2\nA_B,1,untrained,,,1,70,2\n')
    tiny('--repeats', '1', '--betas', '0')
    table = capsys.readouterr().out
    assert '| A_B | untrained |  |  | 2 | 75.0 ± 7.1 |  |  |' in table
    assert '| A_B | graphcl | 2 | 0.1 | 2 | 82.0 ± 4.2 | +5.0 ± 1.4 | +7.0 ± 2.8 |' in table


def test_picture_has_a_dot_for_each_repeat_beside_mean_and_deviation_on_an_axis_of_accuracy(tmp_path):
    rows = [('A', 1, 'untrained', '', '', (80, 70)), ('A', 1, 'graphcl', 0, 0.1, (81, 73)),
            ('A', 1, 'graphcl', 2, 0.1, (85, 79)), ('A', 1, 'graphcl', 2, 0.2, (75, 76)),
            ('A', '2e1', 'untrained', '', '', (10, 11)), ('B', 3, 'untrained', '', '', (50, 51))]
    lines = [(*key, repeat, accuracy, 1) for *key, found in rows for repeat, accuracy in enumerate(found)]
    text = HEAD + ''.join(','.join(map(str, line)) + '\n' for line in lines)
    for name in ('x', 'y'):  # the same rows in two files count once
        (tmp_path / f'{name}.csv').write_text(text)
    figure = plot.graphs(Namespace(paths=[tmp_path]))
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert [*panels] == ['A 1', 'A 2e1', 'B']
    axes = panels['A 1']
    assert [label.get_text() for label in axes.get_xticklabels()] == ['untrained', '0', '2']
    dots = [tuple(dot.get_offsets()[:, 1]) for dot in axes.collections if len(dot.get_offsets())]
    bars = [container.lines for container in axes.containers]
    means = [bar[0].get_ydata()[0] for bar in bars]
    assert [dot for dot in dots if dot in [found for *_, found in rows]] == [found for *_, found in rows[:4]]
    assert means == [75, 77, 82, 75.5]
    low, high = bars[2][2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((82 - 18**0.5, 82 + 18**0.5))
    assert [np.ptp(axes.get_ylim()) for axes in panels.values()] == pytest.approx([15 + 2] * 3)  # one scale for all
    assert all(low < y < high for y in (70, 85) for low, high in [axes.get_ylim()])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['GraphCL, τ⁺ = 0.1', 'GraphCL, τ⁺ = 0.2']


# What an accuracy belongs to

def test_accuracies_are_those_of_what_the_files_hold_and_no_others(tiny, root, tmp_path, capsys):
    dice, flags, sets = random.Random(0), ['--betas', '0', '--repeats', '1', '--root'], {}
    changes = dict(graph_labels=lambda lines: dice.sample(lines, len(lines)), A=lambda lines: lines[2:],
                   node_labels=lambda lines: [*lines[:-1], '1\n'], graph_indicator=lambda lines: lines)
    for name, change in changes.items():
        file = shutil.copytree(root / 'TINY', tmp_path / name / 'TINY') / 'raw' / f'TINY_{name}.txt'
        lines = change(file.read_text().splitlines(True))
        file.write_text(''.join(lines), newline='\r\n')  # which alone changes nothing
        rows = tiny(*flags, str(tmp_path / name))
        sets[name] = rows.tail(2)['digest'].iloc[0] if name != 'graph_indicator' else None
        lone = tiny(*flags, str(tmp_path / name), '--results_dir', str(tmp_path / name), file=f'{name}/TINY.csv')
        own = rows[rows['digest'] == lone['digest'][0]].reset_index(drop=True)
        pd.testing.assert_frame_equal(own.drop(columns='seconds'), lone.drop(columns='seconds'))
        assert {path.name for path in (tmp_path / name / 'TINY').iterdir()} == {'raw'}  # a cache would keep old graphs
    rows = tiny(*flags, str(root))
    assert len(rows) == 8 and rows['digest'].nunique() == 4
    table = capsys.readouterr().out
    for digest, own in rows.groupby('digest'):
        assert f'| TINY {digest} | untrained |  |  | 1 | {own["accuracy"].iloc[0]:.1f} ± nan |' in table
    random_labels = rows[rows['digest'] == sets['graph_labels']]['accuracy']
    assert random_labels.iloc[0] < rows[rows['digest'] == g.load(root, 'TINY')[2]]['accuracy'].iloc[0] - 10


# Files

def test_graphs_are_those_that_pyg_reads(root, tmp_path):
    raw = shutil.copytree(root / 'TINY', tmp_path / 'TINY') / 'raw'
    edges = (raw / 'TINY_A.txt').read_text().splitlines()
    random.Random(0).shuffle(edges)
    (raw / 'TINY_A.txt').write_text('\n'.join([*edges, '7, 7', *edges[:9]]) + '\n')  # a loop, and some edges twice
    labels = [[3 * (i % 2) - 2, -i % 3 + 5] for i in range(120)]
    (raw / 'TINY_node_labels.txt').write_text(''.join(f'{a}, {b}\n' for a, b in labels))  # -1 and 0 are nobody's
    graphs, y, _ = g.load(tmp_path, 'TINY')
    theirs = pyg.datasets.TUDataset(tmp_path, 'TINY')
    assert len(graphs) == len(theirs) == 24 and list(y) == [graph.y.item() for graph in theirs]
    for ours, other in zip(graphs, theirs):
        assert ours.x.equal(other.x) and ours.edge_index.equal(other.edge_index) and ours.x.shape[1] == 4 + 3


def test_attributes_are_features_standardised_and_separate_classes_that_labels_do_not(tmp_path):
    raw = write_tu(tmp_path, 'ATTR', [SHAPES['ring']] * 40)
    bare = g.train(*g.load(tmp_path, 'ATTR')[:2], 'untrained', 0, 0, 0)
    values = [1000 + 50 * (i % 2) + random.Random(i).random() for i in range(40) for _ in range(4)]
    (raw / 'ATTR_node_attributes.txt').write_text(''.join(f'{value}, 7.5\n' for value in values))
    graphs, y, _ = g.load(tmp_path, 'ATTR')
    x = torch.cat([graph.x for graph in graphs])
    assert x.shape == (160, 1 + 3)  # nothing of the constant
    torch.testing.assert_close(x[:, 0].mean(), torch.tensor(0.), atol=1e-5, rtol=0)
    torch.testing.assert_close(x[:, 0].std(), torch.tensor(1.))
    assert x[:, 1:].equal(torch.eye(3)[torch.arange(4).repeat(40) % 3])
    assert g.train(graphs, y, 'untrained', 0, 0, 0) == 100 > bare + 30


def numbers(raw, part, kind):
    """The rows of a file, or None if it does not hold equally many numbers of the kind in every line."""
    text = (raw / f'TINY_{part}.txt').read_text()
    try:
        rows = [[kind(cell) for cell in line.split(',')] for line in text.split('\n') if line]
    except ValueError:
        return None
    fits = text[-1:] == '\n' and rows and {*map(len, rows)} == {len(rows[0])}
    return rows if fits and (kind is float or max(abs(x) for row in rows for x in row) < 2**63) else None


def held(raw):
    """What the files of TINY hold, line by line: the set of edges of each graph and its class; None if damaged."""
    A, owner, y = (numbers(raw, part, int) for part in ('A', 'graph_indicator', 'graph_labels'))
    labels, attributes = numbers(raw, 'node_labels', int), numbers(raw, 'node_attributes', float)
    if not (A and owner and y and labels and attributes and len(A[0]) == 2 and len(y[0]) == len(owner[0]) == 1):
        return None
    owner, y = [row[0] for row in owner], [row[0] for row in y]
    if not (len(owner) == len(labels) == len(attributes) and all(math.isfinite(x) for row in attributes for x in row)
            and [*dict.fromkeys(owner)] == [*range(1, len(y) + 1)] == sorted({*owner}) and owner == sorted(owner)
            and all(0 < a <= len(owner) and 0 < b <= len(owner) and owner[a - 1] == owner[b - 1] for a, b in A)
            and all(abs(x) < 10_000 for row in labels for x in row) and len({*y}) > 1 and min(map(y.count, y)) >= 10):
        return None
    edges = [set() for _ in y]
    for a, b in A:
        first = owner.index(owner[a - 1]) + 1
        edges[owner[a - 1] - 1] |= {(a - first, b - first)} if a != b else set()
    return edges, [sorted({*y}).index(label) for label in y]


def damaged_lines(text, dice):
    """What editors, transfers and other programs make of a file of numbers."""
    lines, n = text.splitlines(True), text.count('\n')
    i = dice.choice([dice.randrange(n), n - 1])
    cells = lines[i].rstrip('\n').split(', ')
    other = dice.choice(['-1', '0', '1', '2', '121', '9' * 30, 'x', 'nan', 'inf', '0.53', '1000000000'])
    cells[dice.randrange(len(cells))] = other
    changed = ', '.join(cells) + '\n'
    return dice.choice([
        lambda: text[:dice.randrange(len(text))], lambda: '', lambda: '\n', lambda: '<!DOCTYPE html>\n<p>Not, found\n',
        lambda: ''.join(lines[:i] + lines[i + 1:]), lambda: ''.join(lines[:i] + [changed] + lines[i + 1:]),
        lambda: ''.join(lines[:i] + [changed] + lines[i + 1:]), lambda: ''.join(lines[:i]), lambda: text + lines[i],
        lambda: ''.join([*lines[:i], lines[i][:-1] + ', 1\n', *lines[i + 1:]]), lambda: text.replace('1', '2'),
        lambda: text.replace('120', '0'),
        lambda: ''.join(dice.sample(lines, len(lines))), lambda: text.replace('\n', '.5\n'), lambda: text[:-1]])()


@pytest.mark.filterwarnings('ignore:invalid value encountered in cast')  # as the script does
@pytest.mark.parametrize('part', ['A', 'graph_indicator', 'graph_labels', 'node_labels', 'node_attributes'])
def test_damaged_files_are_read_as_they_are_or_are_one_line_and_nothing_is_written(part, root, tmp_path):
    raw, dice, named = shutil.copytree(root / 'TINY', tmp_path / 'TINY') / 'raw', random.Random(part), 0
    (raw / 'TINY_node_attributes.txt').write_text(''.join(f'{dice.random()}\n' for _ in range(120)))
    file, whole, digests = raw / f'TINY_{part}.txt', (raw / f'TINY_{part}.txt').read_text(), {}
    for i in range(90):
        text = whole if i == 0 else damaged_lines(whole, dice)
        file.write_text(text)
        wanted, before = held(raw), {path: path.read_bytes() for path in tmp_path.rglob('*.*')}
        try:
            graphs, y, digest = g.load(tmp_path, 'TINY')
            assert wanted == ([{*map(tuple, graph.edge_index.T.tolist())} for graph in graphs], y.tolist()), text
            assert digests.setdefault(digest, text) == text or part == 'node_attributes'  # 0.50 is 0.5
        except UserError as error:
            named += 1
            assert wanted is None and '\n' not in str(error) and str(raw) in str(error), (text, error)
        assert {path: path.read_bytes() for path in tmp_path.rglob('*.*')} == before
    assert 30 < named < 90


def test_sets_are_downloaded_and_what_is_no_zip_file_leaves_nothing(root, tmp_path, monkeypatch):
    monkeypatch.setattr(pyg.datasets.TUDataset, 'url', tmp_path.as_uri())
    page = tmp_path / 'TINY.zip'
    page.write_text('<!DOCTYPE html>')
    with pytest.raises(UserError, match='cannot download .*TINY.zip .*not a zip file') as error:
        g.load(tmp_path / 'new', 'TINY')
    assert '\n' not in str(error.value) and not (tmp_path / 'new').exists()
    shutil.copytree(root / 'TINY/raw', tmp_path / 'zip/TINY')
    shutil.make_archive(page.with_suffix(''), 'zip', tmp_path / 'zip')
    written, write = [], g.files.write
    monkeypatch.setattr(g.files, 'write', lambda path, data: written.append(path.name) or write(path, data))
    graphs, y, digest = g.load(tmp_path / 'new', 'TINY')
    assert digest == g.load(root, 'TINY')[2] and len(graphs) == len(y) == 24
    assert len(written) == 4 and written[-1] == 'TINY_A.txt'  # by which a later run knows that all are there
    page.unlink()
    g.load(tmp_path / 'new', 'TINY')


@pytest.mark.parametrize('flags', [['--repeats', '0'], ['--tau_plus', '1'], ['--betas', 'nan'], ['--betas', 'x'],
                                   ['--objective', 'graphcl', '--betas', '-1'], ['--objective', 'jsd'],
                                   ['--published', '--objective', 'graphcl'], ['--dataset_name', 'a/b']])
def test_wrong_flags_end_with_one_line_and_code_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        g.main(flags)
    assert error.value.code == 2 and capsys.readouterr().err.count('\n') == 1


def test_missing_data_is_one_line_that_names_folder_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pyg.datasets.TUDataset, 'url', tmp_path.as_uri())
    with pytest.raises(UserError) as error:
        g.main(['--dataset_name', 'NONE', '--root', str(tmp_path), '--results_dir', str(tmp_path / 'out')])
    text = str(error.value)
    assert '\n' not in text and f'{tmp_path}/NONE/raw' in text and not (tmp_path / 'out/NONE.csv').exists()
    assert all(f'NONE_{part}.txt' in text for part in ('A', 'graph_indicator', 'graph_labels', 'node_labels'))


def test_foreign_csv_file_is_one_line_and_stays(tiny, tmp_path):
    (tmp_path / 'TINY.csv').write_text('a,b\n1,2\n')
    with pytest.raises(UserError, match='holds a CSV file of something else'):
        tiny()
    assert (tmp_path / 'TINY.csv').read_text() == 'a,b\n1,2\n'


def test_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torch_geometric', None)
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with pytest.raises(SystemExit, match='^error: torch_geometric is missing: pip install torch_geometric$'):
        runpy.run_path(g.__file__)
