"""Pictures of what runs left, as PNG files.

    python misc/plot.py curves results/mine/*_?                      # loss and kNN accuracy of any number of runs
    python misc/plot.py similarity results/mine/*_0/model_4.pth      # cosines of pairs of the same and of other classes
    python misc/plot.py neighbours results/model_400.pth             # test images and their nearest training images
    python misc/plot.py map results/model_400.pth                    # t-SNE of the test images' features
    python misc/plot.py negatives results/model_400.pth              # which negatives each objective pushes away
    python misc/plot.py graphs results/graphs                        # accuracies that misc/graphs.py found

Data set and sizes come from the config.json beside a checkpoint. Runs whose settings differ in the seed alone are
drawn as one line of means and a band of one standard deviation.
"""

import copy
import io
import sys
from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[1]))
import flags
import runtime
from augment import draw, transform
from batches import seeded
from data import load_data
from evaluate import encode
from files import write
from losses import contrastive_loss
from model import load_model, unit
from runs import OBJECTIVE, accuracies, data_name, read_run
from runtime import UserError

COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#888888']  # Okabe and Ito's
STANDARD, DEBIASED, HARD = 'standard', 'debiased, τ⁺ = 0.1', 'hard, τ⁺ = 0.1, β = 1'
OWN = {STANDARD: COLOURS[0], DEBIASED: COLOURS[2], HARD: COLOURS[1]}  # in all pictures of objectives
CLASSES = ['#3f90da', '#ffa90e', '#bd1f01', '#94a4a2', '#832db6', '#a96b59', '#e76300', '#b9ac70', '#717581', '#92dadd']
# Petroff, Accessible color sequences for data visualization, arXiv 2107.02270
RIGHT, WRONG = '#009E73', '#CC3311'  # a green and a red that the colour-blind can tell apart
MARKERS = 'os^Dv'
GRAPHS = dict(infograph='InfoGraph, the paper\'s form', published='InfoGraph, the released code\'s', graphcl='GraphCL')
BATCH = 256  # images of the batch whose negatives are drawn
CURVES = [('train_loss', 'training loss (nats)'), ('test_acc@1', 'kNN accuracy on test images (%)'),
          ('alignment', 'alignment of z (0: views are equal)'), ('uniformity', 'uniformity of z (less: more even)'),
          ('rankme', 'RankMe of f (more is better)')]
plt.rcParams.update({'figure.dpi': 160, 'savefig.facecolor': 'white', 'font.size': 9, 'axes.grid': True,
                     'grid.color': '#dddddd', 'axes.axisbelow': True, 'axes.spines.top': False,
                     'axes.spines.right': False, 'legend.frameon': False, 'figure.constrained_layout.use': True})


def main(argv=None):
    parser = flags.Parser(prog='plot.py', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='what', required=True, metavar='PICTURE', prog='plot.py')
    for name, (function, what, plural) in PICTURES.items():
        command = commands.add_parser(name, help=function.__doc__.partition('\n')[0])
        command.add_argument('paths', nargs='+' if plural else 1, type=flags.path, help=what)
        command.add_argument('--out', type=flags.path, help=f'file to write (default: {name}.png in the first run)')
        if name not in ('curves', 'graphs'):
            flags.add(command, 'data (default: as in config.json)',
                      *((name, None, kind, text) for name, _, kind, text in flags.DATA))
            command.add_argument('--seed', default=0, type=flags.seed, help='of the images (default: %(default)s)')
        if name == 'negatives':
            command.add_argument('--query', default=0, type=flags.integer(0, BATCH - 1),
                                 help='which image of the batch is the query (default: %(default)s)')
        if name in ('similarity', 'map'):
            command.add_argument('--images', default=2000, type=flags.integer(100, 5000),
                                 help='test images, at most, drawn at random (default: %(default)s)')
    args = parser.parse_args(argv)
    whole = args.what in ('curves', 'graphs')  # a picture of a directory
    args.paths = [*map(Path, args.paths)]
    args.out = Path(args.out or (args.paths[0] if whole else args.paths[0].parent) / f'{args.what}.png')
    if args.out.suffix != '.png':
        parser.error(f'--out {args.out}: pictures are PNG files, their names end in .png')
    figure, png = PICTURES[args.what][0](args), io.BytesIO()
    figure.savefig(png)
    write(args.out, png.getbuffer())
    print(args.out)


