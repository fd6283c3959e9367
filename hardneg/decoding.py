"""Image files decoded once, to one array in a file that later runs and all ranks of a machine map."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from hardneg.folder import CACHE, own_size
from hardneg.runtime import UserError, cores, ranks, say

FITS = ('crop', 'squeeze', 'pad')
TURNS = dict(zip(range(2, 9), (Image.Transpose[name] for name in (  # EXIF's orientation
    'FLIP_LEFT_RIGHT', 'ROTATE_180', 'FLIP_TOP_BOTTOM', 'TRANSPOSE', 'ROTATE_270', 'TRANSVERSE', 'ROTATE_90'))))
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # from 179 MP on it is an error


@dataclass
class Decoded:
    """Images (n, 3, S, S) uint8 of the intact files, mapped; of all files key and digest, 0 if damaged; why damaged."""

    images: np.ndarray
    keys: np.ndarray
    digests: np.ndarray
    damaged: dict


def decoded(root, files, store_size, fit='crop', cache_dir=None):
    """The Decoded images of files, as Listing gives them.

    The first process that needs them decodes them to a file, which serves until a file of the folder changes; then
    the rows of all others are copied. It is an .npy, behind which an .npz has keys, digests and checksums of the rows.

    Raises:
        UserError: there is no place for the file.
    """
    place = root / CACHE
    if cache_dir or not (place.exists() or os.access(root, os.W_OK)):
        with contextlib.suppress(RuntimeError):  # no home directory
            user = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
            cache_dir = cache_dir or user / 'contrastive'
        if not cache_dir:
            raise UserError(f'{root} cannot be written, and there is no home directory: choose a --cache_dir')
        name = f'{root.name[:40]}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}'
        place = Path(cache_dir, name)
    path = place / f'{store_size or "own"}-{fit}.npy'
    keys = np.array([_digest(repr(file).encode()) for file in files], np.uint64)

    def ready():
        cached = _cached(path)
        if cached and np.array_equal(cached.keys, keys) and all(
                isinstance(decode_or_why(root / name, 8, fit), str) for name in cached.damaged):
            return cached  # no damaged file has become readable since

    try:
        cached = ready()
        if not cached:
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / '.lock'):  # the others wait, and find the file
                cached = ready() or _write_cache(path, root, files, keys, store_size or own_size(root, files), fit)
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(f'cannot write {path} ({error}): choose another --cache_dir') from error
    say(f'{root}: {len(cached.images)} images, kept at {cached.images.shape[2]} px in {path}')
    return cached


def _digest(content):
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), 'big')


def _cached(path):
    """What _write_cache() wrote, or None if the file is missing or damaged.

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
            return Decoded(images, about['keys'], about['digests'], json.loads(str(about['damaged'])))
    except (OSError, ValueError, LookupError, EOFError, zipfile.BadZipFile, zlib.error):
        pass
    return None


def _write_cache(path, root, files, keys, size, fit):
    """Decode the files in parallel into path, and return what _cached() then does."""
    needed, free = len(files) * 3 * size**2, shutil.disk_usage(path.parent).free
    if needed > free:
        raise UserError(f'{root} takes {needed / 1e9:.1f} GB at {size} px, and {free / 1e9:.1f} GB are free in '
                        f'{path.parent}: choose another --cache_dir, or lower --store_size')
    before, rows = _cached(path), {}
    if before and before.images.shape[2] == size:
        intact = before.digests != 0
        rows = dict(zip(before.keys[intact].tolist(),
                        zip(before.images, before.digests[intact], itertools.repeat(False))))
    threads, part = cores() * ranks().local_world, path.with_suffix('.part')
    damaged, digests, checksums, dark = {}, [], [], []

    def header(n):
        np.lib.format.write_array_header_1_0(out, dict(descr='|u1', fortran_order=False, shape=(n, 3, size, size)))

    try:
        with ThreadPoolExecutor(threads) as pool, open(part, 'wb') as out, \
                tqdm(total=len(files), desc=f'Decoding {root}', unit='image', disable=None) as bar:
            header(len(files))
            for i in range(0, len(files), 64 * threads):  # few at a time, as they wait in memory to be written
                names, some = [name for name, *_ in files[i:i + 64 * threads]], keys[i:i + 64 * threads].tolist()
                found = pool.map(lambda key, name: rows.get(key) or decode_or_why(root / name, size, fit), some, names)
                for name, result in zip(names, found):
                    if isinstance(result, str):
                        damaged[name] = result
                        digests.append(0)
                    else:
                        pixels, digest, is_dark = result
                        out.write(pixels)
                        checksums.append(zlib.crc32(pixels))
                        digests.append(digest)
                        dark += [name] * is_dark
                    bar.update()
            np.savez(out, keys=keys, digests=np.array(digests, np.uint64), checksums=checksums,
                     damaged=json.dumps(damaged))
            out.seek(0)
            header(len(checksums))  # as long as before: numpy leaves room for more digits
            out.flush()
            os.fsync(out.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    if dark:
        say(f'{root}: {len(dark)} images of 16 bits come out dark, as they use less than 14 of them: scale them first, '
            f'such as {dark[0]}')
    return _cached(path)


def decode_or_why(path, size, fit):
    """What decode() returns, or why the file is damaged."""
    try:
        return decode(path, size, fit)
    except UnidentifiedImageError:  # its own text names a buffer
        return 'empty, or not an image that Pillow can read'
    except Exception as error:  # whatever a decoder makes of a damaged file
        return str(error or type(error).__name__)


def decode(path, size, fit='crop'):
    """An image's first frame as (3, size, size) uint8, a digest of its file, and whether it is dark.

    It is turned as EXIF says and resized by PIL's antialiased bilinear filter: its largest central square (crop), all
    of it (squeeze), or all of it in its proportions on white (pad). A dark image has 16 bits and uses fewer than 14.
    """
    content = Path(path).read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        wide = image.mode.startswith('I;16') or (image.mode, image.format) == ('I', 'PPM')  # 16 bits
        if image.mode in ('I', 'F') and not wide:
            raise ValueError('32 bits a pixel, of unknown range')
        image.draft(image.mode, (2 * size, 2 * size))  # a JPEG is decoded smaller, at least twice as large as needed
        image.load()  # first, as PIL turns a TIFF itself, and would hide of a damaged PNG that it failed before
        orientation, dark = None, False
        with contextlib.suppress(Exception):  # damaged EXIF is no damaged image
            orientation = image.getexif().get(0x0112)
        if wide:  # convert('RGB') would clip these to white
            pixels = np.asarray(image)
            dark = bool(pixels.max() < 2**14)
            image = Image.fromarray((pixels >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert('RGBA')
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
        image = image.convert('RGB')
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        if fit == 'squeeze':
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        elif fit == 'crop':
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        else:
            sides = [max(1, round(x / max(image.size) * size)) for x in image.size]  # ImageOps.pad makes a side of 0
            whole, image = image.resize(sides, Image.Resampling.BILINEAR), Image.new('RGB', (size, size), 'white')
            image.paste(whole, tuple(round((size - x) / 2) for x in sides))
    return np.array(image).transpose(2, 0, 1).copy(), _digest(content), dark  # (H, W, 3) -> (3, H, W)
