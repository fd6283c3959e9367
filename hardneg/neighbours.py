"""Nearest neighbours and near-duplicates among features (n, F): rows of unit length.

The cosines of all pairs are computed tile by tile, each pair once, on the device that holds the
features. Beyond the features they take two tiles, the results, and a copy of the rows in crowded
places. Results are on the CPU. The distance of two rows is sqrt(2 - 2 cosine).
"""

import math

import torch
from scipy.sparse import coo_array  # scikit-learn brings scipy
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from hardneg.runtime import UserError, no_bar

TILE = 2048  # rows of a tile
LINKS = 1_000_000  # that wait to be joined
# The rule of near_duplicates()
NEAREST = 11
RATIO = 0.76
FLOOR = 0.5
# What rounding makes of equal images: at most this distance, and this much less than a cosine of 1
ROUNDING = 1e-3
COSINE_ROUNDING = 1e-6


def near_duplicates(features, ratio=RATIO):
    """Labels (n,) of the rows, equal for near-duplicates, by a rule that needs no cosine.

    The reach of a row is the distance to its NEAREST-th nearest row, but at least FLOOR times the
    median of these distances. Two rows are linked if their distance is at most `ratio` times the
    smaller of their reaches. Rows that a chain of links joins are near-duplicates.

    So copies are rows that are much nearer to each other than to anything else. The floor is for
    groups of more than NEAREST copies, where the NEAREST-th nearest is a copy, too.

    Args:
        ratio: in (0, 1). Less finds fewer, and more surely.

    Raises:
        UserError: there are too few rows.
    """
    n = len(features)
    if n <= NEAREST:
        raise UserError(
            f'{n} images: the rule for near-duplicates needs {NEAREST + 1}, as it looks at the '
            f'{NEAREST}th nearest. Give a cosine with --at_least, or a number of pairs with '
            '--top_pairs'
        )
    cosine, index = nearest(features, NEAREST)
    distance = (2 - 2 * cosine).clamp(min=0).sqrt()  # (n, NEAREST)
    reach = distance[:, -1]
    floor = max(FLOOR * reach.median().item(), ROUNDING)
    crowded = (reach < floor).nonzero()[:, 0]  # (m, 1) -> (m,)
    reach = reach.clamp(min=floor)
    # A row that is not crowded has all rows that it is linked to among its nearest, as ratio < 1.
    smaller = torch.minimum(reach[:, None], reach[index])  # (n, NEAREST)
    linked = distance <= (ratio * smaller).clamp(min=ROUNDING)
    first, place = linked.nonzero().T  # (links, 2) -> 2 x (links,)
    label = _joined(torch.arange(n), first.cpu(), index[first, place].cpu())
    # Two crowded rows may have more than NEAREST rows between them.
    limit = max(ratio * floor, ROUNDING)
    crowds = groups(joined_by_cosine(features[crowded], 1 - limit**2 / 2))
    if not crowds:
        return label
    crowded = crowded.cpu()
    first = torch.cat([crowded[rows[:-1]] for rows in crowds])
    second = torch.cat([crowded[rows[1:]] for rows in crowds])
    return _joined(label, first, second)


def joined_by_cosine(features, least):
    """Labels (n,) of the rows, equal if a chain of pairs with a cosine of `least` joins them."""
    label = torch.arange(len(features))
    waiting, count = [], 0
    for a, b, cosine in _tiles(features):
        i, j = cosine.ge(least - COSINE_ROUNDING).nonzero().T  # (links, 2) -> 2 x (links,)
        waiting.append(((i + a).cpu(), (j + b).cpu()))
        count += len(i)
        if count > LINKS:
            label = _joined(label, *(torch.cat(rows) for rows in zip(*waiting)))
            waiting, count = [], 0
    if waiting:
        label = _joined(label, *(torch.cat(rows) for rows in zip(*waiting)))
    return label


def groups(label):
    """Tensors of the rows that share a label (n,), for each label that two or more rows have."""
    order = label.argsort(stable=True)
    _, counts = label[order].unique_consecutive(return_counts=True)
    return [rows for rows in order.split(counts.tolist()) if len(rows) > 1]


def nearest(features, k):
    """The k < n nearest other rows of each row, nearest first: cosines and indices, (n, k) each."""
    n = len(features)
    best = features.new_full((n, k), -math.inf)
    index = torch.zeros(n, k, dtype=torch.int64, device=features.device)

    def update(first, other, cosine):
        """Take what is nearer in a tile (r, c): of rows from first on, and columns from other."""
        rows = slice(first, first + len(cosine))
        values, found = cosine.topk(min(k, cosine.shape[1]))
        values = torch.cat([best[rows], values], 1)
        found = torch.cat([index[rows], found + other], 1)
        best[rows], order = values.topk(k)
        index[rows] = found.gather(1, order)

    for a, b, cosine in _tiles(features):
        update(a, b, cosine)
        update(b, a, cosine.T)
    return best, index


def top_pairs(features, count):
    """The `count` pairs i < j of rows with the largest cosines, or all if there are fewer.

    Returns i, j and cosine, (pairs,) each, the largest cosine first.
    """
    none = torch.zeros(0, dtype=torch.int64)
    best = none, none, torch.zeros(0)
    for a, b, cosine in _tiles(features):
        cosine = cosine.flatten()
        values, place = cosine.topk(min(count, len(cosine)))
        there = values > -math.inf
        values, place = values[there].cpu(), place[there].cpu()
        columns = min(TILE, len(features) - b)
        tile = a + place // columns, b + place % columns, values
        i, j, cosine = (torch.cat(x) for x in zip(best, tile))
        order = cosine.argsort(descending=True, stable=True)[:count]
        best = i[order], j[order], cosine[order]
    return best


def _tiles(features):
    """Yield (a, b, cosine), a <= b: the cosines (r, c) of rows from a on and of rows from b on.

    Each pair comes once: the others of a tile are -inf. The next tile overwrites this one.
    """
    n = len(features)
    memory = features.new_empty(min(n, TILE) ** 2)
    starts = [(a, b) for a in range(0, n, TILE) for b in range(a, n, TILE)]
    for a, b in tqdm(starts, 'Comparing', unit='tile', delay=2, leave=False, disable=no_bar()):
        rows, others = features[a : a + TILE], features[b : b + TILE]
        cosine = memory[: len(rows) * len(others)].view(len(rows), len(others))
        torch.mm(rows, others.T, out=cosine)  # (r, F) x (F, c) -> (r, c)
        if a == b:
            lower = torch.ones_like(cosine, dtype=torch.bool).tril()
            cosine.masked_fill_(lower, -math.inf)
        yield a, b, cosine


def _joined(label, first, second):
    """The labels (n,) after those of the rows first and second, (links,) each, have become one."""
    n = len(label)
    links = torch.ones(len(first), dtype=torch.bool)
    graph = coo_array((links, (label[first], label[second])), shape=(n, n))
    _, component = connected_components(graph, directed=False)
    return torch.from_numpy(component).long()[label]
