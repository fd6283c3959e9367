"""The image files of a folder data set: which there are, with which labels, and of what size."""

import contextlib
import hashlib
import os
import random
import shlex
import stat
import statistics
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from hardneg.files import is_run
from hardneg.runtime import UserError, no_bar, say

TRAIN, UNLABELED, TEST = 0, 1, 2  # parts of a data set

# Names in lower case: of files and directories that systems leave, and of splits
SYSTEM = (
    '@eadir',
    '#recycle',
    '__macosx',
    'thumbs.db',
    'desktop.ini',
    '$recycle.bin',
    'lost+found',
)
SPLITS = ('train', 'training', 'test', 'testing', 'val', 'valid', 'validation', 'unlabelled')

# Formats that Pillow recognises, but does not decode by itself. To decode EPS it starts
# Ghostscript, which runs the file as a program.
NOT_DECODED = 'BUFR', 'EPS', 'GRIB', 'HDF5', 'MPEG', 'WMF'
_by_suffix = Image.registered_extensions()  # which loads all of Pillow's formats
FORMATS = [name for name in Image.ID if name not in NOT_DECODED]
# An MPO, two JPEGs in one file, has a suffix of its own and is opened as a JPEG.
SUFFIXES = {suffix for suffix, name in _by_suffix.items() if name in (*FORMATS, 'MPO')}

# Pillow takes a PNG for damaged if its colour profile, or one of its texts, has more than 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20

# Why paths are left out
HIDDEN = "hidden or a system's"
NAME = 'not named as an image'
HEIC = 'in HEIC, which needs converting first'
SPECIAL = 'no regular file'
RUN = 'with a run in it'


@dataclass
class Folder:
    """A folder data set.

    files are as Listing.images() returns them. parts (N,) holds TRAIN, UNLABELED or TEST for each
    file, and labels (N,) its class, or -1. classes are the names of the classes.
    """

    root: Path
    files: list
    parts: torch.Tensor
    labels: torch.Tensor
    classes: list


@dataclass
class Group:
    """The images below some directories, all of one part and with one label."""

    part: int
    label: int
    directories: list


def find_folder(root, unlabeled=True, holdout=0.0):
    """The Folder at root, in one of three layouts.

    - root/train/<class>/**, root/test/<class>/** (or root/val) and, if there, root/unlabeled/**.
    - With holdout: root/train/<class>/** or root/<class>/**, and root/unlabeled/**. This part of
      the images of each class is the test images.
    - Images anywhere: without root/train, or with fewer than two classes in it, all images below
      root, or below root/train and root/unlabeled, have no label.

    Args:
        unlabeled: whether a folder without labels will do.
        holdout: part of the images that are tested with, in [0, 1).

    Raises:
        UserError: directories or images are missing, or cannot be read. It names all of them.
    """
    root = Path(os.path.abspath(root))  # one name from any directory
    listing = Listing(root)
    classes, groups = _layout(listing, unlabeled, holdout)
    files, parts, labels = [], [], []
    with tqdm(desc=f'Listing {root}', unit=' files', delay=3, leave=False, disable=no_bar()) as bar:
        for group in groups:
            found = _images_of(group, listing, bar)
            _check_enough(group, found, listing, holdout)
            files += found
            labels += [group.label] * len(found)
            if holdout and group.part == TRAIN and found:
                parts += held_out(found, holdout)
            else:
                parts += [group.part] * len(found)
    listing.report()
    if not files:
        raise UserError(
            f'{root}: no image in it or below it (looked for .jpg, .png and others): give the '
            'directory of the images with --root'
        )
    order = torch.tensor(parts).argsort(stable=True)
    return Folder(
        root,
        [files[i] for i in order.tolist()],
        torch.tensor(parts)[order],
        torch.tensor(labels)[order],
        classes,
    )


def _images_of(group, listing, bar):
    images = []
    for top in group.directories:
        if top.is_dir():  # root/unlabeled may be missing
            images += listing.images(top, bar)
    return images


