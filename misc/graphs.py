"""InfoGraph (arXiv 1908.01000) and GraphCL (arXiv 2010.13902) with hard negatives, on graphs of the TU data sets.

    python misc/graphs.py --dataset_name MUTAG --root data --betas 0 1 2 10 --repeats 10   # the paper's form
    python misc/graphs.py --dataset_name MUTAG --root data --published                     # the released code's form
    python misc/graphs.py --dataset_name MUTAG --root data --objective graphcl             # two views of each graph
A GIN learns without classes from node labels and node attributes; an RBF SVM on its graph embeddings gives the accuracy
(percent). A line writes one CSV file, which it continues if it was stopped, and then table.md of all files there. The
column digest tells what the data set's files held. HCL's released code (joshr17/HCL, graph/) departs from the paper,
and --published keeps all of it. In both, gradients flow through negatives' weights.
1. A score s weighs exp(-2 beta s / max|s|), which stresses the least similar graphs; the paper's weight is exp(beta s).
   With beta = 10 and s = -1, 0, 0.5, 2, nearly the whole gradient acts on -1. --betas -1 -2 -10 turns the sign.
2. A node's own graph stays among the negatives with a score of 0, in their sum and in the mean of their weights.
3. tau_plus is 0.5 for any data; log 2 is subtracted before the division by 1 - tau_plus if beta = 0, else after it.
4. The correction for false negatives has the opposite sign: softplus(-s) + softplus(s) draws the own graph's s to 0."""
import io
import math
import re
import sys
import time
import urllib.request
import warnings
import zipfile
from http.client import HTTPException
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.svm import SVC
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import files
from hardneg import flags
from hardneg import runtime
from hardneg.losses import contrastive_loss
from hardneg.runs import markdown
from hardneg.runtime import UserError

warnings.filterwarnings('ignore', category=FutureWarning)  # PyG's, of torch.jit
warnings.filterwarnings('ignore', 'invalid value encountered in cast')  # pandas', before its error
try:
    import torch_geometric as pyg
except ModuleNotFoundError as error:
    raise SystemExit(f'error: {error.name} is missing: pip install torch_geometric') from None
KEY = ['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat']  # what an accuracy belongs to
COLUMNS = [*KEY, 'accuracy', 'seconds']
PARTS = dict(A=int, graph_indicator=int, graph_labels=int, node_labels=int, node_attributes=float)


def infograph_loss(nodes, graphs, batch, tau_plus=0.1, beta=1.0, published=False):
    """The Jensen-Shannon objective with HCL's negatives, the mean over nodes. With s = node·graph, j the others:
        R    = sum_j exp(beta s_j) softplus(s_j) / sum_j exp(beta s_j)
        loss = softplus(-s_own) + max(R - tau_plus softplus(s_own), 0) / (1 - tau_plus)
    As in DCL, the floor is the least that the negatives can give. InfoGraph's own is tau_plus = beta = 0.
    nodes (n, D); graphs (G, D), G >= 2; batch (n,), the graph of each node; tau_plus in [0, 1)."""
    s, own, G, sp = nodes @ graphs.T, batch[:, None], len(graphs), F.softplus  # (n, D) x (G, D) -> (n, G)
    s_own = s.gather(1, own)[:, 0]
    if not published:
        R = ((beta * s).scatter(1, own, -math.inf).softmax(1) * sp(s)).sum(1)
        return (sp(-s_own) + (R - tau_plus * sp(s_own)).clamp(min=0) / (1 - tau_plus)).mean()
    s, odds, log_2 = s.scatter(1, own, 0), tau_plus / (1 - tau_plus), math.log(2)
    E_pos = log_2 - sp(-s_own) - odds * sp(s_own) - odds * (G - 1) * log_2
    w = (-2 * beta * s / s.abs().max()).softmax(1) if beta else 1 / G
    E_neg = (w * sp(s)).sum(1) / (1 - tau_plus) - log_2 / (1 if beta else 1 - tau_plus)
    return E_neg.mean() * G / (G - 1) - E_pos.mean()


