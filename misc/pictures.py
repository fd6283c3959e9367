"""The pictures of encoders that misc/plot.py draws: similarity, neighbours and negatives."""

import copy
import os
import sys
import warnings
from pathlib import Path

os.environ['MPLBACKEND'] = 'agg'  # a notebook's may not be installed
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runtime
from hardneg.augment import draw, transform
from hardneg.batches import seeded
from hardneg.evaluate import Evaluator
from hardneg.losses import contrastive_loss
from hardneg.runs import OBJECTIVE, data_name, find_run, name_data
from hardneg.runtime import UserError
from main import defaults
from model import load_encoder, load_model, unit
from utils import load

# Okabe and Ito's colours
COLOURS = (
    '#0072B2',
    '#D55E00',
    '#009E73',
    '#CC79A7',
    '#E69F00',
    '#56B4E9',
    '#000000',
    '#888888',
)
MARKERS = 'os^DvP*X'
SIMCLR = 'SimCLR'
DCL = 'DCL, τ⁺ = 0.1'
HCL = 'HCL, τ⁺ = 0.1, β = 1'
OBJECTIVES = {
    SIMCLR: dict(tau_plus=0, beta=0),
    DCL: dict(tau_plus=0.1, beta=0),
    HCL: dict(tau_plus=0.1, beta=1),
}
# In all pictures of objectives
OWN = {SIMCLR: COLOURS[0], DCL: COLOURS[2], HCL: COLOURS[1]}
# A green and a red that the colour-blind can tell apart
RIGHT, WRONG = '#009E73', '#CC3311'
GREY = '#555555'
BATCH = 256  # images of the batch whose negatives are drawn

warnings.filterwarnings('ignore', 'Glyph')  # a name in a script without a font shows as boxes
plt.rcParams.update(
    {
        'figure.dpi': 160,
        'figure.constrained_layout.use': True,
        'savefig.facecolor': 'white',
        'font.size': 9,
        'axes.grid': True,
        'axes.axisbelow': True,
        'axes.spines.top': False,
        'axes.spines.right': False,
        'grid.color': '#dddddd',
        'legend.frameon': False,
    }
)


def names(runs, but=()):
    """A name for each run: its objective and, if that is not enough, the settings that differ.

    Settings in `but` are not told.
    """
    name_data(runs)
    objectives = [run['objective'] for run in runs]
    if len(set(objectives)) == len(objectives):
        return objectives
    settings = pd.DataFrame([run['identity'] for run in runs])
    settings = settings.drop(columns=['objective', *OBJECTIVE, *but], errors='ignore')
    differ = [name for name in settings if settings[name].nunique(dropna=False) > 1]
    found = []
    for run in runs:
        parts = [run['objective']]
        for name in differ:
            if name in run['identity']:  # another program's encoder has none
                parts.append(f'{name} {run["identity"][name]}')
        found.append(', '.join(parts))
    return found


def colours(titles):
    """A colour for each title. An objective that occurs once has its own in all pictures."""
    chosen = []
    for title in titles:
        own = None
        if titles.count(title) == 1:
            own = OWN.get(title)
        chosen.append(own)
    spare = [colour for colour in COLOURS if colour not in chosen]
    if chosen.count(None) > len(spare):
        raise UserError(
            f'{len(titles)} different runs, and {len(COLOURS)} colours to tell them apart'
        )
    return [colour or spare.pop(0) for colour in chosen]


def open_checkpoint(path, args, unlabeled=False, head=False):
    """The encoder in a checkpoint, the run that wrote it, and data: the run's, or as flags name.

    Without a config.json of a run beside it, the run has the name of the file and main.py's default
    settings, but no number of epochs. head tells whether the encoder needs its head.
    """
    if head:
        net = load_model(path, head, args.prefix, args.arch).eval()
    else:
        net = load_encoder(str(path), args.prefix, args.arch).eval()
    run = find_run(path.parent, defaults())
    known = net.sizes()
    if run:
        known = run['settings']
    else:
        run = dict(settings=defaults(), objective=str(path), identity={})
        del run['settings']['epochs']
    named = copy.copy(args)
    flags.fill_data_flags(named, known)
    for name in flags.DATA:
        run['settings'][name] = getattr(named, name)
    # STL10's 100,000 images without labels are neither searched nor shown.
    data = load(named, unlabeled and named.dataset_name == 'folder')
    run['data'] = data_name(run['settings'])
    run['data_digest'] = data.digest
    return net, run, data


