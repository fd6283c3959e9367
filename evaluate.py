"""What an encoder is worth: features of images, label-free measures, kNN accuracy, and the hits @1 and @5."""

import math

import torch
import torch.nn.functional as F

from augment import apply, draw, normalize, seeded
from model import unit
from runtime import RANK, WORLD, sum_ranks


@torch.no_grad()
def encode(net, images, index, size, autocast, device, signals=None, batch_size=256, view=None):
    """f's features (n, width) in eval mode, float32, on every rank, of the uint8 images (N, 3, H, W) at index (n,).

    Images are resized to size pixels, or keep their own if it is 0. With view, an integer, the result is z (n, D) of
    one random view of each image, of size pixels, with blur; the same integer gives the same views. Batches are the
    same for any number of ranks: each rank encodes every WORLD-th. A stop signal is raised between batches of a single
    process; several ranks would have to agree on it, so they finish first.
    """
    net.eval()
    width = net.features if view is None else net.g[3].out_features
    features = torch.zeros(len(index), width, device=device)
    for i in range(RANK * batch_size, len(index), WORLD * batch_size):
        x = images.index_select(0, index[i:i + batch_size].to(images.device)).to(device)
        if view is not None:
            x = apply(x, draw(len(x), *x.shape[2:], seeded(view, i, device=device)), size)
        else:
            x = x.float()
            x = normalize(F.interpolate(x, (size, size), mode='bilinear', antialias=True) if size else x)
        with autocast:
            feature = net.f(x).flatten(1)
            features[i:i + batch_size] = feature if view is None else unit(net.g(feature))
        if signals and WORLD == 1:
            signals.check()
    return sum_ranks(features)


def label_free(net, images, view_size, size, autocast, device, signals=None, n=1024):
    """Measures of an encoder that need no labels, as a dict, on at most n images, for z half of them: always the same.

    alignment: mean squared distance of the embeddings z of two random views of an image, in [0, 4]; uniformity: log of
    the mean of exp(-2 d^2) over the distances d of the z of different images, in [-8, 0]: of both, less is better
    (Wang and Isola 2020, arXiv 2005.10242). rankme: the exponential of the entropy of the singular values of f's
    features, from 1 to the smaller of their width and n: more is better (Garrido et al. 2023, arXiv 2210.02885).
    """
    chosen = torch.randperm(len(images), generator=seeded(0))[:n].sort().values
    z1, z2 = (encode(net, images, chosen[::2], view_size, autocast, device, signals, view=view) for view in range(2))
    features = encode(net, images, chosen, size, autocast, device, signals)
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