class GIN(torch.nn.Module):
    """Embeddings of nodes (n, 96) and, as sums over nodes, of graphs (G, 96), or what heads 0 and 1 make of them."""
    def __init__(self, features, width=32, layers=3):
        super().__init__()
        ins, D, mlp = (features, *[width] * (layers - 1)), layers * width, dict(norm=None, plain_last=False)
        self.convs = torch.nn.ModuleList(pyg.nn.GINConv(pyg.nn.MLP([d, width, width], **mlp)) for d in ins)
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(width) for _ in ins)
        self.blocks = torch.nn.ModuleList(pyg.nn.MLP([D, D, D, D], **mlp) for _ in range(2))
        self.shortcuts = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(2))
        for p in (p for name, p in self.named_parameters() if 'norms' not in name):
            torch.nn.init.xavier_uniform_(p) if p.ndim == 2 else torch.nn.init.zeros_(p)

    def forward(self, x, edge_index, batch, G, heads=()):
        xs = [x]
        for conv, norm in zip(self.convs, self.norms):
            xs.append(norm(conv(xs[-1], edge_index)))  # conv ends with the ReLU
        z = (nodes := torch.cat(xs[1:], 1)), pyg.nn.global_add_pool(nodes, batch, G)
        return [self.blocks[i](z[i]) + self.shortcuts[i](z[i]) for i in heads] or z


def view(b, strength=0.2):
    """x, edge_index, batch after one of GraphCL's changes, drawn for each graph: of its nodes, a fifth dropped (one
    stays) or with attributes of 0; of its edges, a fifth moved to random pairs of its nodes. Edges go both ways."""
    change, r = torch.randint(3, (b.num_graphs,))[b.batch], torch.rand(b.num_nodes)
    pair = b.edge_index[:, b.edge_index[0] < b.edge_index[1]]
    moved, graph = (change[pair[0]] == 1) & (torch.rand(pair.shape[1]) < strength), b.batch[pair]
    pair = torch.where(moved, b.ptr[graph] + (torch.rand(pair.shape) * b.ptr.diff()[graph]).long(), pair)
    keep = (change != 0) | (r >= strength) | (r == pyg.utils.scatter(r, b.batch, reduce='max')[b.batch])
    pair = pyg.utils.to_undirected(pyg.utils.subgraph(keep, pair[:, pair[0] != pair[1]], relabel_nodes=True)[0])
    return b.x.masked_fill(((change == 2) & (r < strength))[:, None], 0)[keep], pair, b.batch[keep]


def read(raw, name):
    """The numbers in a TU data set's files, by part, each (lines, columns). If A.txt is missing, download them."""
    url, parts = f'{pyg.datasets.TUDataset.url}/{name}.zip', {}
    try:
        if not (raw / f'{name}_A.txt').exists():
            with urllib.request.urlopen(url, timeout=60) as answer:
                texts = zipfile.ZipFile(io.BytesIO(answer.read()))
            raw.mkdir(parents=True, exist_ok=True)
            for path in sorted(texts.namelist(), reverse=True):  # A.txt last: if it is there, so are the others
                if path.endswith('.txt'):
                    files.write(raw / Path(path).name, texts.read(path))
    except (OSError, HTTPException, zipfile.BadZipFile) as error:
        needed = ', '.join(f'{name}_{part}.txt' for part in PARTS)
        raise UserError(f'cannot download {url} ({error}): {raw} needs {needed}; node_* may be missing') from None
    for part, kind in PARTS.items():
        path = raw / f'{name}_{part}.txt'
        try:
            if path.exists() or not part.startswith('node'):
                if not (text := path.read_bytes()).endswith(b'\n'):
                    raise ValueError('its last line has no end, so it may be cut off')
                table = pd.read_csv(io.BytesIO(text), header=None, dtype=kind, skipinitialspace=True)
                parts[part] = torch.tensor(table.to_numpy())
        except (OSError, ValueError, OverflowError) as error:
            what = 'whole numbers' if kind is int else 'numbers'
            raise UserError(f'{path} must hold {what}, equally many in each line: {str(error).strip()}') from None
    return parts


