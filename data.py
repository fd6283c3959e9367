"""The data sets, as uint8 arrays with labels: stl10, cifar10 and cifar100 by torchvision, folders, and drawn shapes."""

import contextlib
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from filelock import FileLock
from torch.utils.data import ConcatDataset
from torchvision.datasets.utils import check_integrity

from decoding import decoded
from folder import find_folder, in_any_form
from runtime import UserError, say


@dataclass
class Data:
    """Images (N, 3, H, W) uint8, labels (N,) int64 with -1 where there is none, and the names of the classes.

    Without labels there are no test images and no classes. digest identifies the content of the whole data set,
    wherever it lies; damaged names the files that were left out as such, names those of a folder's training images.
    """

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    digest: str
    damaged: tuple = ()
    names: tuple = ()


def digest_of(*parts):
    """A digest of arrays, tensors and values."""
    parts = [np.asarray(part).tobytes() if isinstance(part, (np.ndarray, torch.Tensor)) else repr(part).encode()
             for part in parts]
    return hashlib.sha256(b'/'.join(parts)).hexdigest()


def mapped(array):
    """A tensor of memory that may be read-only, as that of a mapped file: torch warns of what nobody does, to write."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.from_numpy(array)


class Joined(ConcatDataset):
    """Images (n, 3, H, W) of several files, read by index like one tensor, without being copied to one."""

    device = torch.device('cpu')

    def __init__(self, parts):
        super().__init__(parts)
        self.nbytes = sum(part.nbytes for part in parts)
        self.shape = torch.Size([sum(map(len, parts)), *parts[0].shape[1:]])

    def index_select(self, dim, index, out=None):
        out, first = torch.empty(len(index), *self.shape[1:], dtype=torch.uint8) if out is None else out, 0
        for part in self.datasets:
            here = ((index >= first) & (index < first + len(part))).nonzero()[:, 0]
            out[here] = part.index_select(dim, index[here] - first)
            first += len(part)
        return out

    def to(self, device):
        return self if torch.device(device).type == 'cpu' else torch.cat([part.to(device) for part in self.datasets])


def load_data(name, root='data', store_size=0, unlabeled=True, cache_dir=None, skip_damaged=False, fit='crop',
              holdout=0.0, found=None):
    """Load one of flags.DATASETS from root, downloading it where torchvision can. Images that lie in files are mapped.

    Args:
        store_size: side in pixels at which a `folder`'s images are kept; 0: their own, if all are squares of one size
            of at most 256 pixels, else 96.
        unlabeled: whether the training images include those without labels (stl10, folder).
        cache_dir: where a folder's decoded images are kept; None: in it, or else in the user's cache directory.
        skip_damaged: leave out the damaged files of a folder, which are an error otherwise.
        fit: how a folder's images become squares, one of decoding.FITS.
        holdout: the part of a folder's images, class by class, that are tested with, if it has no test images.
        found: what find_folder() returned for this root and holdout, if it was called before.

    Raises:
        UserError: data missing, damaged or unusable; it says what, where, and what to do.
    """
    if name == 'shapes':
        return _shapes()
    if name == 'folder':
        found = found or find_folder(root, unlabeled, holdout)
        return _folder(found, store_size, unlabeled, cache_dir, skip_damaged, fit)
    root = in_any_form(Path(root))
    if name == 'stl10':
        test = _torchvision('STL10', root, split='test')  # checks all files
        parts = ['train', 'unlabeled', 'test'] if unlabeled else ['train', 'test']
        # Each channel lies in the file column by column: (N, 3, W, H) -> (N, 3, H, W)
        images = [mapped(np.memmap(root / test.base_folder / f'{part}_X.bin', mode='r').reshape(-1, 3, 96, 96)).mT
                  for part in parts]
        train_labels = torch.full((sum(map(len, images[:-1])),), -1)
        train_labels[:len(images[0])] = torch.from_numpy(
            np.fromfile(root / test.base_folder / 'train_y.bin', np.uint8)).long() - 1
        images, labels = (Joined(images[:-1]) if unlabeled else images[0], images[-1]), (train_labels, test.labels)
    else:
        train, test = (_torchvision(name.upper(), root, train=flag) for flag in (True, False))
        images = [torch.from_numpy(np.ascontiguousarray(s.data.transpose(0, 3, 1, 2)))  # (N, H, W, 3) -> (N, 3, H, W)
                  for s in (train, test)]
        labels = train.targets, test.targets
    labels = [torch.as_tensor(y, dtype=torch.int64) for y in labels]
    classes = list(getattr(test, 'classes', ()))  # torchvision reads STL10's from a file that has no checksum
    if len(classes) != labels[1].max() + 1:
        raise UserError(f'{Path(root, test.base_folder)}: {len(classes)} names of classes where the labels have '
                        f'{labels[1].max() + 1}: restore class_names.txt from the archive')
    digest = digest_of(test.train_list, test.test_list, classes)  # the lists hold the MD5s that were checked
    return Data(images[0], labels[0], images[1], labels[1], classes, digest)


def _torchvision(name, root, **split):
    """A torchvision data set, downloaded when nothing of it is there; files that are there are never replaced."""
    cls = getattr(torchvision.datasets, name)
    folder = Path(root, cls.base_folder)
    try:
        return cls(root, download=False, **split)
    except RuntimeError:  # missing or damaged: which is it?
        pass
    existed = Path(root).exists()
    lock = Path(root, '.download.lock')
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # of several processes one downloads, the others find the files
            for file, md5 in cls.train_list + cls.test_list:
                if (folder / file).exists() and not check_integrity(folder / file, md5):
                    raise UserError(f'{folder / file} is truncated or damaged (its MD5 is not {md5}): delete it, '
                                    f'and {name} is downloaded again')
            return cls(root, download=True, **split)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # leave nothing behind that was not there
            lock.unlink(missing_ok=True)
            if not existed:
                lock.parent.rmdir()
        raise UserError(f'{name} is not in {folder} and could not be downloaded ({error}). Unpack {cls.url} in '
                        f'{root}, point --root at it, or use --dataset_name shapes, which needs no files') from error


def _folder(found, store_size, unlabeled, cache_dir, skip_damaged, fit):
    """The Data of what find_folder() found."""
    root, classes = found.root, found.classes
    content = decoded(root, found.files, store_size, fit, cache_dir)
    damaged, intact = content.damaged, content.digests != 0
    if damaged and not skip_damaged:
        raise UserError('\n  '.join([f'{root}: {len(damaged)} damaged images. Repair them, or leave them out by '
                                     '--skip_damaged:', *(f'{root / name}: {why}' for name, why in damaged.items())]))
    if damaged:
        say(f'{root}: {len(damaged)} images damaged and left out, such as {next(iter(damaged))}')
    if not intact.any():
        raise UserError(f'{root}: every image is damaged')
    parts, labels, images = found.parts[intact], found.labels[intact], mapped(content.images)
    for part, kind in ((0, 'training'), (2, 'test')):
        empty = {*range(len(classes))} - {*labels[parts == part].tolist()}
        if empty:
            raise UserError(f'{root}: every {kind} image of {classes[min(empty)]} is damaged')
    n, first = int((parts <= unlabeled).sum()), int((parts < 2).sum())
    return Data(images[:n], labels[:n], images[first:], labels[first:], classes,
                digest_of(parts, labels, content.digests[intact], classes), tuple(damaged),
                tuple(name for (name, *_), good in zip(found.files, intact) if good)[:n])


def _outlines():
    """The ten shapes of the embedded data set as rings of points in about [-1, 1], filled by the even-odd rule."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    arm = np.array([[-1, 1], [-1, 3], [1, 3], [1, 1]]) / 3
    quarter = np.array([[0, 1], [-1, 0]])
    heart = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return {
        'disk': [circle],
        'ring': [circle, 0.55 * circle],
        'square': [0.85 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])],
        'triangle': [1.15 * circle[[5, 25, 45]]],
        'star': [circle[3::6] * np.array([1.15, 0.42] * 5)[:, None]],
        'plus': [np.concatenate([arm @ np.linalg.matrix_power(quarter, turns) for turns in (0, 3, 2, 1)])],
        'crescent': [np.concatenate([circle[8:53], circle[52:7:-1] * [0.62, 0.8] + [0.5, 0]]) - [0.2, 0]],
        'arrow': [np.array([[-1, -1 / 3], [0, -1 / 3], [0, -1], [1, 0], [0, 1], [0, 1 / 3], [-1, 1 / 3]])],
        'stripes': [np.array([[-1, y], [1, y], [1, y + 0.4], [-1, y + 0.4]]) for y in (-1, -0.2, 0.6)],
        'heart': [np.stack([np.sin(angle) ** 3, -heart / 16], 1)],
    }


