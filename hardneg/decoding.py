"""Image files decoded once, to a file of pixels that later runs and all ranks of a machine map.

The file holds a row for each intact image. It lies in the user's cache, never among the images, and
beside it an index in JSON: which files the rows are of, and which files are damaged.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from hardneg.files import cache_directory, write
from hardneg.folder import FORMATS, own_size
from hardneg.runtime import UserError, cores, ranks, say, say_anywhere

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
# Pillow warns from 89 megapixels on, and refuses from 179 on.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


class Row(NamedTuple):
    """An image as decoded.

    pixels are (3, size, size) uint8. digest is that of the file. dark says that the image is grey,
    has 16 bits, and uses fewer than 14 of them. area is the number of pixels of the image in the
    file.
    """

    pixels: np.ndarray
    digest: int
    dark: bool
    area: int = 0


@dataclass
class Decoded:
    """Decoded files.

    images (n, 3, size, size) uint8 are those of the intact files, mapped. keys (N) and digests (N,)
    uint64 are of all files: a key tells of a change of the file's name, size or times, a digest of
    its content. The digest of a damaged file is 0. damaged maps the names of files that are damaged
    or too large to what is wrong.
    """

    images: np.ndarray
    keys: list
    digests: np.ndarray
    damaged: dict


def decoded(root, files, store_size, fit='crop', cache_dir=None):
    """The Decoded of the files, which are as folder.Listing.images() returns them.

    The first process decodes them to a file, and the others wait for it. Files that have kept their
    name, size and times since then are not read again.

    Args:
        store_size: side of the decoded images in pixels; 0: folder.own_size().
        fit: one of FITS, as decode() takes it.
        cache_dir: directory for the file; None: files.cache_directory().

    Raises:
        UserError: the file cannot be written.
    """
    index = index_file(root, store_size, fit, cache_dir)
    keys = [_digest(repr(file).encode()) for file in files]
    try:
        content = _current(index, root, keys, fit)
        if content is None:
            index.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(index.with_suffix('.lock')):
                content = _current(index, root, keys, fit)  # another process may have been first
                if content is None:
                    size = store_size or own_size(root, files)
                    names = [name for name, *_ in files]
                    _decode_to(index, root, names, keys, (size, fit))
                    content = _read(index)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(
            f'cannot write in {index.parent} ({error}): choose another --cache_dir'
        ) from error
    n, _, size, _ = content.images.shape
    say(f'{root}: {n} images, kept at {size} px in {index.parent}')
    return content


def index_file(root, store_size, fit, cache_dir=None):
    """The path of the index of a folder's decoded images."""
    directory = f'{root.name[:40]}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}'
    name = f'{store_size or "own"}-{fit}.index'
    return Path(cache_dir or cache_directory(), directory, name)


