"""Image files below a directory, found as people keep them: which there are, with which labels, how large."""

import contextlib
import hashlib
import os
import random
import stat
import statistics
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from hardneg.runtime import UserError, ranks, say

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()  # of those that Pillow reads
            if kind in set(Image.OPEN) - {'BUFR', 'GRIB', 'HDF5', 'MPEG', 'WMF'}}  # and not just recognises
SYSTEM = ('@eadir', '#recycle', '__macosx', 'thumbs.db', 'desktop.ini', '$recycle.bin', 'lost+found')
ALIKE = ('train', 'training', 'test', 'testing', 'val', 'valid', 'validation', 'unlabelled')  # but for capitals
CACHE = '.decoded'  # where the images of a folder are kept once they are decoded, if it can be written


def hidden(name):
    return name[0] == '.' or name.lower() in SYSTEM


class Listing:
    """The image files below root: what was left out, by its reason, and which directories could not be read."""

    def __init__(self, root):
        self.root, self.left, self.problems = root, {}, []

    def images(self, top, bar):
        """(path below root, bytes, times of change) of the images below the directory top, sorted. Links are followed.

        No directory is read twice, nor one between root and top, so that loops of links end.
        """
        found, root = [], self.root
        seen = {os.stat(path)[1:3] for path in (top, *top.parents) if path.is_relative_to(root)}
        for place, directories, names in os.walk(top, onerror=lambda error: self.problems.append(str(error)),
                                                 followlinks=True):
            kept = []
            for name in sorted(directories + names):
                path, why = f'{place}/{name}', None
                try:
                    about = os.stat(path)
                except OSError:  # of a broken link decoding tells
                    about = os.lstat(path)
                if hidden(name):
                    why = 'hidden or a system\'s'
                elif stat.S_ISDIR(about.st_mode):
                    why = 'read before by another link' if about[1:3] in seen else kept.append(name)
                    seen.add(about[1:3])  # inode and device
                elif os.path.splitext(name)[1].lower() not in SUFFIXES:
                    why = 'not named as an image'
                elif not (stat.S_ISREG(about.st_mode) or stat.S_ISLNK(about.st_mode)):
                    why = 'FIFO, socket or device'
                else:
                    found.append((path[len(str(root)) + 1:], about.st_size, about.st_mtime_ns, about.st_ctime_ns))
                if why and name != CACHE:
                    self.left.setdefault(why, []).append(path)
            directories[:] = kept
            bar.update(len(names))
        return sorted(found)


@dataclass
class Folder:
    """The files of a folder data set, as Listing gives them; of each, its part (0: labelled training images, 1: those
    without label, 2: test images) and label; the names of the classes."""

    root: Path
    files: list
    parts: torch.Tensor
    labels: torch.Tensor
    classes: list


def find_folder(root, unlabeled=True, holdout=0.0):
    """The Folder of root/train/<class>/**, root/test/<class>/** (or root/val), and images anywhere in root/unlabeled.

    Without train and test, or with less than two classes in train, all images below root, or train, have no label. With
    holdout, root/<class>/** (or root/train/<class>/**) are both training and test images.

    Raises:
        UserError: naming all that is missing or cannot be read.
    """
    root = in_any_form(Path(root)).absolute()
    listing = Listing(root)
    classes, groups = _groups(listing, unlabeled, holdout)
    files, parts, labels = [], [], []
    with tqdm(desc=f'Listing {root}', unit=' files', delay=3, leave=False,
              disable=None if ranks().rank == 0 else True) as bar:
        for part, label, directories in groups:
            found = [file for top in directories if top.is_dir() for file in listing.images(top, bar)]
            if part != 1 and len(found) < 1 + bool(holdout):
                listing.problems.append(f'{directories[0]}: {len(found) or "no"} image in it')
            files += found
            parts += held_out(found, holdout) if holdout and part == 0 else [part] * len(found)
            labels += [label] * len(found)
    if listing.left:
        say(f'{root}: left out ' + '; '.join(f'{len(paths)} {why}, such as {paths[0]}'
                                             for why, paths in listing.left.items()))
    if listing.problems:
        raise UserError('\n  '.join([f'{root}: {len(listing.problems)} problems:', *listing.problems]))
    if not files:
        raise UserError(f'{root}: no image in it or below it (looked for .jpg, .png and others): '
                        'give the directory of the images by --root')
    parts, labels = torch.tensor(parts), torch.tensor(labels)
    order = parts.argsort(stable=True)
    return Folder(root, [files[i] for i in order.tolist()], parts[order], labels[order], classes)