def _check_enough(group, images, listing, holdout):
    """Note as a problem that a class has too few images: none, or a single one with holdout."""
    needed, why = 1, ''
    if holdout:
        needed, why = 2, '; --holdout needs two, to train and to test'
    if group.part != UNLABELED and len(images) < needed:
        listing.problems.append(f'{group.directories[0]}: {len(images) or "no"} image in it{why}')


def held_out(files, holdout):
    """The part of each file of a class, TRAIN or TEST: TEST for the lowest hashes of their names.

    Both have one file at least. Otherwise the part depends on the name alone: a file keeps it when
    others come and go, and on another machine.
    """
    hashes = []
    for name, *_ in files:
        digest = hashlib.sha256(os.fsencode(nfc(name))).hexdigest()
        hashes.append(int(digest[:16], 16) / 2**64)
    lowest, highest = min(hashes), max(hashes)
    parts = []
    for x in hashes:
        if x == lowest or x < min(holdout, highest):
            parts.append(TEST)
        else:
            parts.append(TRAIN)
    return parts


# The layout of a folder


def _layout(listing, unlabeled, holdout):
    """The names of the classes, and the Groups of files."""
    root = listing.root
    train = root / 'train'
    test = _test_directory(root)
    _check_there(root, train)
    if holdout and test.is_dir():
        raise UserError(f'{test} has test images: --holdout is for a folder without')
    top = root
    if train.is_dir():
        top = train
        _tell_of_others(root, test)
    classes = _class_directories(root, top)
    if holdout and len(classes) < 2:
        raise UserError(
            f'{top}: --holdout needs two directories of images or more, one for each class'
        )
    takes_classes = top == train or holdout > 0
    if len(classes) < 2 or not takes_classes:
        if not unlabeled:
            raise UserError(
                f'{root} has no labels: name a labelled data set with --dataset_name and --root, '
                'or, where directories are classes, give --holdout 0.1'
            )
        return [], [_without_labels(root, top, test, classes)]
    listing.leave_out_beside_classes(top, classes)
    names = sorted(classes)
    groups = [Group(TRAIN, label, classes[name]) for label, name in enumerate(names)]
    groups.append(Group(UNLABELED, -1, [root / 'unlabeled']))
    if not holdout:
        tests = _class_directories(root, test)
        _check_test(train, test, names, sorted(tests))
        listing.leave_out_beside_classes(test, tests)
        groups += [Group(TEST, label, tests[name]) for label, name in enumerate(names)]
    return names, groups


def _test_directory(root):
    if (root / 'val').is_dir() and not (root / 'test').is_dir():
        return root / 'val'
    return root / 'test'


def _check_there(root, train):
    missing = None
    if not root.is_dir():
        missing = root
    elif (root / 'test').is_dir() and not train.is_dir():
        missing = train
    if missing:
        raise UserError(
            f'{missing} is not a directory: a folder data set is {root}/train/<class>/*, '
            f'{root}/test/<class>/* and, if wanted, {root}/unlabeled/**, or images without labels '
            f'anywhere below {root}. --dataset_name shapes needs no files'
        )


def _check_test(train, test, classes, test_classes):
    if not test.is_dir():
        raise UserError(
            f'{train} has classes, and {test} is not a directory. Give --holdout 0.1 to test with '
            'a tenth of the images, or, to train without labels, --root '
            f'{shlex.quote(str(train))}'
        )
    if classes != test_classes:
        only_train = sorted(set(classes) - set(test_classes))
        only_test = sorted(set(test_classes) - set(classes))
        outside = ''
        images = _images_in(test)
        if images:
            outside = f'; outside the classes: {_counted(images)}'
        raise UserError(
            f'classes differ: only in {train}: {only_train or "none"}; '
            f'only in {test}: {only_test or "none"}{outside}'
        )


