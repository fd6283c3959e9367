"""The data sets by name, and the published views by PIL in a DataLoader."""

import contextlib
import hashlib
import shutil
import signal
import sys
import tempfile
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Listener
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from filelock import FileLock
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets.utils import check_integrity

from hardneg import shapes
from hardneg.augment import BLUR_SIGMA, CROP_RATIO, JITTER, MEAN, STD, blur_kernel_size
from hardneg.batches import seeded
from hardneg.decoding import decoded
from hardneg.folder import TEST, TRAIN, find_folder
from hardneg.runtime import STOP_SIGNALS, UserError, ranks, say

# The data sets


@dataclass
class Data:
    """A data set in memory, or mapped from a file.

    train and test are images (N, 3, H, W) uint8, their labels (N,) int64, -1 where there is none;
    classes are the names of the classes. Without labels there are no test images and no classes.
    digest identifies the content of the whole data set, wherever it lies. damaged names the files
    that were left out, as they are damaged or too large.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    digest: str
    damaged: tuple = ()


def load(args, unlabeled=True, found=None):
    """The Data that a script's flags name."""
    return load_data(
        args.dataset_name,
        args.root,
        unlabeled=unlabeled,
        found=found,
        store_size=args.store_size,
        fit=args.fit,
        holdout=args.holdout,
        cache_dir=args.cache_dir,
        skip_damaged=args.skip_damaged,
    )


def load_data(
    name,
    root='data',
    *,
    unlabeled=True,
    found=None,
    store_size=0,
    fit='crop',
    holdout=0.0,
    cache_dir=None,
    skip_damaged=False,
):
    """Load a data set from root, downloading it where torchvision can.

    Args:
        name: one of flags.DATASETS. To add a data set, add a branch here and its name there.
        unlabeled: whether the training images include those without labels (stl10, folder).
        found: what find_folder() returned for root and holdout, if it was called before.
        holdout: part of a folder's images, class by class, that are tested with.
        store_size, fit, cache_dir, skip_damaged: of a folder, as folder_data() takes them.

    Raises:
        UserError: data are missing, damaged or unusable. It says which, where, and what to do.
    """
    root = Path(root)
    if name == 'shapes':
        return shapes_data()
    if name == 'stl10':
        return stl10_data(root, unlabeled)
    if name in ('cifar10', 'cifar100'):
        return cifar_data(name.upper(), root)
    if found is None:
        found = find_folder(root, unlabeled, holdout)
    return folder_data(
        found,
        unlabeled,
        store_size=store_size,
        fit=fit,
        cache_dir=cache_dir,
        skip_damaged=skip_damaged,
    )


def shapes_data(train=3000, test=1000):
    """The drawn data set, which needs no files."""
    images, labels, classes = shapes.draw(train + test)
    digest = digest_of(images, labels)
    return Data(images[:train], labels[:train], images[train:], labels[train:], classes, digest)


def stl10_data(root, unlabeled):
    """STL10. The training images come first, those without labels after them."""
    test = _torchvision('STL10', root, split='test')  # checks all files
    folder = root / test.base_folder
    files = ['train_X.bin']
    if unlabeled:
        files.append('unlabeled_X.bin')
    train = torch.cat([_stl10_images(folder / file) for file in files])
    train_labels = np.fromfile(folder / 'train_y.bin', np.uint8)
    labels = torch.full((len(train),), -1)
    labels[: len(train_labels)] = torch.from_numpy(train_labels).long() - 1
    classes = list(getattr(test, 'classes', ()))  # from a file that has no checksum
    if len(classes) != 10:
        raise UserError(
            f'{folder}: {len(classes)} names of classes where the labels have 10: restore '
            'class_names.txt from the archive'
        )
    test_images = torch.from_numpy(np.ascontiguousarray(test.data))
    test_labels = torch.as_tensor(test.labels, dtype=torch.int64)
    # The lists hold the checksums of the files.
    digest = digest_of(test.train_list, test.test_list, classes)
    return Data(train, labels, test_images, test_labels, classes, digest)


def _stl10_images(file):
    """The images in a file of STL10, mapped. Each channel lies in it column by column."""
    array = np.memmap(file, mode='r').reshape(-1, 3, 96, 96)
    return mapped(array).mT  # (N, 3, W, H) -> (N, 3, H, W)


def cifar_data(name, root):
    """CIFAR10 or CIFAR100."""
    train = _torchvision(name, root, train=True)
    test = _torchvision(name, root, train=False)
    images, labels = [], []
    for split in (train, test):
        array = split.data.transpose(0, 3, 1, 2)  # (N, H, W, 3) -> (N, 3, H, W)
        images.append(torch.from_numpy(np.ascontiguousarray(array)))
        labels.append(torch.tensor(split.targets))
    digest = digest_of(test.train_list, test.test_list, test.classes)
    return Data(images[0], labels[0], images[1], labels[1], test.classes, digest)


