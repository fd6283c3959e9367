"""Which images make a batch, and what yields its views: DeviceViews on the device, ReferenceViews by PIL in workers.

Of either, epoch(e) yields ([x_1 ... x_V], index) for every batch of epoch e: views (b, 3, size, size) uint8 and the
indices (b,) of their images, on the device, for this rank's part of the batch.
"""

import hashlib
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from augment import parameters, transform, uniforms
from runtime import STOP_SIGNALS, UserError
from utils import reference_transform


def seeded(*key, device='cpu'):
    """A generator whose stream is a function of the key, integers such as (seed, epoch, step), alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'big') >> 1)


class Batches:
    """The batches of every epoch, a function of (seed, epoch) alone, and the part of each that this rank takes.

    Args:
        n: number of images.
        batch_size: images in a batch, over all ranks.
        views: views V of each image.
        labels: (n,), optional: every view but the first is of a random image of the same class.
        drop_last: leave out the last batch if it is smaller.
    """

    def __init__(self, n, batch_size, views=2, seed=0, labels=None, drop_last=True, rank=0, world=1):
        self.n, self.batch_size, self.views, self.seed, self.labels = n, batch_size, views, seed, labels
        self.drop_last, self.rank, self.world = drop_last, rank, world

    def epoch(self, epoch):
        """The shuffle of an epoch, batch by batch: indices (W, B) of images. W is 1, or V with labels."""
        order = torch.randperm(self.n, generator=seeded(self.seed, epoch))[None]  # (1, n)
        if self.labels is not None:
            others = [same_class(self.labels, seeded(self.seed, epoch, 0, view)) for view in range(1, self.views)]
            order = torch.cat([order, *(other[order] for other in others)])  # (V, n)
        return order.split(self.batch_size, 1)[:self.n // self.batch_size if self.drop_last else None]

    def part(self, x, dim=0):
        """This rank's part of what belongs to a whole batch."""
        return x.tensor_split(self.world, dim)[self.rank]


def same_class(labels, generator):
    """For each of n images the index of a random one that has its label, itself possible: (n,) -> (n,)"""
    by_class, counts = labels.argsort(), labels.bincount()
    first, count = (counts.cumsum(0) - counts)[labels], counts[labels]
    return by_class[first + (torch.rand(len(labels), generator=generator, dtype=torch.float64) * count).long()]


def random_views(images, u, size, **recipe):
    """(n, 3, H, W) uint8 images and uniforms() u -> (n, 3, size, size) uint8 views: what compiles."""
    return transform(images, parameters(u, *images.shape[2:], **recipe), size)


