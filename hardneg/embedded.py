"""The file of features that misc/embed.py writes: images, what they are, and what encoded them."""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardneg.files import write
from hardneg.runtime import UserError

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

    def path(self, i, root=None):
        """The Path of an image, below root if the images have moved there."""
        return Path(root or self.about['root'], self.names[i])

    def keys(self):
        """What tells of a change of each file: (name, bytes, time)."""
        return list(zip(self.names.tolist(), self.bytes.tolist(), self.times.tolist()))


def write_embedded(path, embedded):
    arrays = {name: getattr(embedded, name) for name in ARRAYS}
    file = io.BytesIO()
    np.savez(file, **arrays, about=json.dumps(embedded.about))
    write(path, file.getbuffer())


def read_embedded(path):
    """The Embedded in an .npz file of misc/embed.py.

    Raises:
        UserError: there is none, it is damaged, or it is another program's.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ARRAYS}
            about = json.loads(str(file['about']))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file. misc/embed.py makes it by --out') from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = f'{type(error).__name__}: {" ".join(str(error).split()):.80}'
        raise UserError(
            f'{path} is damaged or not an .npz file of misc/embed.py ({reason}): choose another '
            'name, or delete it'
        ) from None
    return Embedded(**arrays, about=about)
