"""Encoder evaluation: features, label-free measures, kNN accuracy, and hits @1 and @5."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from hardneg.augment import uniforms
from hardneg.batches import seeded, views_in_parts
from hardneg.runtime import no_bar, ranks, sum_ranks

BLOCK = 256  # images that one rank encodes before the next block
# Pixels that go through the network at once on a CPU: 512 images of 32 px, 56 of 96 px
PIXELS = 2**19
# On a GPU, where few start too many kernels: at most, and the bytes of memory that one takes with
# the published stem in float32
MOST_PIXELS = 2**23
PIXEL_BYTES = 3000


@dataclass
class Evaluator:
    """An encoder in eval mode, and where and how it computes.

    The blocks of images are the same for any number of ranks: each rank encodes every world-th.
    Results are on every rank.

    Args:
        net: model.Model.
        device: torch.device that the network is on.
        autocast: what runtime.autocast() gives.
        signals: runtime.Signals, optional: a single process raises a stop signal between blocks.
    """

    net: torch.nn.Module
    device: torch.device
    autocast: Any
    signals: Any = None

    @torch.no_grad()
    def features(self, images, index, size):
        """f's features (n, F), float32, of the uint8 images (N, 3, H, W) at index (n,).

        Images are resized to size pixels; 0: they keep their own size.
        """
        features = torch.zeros(len(index), self.net.features, device=self.device)
        for i, x in self._blocks(images, index):
            features[i : i + BLOCK] = self.encode(x, size)
        return sum_ranks(features)

    @torch.no_grad()
    def embeddings(self, images, index, size, view, recipe):
        """Embeddings z (n, D) of one random view, of size pixels, of each image at index (n,).

        view is an integer: the same one gives the same views. recipe is what augment.draw() takes.
        """
        z = torch.zeros(len(index), self.net.g[-1].out_features, device=self.device)
        for i, x in self._blocks(images, index):
            u = uniforms(len(x), seeded(view, i, device=self.device))
            feature = self.encode(views_in_parts(x, u, size, recipe), size)
            with self.autocast:
                z[i : i + BLOCK] = self.net.embed(feature)
        return sum_ranks(z)

    def encode(self, images, size):
        """f's features (b, F) of images (b, 3, H, W) uint8 on the device, few at a time."""
        some = max(1, self._pixels() // (size or images.shape[2]) ** 2)
        features = []
        with self.autocast:
            for part in images.split(some):
                x = self.net.normalize(resized(part, size))
                features.append(self.net.f(x).flatten(1))  # -> (b, F)
        return torch.cat(features)

    def _pixels(self):
        """How many pixels go through the network at once."""
        if self.device.type == 'cpu':
            return PIXELS
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(PIXELS, min(MOST_PIXELS, int(free / 2) // PIXEL_BYTES))

    def _blocks(self, images, index):
        """Yield this rank's blocks: the place i of each in index, and its images on the device."""
        self.net.eval()
        rank, world, _, _ = ranks()
        starts = range(rank * BLOCK, len(index), world * BLOCK)
        for i in tqdm(starts, 'encoding', unit='block', leave=False, delay=3, disable=no_bar()):
            chosen = index[i : i + BLOCK].to(images.device)
            yield i, images.index_select(0, chosen).to(self.device)
            if self.signals and world == 1:  # several ranks would have to agree on it
                self.signals.check()


def all_finite(x):
    """Whether all numbers of x are finite. isfinite() makes a copy of x, which may not fit."""
    least, most = x.aminmax()  # NaN if any number is
    return bool(least.isfinite() & most.isfinite())


def resized(images, size):
    """(n, 3, H, W) uint8 -> grey levels (n, 3, size, size), resized with antialiasing.

    With size 0 images keep their own size.
    """
    x = images.float()
    if size not in (0, x.shape[2]):
        x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
    return x


def label_free(evaluator, images, view_size, size, recipe, n=1024):
    """Measures of an encoder that need no labels, as a dict, on at most n images, always the same.

    alignment: mean squared distance of the embeddings z of two random views of an image, in [0, 4].
    uniformity: log of the mean of exp(-2 d^2) over the distances d of the z of different images. It
    is 0 if all are equal, and about -3.9 if they are spread evenly over the sphere in 128
    dimensions. Both are better if lower (Wang and Isola 2020, arXiv 2005.10242). They take half of
    the images. rankme: the exponential of the entropy of the singular values of f's features, from
    1 to the smaller of their dimension and n; more is better. Garrido et al. 2023 (arXiv
    2210.02885) take 25,600 images, and compare runs of one method: with fewer images it is lower.
    """
    chosen = torch.randperm(len(images), generator=seeded(0))[:n].sort().values
    half = chosen
    if len(chosen) > 3:  # uniformity needs pairs
        half = chosen[::2]
    z1, z2 = (evaluator.embeddings(images, half, view_size, view, recipe) for view in range(2))
    alignment = (z1 - z2).square().sum(1).mean()
    uniformity = (_uniformity(z1) + _uniformity(z2)) / 2
    features = evaluator.features(images, chosen, size)
    if not all_finite(features):  # the encoder diverges: they have no singular values
        features = features.new_zeros(1, 1)
    sigma = torch.linalg.svdvals(features)
    rankme = torch.special.entr(sigma / sigma.sum()).sum().exp()
    return dict(alignment=alignment.item(), uniformity=uniformity.item(), rankme=rankme.item())


def _uniformity(z):
    return F.pdist(z).square().mul(-2).exp().mean().log()


def hits(scores, labels):
    """How many of n labels have the highest score, and one of the five highest: (2,) counts.

    scores (n, classes), labels (n,). A class with a score of -inf is never a hit.
    """
    top = scores.topk(min(5, scores.shape[1]))
    hit = (top.indices == labels[:, None]) & (top.values > -math.inf)  # (n, 5)
    return torch.stack([hit[:, 0].sum(), hit.sum()])


def knn(memory, queries, memory_labels, labels, k, temperature):
    """Accuracies @1 and @5, in percent, of the vote of the k nearest rows of memory.

    A vote weighs exp(cosine / temperature). memory (n, F) and queries (m, F) are features of any
    length, which become rows of unit length in place: a second copy may not fit. memory_labels (n,)
    and labels (m,) are integers.
    """
    F.normalize(memory, dim=1, out=memory)
    F.normalize(queries, dim=1, out=queries)
    classes = int(memory_labels.max()) + 1
    counts = torch.zeros(2, dtype=torch.int64, device=memory.device)
    for query, label in zip(queries.split(512), labels.split(512)):
        similarity, nearest = (query @ memory.T).topk(k)  # (b, k)
        relative = similarity - similarity[:, :1]  # exp(1 / temperature) may be infinite
        weights = (relative.double() / temperature).exp()
        votes = weights.new_zeros(len(query), classes)
        votes.scatter_add_(1, memory_labels[nearest], weights)
        votes = votes.where(votes > 0, -math.inf)  # no vote, no hit
        counts += hits(votes, label)
    return (100 * counts.double() / len(queries)).tolist()
