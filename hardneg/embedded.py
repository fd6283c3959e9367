"""The file of features that misc/embed.py writes: images, what they are, and what encoded them."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardneg.files import write_by
from hardneg.runtime import UserError

# What zipfile raises for a damaged file
DAMAGED = zipfile.BadZipFile, zlib.error, NotImplementedError
ARRAYS = ('names', 'features', 'pixels', 'bytes', 'times')


@dataclass
class Embedded:
    """Images and their features.

    Args:
        names: (n,) paths of the images below about['root'].
        features: (n, F) float32, rows of unit length.
        pixels: (n,) int64, the numbers of pixels of the images in their files.
        bytes: (n,) int64, the sizes of the files.
        times: (n,) int64, when the files were last modified, in ns.
        about: a dict of what made them: settings, the flags of embed.py; root, the directory of the
            images; size, the side to which they were decoded; encoder, its CRC; damaged, the names
            of images that are left out; versions and device.
    """

    names: np.ndarray
    features: np.ndarray
    pixels: np.ndarray
    bytes: np.ndarray
    times: np.ndarray
    about: dict

    def path(self, i):
        """The Path of an image."""
        return Path(self.about['root'], self.names[i])

    def file_keys(self):
        """What tells of a change of each file: (name, bytes, time)."""
        return list(zip(self.names.tolist(), self.bytes.tolist(), self.times.tolist()))


def write_embedded(path, embedded):
    arrays = {name: getattr(embedded, name) for name in ARRAYS}
    about = json.dumps(embedded.about)
    write_by(path, lambda file: np.savez(file, **arrays, about=about))


def read_embedded(path, root=None):
    """The Embedded in an .npz file of misc/embed.py.

    Args:
        root: where the images are now, if they have moved.

    Raises:
        UserError: there is none, it cannot be read or is damaged, or it is another program's.
    """
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError('one array')
        with file:
            arrays = {name: file[name] for name in ARRAYS}
            about = json.loads(str(file['about']))
        embedded = Embedded(**arrays, about=about)
        _check(embedded)
    except FileNotFoundError:
        raise UserError(f'{path}: no such file. misc/embed.py --out makes it') from None
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror or error})') from None
    except (ValueError, KeyError, TypeError, EOFError, *DAMAGED) as error:
        reason = f'{type(error).__name__}: {" ".join(str(error).split()):.80}'
        raise UserError(
            f'{path} is damaged or not an .npz file of misc/embed.py ({reason}): choose another '
            'name, or delete it'
        ) from None
    if root:
        embedded.about['root'] = str(root)
    return embedded


def _check(embedded):
    """ValueError or KeyError if the parts of an Embedded do not fit."""
    lengths = {len(getattr(embedded, name)) for name in ARRAYS}
    if len(lengths) > 1 or embedded.features.ndim != 2:
        raise ValueError('arrays of other shapes')
    for name in 'settings', 'root', 'size', 'encoder':
        embedded.about[name]
