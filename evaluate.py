"""What an encoder is worth: features of images, kNN accuracy, and the hits @1 and @5 that every accuracy counts."""

import math

import torch
import torch.nn.functional as F

from augment import normalize
from runtime import RANK, WORLD, sum_ranks


@torch.no_grad()
def encode(net, images, index, size, autocast, device, signals=None, batch_size=256):
    """f's features (n, width) in eval mode, float32, on every rank, of the uint8 images (N, 3, H, W) at index (n,).

    Images are resized to size pixels, or keep their own if it is 0. Of batches that do not depend on the number of
    ranks, each rank encodes every WORLD-th, so that no image counts twice and features are the same. A stop signal
    is raised between two batches; several ranks, which would have to agree on it, finish first.
    """
    net.eval()
    features = torch.zeros(len(index), net.features, device=device)
    for i in range(RANK * batch_size, len(index), WORLD * batch_size):
        x = images[index[i:i + batch_size].to(images.device)].to(device).float() / 255
        if size:
            x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
        with autocast:
            features[i:i + batch_size] = net.f(normalize(x)).flatten(1)
        if signals and WORLD == 1:
            signals.check()
    return sum_ranks(features)


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
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        counts += hits(votes.where(votes > 0, -math.inf), label)  # no vote, no hit
    return (100 * counts.double() / len(queries)).tolist()