def _shapes(train=3000, test=1000, size=32, seed=0):
    """Ten classes of drawn images. The class is the outline; what tells images apart is only what views vary.

    Place, scale, brightness, contrast and saturation differ widely from image to image, so that an untrained encoder's
    neighbours are of any class. All have one hue: it survives the views, and an encoder would learn it instead.
    """
    rng, outlines = np.random.default_rng(seed), _outlines()
    labels = rng.integers(len(outlines), size=train + test)
    images = np.stack([_draw(list(outlines.values())[label], size, rng) for label in labels])
    images, labels = torch.from_numpy(images), torch.from_numpy(labels)
    return Data(images[:train], labels[:train], images[train:], labels[train:], list(outlines),
                digest_of(images, labels))


def _draw(rings, size, rng):
    """(3, size, size) uint8: the rings filled with an orange, on a plain ground that is darker or brighter."""
    colour = 255 * rng.uniform(0.25, 1) * (1 - rng.uniform(0.2, 1) * np.array([0, 0.55, 1]))  # value, saturation
    ground = rng.uniform(0, 255)
    while abs(ground - colour.mean()) < 40:
        ground = rng.uniform(0, 255)
    ground = ground * np.array([1, 0.95, 0.9])
    radius = size * rng.uniform(0.15, 0.45)
    centre = rng.uniform(radius, size - radius, 2)
    points = [np.rint(64 * (radius * ring + centre)).astype(np.int32) for ring in rings]  # 4 * 16: fillPoly's fraction
    mask = cv2.fillPoly(np.zeros((4 * size, 4 * size), np.uint8), points, 255, shift=4)
    mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)[..., None] / 255  # (size, size, 1)
    return (mask * colour + (1 - mask) * ground).clip(0, 255).astype(np.uint8).transpose(2, 0, 1)