def _digest(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big')


# Reading


def _current(index, root, keys, fit):
    """What the files hold, or None if they are missing, damaged or of other images.

    It is also None if a damaged image can be read by now, as after an error of the network.
    """
    content = _read(index)
    if content is None or content.keys != keys:
        return None
    for name in content.damaged:
        if isinstance(decode_or_why(root / name, 8, fit), Row):
            return None
    return content


def _read(index):
    """The Decoded of an index, or None if a file is missing, cut, or of another kind."""
    try:
        about = json.loads(index.read_bytes())
        digests = np.array(about['digests'], np.uint64)
        shape = int((digests != 0).sum()), 3, about['size'], about['size']
        rows = index.with_name(about['rows'])
        if rows.stat().st_size != math.prod(shape):
            return None
        if shape[0]:
            images = np.asarray(np.memmap(rows, np.uint8, 'r', 0, shape))
        else:  # an empty file cannot be mapped
            images = np.empty(shape, np.uint8)
        return Decoded(images, about['keys'], digests, about['damaged'])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None


# Writing


def _decode_to(index, root, names, keys, form):
    """Write the rows, and then the index that names their file. form is (size, fit).

    Rows of files that have not changed are copied. What the index named before is deleted, and what
    a process left that was killed; a process that maps rows keeps them until it ends, unless they
    are on NFS and another machine deletes them.
    """
    size, _ = form
    _check_space(root, index.parent, len(names), size)
    say_anywhere(
        f'{root}: {len(names):,} images of {size} px take {_gigabytes(len(names), size):.2f} GB in '
        f'{index.parent}. Another place: --cache_dir'
    )
    earlier = _read(index)
    rows = index.with_name(f'{index.stem}-{secrets.token_hex(4)}.rows')
    try:
        # Plain writes: where a mapped file finds no room, the process ends.
        with open(rows, 'xb') as out:
            found = _rows([root / name for name in names], keys, earlier, form)
            bar = tqdm(found, f'Decoding {root}', len(names), unit='image', disable=None)
            about, dark = _write(out, names, bar)
            out.flush()
            os.fsync(out.fileno())
        write(index, json.dumps(dict(rows=rows.name, size=size, keys=keys, **about)).encode())
    except BaseException:
        rows.unlink(missing_ok=True)
        raise
    for other in index.parent.glob(f'{index.stem}*'):
        if other.suffix in ('.rows', '.part') and other != rows:
            other.unlink()
    tell_of_dark(root, dark)


def tell_of_dark(root, names):
    """Say which images came out dark, if any."""
    if names:
        say_anywhere(
            f'{root}: {len(names)} grey images of 16 bits come out dark, as they use less than 14 '
            f'of them: scale them first, such as {names[0]}'
        )


def _gigabytes(n, size):
    return n * 3 * size**2 / 1e9


def _check_space(root, directory, n, size):
    free = shutil.disk_usage(directory).free / 1e9
    if _gigabytes(n, size) > free:
        raise UserError(
            f'{root} takes {_gigabytes(n, size):.1f} GB at {size} px, and {free:.1f} GB are free '
            f'in {directory}: choose another --cache_dir, or lower --store_size'
        )


def _rows(paths, keys, earlier, form):
    """Yield the Row of each file, or what is wrong with it: an earlier one, or else decoded.

    earlier is the Decoded of files of this folder, or None.
    """
    size, _ = form
    places = {}  # the number of an earlier row, and the file's digest, by key
    if earlier and earlier.images.shape[2] == size:
        for key, digest in zip(earlier.keys, earlier.digests.tolist()):
            if digest:
                places[key] = len(places), digest

    def row(path, key):
        if key in places:
            i, digest = places[key]
            # Whether it is dark was told when it was decoded.
            return Row(earlier.images[i], digest, dark=False)
        return decode_or_why(path, *form)

    threads = cores() * ranks().local_world  # the other ranks wait
    some = 64 * threads  # not all at once, as they wait in memory to be written
    with ThreadPoolExecutor(threads) as pool:
        for i in range(0, len(paths), some):
            yield from pool.map(row, paths[i : i + some], keys[i : i + some])


def _write(out, names, rows):
    """Write the intact rows. Returns what the index says of them, and the names of dark images."""
    digests, dark = [], []
    damaged = {}
    for name, row in zip(names, rows):
        if isinstance(row, str):
            damaged[name] = row
            digests.append(0)
            continue
        out.write(row.pixels)
        digests.append(row.digest)
        if row.dark:
            dark.append(name)
    return dict(digests=digests, damaged=damaged), dark


# One image


def decode_or_why(path, size, fit):
    """The Row of decode(), or a text that says what is wrong with the file."""
    try:
        return decode(path, size, fit)
    except UnidentifiedImageError:  # its own text names a buffer
        return 'empty, or not an image that Pillow can read'
    except Image.DecompressionBombError:
        return f'too large: more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels'
    except Exception as error:  # whatever a decoder makes of a damaged file
        reason = getattr(error, 'strerror', None)  # of the system, whose text names the file again
        return str(reason or error or type(error).__name__)


def decode(path, size, fit='crop'):
    """The Row of an image's first frame, turned as EXIF says and laid on white.

    It becomes a square by PIL's antialiased bilinear filter: its largest central square (crop),
    all of it (squeeze), or all of it in its proportions on white (pad).
    """
    content = Path(path).read_bytes()
    opened = _opened(content, size)
    square = np.asarray(_to_square(opened.image, size, fit))
    pixels = np.ascontiguousarray(square.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)
    return Row(pixels, _digest(content), opened.dark, opened.area)


def upright(path, size):
    """An image's first frame in RGB, as decode() takes it before it makes it a square.

    A JPEG may be smaller than in its file, but has sides of at least twice size.
    """
    return _opened(Path(path).read_bytes(), size).image


class _Opened(NamedTuple):
    """An image in RGB, turned as EXIF says and laid on white; dark and area are as in Row."""

    image: Image.Image
    dark: bool
    area: int


def _opened(content, size):
    """The _Opened in the content of a file, of which size pixels a side are needed."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as file:
        area = file.width * file.height
        # A JPEG is decoded smaller, but at least twice as large as needed.
        file.draft(file.mode, (2 * size, 2 * size))
        # Before EXIF is asked for: a damaged PNG would hide that it failed. It also turns a TIFF.
        file.load()
        orientation = None
        with contextlib.suppress(Exception):  # damaged EXIF does not damage the image
            orientation = file.getexif().get(ORIENTATION)
        image = _to_eight_bits(file)
        dark = _is_wide(file) and image.getextrema()[1] < 64  # of 256, as 2^14 is of 2^16
        image = _to_rgb(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return _Opened(image, dark, area)


def _is_wide(image):
    """Whether Pillow keeps 16 bits. A PPM of 16 bits has mode I, as images of 32 bits have."""
    return image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM')


def _to_eight_bits(image):
    if _is_wide(image):
        levels = np.asarray(image) >> 8  # convert() would clip them
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ('I', 'F'):
        raise ValueError('32 bits a pixel, of unknown range')
    return image


def _to_rgb(image):
    """The image in RGB, on white where it is transparent."""
    if image.has_transparency_data:
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB')


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
