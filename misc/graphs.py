"""InfoGraph and GraphCL with hard negatives, on graphs of the TU data sets.

    python misc/graphs.py --dataset_name MUTAG --root data --betas 0 1 2 10 --repeats 10
    python misc/graphs.py --dataset_name MUTAG --root data --published
    python misc/graphs.py --dataset_name MUTAG --root data --objective graphcl

The first line is the paper's form of InfoGraph (arXiv 1908.01000), the second the released code's,
the third GraphCL (arXiv 2010.13902), which contrasts two views of each graph. A GIN learns without
classes from node labels and node attributes. The accuracy (percent) is that of an RBF SVM on its
embeddings of graphs. A line writes one CSV file to --results_dir, which it continues if it was
stopped, and then table.md of all files there. The column digest identifies the graphs. On one CPU
core a run on MUTAG takes 7 seconds, with GraphCL 15. It needs torch_geometric.

HCL's released code (joshr17/HCL, graph/) departs from the paper, and --published keeps all of it:

1. A score s weighs exp(-2 beta s / max|s|), which stresses the least similar graphs; the paper's
   weight is exp(beta s). With beta = 10 and s = -1, 0, 0.5, 2, nearly the whole gradient acts on
   -1. --betas -1 -2 -10 turns the sign.
2. A node's own graph stays among the negatives with a score of 0, in their sum and in the mean of
   their weights.
3. tau_plus is 0.5 for any data; log 2 is subtracted before the division by 1 - tau_plus if beta
   is 0, else after it.
4. The correction for false negatives has the opposite sign: softplus(-s) + softplus(s) draws the
   own graph's s to 0.

In both forms, gradients flow through the weights of negatives.
"""

import math
import re
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import files, flags, runtime
from hardneg.losses import contrastive_loss
from hardneg.runs import markdown
from hardneg.runtime import UserError
from utils import digest_of

warnings.filterwarnings('ignore', category=FutureWarning)  # PyG's, of torch.jit
try:
    import torch_geometric as pyg
except ModuleNotFoundError as error:
    raise SystemExit(f'error: {error.name} is missing: pip install torch_geometric') from None

KEY = ['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat']  # what an accuracy belongs to
COLUMNS = [*KEY, 'accuracy', 'seconds']


def arguments(argv=None):
    parser = flags.Parser(prog='graphs.py', description=__doc__.partition('\n')[0])
    data = parser.add_argument_group('data')
    data.add_argument(
        '--dataset_name',
        type=flags.number(str, 'a name such as MUTAG', re.compile(r'\w[\w.-]{0,49}').fullmatch),
        default='MUTAG',
        help='one of the TU collection (%(default)s)',
    )
    data.add_argument(
        '--root',
        type=flags.path,
        default='data',
        help='directory of the data sets; what is missing is downloaded to it (%(default)s)',
    )
    training = parser.add_argument_group('training')
    form = training.add_mutually_exclusive_group()
    form.add_argument(
        '--objective',
        choices=('infograph', 'graphcl'),
        default='infograph',
        help='what to train with (%(default)s)',
    )
    form.add_argument(
        '--published',
        dest='objective',
        action='store_const',
        const='published',
        help="InfoGraph as in HCL's released code",
    )
    training.add_argument(
        '--betas',
        nargs='+',
        type=flags.real(-1000, 1000),
        default=[0, 1, 2, 10],
        help='concentrations on hard negatives (0 1 2 10)',
    )
    training.add_argument(
        '--tau_plus',
        type=flags.fraction,
        help='prior probability of a false negative (0.1; published: 0.5)',
    )
    training.add_argument(
        '--repeats',
        type=flags.count,
        default=10,
        help='runs of each beta: seeds 0, 1, ... (%(default)s)',
    )
    training.add_argument(
        '--results_dir',
        type=flags.path,
        default='results/graphs',
        help='directory of the CSV files and of table.md (%(default)s)',
    )
    args = parser.parse_args(argv)
    if min(args.betas) < 0 and args.objective == 'graphcl':
        parser.error('--betas must be at least 0 with --objective graphcl')
    if args.tau_plus is None:
        args.tau_plus = 0.5 if args.objective == 'published' else 0.1
    return args


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # easy negatives have denormal weights, which are slow on a CPU
    results = Path(args.results_dir)
    files.lock(results)
    tables = {path.name: read_rows(path) for path in sorted(results.glob('*.csv'))}
    file = f'{args.dataset_name}.csv'
    if args.objective != 'infograph':
        file = f'{args.dataset_name}_{args.objective}.csv'
    rows = tables.setdefault(file, pd.DataFrame(columns=COLUMNS))
    done = {*rows[KEY].itertuples(index=False, name=None)}
    graphs, y, digest = load(args.root, args.dataset_name)

    settings = [('untrained', '', '')]
    for beta in args.betas:
        settings.append((args.objective, f'{beta:g}', f'{args.tau_plus:g}'))
    missing = []
    for repeat in range(args.repeats):
        for setting in dict.fromkeys(settings):
            key = args.dataset_name, digest, *setting, str(repeat)
            if key not in done:
                missing.append(key)
    for key in tqdm(missing, unit='run'):
        began = time.perf_counter()
        _, _, objective, beta, tau_plus, repeat = key
        accuracy = train(
            graphs, y, objective, float(beta or 0), float(tau_plus or 0), seed=int(repeat)
        )
        seconds = time.perf_counter() - began
        rows.loc[len(rows)] = [*key, round(accuracy, 4), f'{seconds:.1f}']
        files.write(results / file, rows.to_csv(index=False, float_format='%.4f').encode())
    text = table(pd.concat(tables.values()))
    files.write(results / 'table.md', text.encode())
    print(text)