def features(net, images, index, run):
    """f's features (n, F) of the uint8 images at index (n,), on the CPU."""
    device = runtime.start()
    evaluator = Evaluator(net.to(device), device, runtime.autocast(device, 'fp32'))
    return evaluator.features(images, index, run['settings']['test_size']).cpu()


def some(n, count, seed):
    """At most count of n indices, in random order."""
    return torch.randperm(n, generator=seeded(seed))[:count]


# Similarity


@torch.no_grad()
def similarity(args):
    """Cosine similarities of pairs of images of one class and of two, as histograms.

    Encoders without a head have no embeddings z.
    """
    opened = [open_checkpoint(path, args) for path in args.paths]
    width = max(4, 2.7 * len(opened))
    figure, axes = plt.subplots(2, len(opened), figsize=(width, 5), sharex=True, squeeze=False)
    titles = names([run for _, run, _ in opened])
    for column, name, (net, run, data) in zip(axes.T, titles, opened):
        chosen = some(len(data.test), args.images, args.seed)
        labels = data.test_labels[chosen]
        i, j = torch.triu_indices(len(chosen), len(chosen), 1)  # all pairs
        same = labels[i] == labels[j]
        if same.all() or not same.any():
            raise UserError(
                f'{run["data"]}: its test images have no two of one class and two of different ones'
            )
        f = features(net, data.test, chosen, run)  # (n, F)
        rows = dict(f=unit(f))
        if net.g is None:
            column[1].axis('off')
        else:
            rows['z'] = net.cpu().embed(f)  # (n, D)
        for panel, (what, x) in zip(column, rows.items()):
            cosine = (x @ x.T)[i, j].clamp(-1, 1)  # (pairs,)
            histograms(panel, cosine, same)
            area = f'{what}: area under ROC {roc_auc_score(same, cosine):.3f}'
            panel.set_title(area, fontsize=9)
        column[0].set_title(f'{shown(name)}\n{column[0].get_title()}', fontsize=9)
        column[len(rows) - 1].set_xlabel('cosine similarity')
    axes[0, 0].set_ylabel('density of pairs, features f')
    axes[1, 0].set_ylabel('density of pairs, embeddings z')
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc='outside upper center', ncols=2)
    return figure


def histograms(panel, cosine, same):
    """Draw the cosines (pairs,) of those of the same class and of the others, with their means."""
    kinds = (
        (cosine[same], COLOURS[5], 'same class'),
        (cosine[~same], COLOURS[7], 'different classes'),
    )
    bins = np.linspace(-1, 1, 101)
    for values, colour, text in kinds:
        panel.hist(values.numpy(), bins, density=True, color=colour, alpha=0.55, label=text)
        panel.axvline(values.mean(), color=colour, linestyle='--', linewidth=1)
    panel.set_xlim(-1, 1)


# Neighbours