def held_out(files, holdout):
    """The part of each of a class's files: 2 (test) for the lowest hashes of names, else 0, one at least of each."""
    hashes = [int(hashlib.sha256(os.fsencode(nfc(name))).hexdigest()[:16], 16) / 2**64 for name, *_ in files]
    return [2 if x == min(hashes) or x < min(holdout, max(hashes)) else 0 for x in hashes]


def _groups(listing, unlabeled, holdout):
    """The names of the classes, and of every group of files its part, its label and its directories."""
    root = listing.root
    train, test = root / 'train', root / ('val' if (root / 'val').is_dir() and not (root / 'test').is_dir() else 'test')
    missing = [path for path in (root, *[train] * (root / 'test').is_dir()) if not path.is_dir()]
    if missing:
        raise UserError(f'{missing[0]} is not a directory: a folder data set is {root}/train/<class>/*, {root}/test/'
                        f'<class>/* and, if wanted, {root}/unlabeled/**, or images without labels anywhere below '
                        f'{root}. --dataset_name shapes needs no files')
    if holdout and test.is_dir():
        raise UserError(f'{test} has test images: --holdout is for a folder without')
    top = train if train.is_dir() else root
    splits = ({}, {})  # class -> directories, whose names may differ in Unicode form
    for split, names in zip((top, test), splits):
        for entry in sorted(split.glob('*')):
            if entry.is_dir() and not hidden(entry.name) and entry != root / 'unlabeled':
                names.setdefault(nfc(entry.name), []).append(entry)
            elif entry != root / 'unlabeled' and (top == train or holdout):
                listing.left.setdefault('outside the classes', []).append(entry)
    classes = sorted(splits[0])
    if top == train:
        others = [str(path) for path in sorted(root.glob('*')) if path.is_dir() and not hidden(path.name)
                  and path not in (train, test, root / 'unlabeled')]
        if others:
            say(f'{root}: not read beside {train.name}: {", ".join(others)} (known: train, test or val, unlabeled)')
    if holdout and len(classes) < 2:
        raise UserError(f'{top}: --holdout needs two directories of images or more, one for each class')
    if len(classes) < 2 or top == root and not holdout:
        if not unlabeled:
            raise UserError(f'{root} has no labels: name a labelled data set by --dataset_name and --root, or, where '
                            'directories are classes, give --holdout 0.1')
        if len(classes) > 1:
            say(f'{root}: its directories ({classes[0]}, {classes[1]}, …) are not taken as classes. --holdout 0.1 '
                'takes them, and tests with a tenth of their images')
        meant = [path.name for path in sorted(root.glob('*')) if path.is_dir() and path.name.lower() in ALIKE]
        if meant:
            say(f'{root}: {", ".join(meant)} read as any other directory; known are train, test, val and unlabeled')
        listing.left.clear()
        return [], [(1, -1, [train, root / 'unlabeled'] if top == train else [root])]
    if not holdout and not test.is_dir():
        raise UserError(f'{train} has classes, and {test} is not a directory. Give --holdout 0.1 to test with a tenth '
                        f'of the images, or, to train without labels, --root {train}')
    if not holdout and classes != sorted(splits[1]):
        raise UserError(f'classes differ: only in {train}: {sorted({*classes} - {*splits[1]}) or "none"}; '
                        f'only in {test}: {sorted({*splits[1]} - {*classes}) or "none"}')
    groups = [(part, label, names[name]) for part, names in ((0, splits[0]), (2, splits[1]))
              for label, name in enumerate(classes) if name in names]
    return classes, sorted([*groups, (1, -1, [root / 'unlabeled'])])


def in_any_form(path):
    """The path, or, where nothing is there, the one whose names differ from it in Unicode form alone (NFC, NFD)."""
    if path.exists() or path == path.parent:
        return path
    parent = in_any_form(path.parent)
    return next((p for p in parent.glob('*') if nfc(p.name) == nfc(path.name)), parent / path.name)


def nfc(name):
    return unicodedata.normalize('NFC', name)


def short_side(root, files, n=1000):
    """The median of the shorter sides, in pixels, of up to n of the files; None if no header can be read."""
    sides = []
    for name, *_ in random.Random(0).sample(files, min(n, len(files))):
        with contextlib.suppress(Exception), Image.open(root / name) as image:  # decoding tells what is wrong
            sides.append(min(image.size))
    return int(statistics.median(sides)) if sides else None


def own_size(root, files):
    """The side of the images where all are squares of one size of at most 256 pixels, else 96, by their headers."""
    sizes = set()
    for name, *_ in files:
        with contextlib.suppress(Exception), Image.open(root / name) as image:  # decoding tells what is wrong
            sizes.add(image.size)
        if len(sizes) > 1:
            return 96
    width, height = sizes.pop() if sizes else (96, 96)
    return width if width == height <= 256 else 96