def _class_directories(root, top):
    """The directories of each class in top, by its name. Their names may differ in Unicode form."""
    directories = {}
    for path in _directories(top):
        if path != root / 'unlabeled' and not _holds_runs_alone(path):
            directories.setdefault(nfc(path.name), []).append(path)
    return directories


def _holds_runs_alone(directory):
    """Whether runs lie in the directory or below it, and no image beside them."""
    if is_run(directory):
        return True
    listing = Listing(directory)
    for _, names in listing.directories_of_images(directory):
        if any(_is_image(name) for name in names):
            return False
    return RUN in listing.left


def _directories(top):
    return [path for path in sorted(top.glob('*')) if path.is_dir() and not hidden(path.name)]


def _without_labels(root, top, test, classes):
    """The Group of a folder without labels. Tells of directories that may be meant otherwise."""
    if top != root:
        if test.is_dir():
            say(f'{test} is not read, as {top} has no classes')
        return Group(UNLABELED, -1, [top, root / 'unlabeled'])
    if len(classes) > 1:
        first, second, *_ = sorted(classes)
        say(
            f'{root}: its directories ({first}, {second}, …) are not taken as classes. '
            '--holdout 0.1 takes them, and tests with a tenth of their images'
        )
    meant = [path.name for path in _directories(root) if path.name.lower() in SPLITS]
    if meant:
        say(
            f'{root}: {", ".join(meant)} read as any other directory; known are train, test, val '
            'and unlabeled'
        )
    return Group(UNLABELED, -1, [root])


def _tell_of_others(root, test):
    """Warn about directories and images beside root/train that are not read."""
    known = root / 'train', test, root / 'unlabeled'
    others = [str(path) for path in _directories(root) if path not in known]
    images = _images_in(root)
    if images:
        others.append(_counted(images))
    if others:
        say(
            f'{root}: not read beside train: {", ".join(others)} (known: train, test or val, '
            'unlabeled)'
        )


def _images_in(directory):
    """The paths of the image files in a directory, without those in its directories."""
    paths = sorted(directory.glob('*'))
    return [path for path in paths if path.is_file() and _is_image(path.name)]


def _counted(images):
    return f'{len(images)} images, such as {images[0]}'


# Files