class DeviceViews:
    """Random views made in batches on the device. They are a function of (seed, epoch, step) alone.

    Args:
        images: (N, 3, H, W) uint8. They are kept on the device, or, with resident=False, in host memory: then each
            batch is copied from pinned memory on a stream of its own while the batch before it trains.
        at_once: images whose views are made at a time, which bounds the memory that it takes (default: all of a batch;
            48, which fit a core's cache, on a CPU).
        recipe: what augment.parameters() takes.
    """

    def __init__(self, images, batches, size, device='cpu', resident=True, compile=False, at_once=None, **recipe):
        self.device, self.resident = torch.device(device), resident
        self.images = images.to(self.device) if resident else images
        self.batches, self.size, self.recipe = batches, size, recipe
        self.at_once = at_once if compile or self.device.type != 'cpu' else 48
        self.random_views = torch.compile(random_views, dynamic=False) if compile else random_views
        self.stream = None if resident else torch.cuda.Stream(self.device)

    def epoch(self, epoch, start=0):
        batches = self.batches.epoch(epoch)
        sizes = [batch.shape[1] for batch in batches]
        order = torch.cat(batches, 1).to(self.device if self.resident else 'cpu')  # (W, steps * B), moved once
        parts = [self.batches.part(batch, 1) for batch in order.split(sizes, 1)]
        ahead = self.fetch(parts[start]) if start < len(parts) else None
        for step in range(start, len(parts)):
            images, index = self.arrived(ahead)
            generator = seeded(self.batches.seed, epoch, step, device=self.device)
            views = [self.view(images[min(v, len(images) - 1)], sizes[step], generator)
                     for v in range(self.batches.views)]
            if step + 1 < len(parts):  # while the device makes the views
                ahead = self.fetch(parts[step + 1])
            yield views, index

    def fetch(self, index):
        """Start bringing the images (W, b, 3, H, W') of index (W, b) to the device, and the index of the first."""
        if self.resident:
            return self.images.index_select(0, index.flatten()).unflatten(0, index.shape), index[0]
        # torch gives pinned memory to another tensor only when the copies from it have ended.
        pinned = torch.empty(index.numel(), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
        select = torch.index_select if isinstance(self.images, torch.Tensor) else type(self.images).index_select
        select(self.images, 0, index.flatten(), out=pinned)
        with torch.cuda.stream(self.stream):
            return [x.to(self.device, non_blocking=True) for x in (pinned.unflatten(0, index.shape),
                                                                   index[0].pin_memory())]

    def arrived(self, batch):
        """Let the current stream wait for a batch that fetch() started."""
        if not self.resident:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for x in batch:
                x.record_stream(current)
        return batch

    def view(self, images, whole, generator):
        """A random view of each image; the numbers are drawn for the whole batch, the same on any number of ranks."""
        u, n = [self.batches.part(x) for x in uniforms(whole, generator)], self.at_once or max(1, len(images))
        views = [self.random_views(images[i:i + n], [x[i:i + n] for x in u], self.size, **self.recipe)
                 for i in range(0, max(1, len(images)), n)]
        return torch.cat(views)


class RandomViews(Dataset):
    """Item (epoch, place in its shuffle, i_1 ... i_V): a random view (3, size, size) of each of V images, and i_1."""

    def __init__(self, images, size, seed, recipe):
        *pil, _, _ = reference_transform(size, **recipe).transforms  # Model normalises bytes
        self.images, self.seed, self.transform = images, seed, transforms.Compose([*pil, transforms.PILToTensor()])

    def __getitem__(self, key):
        epoch, place, *index = key
        images = [Image.fromarray(self.images[i].permute(1, 2, 0).numpy()) for i in index]  # (3, H, W) -> (H, W, 3)
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(seeded(self.seed, epoch, place).get_state())
            return *map(self.transform, images), index[0]


class Keys:
    """A batch sampler: the keys (epoch, place, V indices) of this rank's part of every batch, from `now` on."""

    def __init__(self, batches):
        self.batches, self.now = batches, (1, 0)  # epoch and step

    def __iter__(self):
        epoch, start = self.now
        for step, index in list(enumerate(self.batches.epoch(epoch)))[start:]:
            place = step * self.batches.batch_size + torch.arange(index.shape[1])[None]  # (1, B)
            keys = torch.cat([torch.full_like(place, epoch), place, index.expand(self.batches.views, -1)])
            yield self.batches.part(keys.T).tolist()  # (2 + V, B) -> (b, 2 + V)


def begin_worker(parent, worker):
    """A worker leaves the signals that stop a run, which reach all processes of a group, to the training loop.

    It ends if the run, of process id parent, was killed before torch began to watch for that.
    """
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    if os.getppid() != parent:
        os._exit(1)


class ReferenceViews:
    """Random views through PIL, image by image, in workers: the slow path that defines the fast one.

    They are a function of (seed, epoch, place in the shuffle) alone, whatever the number of workers and ranks.
    """

    def __init__(self, images, batches, size, device='cpu', workers=0, **recipe):
        self.images, self.device, self.keys = images, torch.device(device), Keys(batches)
        view = 3 * size**2  # bytes; each worker is two batches ahead
        ahead = 2 * workers * batches.batch_size // batches.world * batches.views * view
        if workers and Path('/dev/shm').is_dir() and ahead > shutil.disk_usage('/dev/shm').free:
            raise UserError(f'/dev/shm has no room for the {ahead / 1e6:.0f} MB of batches that {workers} workers hand '
                            'over: use --workers 0 or fewer, or make it larger, as docker run --shm-size does')
        # A forked worker shares the images; one that is started afresh would get a copy.
        start = 'fork' if workers and sys.platform == 'linux' else None
        self.loader = DataLoader(RandomViews(images, size, batches.seed, recipe), batch_sampler=self.keys,
                                 num_workers=workers, worker_init_fn=partial(begin_worker, os.getpid()),
                                 persistent_workers=workers > 0, multiprocessing_context=start,
                                 pin_memory=self.device.type == 'cuda')

    def epoch(self, epoch, start=0):
        self.keys.now = epoch, start
        try:
            for *views, index in self.loader:
                yield [x.to(self.device, non_blocking=True) for x in views], index.to(self.device, non_blocking=True)
        except (ConnectionError, EOFError):
            raise RuntimeError('DataLoader worker was killed as it handed over a batch') from None  # in torch's words