# The objective and the encoder


def infograph_loss(nodes, graphs, batch, tau_plus=0.1, beta=1.0, published=False):
    """The Jensen-Shannon objective with HCL's negatives, the mean over nodes.

    With s = node·graph, and j the graphs other than the node's own:

        R    = sum_j exp(beta s_j) softplus(s_j) / sum_j exp(beta s_j)
        loss = softplus(-s_own) + max(R - tau_plus softplus(s_own), 0) / (1 - tau_plus)

    As in DCL, the floor is the least that the negatives can give. InfoGraph's own objective is that
    of tau_plus = beta = 0.

    Args:
        nodes: embeddings (n, D) of nodes.
        graphs: embeddings (G, D) of graphs, G >= 2.
        batch: (n,), the graph of each node.
        tau_plus: prior probability of a false negative, in [0, 1).
        beta: concentration on hard negatives.
        published: take the released code's form.
    """
    s = nodes @ graphs.T  # (n, D) x (D, G) -> (n, G)
    own = batch[:, None]  # (n,) -> (n, 1)
    s_own = s.gather(1, own)[:, 0]  # (n, 1) -> (n,)
    if published:
        return _published_loss(s.scatter(1, own, 0), s_own, tau_plus, beta)
    weights = (beta * s).scatter(1, own, -math.inf).softmax(1)
    R = (weights * F.softplus(s)).sum(1)
    negative = (R - tau_plus * F.softplus(s_own)).clamp(min=0) / (1 - tau_plus)
    return (F.softplus(-s_own) + negative).mean()


def _published_loss(s, s_own, tau_plus, beta):
    """The released code's form, of scores s (n, G), 0 for the own graph, and those of it (n,)."""
    G = s.shape[1]
    log_2 = math.log(2)
    odds = tau_plus / (1 - tau_plus)
    # The own graph's score, and G - 1 zeros beside it
    E_pos = log_2 - F.softplus(-s_own) - odds * F.softplus(s_own) - odds * (G - 1) * log_2
    if beta:
        weights = (-2 * beta * s / s.abs().max()).softmax(1)
        E_neg = (weights * F.softplus(s)).sum(1) / (1 - tau_plus) - log_2
    else:
        E_neg = (F.softplus(s).mean(1) - log_2) / (1 - tau_plus)
    return E_neg.mean() * G / (G - 1) - E_pos.mean()