def load(root, name):
    """The graphs of a TU data set, their classes (G,), and a digest of what its files hold; UserError if damaged.

    A node's features are its attributes, standardised, and its labels, one-hot. Without both, they are its degree."""
    raw = Path(root, name, 'raw')
    parts = read(raw, name)
    A, owner, y = (parts[part] for part in ('A', 'graph_indicator', 'graph_labels'))
    G, n, none = len(y), len(owner), torch.empty(len(owner), 0)
    a, labels = parts.get('node_attributes', none), parts.get('node_labels', none)
    if not (len(a) == len(labels) == n and a.isfinite().all() and (labels.abs() < 10_000).all()
            and A.shape[1] == 2 and A.min() > 0 and A.max() <= n
            and owner.unique_consecutive().equal(torch.arange(1, G + 1)) and owner[A - 1].diff(dim=1).eq(0).all()):
        lines = ', '.join(f'{part} {len(numbers)}' for part, numbers in parts.items())
        raise UserError(f'the files in {raw} do not fit together. {name}_A.txt must hold pairs of nodes of one graph, '
                        'graph_indicator.txt count up from 1 to the number of lines in graph_labels.txt, and node_* '
                        f'have as many lines as it and finite numbers, labels below 10,000. Lines there: {lines}')
    members = y.unique(return_counts=True)[1]
    if y.shape[1] > 1 or len(members) < 2 or members.min() < 10:
        raise UserError(f'{raw}/{name}_graph_labels.txt must hold two classes or more, each of 10 graphs or more, for '
                        f'10-fold cross-validation. It holds {len(members)}, the smallest of {members.min()}')
    y, owner = y.unique(return_inverse=True)[1][:, 0], owner[:, 0] - 1
    edges = pyg.utils.coalesce(pyg.utils.remove_self_loops(A.T - 1)[0])  # sorted by node, and so by graph
    degrees = edges[0].bincount(minlength=n)[:, None]
    a, labels = a[:, (a != a[0]).any(0)], labels - labels.min(0).values  # a constant tells nothing
    if a.shape[1] + labels.shape[1] == 0:
        a, labels = (none, degrees) if degrees.max() < 1000 else (degrees, none)
    standardised = [((v - v.mean()) / v.std())[:, None] for v in a.double().T]
    x = torch.cat([*standardised, *(F.one_hot(v) for v in labels.T)], 1).float()
    sizes, graph = owner.bincount(), owner[edges[0]]  # nodes of each graph; the graph of each edge
    edges = edges - (sizes.cumsum(0) - sizes)[graph]
    pairs = zip(x.split(sizes.tolist()), edges.split(graph.bincount(minlength=G).tolist(), 1))
    return [pyg.data.Data(*pair) for pair in pairs], y.numpy(), files.digest(parts)[:16]


def train(graphs, y, objective, beta, tau_plus, seed, epochs=200, batch=128):
    """10-fold accuracy (percent) of the embeddings after the epochs; before them where 'untrained'."""
    torch.manual_seed(seed)  # one order of the graphs, one initialisation and one set of folds for all objectives
    order = torch.randperm(len(graphs)).tolist()
    ends = [*range(batch, len(order) - 1, batch), len(order)]  # a last graph alone, without negatives, joins others
    batches = [pyg.data.Batch.from_data_list([graphs[i] for i in order[a:b]]) for a, b in zip([0, *ends], ends)]
    model = GIN(graphs[0].num_node_features)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    for b in batches * (0 if objective == 'untrained' else epochs):
        if objective == 'graphcl':
            z = [*model(*view(b), b.num_graphs, heads=[1]), *model(*view(b), b.num_graphs, heads=[1])]
            loss = contrastive_loss(*z, temperature=0.2, tau_plus=tau_plus, beta=beta)  # GraphCL's temperature
        else:
            z = model(b.x, b.edge_index, b.batch, b.num_graphs, heads=[0, 1])
            loss = infograph_loss(*z, b.batch, tau_plus, beta, objective == 'published')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    z = torch.cat([model.eval()(b.x, b.edge_index, b.batch, b.num_graphs)[1] for b in batches]).detach().numpy()
    svm = GridSearchCV(SVC(), {'C': [1e-3, 1e-2, 1e-1, 1, 10, 100, 1000]}, cv=5)
    return 100 * cross_val_score(svm, z, y[order], cv=StratifiedKFold(10, shuffle=True, random_state=seed)).mean()