def _torchvision(name, root, **split):
    """A torchvision data set, downloaded if nothing of it is there. No file is ever replaced."""
    cls = getattr(torchvision.datasets, name)
    try:
        return cls(root, download=False, **split)
    except RuntimeError:  # missing or damaged: which is it?
        pass
    existed = root.exists()
    lock = root / '.download.lock'
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # one process downloads, the others find the files
            for file, md5 in cls.train_list + cls.test_list:
                path = root / cls.base_folder / file
                if path.exists() and not check_integrity(path, md5):
                    raise UserError(
                        f'{path} is truncated or damaged (its MD5 is not {md5}): delete it, and '
                        f'{name} is downloaded again'
                    )
            return cls(root, download=True, **split)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # leave nothing behind that was not there
            lock.unlink(missing_ok=True)
            if not existed:
                root.rmdir()
        raise UserError(
            f'{name} is not in {root / cls.base_folder} and could not be downloaded ({error}). '
            f'Unpack {cls.url} in {root}, point --root at it, or use --dataset_name shapes, which '
            'needs no files'
        ) from error


def folder_data(found, unlabeled, *, store_size=0, fit='crop', cache_dir=None, skip_damaged=False):
    """The images of a folder.Folder.

    Args:
        unlabeled: whether the training images include those without labels.
        store_size: side in pixels at which images are kept; 0: their own, if all are squares of one
            size of at most 256 pixels, else 96.
        fit: how images become squares, one of decoding.FITS.
        cache_dir: where the decoded images are kept; None: files.cache_directory().
        skip_damaged: leave out files that are damaged or too large, which are an error otherwise.
    """
    root, classes = found.root, found.classes
    content = decoded(root, found.files, store_size, fit, cache_dir)
    damaged = content.damaged
    if damaged and not skip_damaged:
        lines = [
            f'{root}: {len(damaged)} images damaged or too large. Repair or shrink them, or leave '
            'them out with --skip_damaged:'
        ]
        for name, why in damaged.items():
            lines.append(f'{root / name}: {why}')
        raise UserError('\n  '.join(lines))
    if damaged:
        say(
            f'{root}: {len(damaged)} images damaged or too large and left out, such as '
            f'{next(iter(damaged))}'
        )
    intact = content.digests != 0
    if not intact.any():
        raise UserError(f'{root}: every image is damaged or too large')
    parts, labels = found.parts[intact], found.labels[intact]
    for part, kind in ((TRAIN, 'training'), (TEST, 'test')):
        there = set(labels[parts == part].tolist())
        for label, name in enumerate(classes):
            if label not in there:
                raise UserError(f'{root}: every {kind} image of {name} is damaged or too large')
    images = mapped(content.images)
    first = int((parts != TEST).sum())  # of the test images, which come last
    n = first  # training images
    if not unlabeled:
        n = int((parts == TRAIN).sum())
    digest = digest_of(parts, labels, content.digests[intact], classes)
    train, test = images[:n], images[first:]
    return Data(train, labels[:n], test, labels[first:], classes, digest, tuple(damaged))


def digest_of(*parts):
    """A digest of arrays, tensors and values."""
    content = []
    for part in parts:
        if isinstance(part, (np.ndarray, torch.Tensor)):
            content.append(np.asarray(part).tobytes())
        else:
            content.append(repr(part).encode())
    return hashlib.sha256(b'/'.join(content)).hexdigest()


def mapped(array):
    """The array as a tensor, without torch's warning that a mapped file cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.from_numpy(array)


# The published views


class GaussianBlur(torch.nn.Module):
    """OpenCV's blur of a PIL image, with probability 0.5 and sigma uniform in BLUR_SIGMA."""

    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, image):
        if torch.rand(()) >= 0.5:
            return image
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
        kernel = self.kernel_size, self.kernel_size
        return Image.fromarray(cv2.GaussianBlur(np.array(image), kernel, sigma))


