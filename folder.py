"""Image files below a directory: found as people keep them, decoded once to one array in a file, and mapped."""

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import stat
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps
from tqdm import tqdm

from runtime import CORES, LOCAL_WORLD, UserError, say

SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items()  # of those that Pillow reads
            if kind in set(Image.OPEN) - {'BUFR', 'GRIB', 'HDF5', 'MPEG', 'WMF'}}  # and not just recognises
SYSTEM = ('@eadir', '#recycle', '__macosx', 'thumbs.db', 'desktop.ini', '$recycle.bin', 'lost+found')
CACHE = '.decoded'  # where the images of a folder are kept once they are decoded, if it can be written


def hidden(name):
    return name[0] == '.' or name.lower() in SYSTEM


def find_images(top, root, left, problems):
    """(path below root, bytes, time of change) of the images below the directory top, sorted. Links are followed.

    Adds to left, by its reason, what is left out, and to problems the directories that cannot be read. No directory is
    read twice, nor one between root and top, so that loops of links end.
    """
    found, seen = [], {os.stat(path)[1:3] for path in (top, *top.parents) if path.is_relative_to(root)}
    for place, directories, names in os.walk(top, onerror=lambda error: problems.append(str(error)), followlinks=True):
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
                found.append((path[len(str(root)) + 1:], about.st_size, about.st_mtime_ns))
            if why and name != CACHE:
                left.setdefault(why, []).append(path)
        directories[:] = kept
    return sorted(found)


def decoded(root, files, store_size, cache_dir):
    """Images (n, 3, S, S) of the intact files, mapped; reasons by name of the damaged; names of the dark ones.

    A dark image has 16 bits and uses fewer than 14 of them.

    The first process that needs them decodes them to a file, which serves until a file of the folder changes; then
    the rows of all others are copied. It is an .npy, behind which an .npz has keys and checksums of the rows.
    """
    place = root / CACHE
    if cache_dir or not (place.exists() or os.access(root, os.W_OK)):
        user = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'contrastive')
        place = Path(cache_dir or user, f'{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}')
    path = place / f'{store_size or "own"}.npy'
    keys = [int(hashlib.blake2b(repr(file).encode(), digest_size=8).hexdigest(), 16) for file in files]

    def ready():
        cached = _cached(path)  # damaged files may have become readable since
        if cached and cached[3] == keys and all(_decode(root / name, 8)[0] is None for name in cached[1]):
            return cached

    with warnings.catch_warnings():
        warnings.simplefilter('error', Image.DecompressionBombWarning)
        try:
            cached = ready()
            if not cached:
                place.mkdir(parents=True, exist_ok=True)
                with FileLock(place / '.lock'):  # the others wait, and find the file
                    cached = ready() or _write_cache(path, root, files, keys, store_size or _own_size(root, files))
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            raise UserError(f'cannot write {path} ({error}): choose another --cache_dir') from error
    say(f'{root}: {len(cached[0])} images, kept at {cached[0].shape[2]} px in {path}')
    return torch.from_dlpack(cached[0]), *cached[1:3]


def _cached(path):
    """What _write_cache() wrote: images (n, 3, S, S), mapped, damaged, dark, keys, good.

    good tells of each key whether it was decoded. () stands for a file that is missing or damaged.

    Checksums are of rows. All are checked in a file of less than 1 GB, 4,096 at random in a larger one.
    """
    try:
        images = np.load(path, mmap_mode='r')
        with open(path, 'rb') as file:
            file.seek(images.offset + images.nbytes)
            about = dict(np.load(file))
        images, n = np.asarray(images), len(images)
        rows = range(n) if images.nbytes < 1e9 else sorted(random.sample(range(n), min(n, 4096)))
        if all(zlib.crc32(images[i]) == about['checksums'][i] for i in rows):
            return images, *json.loads(str(about['notes'])), about['keys'].tolist(), about['good']
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    return ()


def _write_cache(path, root, files, keys, size):
    """Decode the files in parallel into path, and return what _cached() then does."""
    needed, free = len(files) * 3 * size**2, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f'{root} takes {needed / 1e9:.1f} GB at {size} px, and {free / 1e9:.1f} GB are free in '
                        f'{path.parent}: choose another --cache_dir, or lower --store_size')
    images, _, was_dark, were, good = _cached(path) or ((), {}, (), (), ())
    rows = dict(zip(itertools.compress(were, good), images)) if len(images) and images.shape[2] == size else {}
    threads, part, damaged, dark, checksums = CORES * LOCAL_WORLD, path.with_suffix('.part'), {}, [], []

    def read(key, file):
        return (rows[key], file[0] in was_dark) if key in rows else _decode(root / file[0], size)

    def header(n):
        np.lib.format.write_array_header_1_0(out, dict(descr='|u1', fortran_order=False, shape=(n, 3, size, size)))

    try:
        with ThreadPoolExecutor(threads) as pool, open(part, 'wb') as out, \
                tqdm(total=len(files), desc=f'Decoding {root}', unit='image', disable=None) as bar:
            header(len(files))
            for i in range(0, len(files), 64 * threads):  # few at a time, as they wait in memory to be written
                some = slice(i, i + 64 * threads)
                for (name, *_), (pixels, note) in zip(files[some], pool.map(read, keys[some], files[some])):
                    if pixels is None:
                        damaged[name] = note
                    else:
                        out.write(pixels)
                        checksums.append(zlib.crc32(pixels))
                        dark += [name] * note
                    bar.update()
            np.savez(out, keys=np.array(keys, np.uint64), checksums=checksums, notes=json.dumps([damaged, dark]),
                     good=[name not in damaged for name, *_ in files])
            out.seek(0)
            header(len(checksums))  # as long as before: numpy leaves room for more digits
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return _cached(path)


def _own_size(root, files):
    """The side of the images where all are squares of one size of at most 256 pixels, else 96, by their headers."""
    sizes = set()
    for name, *_ in files:
        with contextlib.suppress(Exception), Image.open(root / name) as image:  # decoding tells what is wrong
            sizes.add(image.size)
        if len(sizes) > 1:
            return 96
    width, height = sizes.pop() if sizes else (96, 96)
    return width if width == height <= 256 else 96


def _decode(path, size):
    """(3, size, size) uint8 of the image's first frame and whether it is dark; None and why, if it is damaged.

    Its largest central square, turned as EXIF says, is resized by PIL's antialiased bilinear filter.
    """
    try:
        with Image.open(path) as image:
            wide = image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM')  # 16 bits
            if image.mode in ('I', 'F') and not wide:
                raise ValueError('32 bits a pixel, of unknown range')
            image = ImageOps.exif_transpose(image)
            if wide:  # convert('RGB') would clip these to white
                pixels = np.asarray(image)
                image = Image.fromarray((pixels >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert('RGB'), (size, size), Image.Resampling.BILINEAR)
        # (H, W, 3) -> (3, H, W)
        return np.array(image).transpose(2, 0, 1).copy(), bool(wide and pixels.max() < 2**14)
    except Exception as error:  # whatever a decoder makes of a damaged file
        return None, str(error or type(error).__name__)
