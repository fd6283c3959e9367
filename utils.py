"""The reference views, as the published utils.py makes them: image by image, through PIL and OpenCV, in workers."""

import multiprocessing
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from augment import BLUR_SIGMA, CROP_RATIO, CROP_SCALE, JITTER, MEAN, STD, blur_kernel_size, epoch_batches, seeded
from runtime import STOP_SIGNALS, UserError


class GaussianBlur(torch.nn.Module):
    """OpenCV's blur of a PIL image, with probability 0.5 and sigma uniform in BLUR_SIGMA (pixels)."""

    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, image):
        if torch.rand(()) >= 0.5:
            return image
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
        return Image.fromarray(cv2.GaussianBlur(np.array(image), (self.kernel_size,) * 2, sigma))


def reference_transform(size, blur=True):
    """SimCLR's training view as published, PIL image -> (3, size, size) float32, normalised."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, CROP_SCALE, CROP_RATIO),
        transforms.RandomHorizontalFlip(0.5),
        transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=0.8),
        transforms.RandomGrayscale(0.2),
        *([GaussianBlur(blur_kernel_size(size))] if blur else []),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])


class RandomViews(Dataset):
    """Item (epoch, place in its shuffle, i_1 ... i_V): a random view (3, size, size) of each of V images, and i_1."""

    def __init__(self, images, size, seed, blur):
        self.images, self.transform, self.seed = images, reference_transform(size, blur), seed

    def __getitem__(self, key):
        epoch, place, *index = key
        images = [Image.fromarray(self.images[i].permute(1, 2, 0).numpy()) for i in index]  # (3, H, W) -> (H, W, 3)
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(seeded(self.seed, epoch, place).get_state())
            return *map(self.transform, images), index[0]


def leave_signals(worker):
    """A worker leaves the signals that stop a run, which reach all processes of a group, to the training loop."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class EpochKeys:
    """A batch sampler: keys (epoch, place, V indices) of this rank's part of every batch of the epoch that is set."""

    def __init__(self, n, batch_size, seed, rank, world, labels, views):
        self.n, self.batch_size, self.seed, self.rank, self.world = n, batch_size, seed, rank, world
        self.labels, self.views = labels, views
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __iter__(self):
        batches = epoch_batches(self.n, self.batch_size, self.seed, self.epoch, True, self.labels, self.views)
        for step in range(self.start, len(batches)):
            place = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)[None]  # (1, B)
            keys = torch.cat([torch.full_like(place, self.epoch), place, batches[step].expand(self.views, -1)])
            yield keys.T.tensor_split(self.world)[self.rank].tolist()  # (2 + V, B) -> (b, 2 + V)

    def __len__(self):
        return self.n // self.batch_size - self.start


class ReferenceViews:
    """Random views of every image, batch after batch, through PIL: the slow path that defines the fast one.

    epoch(e) yields ([x_1 ... x_V], index): views (b, 3, size, size) and indices (b,), on the device, for this
    rank's part of each whole batch. Views are a function of (seed, epoch, place in the shuffle) alone, whatever
    the number of workers and ranks.
    """

    def __init__(self, images, batch_size, size, views=2, seed=0, device='cpu', rank=0, world=1, workers=0, blur=True,
                 labels=None):
        self.images, self.device = images, torch.device(device)
        ahead = 2 * workers * batch_size // world * views * 3 * size**2 * 4  # bytes: two batches of each worker
        if workers and Path('/dev/shm').is_dir() and ahead > shutil.disk_usage('/dev/shm').free:
            raise UserError(f'/dev/shm has no room for the {ahead / 1e6:.0f} MB of batches that {workers} workers hand '
                            'over: use --workers 0 or fewer, or make it larger, as docker run --shm-size does')
        self.keys = EpochKeys(len(images), batch_size, seed, rank, world, labels, views)
        self.loader = DataLoader(RandomViews(images, size, seed, blur), batch_sampler=self.keys, num_workers=workers,
                                 persistent_workers=workers > 0, worker_init_fn=leave_signals,
                                 pin_memory=self.device.type == 'cuda')

    def epoch(self, epoch, start=0):
        self.keys.set_epoch(epoch, start)
        try:
            for *views, index in self.loader:
                views = [x.to(self.device, non_blocking=True) for x in views]
                yield ([x.contiguous(memory_format=torch.channels_last) for x in views],
                       index.to(self.device, non_blocking=True))
        except (OSError, RuntimeError) as error:
            alive = multiprocessing.active_children()
            for worker in alive:  # Python would end them by SIGTERM, which they ignore, and wait for ever
                worker.kill()
            if len(alive) == self.loader.num_workers:
                raise
            raise UserError('a worker of --augment pil was killed, perhaps as memory ran out: use fewer --workers. '
                            'The same command continues from the last saved state') from error
