"""Image files decoded once, to a file of pixels that later runs and all ranks of a machine map.

The file is an .npy with a row for each intact image. Behind the array an .npz describes the rows:
which files they are of, their checksums, and which files are damaged.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from hardneg.folder import CACHE, FORMATS, own_size
from hardneg.runtime import UserError, cores, ranks, say

FITS = ('crop', 'squeeze', 'pad')
ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # what turns an image of this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHECKED_WHOLE = 1e9  # bytes of rows: of larger files, SAMPLE random rows are checked
SAMPLE = 4096
# Pillow warns from 89 megapixels on, and raises an error from 179 on.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


class Row(NamedTuple):
    """An image as decoded.

    pixels are (3, size, size) uint8. digest is that of the file. dark says that the image has 16
    bits a channel and uses fewer than 14 of them.
    """

    pixels: np.ndarray
    digest: int
    dark: bool


@dataclass
class Decoded:
    """Decoded files.

    images (n, 3, size, size) uint8 are those of the intact files, mapped. keys (N,) and digests
    (N,) uint64 are of all files: a key tells of a change of the file's name, size or times, a
    digest of its content. The digest of a damaged file is 0. damaged maps the names of damaged
    files to what is wrong.
    """

    images: np.ndarray
    keys: np.ndarray
    digests: np.ndarray
    damaged: dict


def decoded(root, files, store_size, fit='crop', cache_dir=None):
    """The Decoded of the files, which are as folder.Listing.images() returns them.

    The first process decodes them to a file, and the others wait for it. When files of the folder
    have changed, these alone are decoded again.

    Args:
        store_size: side of the decoded images in pixels; 0: folder.own_size().
        fit: one of FITS, as decode() takes it.
        cache_dir: directory for the file; None: the folder itself or, if it cannot be written, a
            directory in the user's cache.

    Raises:
        UserError: the file cannot be written.
    """
    path = decoded_file(root, store_size, fit, cache_dir)
    keys = np.array([_digest(repr(file).encode()) for file in files], np.uint64)
    try:
        content = _current(path, root, keys, fit)
        if content is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.parent / '.lock'):
                content = _current(path, root, keys, fit)  # another process may have been first
                if content is None:
                    size = store_size or own_size(root, files)
                    names = [name for name, *_ in files]
                    _decode_to(path, root, names, keys, size, fit)
                    content = _read(path)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(f'cannot write {path} ({error}): choose another --cache_dir') from error
    n, _, size, _ = content.images.shape
    say(f'{root}: {n} images, kept at {size} px in {path}')
    return content


def decoded_file(root, store_size, fit, cache_dir=None):
    """The path of the file of a folder's decoded images."""
    name = f'{store_size or "own"}-{fit}.npy'
    own = root / CACHE
    if not cache_dir and (own.exists() or os.access(root, os.W_OK)):
        return own / name
    directory = f'{root.name[:40]}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}'
    return Path(cache_dir or _users_cache(root), directory, name)


def _users_cache(root):
    caches = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    try:
        return Path(caches).expanduser() / 'contrastive'
    except RuntimeError:  # no home directory
        raise UserError(
            f'{root} cannot be written, and there is no home directory: choose a --cache_dir'
        ) from None


def _digest(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big')


# Reading


def _current(path, root, keys, fit):
    """What the file holds, or None if it is missing, damaged or of other files.

    It is also None if a damaged image can be read by now, as after an error of the network.
    """
    content = _read(path)
    if content is None or not np.array_equal(content.keys, keys):
        return None
    for name in content.damaged:
        if isinstance(decode_or_why(root / name, 8, fit), Row):
            return None
    return content


def _read(path):
    """The Decoded in a file, or None if the file is missing or damaged, by its checksums too."""
    try:
        images = np.load(path, mmap_mode='r')
        with open(path, 'rb') as file:
            file.seek(images.offset + images.nbytes)
            about = dict(np.load(file))
        images = np.asarray(images)
        for i in _checked_rows(images):
            if zlib.crc32(images[i]) != about['checksums'][i]:
                return None
        damaged = json.loads(str(about['damaged']))
        return Decoded(images, about['keys'], about['digests'], damaged)
    except Exception:  # numpy and zipfile raise many kinds for a damaged file
        return None


def _checked_rows(images):
    n = len(images)
    if images.nbytes < CHECKED_WHOLE:
        return range(n)
    return sorted(random.sample(range(n), min(n, SAMPLE)))


# Writing


def _decode_to(path, root, names, keys, size, fit):
    """Write the file, which is at path only when it is whole. Unchanged files' rows are copied."""
    _check_space(root, path.parent, len(names), size)
    kept = _intact_rows(path, size)
    part = path.with_suffix('.part')
    try:
        with open(part, 'wb') as out:
            rows = _rows([root / name for name in names], keys.tolist(), kept, size, fit)
            bar = tqdm(rows, f'Decoding {root}', len(names), unit='image', disable=None)
            dark = _write(out, names, keys, bar, size)
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if dark:
        say(
            f'{root}: {len(dark)} images of 16 bits come out dark, as they use less than 14 of '
            f'them: scale them first, such as {dark[0]}'
        )


def _check_space(root, directory, n, size):
    needed = n * 3 * size**2
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f'{root} takes {needed / 1e9:.1f} GB at {size} px, and {free / 1e9:.1f} GB are free '
            f'in {directory}: choose another --cache_dir, or lower --store_size'
        )


