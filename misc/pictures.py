"""The pictures of encoders that misc/plot.py makes: similarity, neighbours, and what negatives feel."""

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
from hardneg import flags
from hardneg import runtime
from hardneg.augment import draw, transform
from hardneg.batches import seeded
from data import load_data
from hardneg.decoding import decode_or_why
from hardneg.evaluate import encode
from hardneg.losses import contrastive_loss
from model import load_model, unit
from hardneg.runs import OBJECTIVE, accuracies, data_name, name_data, read_run
from hardneg.runtime import UserError

COLOURS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#888888']  # Okabe and Ito's
STANDARD, DEBIASED, HARD = 'standard', 'debiased, τ⁺ = 0.1', 'hard, τ⁺ = 0.1, β = 1'
OWN = {STANDARD: COLOURS[0], DEBIASED: COLOURS[2], HARD: COLOURS[1]}  # in all pictures of objectives
RIGHT, WRONG = '#009E73', '#CC3311'  # a green and a red that the colour-blind can tell apart
MARKERS = 'os^Dv'
BATCH = 256  # images of the batch whose negatives are drawn
warnings.filterwarnings('ignore', 'Glyph')  # a name in a script without a font shows as boxes
plt.rcParams.update({'figure.dpi': 160, 'savefig.facecolor': 'white', 'font.size': 9, 'axes.grid': True,
                     'grid.color': '#dddddd', 'axes.axisbelow': True, 'axes.spines.top': False,
                     'axes.spines.right': False, 'legend.frameon': False, 'figure.constrained_layout.use': True})


def names(runs, but=()):
    """A name for each run: its objective, and the settings, but for some, by which runs of one objective differ."""
    name_data(runs)
    found = [run['objective'] for run in runs]
    settings = pd.DataFrame([run['identity'] for run in runs]).drop(columns=['objective', *OBJECTIVE])
    differ = [name for name in settings if settings[name].nunique(dropna=False) > 1 and name not in but]
    if len({*found}) == len(found):
        return found
    return [', '.join([name, *(f'{setting} {run["identity"][setting]}' for setting in differ)])
            for name, run in zip(found, runs)]


def colours(titles):
    """A colour for each title: an objective that occurs once has its own in all pictures."""
    own = [OWN.get(title) if titles.count(title) == 1 else None for title in titles]
    spare = [colour for colour in COLOURS if colour not in own]
    if own.count(None) > len(spare):
        raise UserError(f'{len(titles)} different runs, and {len(COLOURS)} colours to tell them apart')
    return [colour or spare.pop(0) for colour in own]


def open_checkpoint(path, args, unlabeled=False):
    """The encoder in a checkpoint, the run that wrote it, and data: the run's, or what the flags name."""
    net, run = load_model(path).eval(), read_run(path.parent)
    accuracies(path)  # which checks that the run wrote this encoder
    named = copy.copy(args)
    flags.fill_data_flags(named, run['settings'])
    run['settings'] |= {name: getattr(named, name) for name in (flag[2:] for flag, *_ in flags.DATA)}
    data = load_data(named.dataset_name, named.root, named.store_size, unlabeled, named.cache_dir, named.skip_damaged,
                     named.fit, named.holdout)
    run.update(data=data_name(vars(named)), data_digest=data.digest)
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
    """Histograms of the cosine similarity of features f and embeddings z, for pairs of one class and of two."""
    opened = [open_checkpoint(path, args) for path in args.paths]
    figure, axes = plt.subplots(2, len(opened), figsize=(max(4, 2.7 * len(opened)), 5), sharex=True, squeeze=False)
    for column, name, (net, run, data) in zip(axes.T, names([run for _, run, _ in opened]), opened):
        chosen = some(len(data.test), args.images, args.seed)
        f = features(net, data.test, chosen, run)  # (n, width)
        labels = data.test_labels[chosen]
        i, j = torch.triu_indices(len(f), len(f), 1)
        same = labels[i] == labels[j]
        if same.all() or not same.any():
            raise UserError(f'{run["data"]}: its test images have no two of one class and two of different ones')
        for panel, what, x in zip(column, 'fz', (unit(f), unit(net.cpu().g(f)))):
            cosine = (x @ x.T)[i, j].clamp(-1, 1)
            for pairs, colour, text in ((same, COLOURS[5], 'same class'), (~same, COLOURS[7], 'different classes')):
                panel.hist(cosine[pairs].numpy(), bins=np.linspace(-1, 1, 101), density=True, color=colour, alpha=0.55,
                           label=text)
                panel.axvline(cosine[pairs].mean(), color=colour, linestyle='--', linewidth=1)
            title = f'{shown(name)}\n' if what == 'f' else ''
            panel.set_title(f'{title}{what}: area under ROC {roc_auc_score(same, cosine):.3f}', fontsize=9)
            panel.set(xlim=(-1, 1), xlabel='cosine similarity' if what == 'z' else None)
    for row, what in zip(axes, ('features f', 'embeddings z')):
        row[0].set_ylabel(f'density of pairs, {what}')
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=2)
    return figure


