"""Files that are written whole and read back checked: JSON, tables and tensors."""

import contextlib
import hashlib
import io
import json
import os
import zlib
from pathlib import Path

import filelock
import pandas as pd
import torch

from runtime import UserError

locks = []  # held until the process ends


def write(path, data):
    """Write the bytes so that path holds either what it held before or all of them, whatever happens meanwhile."""
    path, beside = Path(path), Path(f'{path}.{os.getpid()}.part')  # of this process: another may write here, too
    try:
        with open(beside, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f'cannot write {path} ({error.strerror}); what was saved before is untouched') from error


def write_table(path, rows, columns):
    write(path, pd.DataFrame(rows, columns=columns).to_csv(index=False).encode(errors='surrogateescape'))


def write_json(path, content):
    write(path, json.dumps({**content, 'digest': digest(content)}, indent=2).encode())


def write_tensors(path, content):
    """torch.save() to the path; returns the CRC of what was written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())
    return zlib.crc32(buffer.getbuffer())


def crc(path):
    """The CRC-32 of a file, by which a checkpoint is known."""
    return zlib.crc32(path.read_bytes())


def digest(content):
    """The checksum of nested dicts, lists, tensors and values that reveals a damaged or edited file."""
    if isinstance(content, torch.Tensor):
        content = str(content.dtype), tuple(content.shape), zlib.crc32(content.cpu().contiguous().numpy().tobytes())
    elif isinstance(content, dict):
        content = sorted((str(key), digest(value)) for key, value in content.items())
    elif isinstance(content, (list, tuple)):
        content = [digest(item) for item in content]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def verified(content, path):
    """The content without its digest; UserError, naming the file, if it is not what a run wrote."""
    content = dict(content) if isinstance(content, dict) else {}
    written = content.pop('digest', None)
    if written is None or written != digest(content):
        raise UserError(f'{path} is damaged, changed, or not of a run: restore it, or move it elsewhere')
    return content


def lock(directory, name='.lock', wait=False):
    """Make this process, until it ends, the only one that holds the lock of this name in the directory.

    Raises:
        UserError: another process holds it, and this one is not to wait; or it cannot be written.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(Path(directory, name).absolute(), blocking=wait, is_singleton=True)
        held.acquire()
    except filelock.Timeout:
        raise UserError(f'another run is writing in {directory}: wait for it, or choose another directory') from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(f'cannot write in {directory} ({error}): choose another directory') from error
    locks.append(held)


def read_json(path):
    """What write_json() wrote; UserError that names the file if it holds anything else."""
    try:
        return verified(json.loads(Path(path).read_text('utf-8-sig')), path)
    except (OSError, UnicodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f'{path} is damaged or not of a run ({type(error).__name__})') from None


def read_table(path, columns):
    """The numbers of a CSV file with these columns, of which epoch counts up; UserError that names the file."""
    try:
        table = pd.read_csv(path, encoding='utf-8-sig')[list(columns)].astype(float)
    except (OSError, ValueError, KeyError, pd.errors.ParserError) as error:
        raise UserError(f'{path} is damaged or not of a run ({type(error).__name__}: {error!s:.60})') from None
    if (table['epoch'].diff()[1:] != 1).any() or not table['epoch'][:1].isin([0, 1]).all():
        raise UserError(f'{path} is damaged or not of a run: its epochs do not count up')
    return table