def _intact_rows(path, size):
    """The Rows of an older file, by their keys; none if there is no such file of this size."""
    rows = {}
    before = _read(path)
    if before and before.images.shape[2] == size:
        intact = before.digests != 0
        keys, digests = before.keys[intact].tolist(), before.digests[intact].tolist()
        for key, digest, pixels in zip(keys, digests, before.images):
            rows[key] = Row(pixels, digest, dark=False)  # it was told when it was decoded
    return rows


def _rows(paths, keys, kept, size, fit):
    """Yield the Row of each file, or what is wrong with it: the one in kept, or else decoded."""

    def row(path, key):
        if key in kept:
            return kept[key]
        return decode_or_why(path, size, fit)

    threads = cores() * ranks().local_world  # the other ranks wait
    some = 64 * threads  # not all at once, as they wait in memory to be written
    with ThreadPoolExecutor(threads) as pool:
        for i in range(0, len(paths), some):
            yield from pool.map(row, paths[i : i + some], keys[i : i + some])


def _write(out, names, keys, rows, size):
    """Write the intact rows and what describes them. Returns the names of dark images."""
    digests = np.zeros(len(names), np.uint64)
    checksums, dark = [], []
    damaged = {}
    _write_header(out, len(names), size)
    for i, (name, row) in enumerate(zip(names, rows)):
        if isinstance(row, str):
            damaged[name] = row
            continue
        out.write(row.pixels)
        checksums.append(zlib.crc32(row.pixels))
        digests[i] = row.digest
        if row.dark:
            dark.append(name)
    np.savez(out, keys=keys, digests=digests, checksums=checksums, damaged=json.dumps(damaged))
    out.seek(0)
    # Now the number of rows is known. The header is as long: numpy leaves room for more digits.
    _write_header(out, len(checksums), size)
    return dark


def _write_header(out, n, size):
    header = dict(descr='|u1', fortran_order=False, shape=(n, 3, size, size))
    np.lib.format.write_array_header_1_0(out, header)


# One image


def decode_or_why(path, size, fit):
    """The Row of decode(), or a text that says what is wrong with the file."""
    try:
        return decode(path, size, fit)
    except UnidentifiedImageError:  # its own text names a buffer
        return 'empty, or not an image that Pillow can read'
    except Exception as error:  # whatever a decoder makes of a damaged file
        return str(error or type(error).__name__)


def decode(path, size, fit='crop'):
    """The Row of an image's first frame, turned as EXIF says and laid on white.

    It becomes a square by PIL's antialiased bilinear filter: its largest central square (crop),
    all of it (squeeze), or all of it in its proportions on white (pad).
    """
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content), formats=FORMATS) as file:
        # A JPEG is decoded smaller, but at least twice as large as needed.
        file.draft(file.mode, (2 * size, 2 * size))
        # Before EXIF is asked for: a damaged PNG would hide that it failed. It also turns a TIFF.
        file.load()
        orientation = None
        with contextlib.suppress(Exception):  # damaged EXIF is no damaged image
            orientation = file.getexif().get(ORIENTATION)
        image, dark = _to_rgb(file)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    square = np.asarray(_to_square(image, size, fit))
    pixels = np.ascontiguousarray(square.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)
    return Row(pixels, _digest(content), dark)


def _to_rgb(image):
    """The image in RGB, on white where it is transparent, and whether it is dark."""
    # A PPM of 16 bits has mode I, as images of 32 bits have.
    if image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM'):
        levels = np.asarray(image)
        eight_bits = Image.fromarray((levels >> 8).astype(np.uint8))  # convert() would clip them
        return eight_bits.convert('RGB'), bool(levels.max() < 2**14)
    if image.mode in ('I', 'F'):
        raise ValueError('32 bits a pixel, of unknown range')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB'), False


def _to_square(image, size, fit):
    if fit == 'squeeze':
        return image.resize((size, size), Image.Resampling.BILINEAR)
    if fit == 'crop':
        return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    # ImageOps.pad() would make a side of 0 pixels of a thin image.
    width, height = (max(1, round(side / max(image.size) * size)) for side in image.size)
    square = Image.new('RGB', (size, size), 'white')
    corner = round((size - width) / 2), round((size - height) / 2)
    square.paste(image.resize((width, height), Image.Resampling.BILINEAR), corner)
    return square
