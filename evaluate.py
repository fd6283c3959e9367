"""What an encoder is worth: features of images, label-free measures, kNN accuracy, and the hits @1 and @5."""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

from augment import draw, standardize, transform
from batches import seeded
from model import unit
from runtime import ranks, sum_ranks

PIXELS = 2**19  # that go through the network at once: 512 images of 32 px, 56 of 96 px


@torch.no_grad()
def encode(net, images, index, size, autocast, device, signals=None, block=256, view=None, recipe=None):
    """f's features (n, width) in eval mode, float32, on every rank, of the uint8 images (N, 3, H, W) at index (n,).

    Images are resized to size pixels, or keep their own if it is 0. With view, an integer, the result is z (n, D) of
    one random view of each image, of size pixels, as recipe describes them to augment.parameters(); the same integer
    gives the same views. Blocks of images are the same for any number of ranks: each rank encodes every world-th. A
    stop signal is raised between blocks of a single process; several ranks would have to agree on it, so they finish.
    """
    net.eval()
    rank, world, _, _ = ranks()
    width = net.features if view is None else net.g[3].out_features
    features = torch.zeros(len(index), width, device=device)
    for i in tqdm(range(rank * block, len(index), world * block), 'encoding', unit='block', leave=False, delay=3,
                  disable=None if rank == 0 else True):
        x = images.index_select(0, index[i:i + block].to(images.device)).to(device)
        if view is not None:
            x = transform(x, draw(len(x), *x.shape[2:], seeded(view, i, device=device), **recipe or {}), size)
        feature = features_of(net, x, size, autocast)
        with autocast:
            features[i:i + block] = feature if view is None else unit(net.g(feature))
        if signals and world == 1:
            signals.check()
    return sum_ranks(features)


def features_of(net, images, size, autocast):
    """f's features (b, width) of (b, 3, H, W) uint8 images at size pixels (0: their own), some at a time."""
    some = max(1, PIXELS // (size or images.shape[2])**2)
    with autocast:
        return torch.cat([net.f(resized(part, size)).flatten(1) for part in images.split(some)])


def resized(images, size):
    """(n, 3, H, W) uint8 -> (n, 3, size, size), normalised: resized with antialiasing, or as large as they are if 0."""
    x = images.float()
    if size not in (0, x.shape[2]):
        x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
    return standardize(x)


def label_free(see, images, view_size, size, recipe, n=1024):
    """Measures of an encoder that need no labels, as a dict, on at most n images, for z half of them: always the same.

    see(images, index, size, view=None, recipe=None) is encode() with the encoder, device, … that it needs.

    alignment: mean squared distance of the embeddings z of two random views of an image, in [0, 4]; uniformity: log of
    the mean of exp(-2 d^2) over the distances d of the z of different images, in [-8, 0]: of both, less is better
    (Wang and Isola 2020, arXiv 2005.10242). rankme: the exponential of the entropy of the singular values of f's
    features, from 1 to the smaller of their width and n: more is better (Garrido et al. 2023, arXiv 2210.02885).
    """
    chosen = torch.randperm(len(images), generator=seeded(0))[:n].sort().values
    half = chosen[::2] if len(chosen) > 3 else chosen  # uniformity needs pairs
    z1, z2 = (see(images, half, view_size, view=view, recipe=recipe) for view in range(2))
    features = see(images, chosen, size)
    alignment = (z1 - z2).square().sum(1).mean()
    uniformity = sum(F.pdist(z).square().mul(-2).exp().mean().log() for z in (z1, z2)) / 2
    # of an encoder that diverges, features may be infinite: they have no singular values
    sigma = torch.linalg.svdvals(features if features.isfinite().all() else features.new_zeros(1, 1))
    rankme = torch.special.entr(sigma / sigma.sum()).sum().exp()
    return dict(alignment=alignment.item(), uniformity=uniformity.item(), rankme=rankme.item())


def hits(scores, labels):
    """How many of n labels (n,) are first, and among the first five, by their scores (n, classes): (2,) counts.

    A class with a score of -inf is never a hit.
    """
    top = scores.topk(min(5, scores.shape[1]))
    hit = (top.indices == labels[:, None]) & (top.values > -math.inf)  # (n, 5)
    return torch.stack([hit[:, 0].sum(), hit.sum()])


def knn(memory, queries, memory_labels, labels, k, temperature):
    """Accuracies @1 and @5, in percent, of the vote of the k nearest of memory, weighted by exp(cosine / temperature).

    memory (n, d) and queries (m, d) are features of any length, with integer labels (n,) and (m,).
    """
    memory, classes = F.normalize(memory, dim=1), int(memory_labels.max()) + 1
    counts = torch.zeros(2, dtype=torch.int64, device=memory.device)
    for query, label in zip(F.normalize(queries, dim=1).split(512), labels.split(512)):
        similarity, nearest = (query @ memory.T).topk(k)  # (b, k)
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()  # exp(1 / t) may be infinite
        votes = weights.new_zeros(len(query), classes).scatter_add_(1, memory_labels[nearest], weights)
        counts += hits(votes.where(votes > 0, -math.inf), label)  # no vote, no hit
    return (100 * counts.double() / len(queries)).tolist()
