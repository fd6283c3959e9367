"""How well features, or a hash, find the variants that variants.py planted among photos.

    python results/photos/evaluate.py truth.csv features.npz [more.npz ...]
    python results/photos/evaluate.py truth.csv --phash OUT      # 64 bits: pip install imagehash

Prints a row of a table for each. Two photos belong together if they come from one original.

small to crop60  variants of this kind whose nearest other photo, or one of them, belongs to them
best F1          of the list of pairs at the best cosine (the best number of bits)
groups           precision, recall and F1 of the pairs in the groups that misc/search.py
                 --duplicates gives, and the part of true groups that it finds whole, without others
Pairs with a crop of 60 % count for the first alone.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from hardneg import neighbours
from hardneg.embedded import read_embedded

KINDS = 'small', 'central', 'mirrored', 'bar', 'turned', 'burst', 'crop60'
TABLE = (
    'features',
    *KINDS,
    'best F1',
    'groups: precision',
    'recall',
    'F1',
    'whole',
)


def true_groups(names, truth):
    """A number (n,) for each name, equal for photos that belong together."""
    original = dict(zip(truth['variant'], truth['original']))
    photos = [original.get(name, name) for name in names]
    return np.unique(photos, return_inverse=True)[1]


def best_f1(similarity, belong):
    """The highest F1 of a list of pairs, sorted by similarity (pairs,); belong (pairs,) is bool."""
    order = np.argsort(-similarity, kind='stable')
    hits = belong[order].cumsum()
    last = np.append(np.diff(similarity[order]) != 0, True)  # of equal similarities
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + belong.sum())
    return f1[last].max()


def found_of_each_kind(similarity, group, kinds):
    """Texts: of how many photos of each kind a nearest other photo belongs to them."""
    similarity = similarity.copy()
    np.fill_diagonal(similarity, -np.inf)
    belong = group[:, None] == group
    right = similarity.max(1) == similarity.max(1, where=belong, initial=-np.inf)
    return [f'{right[kinds == kind].sum()} of {(kinds == kind).sum()}' for kind in KINDS]


def scores(label, group, counted):
    """Precision, recall, F1 of the pairs of photos with one label, and the part of whole groups."""
    label, group = label[counted], group[counted]
    i, j = np.triu_indices(len(label), 1)
    linked, belong = label[i] == label[j], group[i] == group[j]
    hits = (linked & belong).sum()
    precision, recall = hits / linked.sum(), hits / belong.sum()
    whole = []
    for number in np.unique(group):
        members = group == number
        if members.sum() > 1:
            own = np.unique(label[members])
            whole.append(len(own) == 1 and ((label == own[0]) == members).all())
    f1 = 2 * hits / (linked.sum() + belong.sum())
    return precision, recall, f1, np.mean(whole)


def phash(directory, names):
    """pHash of 64 bits of images, as similarities (n, n): minus the number of other bits."""
    import imagehash
    from PIL import Image, ImageOps

    bits = []
    for name in names:
        image = ImageOps.exif_transpose(Image.open(Path(directory, name)))
        bits.append(imagehash.phash(image).hash.flatten())
    bits = np.array(bits, float)
    return -(np.abs(bits[:, None] - bits[None])).sum(2)  # (n, 1, 64), (1, n, 64) -> (n, n)


def main():
    truth = pd.read_csv(sys.argv[1])
    kind_of = dict(zip(truth['variant'], truth['kind']))
    print('| ' + ' | '.join(TABLE) + ' |\n' + '|---' * len(TABLE) + '|')
    if sys.argv[2] == '--phash':
        names = sorted(path.name for path in Path(sys.argv[3]).iterdir())
        report('pHash, 64 bits', names, phash(sys.argv[3], names), None, truth, kind_of)
    else:
        for file in sys.argv[2:]:
            embedded = read_embedded(file)
            cosine = embedded.features @ embedded.features.T
            label = neighbours.near_duplicates(torch.from_numpy(embedded.features)).numpy()
            names = embedded.names.tolist()
            report(Path(file).stem, names, cosine, label, truth, kind_of)


def report(title, names, similarity, label, truth, kind_of):
    group = true_groups(names, truth)
    kinds = np.array([kind_of.get(name, '') for name in names])
    counted = kinds != 'crop60'
    i, j = np.triu_indices(len(names), 1)
    some = counted[i] & counted[j]
    f1 = best_f1(similarity[i, j][some], (group[i] == group[j])[some])
    cells = [title, *found_of_each_kind(similarity, group, kinds), f'{f1:.3f}']
    if label is None:
        cells += [''] * 4
    else:
        cells += [f'{x:.3f}' for x in scores(label, group, counted)]
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
