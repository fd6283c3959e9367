"""Image files decoded once, to a file of pixels that later runs and all ranks of a machine map.

The file holds a row for each intact image. It lies in the user's cache, never among the images, and
beside it an index: which files the rows are of, their checksums, which files are damaged. The first
line of the index is the checksum of the rest, which is JSON.
"""

import contextlib
import hashlib
import io
import json
import os
import random
import secrets
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
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
CHANNELS = 'L', 'LA', 'RGB', 'RGBX', 'RGBA', 'RGBa', 'CMYK'
# Pillow's raw modes of 16 bits a channel, in any order of bytes. BGR;16 has 16 bits a pixel.
SIXTEEN_BITS = {f'{channels};16{order}' for channels, order in product(CHANNELS, 'BLN')}
CHECKED_WHOLE = 1e9  # bytes of rows: of larger files, SAMPLE random rows are checked
SAMPLE = 4096
# Pillow warns from 89 megapixels on, and refuses from 179 on.
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)


class Row(NamedTuple):
    """An image as decoded.

    pixels are (3, size, size) uint8. digest is that of the file. dark says that the image has 16
    bits a channel and its colours use fewer than 14 of them. area is the number of pixels of the
    image in the file.
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

    The first process decodes them to a file, and the others wait for it. Files that were decoded
    before, for this folder or another one of this cache, are not decoded again: they are known by
    their content. Files of this folder that kept their name, size and times are not read either.

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


def _digest_of_file(path):
    """The digest of a file's content, or None if it cannot be read: decoding tells of it."""
    with contextlib.suppress(OSError):
        return _digest(path.read_bytes())
    return None


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
    """The Decoded of an index, or None if a file is missing or damaged, by its checksums too."""
    about = _read_index(index)
    if about is None:
        return None
    images = about['images']
    for i in _checked_rows(images):
        if zlib.crc32(images[i]) != about['checksums'][i]:
            return None
    digests = np.array(about['digests'], np.uint64)
    return Decoded(images, about['keys'], digests, about['damaged'])


def _read_index(index):
    """The dict in an index, and in it the images, not checked; None if it is damaged.

    It is None, too, if the file of the images is missing or too short.
    """
    try:
        checksum, _, text = index.read_bytes().partition(b'\n')
        if checksum != _checksum(text):
            return None
        about = json.loads(text)
        shape = len(about['checksums']), 3, about['size'], about['size']
        if shape[0] == 0:  # an empty file cannot be mapped
            images = np.empty(shape, np.uint8)
        else:
            images = np.asarray(np.memmap(index.with_name(about['rows']), np.uint8, 'r', 0, shape))
    except (OSError, ValueError):
        return None
    return about | dict(images=images)


def _checksum(text):
    return b'%08x' % zlib.crc32(text)


def _checked_rows(images):
    n = len(images)
    if images.nbytes < CHECKED_WHOLE:
        return range(n)
    return sorted(random.sample(range(n), min(n, SAMPLE)))


# Writing


def _decode_to(index, root, names, keys, form):
    """Write the rows, and then the index that names their file. form is (size, fit).

    Rows of files that were decoded before are copied. What the index named before is deleted, and
    what a process left that was killed; a process that maps rows keeps them until it ends.
    """
    size, _ = form
    _check_space(root, index.parent, len(names), size)
    say_anywhere(
        f'{root}: {len(names):,} images of {size} px take {_gigabytes(len(names), size):.2f} GB in '
        f'{index.parent}. Another place: --cache_dir'
    )
    earlier = _earlier_rows(index, form)
    rows = index.with_name(f'{index.stem}-{secrets.token_hex(4)}.rows')
    try:
        # Plain writes: where a mapped file finds no room, the process ends.
        with open(rows, 'xb') as out:
            found = _rows([root / name for name in names], keys, earlier, form)
            bar = tqdm(found, f'Decoding {root}', len(names), unit='image', disable=None)
            about, dark = _write(out, names, bar)
            out.flush()
            os.fsync(out.fileno())
        text = json.dumps(dict(rows=rows.name, size=size, keys=keys, **about)).encode()
        write(index, _checksum(text) + b'\n' + text)
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
            f'{root}: {len(names)} images of 16 bits come out dark, as they use less than 14 of '
            f'them: scale them first, such as {names[0]}'
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