def neighbours(args):
    """A grid of test images, or of the files --query, each with the training images that each encoder finds nearest."""
    opened = [open_checkpoint(path, args, unlabeled=True) for path in args.paths]
    _, run, data = opened[0]
    if any(other.digest != data.digest for _, _, other in opened):
        raise UserError('the encoders were trained on different data: say by --root which images to search')
    memory = (data.train_labels >= 0).nonzero()[:, 0]
    images, chosen = data.test, some(len(data.test), 5, args.seed)
    if not data.classes or args.query:
        memory = some(len(data.train), args.memory, args.seed)  # encoding millions would take hours on a CPU
        if len(memory) < len(data.train):
            runtime.say(f'{len(memory):,} of {len(data.train):,} images are searched: more by --memory')
    if args.query:
        images = torch.from_numpy(np.stack([decode_query(path, data, run) for path in args.query]))
        chosen = torch.arange(len(images))
    elif not data.classes:
        images, chosen = data.train, memory[:5]
    columns = min(max(3, 10 // len(opened)), len(memory) - 1)
    if columns < 1:
        raise UserError(f'{run["data"]}: one image has no neighbours')
    width = 1 + (columns + 0.3) * len(opened)  # in images
    figure, grid = plt.subplots(len(chosen), 1 + (columns + 1) * len(opened), dpi=110, squeeze=False, figsize=(
        8, 8 * (len(chosen) + 1.6) / width), width_ratios=[1, *[0.3, *[1] * columns] * len(opened)])
    truths = data.test_labels[chosen].tolist() if data.classes and not args.query else [-1] * len(chosen)
    for axes, query, truth in zip(grid[:, 0], chosen.tolist(), truths):
        picture(axes, images[query], data.classes[truth] if truth >= 0 else '', None)
    named = bool(args.query and data.names)
    for i, (title, (net, run, _)) in enumerate(zip(names([run for _, run, _ in opened]), opened)):
        queries, known = (unit(features(net, *of, run)) for of in ((images, chosen), (data.train, memory)))
        cosine = queries @ known.T  # (rows, memory)
        if not data.classes and not args.query:
            cosine.fill_diagonal_(-2)  # not an image itself
        near, found = cosine.topk(columns)
        found, right = memory[found].tolist(), 0
        block = grid[:, 1 + i * (columns + 1):][:, :columns + 1]
        for axes, truth, values, indices in zip(block, truths, near.tolist(), found):
            axes[0].axis('off')
            for panel, value, index in zip(axes[1:], values, indices):
                label = int(data.train_labels[index])
                right += label == truth
                text = '' if label == truth else f'× {data.classes[label]}' if truth >= 0 else f'{value:.3f}'
                if named:
                    text = f'{Path(data.names[index]).stem[-11:]}\n{value:.3f}'
                picture(panel, data.train[index], text, None if truth < 0 else RIGHT if label == truth else WRONG)
        count = f': {right} of {columns * len(chosen)} of the query\'s class' if max(truths) >= 0 else ''
        first = block[0, 1]
        first.text(0, 1.15, shown(f'{title}{count}'), transform=first.transAxes, fontsize=8, in_layout=False)
        if named:
            for query, indices in zip(args.query, found):
                print(f'{query}: {", ".join(data.names[i] for i in indices)}')
    figure.suptitle(shown(f'{run["data"]}: images (left) and their nearest {"training " * bool(data.classes)}images by '
                          'cosine of features\n'), fontsize=9)
    return figure


def decode_query(path, data, run):
    """The image in a file as those of the run are kept: (3, H, W) uint8."""
    found = decode_or_why(path, data.train.shape[2], run['settings']['fit'])
    if isinstance(found, str):
        raise UserError(f'--query {path}: {found}')
    return found[0]


def shown(name):
    """A name as matplotlib shows it: no mathematics between dollars, no letters outside Unicode, none left out."""
    name = name.encode('utf-8', 'replace').decode().replace('$', r'\$')
    return f' {name}' if name[:1] == '_' else name  # a legend leaves out what begins so


def picture(axes, image, text, colour):
    """An image (3, h, w), uint8 or in [0, 1], in a frame of the colour, with a line of text below."""
    axes.imshow(image.permute(1, 2, 0).numpy())  # (3, h, w) -> (h, w, 3)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(shown(text), fontsize=6, labelpad=2)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=colour is not None, color=colour or 'none', linewidth=3)


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
    net, run, data = open_checkpoint(args.paths[0], args, unlabeled=True)
    settings, t = run['settings'], run['settings']['temperature']
    images, labels = (data.test, data.test_labels) if data.classes else (data.train, data.train_labels)
    if len(images) < BATCH:
        raise UserError(f'{len(images)} images: a batch of {BATCH} is drawn')
    chosen = some(len(images), BATCH, args.seed)
    images, labels, query = images.index_select(0, chosen), labels[chosen].repeat(2), args.query
    recipe = flags.recipe(settings)
    drawn = [draw(BATCH, *images.shape[2:], seeded(args.seed, view), **recipe) for view in range(2)]
    views = [net(transform(images, p, settings['image_size']))[1] for p in drawn]  # 2 x (B, D)
    seen = torch.cat([transform(images, p, images.shape[2]) for p in drawn])  # the same views, as large as the images
    cosine = torch.cat(views) @ views[0][query]  # (2B,), with the first view of the query
    negative = (torch.arange(2 * BATCH) % BATCH != query).nonzero()[:, 0]
    negative = negative[cosine[negative].argsort()]
    same = ((labels[negative] == labels[query]) & (labels[query] >= 0)).numpy()
    objectives = {STANDARD: (t, 0, 0), DEBIASED: (t, 0.1, 0), HARD: (t, 0.1, 1), 'standard at t = 0.1': (0.1, 0, 0)}
    with torch.enable_grad():
        pushes = {name: push(views, temperature=t, tau_plus=tau_plus, beta=beta)[query, negative]
                  for name, (t, tau_plus, beta) in objectives.items()}
    figure, axes = plt.subplots(figsize=(8, 5.2))
    mean, x = pushes[STANDARD].mean().item(), cosine[negative].numpy()
    pushed = torch.stack([pushes[name] for name in OWN]) / mean
    for name, values in pushes.items():
        values = values / mean if name in OWN else values / values.mean()
        colour = OWN.get(name, COLOURS[7])
        most = '' if name in OWN else f' (its own mean = 1; up to {values.max():.0f})'  # beyond the axis
        axes.scatter(x[~same], values[~same], s=12, color=colour, linewidths=0, alpha=0.8, label=name + most)
        axes.scatter(x[same], values[same], s=36, color=colour, marker='x', linewidths=1.2)
    of_class = f', {data.classes[labels[query]]}' if data.classes else ''
    axes.scatter([], [], color='#555555', marker='x', s=36, linewidths=1.2, label='false negative: the query\'s class')
    axes.axhline(0, color='#555555', linewidth=1)
    axes.set(ylabel='push apart: ∂ loss / ∂ cosine  (mean of standard = 1)', xlim=(x[0] - 0.06, x[-1] + 0.06),
             ylim=(pushed.min().item() - 0.5, 1.1 * pushed.max().item()))
    axes.set_xlabel('cosine similarity of a negative to the query, and what is found there', labelpad=46)
    title = f'encoder: {run["objective"]}, {settings["epochs"]} epochs; objectives at t = {t:g}'
    axes.set_title(shown(title), fontsize=9)
    axes.legend(loc='upper left', bbox_to_anchor=(0.16, 1))
    picture(axes.inset_axes([0.01, 0.74, 0.14, 0.22]), seen[query], f'query{of_class}', '#000000')
    count = 11  # negatives evenly spread over the axis, each below its place
    for place in np.linspace(x[0], x[-1], count):
        nearest = abs(x - place).argmin()
        left = (x[nearest] - axes.get_xlim()[0]) / (axes.get_xlim()[1] - axes.get_xlim()[0])
        panel = axes.inset_axes([left - 0.035, -0.2, 0.07, 0.115])
        picture(panel, seen[negative[nearest]], '', None)
    return figure