class Listing:
    """Lists the image files, or the directories, below the directory root.

    left maps each reason to leave a path out to the paths. problems says which directories could
    not be read, and why.
    """

    def __init__(self, root):
        self.root = root
        self.left = {}
        self.problems = []

    def images(self, top, bar):
        """The images below the directory top, sorted: (path below root, bytes, mtime, ctime) each.

        The times are in ns. Programs that copy files keep mtime; none can keep ctime.

        Directories below top that hold a run, and all below these, are left out: pictures that are
        drawn there are no images of the data set.
        """
        prefix = os.path.join(self.root, '')
        found = []
        for place, names in self.directories_of_images(top):
            for name in names:
                path = os.path.join(place, name)
                if name.endswith('.lock'):  # of embed.py, beside what it writes
                    continue
                if hidden(name):
                    self.leave_out(path, HIDDEN)
                elif name.lower().endswith(('.heic', '.heif')):
                    self.leave_out(path, HEIC)
                elif not _is_image(name):
                    self.leave_out(path, NAME)
                else:
                    with contextlib.suppress(FileNotFoundError):  # a temporary file
                        about = _status(path)
                        if not (stat.S_ISREG(about.st_mode) or stat.S_ISLNK(about.st_mode)):
                            self.leave_out(path, SPECIAL)
                            continue
                        below_root = path.removeprefix(prefix)
                        times = about.st_mtime_ns, about.st_ctime_ns
                        found.append((below_root, about.st_size, *times))
            bar.update(len(names))
        return sorted(found)

    def directories_of_images(self, top):
        """Yield as directories() does, but for those below top that hold a run."""
        top = os.fspath(top)
        for place, directories, names in self.directories(top):
            if place != top and 'config.json' in names and is_run(place):
                self.leave_out(place, RUN)
                directories.clear()
            else:
                yield place, names

    def directories(self, top):
        """Yield (path, names of directories in it, names of files in it) of top and of all below.

        Those that are removed from the list of directories are not entered. Links are followed. No
        directory is yielded twice, nor one between root and top, so that loops of links end. What
        vanishes meanwhile is skipped.
        """
        seen = set()
        for path in (Path(top), *Path(top).parents):
            if path.is_relative_to(self.root):
                seen.add(_identity(path))
        for place, directories, names in os.walk(top, onerror=self._unreadable, followlinks=True):
            # os.walk() goes on in those that stay in the list.
            directories[:] = self._new_directories(place, directories, seen)
            yield place, directories, sorted(names)

    def _new_directories(self, place, names, seen):
        new = []
        for name in sorted(names):
            path = os.path.join(place, name)
            if hidden(name):
                self.leave_out(path, HIDDEN)
                continue
            identity = _identity(path)
            if identity is None:
                continue
            if identity in seen:
                self.leave_out(path, 'read before by another link')
            else:
                seen.add(identity)
                new.append(name)
        return new

    def _unreadable(self, error):
        if not isinstance(error, FileNotFoundError):
            self.problems.append(str(error))

    def leave_out(self, path, why):
        self.left.setdefault(why, []).append(path)

    def leave_out_beside_classes(self, top, classes):
        """Leave out everything in top that is not a class; classes as _class_directories() says."""
        known = {self.root / 'unlabeled'}
        known.update(*classes.values())
        for path in sorted(top.glob('*')):
            if hidden(path.name):
                self.leave_out(path, HIDDEN)
            elif path.is_dir():
                if path not in known:
                    self.leave_out(path, RUN)
            elif _is_image(path.name):
                self.leave_out(path, 'outside the classes')
            else:
                self.leave_out(path, NAME)

    def report(self):
        """Say what was left out.

        Raises:
            UserError: there were problems.
        """
        if self.left:
            reasons = []
            for why, paths in self.left.items():
                reasons.append(f'{len(paths)} {why}, such as {paths[0]}')
            say(f'{self.root}: left out ' + '; '.join(reasons))
        if self.problems:
            lines = [f'{self.root}: {len(self.problems)} problems:', *self.problems]
            raise UserError('\n  '.join(lines))


def hidden(name):
    return name[0] == '.' or name.lower() in SYSTEM


def _is_image(name):
    """Whether a file is an image by its name. Hidden files are none."""
    suffix = os.path.splitext(name)[1].lower()
    return suffix in SUFFIXES and not hidden(name)


def _identity(path):
    """What two paths to one directory have in common, or None if it has vanished."""
    try:
        about = os.stat(path)
    except FileNotFoundError:
        return None
    return about.st_ino, about.st_dev


def _status(path):
    """os.stat() of what a link leads to, or of the link if it is broken: decoding tells of it."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)


def nfc(name):
    return unicodedata.normalize('NFC', name)


# Sizes


def short_side(root, files, n=1000):
    """The median of the shorter sides, in pixels, of up to n of the files, or None.

    It is None if no header can be read.
    """
    sides = []
    for name, *_ in random.Random(0).sample(files, min(n, len(files))):
        size = _size(root / name)
        if size:
            sides.append(min(size))
    if not sides:
        return None
    return int(statistics.median(sides))


def own_size(root, files):
    """The side of the images if all are squares of one size of at most 256 pixels, else 96."""
    sizes = set()
    for name, *_ in files:
        size = _size(root / name)
        if size:
            sizes.add(size)
        if len(sizes) > 1:
            return 96
    for width, height in sizes:
        if width == height <= 256:
            return width
    return 96


def _size(path):
    """(width, height) by the header of an image, or None if Pillow cannot read it."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return image.size
    return None