class GIN(torch.nn.Module):
    """A graph isomorphism network, and two heads: for embeddings of nodes, and of graphs."""

    def __init__(self, features, width=32, layers=3):
        super().__init__()
        D = layers * width
        form = dict(norm=None, plain_last=False)  # every layer ends with a ReLU
        ins = [features] + [width] * (layers - 1)
        self.convs = torch.nn.ModuleList(
            pyg.nn.GINConv(pyg.nn.MLP([d, width, width], **form)) for d in ins
        )
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in ins)
        self.blocks = torch.nn.ModuleList(pyg.nn.MLP([D, D, D, D], **form) for _ in range(2))
        self.shortcuts = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(2))
        for name, p in self.named_parameters():
            if 'norms' in name:
                continue
            if p.ndim == 2:
                torch.nn.init.xavier_uniform_(p)
            else:
                torch.nn.init.zeros_(p)

    def forward(self, x, edge_index, batch, G):
        """Embeddings of nodes (n, D) and, as their sums, of graphs (G, D)."""
        layers = []
        for conv, norm in zip(self.convs, self.norms):
            x = norm(conv(x, edge_index))
            layers.append(x)
        nodes = torch.cat(layers, 1)  # layers x (n, width) -> (n, D)
        return nodes, pyg.nn.global_add_pool(nodes, batch, G)

    def project(self, z, head):
        """What head 0 (nodes) or 1 (graphs) makes of embeddings: (n, D) -> (n, D)."""
        return self.blocks[head](z) + self.shortcuts[head](z)


def view(b, strength=0.2):
    """x, edge_index and batch after one of GraphCL's changes, drawn for each graph of a pyg Batch.

    A fifth (strength) of its nodes are dropped (one stays), or get attributes of 0; or a fifth of
    its edges move to random pairs of its nodes. Edges go both ways.
    """
    change = torch.randint(3, (b.num_graphs,))[b.batch]  # of each node: 0 drop, 1 move, 2 mask
    r = torch.rand(b.num_nodes)
    pair = b.edge_index[:, b.edge_index[0] < b.edge_index[1]]  # (2, edges), one way each
    moved = (change[pair[0]] == 1) & (torch.rand(pair.shape[1]) < strength)
    graph = b.batch[pair]
    elsewhere = b.ptr[graph] + (torch.rand(pair.shape) * b.ptr.diff()[graph]).long()
    pair = torch.where(moved, elsewhere, pair)
    last = pyg.utils.scatter(r, b.batch, reduce='max')[b.batch]  # the node that stays
    keep = (change != 0) | (r >= strength) | (r == last)
    pair = pair[:, pair[0] != pair[1]]
    pair, _ = pyg.utils.subgraph(keep, pair, relabel_nodes=True)
    masked = (change == 2) & (r < strength)
    x = b.x.masked_fill(masked[:, None], 0)
    return x[keep], pyg.utils.to_undirected(pair), b.batch[keep]


def train(graphs, y, objective, beta, tau_plus, *, seed, epochs=200, batch_size=128):
    """10-fold accuracy (percent) of the embeddings after the epochs; of 'untrained' before them."""
    # One order of the graphs, one initialisation and one set of folds for all objectives
    torch.manual_seed(seed)
    order = torch.randperm(len(graphs)).tolist()
    batches = batched([graphs[i] for i in order], batch_size)
    model = GIN(graphs[0].num_node_features)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    if objective == 'untrained':
        epochs = 0
    for _ in range(epochs):
        for b in batches:
            if objective == 'graphcl':
                z = []
                for _ in range(2):
                    _, pooled = model(*view(b), b.num_graphs)
                    z.append(model.project(pooled, head=1))
                # GraphCL's temperature
                loss = contrastive_loss(*z, temperature=0.2, tau_plus=tau_plus, beta=beta)
            else:
                nodes, pooled = model(b.x, b.edge_index, b.batch, b.num_graphs)
                nodes, pooled = model.project(nodes, head=0), model.project(pooled, head=1)
                published = objective == 'published'
                loss = infograph_loss(nodes, pooled, b.batch, tau_plus, beta, published)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        pooled = [model(b.x, b.edge_index, b.batch, b.num_graphs)[1] for b in batches]
    z = torch.cat(pooled).numpy()
    svm = GridSearchCV(SVC(), {'C': [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]}, cv=5)
    folds = StratifiedKFold(10, shuffle=True, random_state=seed)
    return 100 * cross_val_score(svm, z, y[order], cv=folds).mean()


def batched(graphs, size):
    """The graphs as pyg Batches. A last graph alone, without negatives, joins the batch before."""
    starts = [*range(0, len(graphs), size)]
    if len(starts) > 1 and starts[-1] == len(graphs) - 1:
        starts.pop()
    batches = []
    for start, end in zip(starts, [*starts[1:], len(graphs)]):
        batches.append(pyg.data.Batch.from_data_list(graphs[start:end]))
    return batches