def reference_transform(
    size,
    blur=True,
    crop_min=0.08,
    jitter=1.0,
    grayscale=0.2,
    horizontal_flip=0.5,
    vertical_flip=0.0,
):
    """SimCLR's training view as HCL's utils.py makes it: PIL image -> (3, size, size) float32.

    The arguments are those of augment.parameters(). By default the view is the published one.
    """
    strengths = [jitter * strength for strength in JITTER]
    steps = [
        transforms.RandomResizedCrop(size, (crop_min, 1.0), CROP_RATIO),
        transforms.RandomHorizontalFlip(horizontal_flip),
    ]
    if vertical_flip:
        steps.append(transforms.RandomVerticalFlip(vertical_flip))
    steps += [
        transforms.RandomApply([transforms.ColorJitter(*strengths)], p=0.8),
        transforms.RandomGrayscale(grayscale),
    ]
    if blur:
        steps.append(GaussianBlur(blur_kernel_size(size)))
    steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)


class RandomViews(Dataset):
    """Item (epoch, place in the shuffle, i_1 ... i_V): a view of each image, and i_1.

    Views are (3, size, size) uint8.
    """

    def __init__(self, images, size, seed, recipe):
        self.images = images
        self.seed = seed
        steps = reference_transform(size, **recipe).transforms[:-2]  # Model normalises bytes
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __getitem__(self, key):
        epoch, place, *index = key
        with torch.random.fork_rng(devices=[]):
            torch.random.set_rng_state(seeded(self.seed, epoch, place).get_state())
            views = []
            for i in index:
                array = self.images[i].permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
                views.append(self.transform(Image.fromarray(array)))
        return *views, index[0]


class Keys:
    """A batch sampler: the keys of this rank's part of every batch, from a place in an epoch on."""

    def __init__(self, batches):
        self.batches = batches
        self.epoch, self.step = 1, 0

    def __iter__(self):
        batches = self.batches.epoch(self.epoch)
        for step in range(self.step, len(batches)):
            index = batches[step].expand(self.batches.views, -1)  # (W, B) -> (V, B)
            place = step * self.batches.batch_size + torch.arange(index.shape[1])[None]  # (1, B)
            keys = torch.cat([torch.full_like(place, self.epoch), place, index])  # (2 + V, B)
            yield self.batches.part(keys.T).tolist()


def _check_sockets():
    """UserError if workers cannot hand over batches, for which each opens a socket in TMPDIR."""
    try:
        Listener(family='AF_UNIX').close()
    except OSError as error:
        raise UserError(
            f'workers cannot hand over batches by a socket in {tempfile.gettempdir()} ({error}): '
            'set TMPDIR to another directory with a short name, or use --workers 0'
        ) from None


def _begin_worker(worker):
    """Leave the signals that stop a run, which reach all processes of a group, to the run."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


class ReferenceViews:
    """Random views by PIL, image by image, in workers: the slow path that defines the fast one.

    epoch(e) yields what batches.DeviceViews does. The views depend on (seed, epoch, place in the
    shuffle) alone, not on the number of workers and ranks.

    Args:
        images: (N, 3, H, W) uint8.
        batches: batches.Batches.
        size: side of a view in pixels.
        device: torch.device to which the views are moved.
        recipe: what augment.parameters() takes, as a dict.
        workers: number of processes; 0: this one.
    """

    def __init__(self, images, batches, size, device='cpu', recipe=None, workers=0):
        self.device = torch.device(device)
        self.keys = Keys(batches)
        rank_batch = batches.batch_size // batches.world * batches.views
        workers_here = ranks().local_world * workers  # which share the machine's /dev/shm
        ahead = 2 * workers_here * rank_batch * 3 * size**2  # bytes: each is two batches ahead
        if ahead and Path('/dev/shm').is_dir() and ahead > shutil.disk_usage('/dev/shm').free:
            raise UserError(
                f'/dev/shm has no room for the {ahead / 1e6:.0f} MB of batches that {workers_here} '
                'workers hand over: use --workers 0 or fewer, or make it larger, as docker run '
                '--shm-size does'
            )
        start = None
        if workers:
            _check_sockets()
        if workers and sys.platform == 'linux':
            start = 'fork'  # such a worker shares the images; another gets a copy
        self.loader = DataLoader(
            RandomViews(images, size, batches.seed, recipe or {}),
            batch_sampler=self.keys,
            num_workers=workers,
            worker_init_fn=_begin_worker,
            persistent_workers=workers > 0,
            multiprocessing_context=start,
            pin_memory=self.device.type == 'cuda',
        )

    def epoch(self, epoch, start=0):
        self.keys.epoch, self.keys.step = epoch, start
        try:
            for *views, index in self.loader:
                views = [x.to(self.device, non_blocking=True) for x in views]
                yield views, index.to(self.device, non_blocking=True)
        except (ConnectionError, EOFError):
            # A batch that a worker has made is fetched from it later, when it may have died.
            # runtime.run() knows torch's own error for a worker by these words.
            raise RuntimeError(
                'DataLoader worker was killed before it handed over a batch'
            ) from None