def curves(args):
    """Training loss and kNN accuracy against the epoch; without labels alignment, uniformity and RankMe."""
    groups = {}
    for path in args.paths:
        run = read_run(path)
        groups.setdefault(repr(run['identity'] | {'seed': None}), []).append(run)
    if len(groups) > len(COLOURS):
        raise UserError(f'{len(groups)} different runs, and {len(COLOURS)} colours to tell them apart')
    groups = sorted(groups.values(), key=lambda runs: (runs[0]['settings']['tau_plus'], runs[0]['settings']['beta']))
    titles = names([runs[0] for runs in groups], but='seed')
    columns = max(1, min(3, 110 // (max(map(len, titles)) + 8)))  # of the legend, which 8 inches hold
    labelled = any(run['classes'] for runs in groups for run in runs)
    shown = CURVES[:2] if labelled else CURVES[:1] + CURVES[2:]  # two or four panels
    rows = len(shown) // 2
    figure, panels = plt.subplots(rows, 2, figsize=(8, 2.8 * rows + 0.2 * -(-len(titles) // columns)))
    objectives = [runs[0]['objective'] for runs in groups]
    own = [OWN.get(name) if objectives.count(name) == 1 else None for name in objectives]
    spare = [colour for colour in COLOURS if colour not in own]
    colours = [colour or spare.pop(0) for colour in own]
    for name, colour, marker, runs in zip(titles, colours, 'os^DvP*X', groups):
        log = pd.concat(run['log'] for run in runs)
        for axes, (column, what) in zip(panels.flat, shown):
            by = log.dropna(subset=column).groupby('epoch')[column]
            mean, std = by.mean(), by.std().fillna(0)
            axes.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=name)
            axes.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel='epoch', ylabel=what)
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc='outside upper center', ncols=columns)
    return figure


def graphs(args):
    """Accuracy on graphs by data set, objective and β: a dot for each repeat, their mean and standard deviation."""
    try:
        found = pd.concat(pd.read_csv(path, dtype={'data': str, 'digest': str})
                          for path in sorted(args.paths[0].glob('*.csv')))
        found = found.drop_duplicates(['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat'])
        groups, drawn = found.groupby(['data', 'digest']), found[found['objective'] != 'untrained']
        series = sorted({*zip(drawn['objective'], drawn['tau_plus'])}, key=lambda s: ([*GRAPHS].index(s[0]), s[1]))
    except (ValueError, KeyError):
        raise UserError(f'{args.paths[0]} holds no CSV files of misc/graphs.py, or others beside them') from None
    sets, objectives = [data for data, _ in groups.groups], [objective for objective, _ in series]
    betas, span = sorted(drawn['beta'].unique()), groups['accuracy'].agg(np.ptp).max() + 2  # a point is as long in all
    figure, panels = plt.subplots(1, len(groups), figsize=(max(5, 4 * len(groups)), 4), squeeze=False)
    handles = {}
    for axes, ((data, digest), rows) in zip(panels[0], groups):
        untrained = rows.loc[rows['objective'] == 'untrained', 'accuracy']
        columns = [(-1, untrained, '#555555', 'o', 'untrained')]
        for i, (objective, tau_plus) in enumerate(series):
            label = GRAPHS[objective] + f', τ⁺ = {tau_plus:g}' * (objectives.count(objective) > 1)
            own = rows[(rows['objective'] == objective) & (rows['tau_plus'] == tau_plus)]
            columns += [(betas.index(beta) + 0.8 * ((i + 0.5) / len(series) - 0.5), a, COLOURS[i % len(COLOURS)],
                         MARKERS[i % len(MARKERS)], label) for beta, a in own.groupby('beta')['accuracy']]
        for x, a, colour, marker, label in columns:
            axes.scatter(np.full(len(a), x - 0.06), a, s=16, color=colour, alpha=0.4, linewidths=0)
            handles[label] = axes.errorbar(x + 0.06, a.mean(), a.std(), color=colour, marker=marker, capsize=2)
        axes.axhline(untrained.mean(), color='#555555', linestyle=':')
        bottom = (rows['accuracy'].max() + rows['accuracy'].min() - span) / 2
        axes.set(title=data if sets.count(data) == 1 else f'{data} {digest}', xlabel='β', ylim=(bottom, bottom + span),
                 xticks=range(-1, len(betas)), xticklabels=['untrained', *(f'{beta:g}' for beta in betas)])
        axes.xaxis.grid(False)
    panels[0, 0].set_ylabel('accuracy of an RBF SVM (%)')
    del handles['untrained']  # named on the axis
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3)
    return figure


def names(runs, but=None):
    """A name for each run: its objective, and the settings by which runs of one objective differ, but for one."""
    found = [run['objective'] for run in runs]
    settings = pd.DataFrame([run['identity'] for run in runs]).drop(columns=['objective', *OBJECTIVE])
    differ = [name for name in settings if settings[name].nunique(dropna=False) > 1 and name != but]
    if len({*found}) == len(found):
        return found
    return [', '.join([name, *(f'{setting} {run["identity"][setting]}' for setting in differ)])
            for name, run in zip(found, runs)]


def open_checkpoint(path, args, unlabeled=False):
    """The encoder in a checkpoint, the run that wrote it, and data: the run's, or what the flags name."""
    net, run = load_model(path).eval(), read_run(path.parent)
    accuracies(path)  # which checks that the run wrote this encoder
    named = copy.copy(args)
    flags.fill_data_flags(named, run['settings'])
    run['data'] = data_name(vars(named))
    run['settings'] |= {name: getattr(named, name) for name in (flag[2:] for flag, *_ in flags.DATA)}
    data = load_data(named.dataset_name, named.root, named.store_size, unlabeled, named.cache_dir, named.skip_damaged,
                     named.fit, named.holdout)
    return net, run, data


def features(net, images, index, run):
    """f's features (n, width) of the uint8 images at index (n,), on the CPU."""
    device = runtime.start()
    net.to(device)
    return encode(net, images, index, run['settings']['test_size'], runtime.autocast(device, 'fp32'), device).cpu()


def some(n, count, seed):
    """At most count of n indices, in random order."""
    return torch.randperm(n, generator=seeded(seed))[:count]


@torch.no_grad()
def similarity(args):
    """Histograms of the cosine similarity of embeddings, for pairs of the same class and of different ones."""
    opened = [open_checkpoint(path, args) for path in args.paths]
    figure, axes = plt.subplots(1, len(opened), figsize=(max(4, 2.7 * len(opened)), 3), sharex=True, sharey=True,
                                squeeze=False)
    for panel, name, (net, run, data) in zip(axes[0], names([run for _, run, _ in opened]), opened):
        chosen = some(len(data.test), args.images, args.seed)
        f = features(net, data.test, chosen, run)  # (n, width)
        z = unit(net.cpu().g(f))  # (n, D)
        labels = data.test_labels[chosen]
        i, j = torch.triu_indices(len(z), len(z), 1)
        cosine, same = (z @ z.T)[i, j], labels[i] == labels[j]
        for pairs, colour, text in ((same, COLOURS[5], 'same class'), (~same, COLOURS[7], 'different classes')):
            panel.hist(cosine[pairs].numpy(), bins=np.linspace(-1, 1, 101), density=True, color=colour, alpha=0.55,
                       label=text)
            panel.axvline(cosine[pairs].mean(), color=colour, linestyle='--', linewidth=1)
        area = roc_auc_score(same, cosine)
        panel.set_title(f'{name}\narea under ROC {area:.3f}', fontsize=9)
        panel.set(xlabel='cosine similarity of embeddings z', xlim=(-1, 1))
    axes[0, 0].set_ylabel('density of pairs')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=2)
    return figure