# The data


def load(root, name):
    """The graphs of a TU data set as pyg reads it, their classes (G,), and a digest of both.

    A node's features are its attributes, standardised, and its labels, one-hot. Without both, they
    are its degree. pyg keeps what it has read in NAME/processed: delete that if the files change.

    Raises:
        UserError: the data set cannot be downloaded or read, or is not one of classes.
    """
    try:
        dataset = pyg.datasets.TUDataset(root, name, use_node_attr=True)
        graphs = list(dataset)
        y = torch.cat([graph.y for graph in graphs])
    except Exception as error:  # whatever the network, or pyg's parser of damaged files, ends with
        reason = ' '.join(str(error).split())
        raise UserError(
            f'cannot download or read {name} in {root} ({type(error).__name__}: {reason:.200}). If '
            f'{Path(root, name)} is damaged, delete it, and it is downloaded again'
        ) from None
    _, members = y.unique(return_counts=True)
    if y.is_floating_point() or len(members) < 2 or members.min() < 10:
        raise UserError(
            f'{name} must have two classes or more, each of 10 graphs or more, for 10-fold '
            'cross-validation'
        )
    x = features(graphs, dataset.num_node_attributes)
    sizes = [graph.num_nodes for graph in graphs]
    edges = [graph.edge_index for graph in graphs]
    digest = digest_of(x, torch.cat(edges, 1), y, sizes)[:16]
    graphs = [pyg.data.Data(*parts) for parts in zip(x.split(sizes), edges)]
    return graphs, y.numpy(), digest


def features(graphs, attributes):
    """The features (n, F) of all nodes. The first columns of their x are attributes."""
    columns = []
    if graphs[0].x is not None:
        x = torch.cat([graph.x for graph in graphs])
        for values in x[:, :attributes].double().T:
            if (values != values[0]).any():  # a constant tells nothing
                columns.append(standardized(values))
        if x.shape[1] > attributes:
            columns.append(x[:, attributes:])
    if not columns:
        degrees = [graph.edge_index[0].bincount(minlength=graph.num_nodes) for graph in graphs]
        degrees = torch.cat(degrees)
        if degrees.max() < 1000:
            columns.append(F.one_hot(degrees))
        else:
            columns.append(standardized(degrees.double()))
    return torch.cat(columns, 1).float()


def standardized(values):
    """(n,) -> (n, 1)"""
    return ((values - values.mean()) / values.std())[:, None]


# The tables


def read_rows(path):
    """The rows of a CSV file.

    Raises:
        UserError: it is not one of this script.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS]
        rows = rows.astype({'accuracy': float})
        # pandas takes the first of too many cells for an index.
        if rows.index.dtype != int or not rows['accuracy'].between(0, 100).all():
            raise ValueError(
                'accuracies are not in percent, or a row has more cells than there are columns'
            )
    except (ValueError, KeyError) as error:
        raise UserError(
            f'{path} holds a CSV file of something else: {str(error).strip()}'
        ) from None
    return rows


def table(rows):
    """Means, deviations and gains, paired by repeat, in Markdown.

    Data sets that share a name are told apart by their digests.
    """
    shared = rows.groupby('data')['digest'].transform('nunique') > 1
    names = rows['data'].mask(shared, rows['data'] + ' ' + rows['digest'])
    key = ['data', 'objective', 'beta', 'tau_plus']
    wide = rows.assign(data=names).pivot_table('accuracy', 'repeat', key, sort=False)
    lines = [('data', 'objective', 'β', 'τ⁺', 'repeats', 'accuracy, %', 'to β = 0', 'to untrained')]
    for (data, objective, beta, tau_plus), accuracies in wide.items():
        gains = []
        for base in (data, objective, '0', tau_plus), (data, 'untrained', '', ''):
            gain = accuracies - wide.get(base, accuracies)
            text = ''
            if gain.any():
                text = f'{gain.mean():+.1f} ± {gain.std():.1f}'
            gains.append(text)
        spread = f'{accuracies.mean():.1f} ± {accuracies.std():.1f}'
        lines.append((data, objective, beta, tau_plus, accuracies.count(), spread, *gains))
    return markdown(lines)


if __name__ == '__main__':
    runtime.run(main)
