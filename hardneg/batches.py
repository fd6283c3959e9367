"""Which images make a batch, and their random views made on the device."""

import hashlib

import torch

from hardneg.augment import parameters, transform, uniforms
from hardneg.runtime import ranks

# What is made into views at a time: on a CPU images, which fit a core's cache if they are small; on
# a GPU pixels of images, as they take some 60 bytes each
CPU_IMAGES = 48
GPU_PIXELS = 2**24


def seeded(*key, device='cpu'):
    """A generator whose numbers depend on the key alone: integers such as (seed, epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:8], 'big') >> 1
    return torch.Generator(device).manual_seed(seed)


class Batches:
    """The batches of every epoch, and this rank's part of each. They depend on (seed, epoch) alone.

    Args:
        n: number of images.
        batch_size: images in a batch, over all ranks.
        views: views V of each image.
        seed: seed of the shuffles.
        labels: (n,), optional: every view but the first is of a random image of the same class.
        drop_last: leave out the last batch if it is smaller.
    """

    def __init__(self, n, batch_size, views=2, seed=0, labels=None, drop_last=True):
        self.n = n
        self.batch_size = batch_size
        self.views = views
        self.seed = seed
        self.labels = labels
        self.drop_last = drop_last
        self.rank, self.world, _, _ = ranks()

    def epoch(self, epoch, device='cpu'):
        """The shuffle of an epoch, batch by batch: indices (W, B) of images, on the device.

        W is 1, or with labels V.
        """
        order = torch.randperm(self.n, generator=seeded(self.seed, epoch))
        orders = [order]
        if self.labels is not None:
            for view in range(1, self.views):
                other = same_class(self.labels, seeded(self.seed, epoch, 0, view))
                orders.append(other[order])
        order = torch.stack(orders).to(device)  # W x (n,) -> (W, n)
        batches = order.split(self.batch_size, dim=1)  # (W, n) -> (W, B)
        if self.drop_last:
            batches = batches[: self.n // self.batch_size]
        return batches

    def part(self, x, dim=0):
        """This rank's part of what belongs to a whole batch."""
        return x.tensor_split(self.world, dim)[self.rank]


def same_class(labels, generator):
    """For each of n images a random one of its label, perhaps itself: (n,) -> (n,) indices."""
    by_class = labels.argsort()
    counts = labels.bincount()
    starts = counts.cumsum(0) - counts
    u = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    place = (u * counts[labels]).long()
    return by_class[starts[labels] + place]


def random_views(images, u, size, **recipe):
    """Images (n, 3, H, W) uint8 and their uniforms() u -> views (n, 3, size, size) uint8."""
    return transform(images, parameters(u, *images.shape[2:], **recipe), size)


def views_in_parts(images, u, size, recipe, make=random_views):
    """random_views() of a few images at a time, or make() of them, as they take much memory."""
    n = CPU_IMAGES
    if images.device.type != 'cpu':
        H, W = images.shape[2:]
        n = max(1, GPU_PIXELS // (H * W))
    views = []
    for i in range(0, max(1, len(images)), n):
        some = [x[i : i + n] for x in u]
        views.append(make(images[i : i + n], some, size, **recipe))
    return torch.cat(views)


class DeviceViews:
    """Random views, made in batches on the device. They depend on (seed, epoch, step) alone.

    epoch(e) yields ([x_1 ... x_V], index) for each batch: views (b, 3, size, size) uint8 and the
    indices (b,) of their images, on the device, for this rank's part of the batch.

    Args:
        images: (N, 3, H, W) uint8, on the device or in host memory. Each batch is then copied from
            pinned memory on a stream of its own, while the batch before it trains.
        batches: Batches.
        size: side of a view in pixels.
        device: torch.device on which the views are made.
        recipe: what augment.parameters() takes, as a dict.
        compile: whether torch.compile() compiles the views.
    """

    def __init__(self, images, batches, size, device='cpu', recipe=None, compile=False):
        self.images = images
        self.batches = batches
        self.size = size
        self.device = torch.device(device)
        self.recipe = recipe or {}
        self.resident = images.device.type == self.device.type
        self.random_views = random_views
        if compile:
            self.random_views = torch.compile(random_views, dynamic=False)
        self.stream = None
        if not self.resident:
            self.stream = torch.cuda.Stream(self.device)

    def epoch(self, epoch, start=0):
        batches = self.batches.epoch(epoch, self.images.device)
        parts = [self.batches.part(batch, dim=1) for batch in batches]
        ahead = None
        if start < len(parts):
            ahead = self.fetch(parts[start])
        for step in range(start, len(parts)):
            images, index = self.arrived(ahead)
            generator = seeded(self.batches.seed, epoch, step, device=self.device)
            views = []
            for v in range(self.batches.views):
                own = images[min(v, len(images) - 1)]  # the same images for every view, or its own
                views.append(self.view(own, batches[step].shape[1], generator))
            if step + 1 < len(parts):  # while the device makes the views
                ahead = self.fetch(parts[step + 1])
            yield views, index

    def fetch(self, index):
        """Start to bring the images at index (W, b), and the index of the first, to the device."""
        if self.resident:
            images = self.images.index_select(0, index.flatten())
            return images.unflatten(0, index.shape), index[0]  # (W b, ...) -> (W, b, ...)
        # torch gives pinned memory to another tensor only when the copies from it have ended.
        shape = index.numel(), *self.images.shape[1:]
        pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, index.flatten(), out=pinned)
        pinned = pinned.unflatten(0, index.shape)  # (W b, ...) -> (W, b, ...)
        pinned_index = index[0].pin_memory()
        with torch.cuda.stream(self.stream):
            images = pinned.to(self.device, non_blocking=True)
            own = pinned_index.to(self.device, non_blocking=True)
        return images, own

    def arrived(self, batch):
        """A batch that fetch() started, for which the current stream waits."""
        if not self.resident:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for x in batch:
                x.record_stream(current)
        return batch

    def view(self, images, whole, generator):
        """A random view of each image. Every rank draws the numbers of the whole batch."""
        u = [self.batches.part(x) for x in uniforms(whole, generator)]
        return views_in_parts(images, u, self.size, self.recipe, self.random_views)