def arguments(argv):
    parser = flags.Parser(prog='graphs.py', description=__doc__.partition('\n')[0])
    flag, form = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    name = flags.number(str, 'a name such as MUTAG', re.compile(r'\w[\w.-]{0,49}').fullmatch)
    flags.add(parser, 'data', ('--dataset_name', 'MUTAG', name, 'one of the TU collection'),
              ('--root', 'data', flags.path, 'holds {dataset_name}/raw; what is missing is downloaded to it'))
    form('--objective', default='infograph', choices=['infograph', 'graphcl'], help='what to train with')
    form('--published', dest='objective', action='store_const', const='published', help='as in HCL\'s released code')
    flag('--betas', default=[0, 1, 2, 10], nargs='+', type=flags.real(-1000, 1000), help='on hard negatives')
    flag('--tau_plus', type=flags.fraction, help='0.1 or, published, 0.5')
    flag('--repeats', default=10, type=flags.count, help='runs of each: seeds 0, 1, ...')
    flag('--results_dir', default='results/graphs', type=flags.path, help='directory of the CSV files and of table.md')
    args = parser.parse_args(argv)
    if min(args.betas) < 0 and args.objective == 'graphcl':
        parser.error('--betas must be at least 0 with --objective graphcl')
    if args.tau_plus is None:
        args.tau_plus = 0.5 if args.objective == 'published' else 0.1
    return args


def read_rows(path):
    """The rows of a CSV file; UserError if it is not one of this script."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)[COLUMNS].astype({'accuracy': float})
        if rows.index.dtype != int or not rows['accuracy'].between(0, 100).all():  # pandas takes too many cells so
            raise ValueError('accuracies are not in percent, or a row has more cells than there are columns')
        return rows
    except (ValueError, KeyError) as error:
        raise UserError(f'{path} holds a CSV file of something else: {str(error).strip()}') from None


def table(rows):
    """Means, deviations and gains, paired by repeat, in Markdown. Sets that share a name are told apart by digest."""
    shared = rows.groupby('data')['digest'].transform('nunique') > 1
    rows = rows.assign(data=rows['data'].mask(shared, rows['data'] + ' ' + rows['digest']))
    lines = [('data', 'objective', 'β', 'τ⁺', 'repeats', 'accuracy, %', 'to β = 0', 'to untrained')]
    wide = rows.pivot_table('accuracy', 'repeat', ['data', 'objective', 'beta', 'tau_plus'], sort=False)
    for (data, objective, beta, tau_plus), a in wide.items():
        bases = (data, objective, '0', tau_plus), (data, 'untrained', '', '')
        gains = [f'{gain.mean():+.1f} ± {gain.std():.1f}' if gain.any() else '' for gain in
                 (a - wide.get(base, a) for base in bases)]
        lines.append((data, objective, beta, tau_plus, a.count(), f'{a.mean():.1f} ± {a.std():.1f}', *gains))
    return markdown(lines)


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # easy negatives have denormal weights, which are slow on a CPU
    results = Path(args.results_dir)
    files.lock(results)
    tables = {path.name: read_rows(path) for path in sorted(results.glob('*.csv'))}
    file = f'{args.dataset_name}_{args.objective}.csv'.replace('_infograph', '')
    rows = tables.setdefault(file, pd.DataFrame(columns=COLUMNS))
    done = {*rows[KEY].itertuples(index=False, name=None)}
    graphs, y, digest = load(args.root, args.dataset_name)
    settings = [('untrained', '', ''), *((args.objective, f'{beta:g}', f'{args.tau_plus:g}') for beta in args.betas)]
    keys = [(args.dataset_name, digest, *s, str(repeat)) for repeat in range(args.repeats) for s in settings]
    for key in tqdm([key for key in dict.fromkeys(keys) if key not in done], unit='run'):
        start, (objective, beta, tau_plus, repeat) = time.perf_counter(), key[2:]
        accuracy = train(graphs, y, objective, float(beta or 0), float(tau_plus or 0), int(repeat))
        rows.loc[len(rows)] = [*key, round(accuracy, 4), f'{time.perf_counter() - start:.1f}']
        files.write(results / file, rows.to_csv(index=False, float_format='%.4f').encode())
    text = table(pd.concat(tables.values()))
    files.write(results / 'table.md', text.encode())
    print(text)


if __name__ == '__main__':
    runtime.run(main)