def neighbours(args):
    """A grid of images, each with the training images that each encoder finds nearest."""
    opened = [open_checkpoint(path, args, unlabeled=True) for path in args.paths]
    _, run, data = opened[0]
    if any(other.digest != data.digest for _, _, other in opened):
        raise UserError(
            'the encoders were trained on different data: say with --root which images to search'
        )
    images, chosen, memory = queries(args, data)
    columns = min(max(3, 10 // len(opened)), len(memory) - 1)
    if columns < 1:
        raise UserError(f'{run["data"]}: one image has no neighbours')
    truths = [-1] * len(chosen)  # classes of the queries
    if data.classes:
        truths = data.test_labels[chosen].tolist()

    figure, first, blocks = neighbour_grid(len(chosen), columns, len(opened))
    for axes, query, truth in zip(first, chosen, truths):
        text = data.classes[truth] if data.classes else ''
        picture(axes, images[query], text)
    titles = names([run for _, run, _ in opened])
    for title, block, (net, run, _) in zip(titles, blocks, opened):
        cosines, found = nearest(net, run, data, images, chosen, memory, columns)
        for axes, truth, values, indices in zip(block, truths, cosines.tolist(), found.tolist()):
            for panel, value, index in zip(axes, values, indices):
                neighbour(panel, data, index, value, truth)
        if data.classes:
            right = data.train_labels[found] == torch.tensor(truths)[:, None]
            title += f": {right.sum()} of {right.numel()} of the query's class"
        place = dict(transform=block[0, 0].transAxes, fontsize=8, in_layout=False)
        block[0, 0].text(0, 1.15, shown(title), **place)
    kind = 'training images' if data.classes else 'images'
    about = f'{run["data"]}: images (left) and their nearest {kind} by cosine of features\n'
    figure.suptitle(shown(about), fontsize=9)
    return figure


def nearest(net, run, data, images, chosen, memory, columns):
    """The largest cosines of queries with training images, and the indices of these.

    Args:
        images: (N, 3, H, W) uint8, with the queries at the indices chosen (rows,).
        memory: indices (n,) of the training images that are searched.

    Returns two tensors (rows, columns), the nearest first.
    """
    known = unit(features(net, data.train, memory, run))  # (n, F)
    cosine = unit(features(net, images, chosen, run)) @ known.T  # (rows, n)
    if images is data.train:
        cosine.fill_diagonal_(-2)  # the queries come first in memory: not an image itself
    cosines, places = cosine.topk(columns)
    return cosines, memory[places]


def queries(args, data):
    """Images (N, 3, H, W), the indices of the queries among them, and of the training images
    that are searched.

    Queries are five test images or, without classes, training images.
    """
    if data.classes:
        memory = (data.train_labels >= 0).nonzero()[:, 0]  # (n, 1) -> (n,)
        return data.test, some(len(data.test), 5, args.seed), memory
    # Encoding millions would take hours on a CPU.
    memory = some(len(data.train), args.memory, args.seed)
    if len(memory) < len(data.train):
        runtime.say(
            f'{len(memory):,} of {len(data.train):,} images are searched: more with --memory'
        )
    return data.train, memory[:5], memory


def neighbour_grid(rows, columns, encoders):
    """A figure and its panels: for queries (rows,); of each encoder, for neighbours (rows, n)."""
    width = 1 + (columns + 0.3) * encoders  # in images
    figure, grid = plt.subplots(
        rows,
        1 + (1 + columns) * encoders,
        figsize=(8, 8 * (rows + 1.6) / width),
        dpi=165,
        width_ratios=[1] + ([0.3] + [1] * columns) * encoders,
        squeeze=False,
    )
    blocks = []
    for panels in np.split(grid[:, 1:], encoders, axis=1):  # (rows, 1 + columns)
        for gap in panels[:, 0]:
            gap.axis('off')
        blocks.append(panels[:, 1:])
    return figure, grid[:, 0], blocks


def neighbour(panel, data, index, cosine, truth):
    """Draw a training image. With the class of the query, its frame says whether it is the same.

    Without it (-1), the cosine stands below.
    """
    colour = None
    text = f'{cosine:.3f}'
    label = int(data.train_labels[index])
    if truth >= 0:
        colour = RIGHT if label == truth else WRONG
        text = '' if label == truth else f'× {data.classes[label]}'
    picture(panel, data.train[index], text, colour)


# Negatives


def push(views, **objective):
    """The derivative of the loss by the cosine of every pair of V views (B, D): (V B, V B).

    Each embedding gets a coordinate of its own in which it is 1 and the others 0. That leaves the
    cosines of pairs as they are, and the gradient of embedding i at the coordinate of j is the
    derivative by their cosine.
    """
    z = with_own_coordinates(torch.cat(views).double())  # V x (B, D) -> (V B, D + V B)
    contrastive_loss(*z.chunk(len(views)), **objective, normalize=False).backward()
    return z.grad[:, -len(z) :]


def with_own_coordinates(z):
    """Rows (n, D), each with a coordinate of its own in which it is 1: a leaf (n, D + n)."""
    own = torch.eye(len(z), dtype=z.dtype)
    return torch.cat([z, own], 1).requires_grad_()


@torch.no_grad()
def negatives(args):
    """Which negatives of one image each objective pushes away, and how strongly."""
    net, run, data = open_checkpoint(args.paths[0], args, unlabeled=True, head=True)
    settings, query = run['settings'], args.query
    images, labels = data.train, data.train_labels
    if data.classes:
        images, labels = data.test, data.test_labels
    if len(images) < BATCH:
        raise UserError(f'{len(images)} images: a batch of {BATCH} is drawn')
    chosen = some(len(images), BATCH, args.seed)
    images = images.index_select(0, chosen)
    labels = labels[chosen].repeat(2)  # (B,) -> (2B,)
    views, seen = [], []  # as the encoder sees them, and as large as the images
    for v in range(2):
        generator = seeded(args.seed, v)
        p = draw(BATCH, *images.shape[2:], generator, **flags.recipe(settings))
        _, z = net(transform(images, p, settings['image_size']))
        views.append(z)  # (B, D)
        seen.append(transform(images, p, images.shape[2]))
    seen = torch.cat(seen)  # 2 x (B, 3, H, W) -> (2B, 3, H, W)

    cosine = torch.cat(views) @ views[0][query]  # (2B, D) x (D,) -> (2B,)
    negative = (torch.arange(2 * BATCH) % BATCH != query).nonzero()[:, 0]  # (2B - 2,)
    negative = negative[cosine[negative].argsort()]
    same = (labels[negative] == labels[query]) & (labels[query] >= 0)
    t = settings['temperature']
    objectives = {name: dict(temperature=t, **own) for name, own in OBJECTIVES.items()}
    objectives['SimCLR at t = 0.1'] = dict(temperature=0.1, **OBJECTIVES[SIMCLR])
    pushes = {}
    with torch.enable_grad():
        for name, objective in objectives.items():
            pushes[name] = push(views, **objective)[query, negative]

    x = cosine[negative].numpy()
    figure, axes = plt.subplots(figsize=(8, 5.2))
    draw_pushes(axes, x, pushes, same.numpy())
    encoder = run['objective']
    if 'epochs' in settings:
        encoder += f', {settings["epochs"]} epochs'
    axes.set_title(shown(f'encoder: {encoder}; objectives at t = {t:g}'), fontsize=9)
    text = f'query, {data.classes[labels[query]]}' if data.classes else 'query'
    picture(axes.inset_axes([0.01, 0.74, 0.14, 0.22]), seen[query], text, '#000000')
    low, high = axes.get_xlim()
    for place in np.linspace(x[0], x[-1], 11):  # negatives evenly spread, each below its place
        nearest = abs(x - place).argmin()
        left = (x[nearest] - low) / (high - low)
        panel = axes.inset_axes([left - 0.035, -0.2, 0.07, 0.115])
        picture(panel, seen[negative[nearest]])
    return figure


def draw_pushes(axes, x, pushes, same):
    """Draw how strongly each objective pushes the negatives, in multiples of SimCLR's mean.

    Args:
        x: cosines (n,) of the negatives to the query, sorted.
        pushes: (n,) of each objective, by name.
        same: (n,) bool, whether a negative has the query's class.
    """
    mean = pushes[SIMCLR].mean()
    pushed = torch.stack([pushes[name] for name in OWN]) / mean
    for name, own in pushes.items():
        if name in OWN:
            colour, label = OWN[name], name
            values = own / mean
        else:  # it goes beyond the axis
            colour = COLOURS[7]
            values = own / own.mean()
            label = f'{name} (its own mean = 1; up to {values.max():.0f})'
        values = values.numpy()
        axes.scatter(
            x[~same], values[~same], s=12, color=colour, linewidths=0, alpha=0.8, label=label
        )
        axes.scatter(x[same], values[same], s=36, color=colour, marker='x', linewidths=1.2)
    label = "false negative: the query's class"
    axes.scatter([], [], s=36, color=GREY, marker='x', linewidths=1.2, label=label)
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xlim(x[0] - 0.06, x[-1] + 0.06)
    axes.set_ylim(pushed.min().item() - 0.5, 1.1 * pushed.max().item())
    axes.set_ylabel('push apart: ∂ loss / ∂ cosine  (mean of SimCLR = 1)')
    what = 'cosine similarity of a negative to the query, and what is found there'
    axes.set_xlabel(what, labelpad=46)
    axes.legend(loc='upper left', bbox_to_anchor=(0.16, 1))


# The idea

# Angles between an image and its negatives, in degrees
NEGATIVES = {
    'false negative (same class)': (-21, 21),
    'hard negative': (-48, -34, 34, 48),
    'easy negative': (*range(-160, -60, 12), 180, *range(64, 162, 12)),
}
LOOKS = {  # colour and marker
    'false negative (same class)': (WRONG, 'X'),
    'hard negative': (COLOURS[4], 'o'),
    'easy negative': (COLOURS[5], 'o'),
}


def circle(args):
    """Which negatives of an image SimCLR, DCL and HCL push away, on a circle."""
    kinds, angles = [], []
    for kind, places in NEGATIVES.items():
        kinds += [kind] * len(places)
        angles += places
    image, positive, negatives = (on_circle(degrees) for degrees in ([0], [9], angles))
    figure, panels = plt.subplots(1, 3, figsize=(8, 3.3))
    for panel, (name, objective) in zip(panels, OBJECTIVES.items()):
        pushes = push_of_one(image, positive, negatives, temperature=0.5, **objective)
        panel.add_patch(plt.Circle((0, 0), 1, fill=False, color='#bbbbbb'))
        panel.scatter(*image[0], s=120, marker='*', color='black', label='image', zorder=3)
        panel.scatter(*positive[0], s=60, marker='P', color=RIGHT, label='its other view', zorder=3)
        draw_negatives(panel, negatives, kinds, pushes)
        panel.set_title(name.partition(',')[0], fontsize=11)
        panel.set(xlim=(-1.25, 1.25), ylim=(-1.15, 1.25), aspect='equal')
        panel.axis('off')
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc='outside lower center', ncols=5, fontsize=9)
    return figure


def on_circle(degrees):
    """Points (n, 2) at angles (n,) from the top."""
    turn = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([turn.sin(), turn.cos()], 1)


def push_of_one(image, positive, negatives, **objective):
    """The derivative of one image's loss by its cosine to each negative: (K,).

    image and positive are (1, D), negatives (K, D). As in push(), each negative gets a coordinate
    of its own.
    """
    z = with_own_coordinates(torch.cat([image, positive, negatives]))  # (2 + K, D + 2 + K)
    contrastive_loss(z[:1], z[1:2], negatives=z[2:], **objective, normalize=False).backward()
    return 2 * z.grad[0, -len(negatives) :]  # the loss is the mean of the two views'


def draw_negatives(panel, negatives, kinds, pushes):
    """Draw points (K, 2), whose areas are their pushes (K,), and the share of the near ones.

    A push below 0 is a pull. Its point is hollow.
    """
    pushes = pushes.numpy()
    kinds = np.array(kinds)
    for kind, (colour, marker) in LOOKS.items():
        look = dict(marker=marker, edgecolors=colour, linewidths=0.8)
        for sign, inside in ((1, colour), (-1, 'none')):
            own = (kinds == kind) & (sign * pushes > 0)
            area = 6 + 1500 * abs(pushes[own])
            panel.scatter(*negatives[own].T, s=area, facecolors=inside, alpha=0.8, **look)
        panel.scatter([], [], s=45, label=kind, facecolors=colour, alpha=0.8, **look)
    pushed = pushes.clip(min=0)
    share = 100 * pushed[kinds != 'easy negative'].sum() / pushed.sum()
    text = f'{share:.0f} % of the push\nis on hard and\nfalse negatives'
    panel.text(0, -0.05, text, ha='center', va='center')


# Images and names in a picture


def shown(name):
    """A name as matplotlib shows it: no mathematics, no letters outside Unicode, none left out."""
    name = name.encode('utf-8', 'replace').decode().replace('$', r'\$')
    if name.startswith('_'):  # a legend leaves out what begins so
        return f' {name}'
    return name


def picture(axes, image, text='', colour=None):
    """An image (3, h, w) uint8 in a frame of the colour, if any, with a line of text below."""
    axes.imshow(image.permute(1, 2, 0).numpy())  # (3, h, w) -> (h, w, 3)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(shown(text), fontsize=6, labelpad=2)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour or 'none', linewidth=3)
