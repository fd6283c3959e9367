"""The data sets, as uint8 arrays with labels: stl10, cifar10 and cifar100 by torchvision, folders, and drawn shapes."""

import contextlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision
from filelock import FileLock
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm

from runtime import CORES, LOCAL_WORLD, UserError


class DataError(UserError):
    """The data cannot be used, for a reason that its one line tells the user."""


@dataclass
class Data:
    """Images (N, 3, H, W) uint8, labels (N,) int64 with -1 where there is none, and the names of the classes."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list


def load_data(name, root='data', store_size=96, unlabeled=True):
    """Load one of DATASETS from root, downloading it where torchvision can.

    Args:
        store_size: side in pixels at which a `folder`'s images are kept.
        unlabeled: whether the training images include those without labels (stl10, folder).

    Raises:
        DataError: data missing, damaged or unusable; it says what, where, and what to do.
    """
    if name == 'shapes':
        return _shapes()
    if name == 'folder':
        return _folder(Path(root), store_size, unlabeled)
    if name == 'stl10':
        train = _torchvision('STL10', root, split='train+unlabeled' if unlabeled else 'train')
        test = _torchvision('STL10', root, split='test')
        images, labels = (train.data, test.data), (train.labels, test.labels)
    else:
        train, test = (_torchvision(name.upper(), root, train=flag) for flag in (True, False))
        images = [s.data.transpose(0, 3, 1, 2) for s in (train, test)]  # (N, H, W, 3) -> (N, 3, H, W)
        labels = (train.targets, test.targets)
    images = [torch.from_numpy(np.ascontiguousarray(x)) for x in images]
    labels = [torch.as_tensor(y, dtype=torch.int64) for y in labels]
    classes = list(getattr(train, 'classes', ()))  # torchvision reads STL10's from a file that has no checksum
    if len(classes) != labels[1].max() + 1:
        raise DataError(f'{Path(root, train.base_folder)}: {len(classes)} names of classes where the labels have '
                        f'{labels[1].max() + 1}: restore class_names.txt from the archive')
    return Data(images[0], labels[0], images[1], labels[1], classes)


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
                    raise DataError(f'{folder / file} is truncated or damaged (its MD5 is not {md5}): delete it, '
                                    f'and {name} is downloaded again')
            return cls(root, download=True, **split)
    except (OSError, RuntimeError) as error:
        raise DataError(f'{name} is not in {folder} and could not be downloaded ({error}). Unpack {cls.url} in '
                        f'{root}, point --root at it, or use --dataset_name shapes, which needs no files') from error
    finally:
        with contextlib.suppress(OSError):  # after a failure, leave nothing behind that was not there
            lock.unlink(missing_ok=True)
            if not existed:
                lock.parent.rmdir()


def _folder(root, store_size, unlabeled):
    """root/train/<class>/*, root/test/<class>/* (or root/val), and images anywhere below root/unlabeled."""
    test = root / 'test' if (root / 'test').is_dir() or not (root / 'val').is_dir() else root / 'val'
    for split in (root / 'train', test):
        if not split.is_dir():
            raise DataError(f'{split} is not a directory: a folder data set is {root}/train/<class>/*, {root}/test/'
                            f'<class>/* and, if wanted, {root}/unlabeled/**. --dataset_name shapes needs no files')
    classes = sorted(d.name for d in (root / 'train').iterdir() if d.is_dir())
    other = sorted(d.name for d in test.iterdir() if d.is_dir())
    if classes != other:
        raise DataError(f'classes differ: only in {root / "train"}: {sorted({*classes} - {*other}) or "none"}; '
                        f'only in {test}: {sorted({*other} - {*classes}) or "none"}')
    if len(classes) < 2:
        raise DataError(f'{root / "train"} holds {len(classes)} class directories; at least 2 are needed')
    splits, problems = [], []
    for split in (root / 'train', test):
        files = [(path, label) for label, c in enumerate(classes) for path in _image_files(split / c)]
        found = {label for _, label in files}
        problems += [f'{split / c}: no image in it' for label, c in enumerate(classes) if label not in found]
        splits.append(files)
    if unlabeled and (root / 'unlabeled').is_dir():
        splits[0] += [(path, -1) for path in _image_files(root / 'unlabeled')]
    needed, memory = sum(map(len, splits)) * 3 * store_size**2, _memory()
    if needed * LOCAL_WORLD > 0.8 * memory:
        raise DataError(f'{root}: {needed / 1e9:.1f} GB at --store_size {store_size}, and '
                        f'{memory / 1e9:.1f} GB of memory may be used here: lower --store_size')
    images = []
    with ThreadPoolExecutor(CORES) as pool, warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        for files in splits:
            out = torch.empty(len(files), 3, store_size, store_size, dtype=torch.uint8)
            jobs = pool.map(_decode_into, out, [path for path, _ in files])
            problems += filter(None, tqdm(jobs, f'Reading {root}', len(files), leave=False, disable=None))
            images.append(out)
    if problems:
        raise DataError('\n  '.join([f'{root}: {len(problems)} problem{"s" * (len(problems) > 1)}:', *problems]))
    labels = [torch.tensor([label for _, label in files]) for files in splits]
    return Data(images[0], labels[0], images[1], labels[1], classes)


def _memory():
    """Bytes of memory that this process may use: the machine's, or its cgroup's limit."""
    try:
        limit = int(Path('/sys/fs/cgroup/memory.max').read_text())
    except (OSError, ValueError):  # no cgroup, or no limit
        limit = 2**63
    return min(limit, os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))


def _image_files(folder):
    return sorted(p for p in folder.rglob('*') if p.suffix.lower() in IMG_EXTENSIONS and not p.is_dir())


def _decode_into(out, path):
    """Read an image as torchvision does (first frame, no alpha) into out (3, S, S); returns what is wrong with it."""
    try:
        with Image.open(path) as image:
            if image.mode in ('I', 'F'):
                raise ValueError('32 bits a pixel, of unknown range')
            if image.mode.startswith('I;16'):  # convert('RGB') would clip these to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert('RGB'), (out.shape[1],) * 2, Image.Resampling.BILINEAR)
        out.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))  # (H, W, 3) -> (3, H, W)
    except Exception as error:  # whatever a decoder makes of a damaged file
        return f'{path}: {error or type(error).__name__}'


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
    return Data(images[:train], labels[:train], images[train:], labels[train:], list(outlines))


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