def neighbours(args):
    """A grid of test images, each with the training images whose features are nearest; or of images without labels."""
    net, run, data = open_checkpoint(args.paths[0], args, unlabeled=True)
    memory = (data.train_labels >= 0).nonzero()[:, 0]
    images, chosen = data.test, some(len(data.test), 5, args.seed)
    if not data.classes:
        memory = some(len(data.train), 10_000, args.seed)  # encoding millions would take hours on a CPU
        images, chosen = data.train, memory[:5]
    columns = min(9, len(memory) - 1)
    queries, known = (unit(features(net, *of, run)) for of in ((images, chosen), (data.train, memory)))
    cosine = queries @ known.T  # (rows, memory)
    if not data.classes:
        cosine.fill_diagonal_(-2)  # not an image itself
    figure, axes = plt.subplots(len(chosen), columns + 1, figsize=(8, 8 * (len(chosen) + 1.4) / (columns + 1)), dpi=110)
    for line, query, found in zip(axes, chosen, memory[cosine.topk(columns).indices]):
        truth = data.test_labels[query] if data.classes else -1
        picture(line[0], images[int(query)], data.classes[truth] if data.classes else '', None)
        for panel, index in zip(line[1:], found):
            label = data.train_labels[index]
            colour = None if label < 0 else RIGHT if label == truth else WRONG
            picture(panel, data.train[int(index)], '' if label == truth else f'× {data.classes[label]}', colour)
    what = ('Test image (left) and its {} nearest training images by cosine of features: same class green,\n'
            'another class red, marked × and named. ' if data.classes else
            'Image (left) and its {} nearest others by cosine of features. ').format(columns)
    figure.suptitle(f'{what}{run["data"]}, {run["objective"]}', fontsize=9)
    return figure