def _earlier_rows(index, form):
    """What was decoded before in a form, and so need not be decoded again.

    Returns:
        digests: the digest of each key in the folder's own indexes. A key says nothing of another
            folder: archives give files of one name the same size and time.
        rows: by digest, the dict in an index of the cache and the number of the row.
    """
    size, fit = form
    digests, rows = {}, {}
    for other in index.parents[1].glob(f'*/*-{fit}.index'):
        about = _read_index(other)
        if about is None or about['size'] != size:
            continue
        if other.parent == index.parent:
            digests.update(zip(about['keys'], about['digests']))
        intact = [digest for digest in about['digests'] if digest]
        for i, digest in enumerate(intact):
            rows[digest] = about, i
    return digests, rows


def _rows(paths, keys, earlier, form):
    """Yield the Row of each file, or what is wrong with it: an earlier one, or else decoded.

    earlier is as _earlier_rows() returns it.
    """
    digests, rows = earlier

    def row(path, key):
        digest = digests.get(key)
        if digest is None and rows:
            digest = _digest_of_file(path)
        if digest in rows:
            about, i = rows[digest]
            pixels = about['images'][i]
            if zlib.crc32(pixels) == about['checksums'][i]:
                # Whether it is dark was told when it was decoded.
                return Row(pixels, digest, dark=False)
        return decode_or_why(path, *form)

    threads = cores() * ranks().local_world  # the other ranks wait
    some = 64 * threads  # not all at once, as they wait in memory to be written
    with ThreadPoolExecutor(threads) as pool:
        for i in range(0, len(paths), some):
            yield from pool.map(row, paths[i : i + some], keys[i : i + some])


def _write(out, names, rows):
    """Write the intact rows. Returns what the index says of them, and the names of dark images."""
    digests, checksums, dark = [], [], []
    damaged = {}
    for name, row in zip(names, rows):
        if isinstance(row, str):
            damaged[name] = row
            digests.append(0)
            continue
        out.write(row.pixels)
        checksums.append(zlib.crc32(row.pixels))
        digests.append(row.digest)
        if row.dark:
            dark.append(name)
    return dict(digests=digests, checksums=checksums, damaged=damaged), dark


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
        sixteen_bits = _has_sixteen_bits(file, content)
        # Before EXIF is asked for: a damaged PNG would hide that it failed. It also turns a TIFF.
        file.load()
        orientation = None
        with contextlib.suppress(Exception):  # damaged EXIF does not damage the image
            orientation = file.getexif().get(ORIENTATION)
        image = _to_eight_bits(file)
        dark = sixteen_bits and _brightest(image) < 64  # of 256, as 2^14 is of 2^16
        image = _to_rgb(image)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
    return _Opened(image, dark, area)


def _has_sixteen_bits(file, content):
    """Whether an image that is not loaded yet has 16 bits a channel. Of colours, Pillow keeps 8."""
    if _is_wide(file):
        return True
    if file.format == 'JPEG2000':
        codestream = content.find(b'\xff\x4f\xff\x51')
        return content[codestream + 42] & 127 == 15  # Ssiz: the bits of a component, less one
    if not file.tile:
        return False
    codec, _, _, args = file.tile[0]  # how the first part of the file is decoded
    if codec in ('ppm', 'ppm_plain'):
        return args[-1] == 65535  # the highest level
    raw_mode = args
    if isinstance(args, tuple) and args:
        raw_mode = args[0]
    return codec == 'SGI16' or raw_mode in SIXTEEN_BITS


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


def _brightest(image):
    """The highest level of an image of 8 bits, in all channels but alpha."""
    channels = zip(image.getbands(), image.split())
    return max(channel.getextrema()[1] for name, channel in channels if name != 'A')


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