def picture(axes, image, text, colour):
    """An image (3, h, w), uint8 or in [0, 1], in a frame of the colour, with a line of text below."""
    axes.imshow(image.permute(1, 2, 0).numpy())  # (3, h, w) -> (h, w, 3)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(text, fontsize=7, labelpad=2)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour or 'none', linewidth=3)


def class_map(args):
    """A map of the test images' features in two dimensions, by t-SNE, coloured by class."""
    net, run, data = open_checkpoint(args.paths[0], args)
    chosen = some(len(data.test), args.images, args.seed)
    x = unit(features(net, data.test, chosen, run)).numpy()
    labels = data.test_labels[chosen].numpy()
    place = TSNE(metric='cosine', random_state=args.seed, perplexity=min(30, len(x) / 4)).fit_transform(x)  # (n, 2)
    figure, axes = plt.subplots(figsize=(8, 6))
    for label, name in enumerate(data.classes):  # 50 styles; those of like hue differ in the marker
        style = dict(color=CLASSES[label % 10], marker=MARKERS[(label + 3 * (label // 5)) % 5])
        axes.scatter(*place[labels == label].T, s=10, alpha=0.8, linewidths=0, label=name, **style)
    axes.set(xlabel='t-SNE dimension 1 (no unit)', ylabel='t-SNE dimension 2 (no unit)', xticks=[], yticks=[],
             title=f'f\'s features of {len(x)} test images, {run["data"]}, {run["objective"]}')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right center', markerscale=2,
                  ncols=1 + len(data.classes) // 30)
    return figure


def push(views, **objective):
    """How the loss depends on the cosine of every pair of the V views (B, D): d loss / d cosine, (VB, VB).

    Each embedding gets a coordinate of its own in which it is 1 and the others 0. That leaves the cosines of
    pairs as they are, and the gradient of embedding i at the coordinate of j is the derivative by their cosine.
    """
    z = torch.cat(views).double()
    z = torch.cat([z, torch.eye(len(z), dtype=z.dtype)], 1).requires_grad_()  # (VB, D) -> (VB, D + VB)
    contrastive_loss(*z.chunk(len(views)), **objective, normalize=False).backward()
    return z.grad[:, -len(z):]


@torch.no_grad()
def negatives(args):
    """Which negatives of one image each objective pushes away, and how strongly, in one batch of an encoder."""
    net, run, data = open_checkpoint(args.paths[0], args)
    settings = run['settings']
    if len(data.test) < BATCH:
        raise UserError(f'{len(data.test)} test images: a batch of {BATCH} is drawn')
    chosen = some(len(data.test), BATCH, args.seed)
    images, labels, query = data.test[chosen], data.test_labels[chosen].repeat(2), args.query
    drawn = [draw(BATCH, *images.shape[2:], seeded(args.seed, view), **flags.recipe(settings)) for view in range(2)]
    views = [net(transform(images, p, settings['image_size']))[1] for p in drawn]  # 2 x (B, D)
    seen = torch.cat([transform(images, p, images.shape[2]) for p in drawn])  # the same views, as large as the images
    cosine = torch.cat(views) @ views[0][query]  # (2B,), with the first view of the query
    negative = (torch.arange(2 * BATCH) % BATCH != query).nonzero()[:, 0]
    negative = negative[cosine[negative].argsort()]
    same = labels[negative] == labels[query]
    objectives = {STANDARD: dict(tau_plus=0, beta=0), DEBIASED: dict(tau_plus=0.1, beta=0),
                  HARD: dict(tau_plus=0.1, beta=1)}
    with torch.enable_grad():
        pushes = {name: push(views, temperature=settings['temperature'], **objective)[query, negative]
                  for name, objective in objectives.items()}
    figure, axes = plt.subplots(figsize=(8, 5))
    mean, x, same = pushes['standard'].mean().item(), cosine[negative].numpy(), same.numpy()
    for name, values in pushes.items():
        axes.scatter(x[~same], values[~same] / mean, s=12, color=OWN[name], linewidths=0, alpha=0.8, label=name)
        axes.scatter(x[same], values[same] / mean, s=36, color=OWN[name], marker='x', linewidths=1.2)
    axes.scatter([], [], color='#555555', marker='x', s=36, linewidths=1.2, label='false negative: the query\'s class')
    axes.axhline(0, color='#555555', linewidth=1)
    axes.set(ylabel='push apart: ∂ loss / ∂ cosine  (mean of standard = 1)', xlim=(x[0] - 0.06, x[-1] + 0.06))
    axes.set_xlabel('cosine similarity of a negative to the query, and what is found there', labelpad=46)
    axes.legend(loc='upper left', bbox_to_anchor=(0.16, 1))
    picture(axes.inset_axes([0.01, 0.74, 0.14, 0.22]), seen[query], 'query', '#000000')
    count = 11  # negatives evenly spread over the axis, each below its place
    for place in np.linspace(x[0], x[-1], count):
        nearest = abs(x - place).argmin()
        left = (x[nearest] - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
        panel = axes.inset_axes([left - 0.035, -0.2, 0.07, 0.115])
        picture(panel, seen[negative[nearest]], '', None)
    return figure


PICTURES = {
    'curves': (curves, 'directories of runs', True),
    'similarity': (similarity, 'checkpoints', True),
    'neighbours': (neighbours, 'a checkpoint', False),
    'map': (class_map, 'a checkpoint', False),
    'negatives': (negatives, 'a checkpoint', False),
    'graphs': (graphs, 'a directory of misc/graphs.py', False),
}

if __name__ == '__main__':
    runtime.run(main)
