"""Atomic writes, locks, and checked reads: JSON, tables, checkpoints."""

import contextlib
import io
import json
import math
import os
import pickle
import re
import shlex
import tempfile
import zipfile
import zlib
from pathlib import Path

import filelock
import pandas as pd
import torch

from hardneg.runtime import UserError, is_memory_error

# What every JSON file of a run or a probe holds, and no other program's
MARK = 'data_digest'
_locks = []  # held until the process ends


def write(path, data):
    """Write the bytes to path, which holds its old content or all of the new one at any time.

    Raises:
        UserError: the file cannot be written.
    """
    write_by(path, lambda file: file.write(data))


def write_by(path, save):
    """write() what save(file) writes to a binary file."""
    path = Path(path)
    part = Path(f'{path}.{os.getpid()}.part')  # another process may write here, too
    try:
        with open(part, 'wb') as file:
            save(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f'cannot write {path} ({error.strerror}); what was saved before is untouched'
        ) from error


def delete_parts(directory, name):
    """Delete what killed processes left of files whose names match a regular expression."""
    for path in Path(directory).glob('*.part'):
        if re.fullmatch(rf'{name}\.\d+\.part', path.name):
            path.unlink()


def write_table(path, rows, columns):
    """Write rows, a DataFrame or a list of dicts or sequences, as a CSV file with these columns.

    Raises:
        UserError: the file cannot be written.
        ValueError: a dict has another column.
    """
    if columns and isinstance(rows, list):
        for row in rows:
            unknown = isinstance(row, dict) and row.keys() - set(columns)
            if unknown:
                raise ValueError(f'no such column: {", ".join(unknown)}')
    text = pd.DataFrame(rows, columns=columns).to_csv(index=False)
    write(path, text.encode(errors='surrogateescape'))  # names of files may be no valid text


def write_json(path, content):
    text = json.dumps(content, indent=2) + '\n'
    write(path, text.encode())


def write_tensors(path, content):
    """torch.save() to path."""
    buffer = io.BytesIO()  # on a full disk torch.save() raises errors that do not say so
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


def crc(path):
    """The CRC-32 of a file. A probe records its checkpoint's."""
    return zlib.crc32(Path(path).read_bytes())


def lock(directory, name='.lock', wait=False):
    """Hold a lock of the directory until this process ends.

    Args:
        name: of the lock's file.
        wait: for another process to release it.

    Raises:
        UserError: another process holds it and wait is False, or the directory cannot be written.
    """
    check_directory(directory)
    try:
        path = Path(directory, name).absolute()
        held = filelock.FileLock(path, blocking=wait, is_singleton=True)
        held.acquire()
    except filelock.Timeout:
        raise UserError(
            f'another run is writing in {directory}: wait for it, or choose another directory'
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise _not_writable(directory, error) from error
    _locks.append(held)


def check_directory(directory):
    """Make the directory, if it is not there. UserError if no file can be written in it."""
    try:
        _check_writable(directory)
    except OSError as error:
        raise _not_writable(directory, error) from error


def _not_writable(directory, error):
    return UserError(f'cannot write in {directory} ({error}): choose another directory')


def _check_writable(directory):
    """Make the directory, if it is not there. OSError if no file can be written in it."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=directory).close()


def cache_directory():
    """The user's cache directory, for files that can be made again, and for locks.

    It is the first of $XDG_CACHE_HOME/hardneg and ~/.cache/hardneg that can be written.

    Raises:
        UserError: neither can be written.
    """
    places = []
    variable = os.environ.get('XDG_CACHE_HOME', '')
    if os.path.isabs(variable):  # a relative path does not count, by the variable's specification
        places.append(Path(variable, 'hardneg'))
    with contextlib.suppress(RuntimeError):  # there is no home directory
        places.append(Path.home() / '.cache' / 'hardneg')
    for place in places:
        with contextlib.suppress(OSError):
            _check_writable(place)
            return place
    tried = ' and '.join(map(str, places)) or '~/.cache'
    raise UserError(
        f'{tried} cannot be written: choose a directory with --cache_dir or XDG_CACHE_HOME'
    )


def is_run(directory):
    """Whether the config.json in a directory is a run's. Other programs have files of this name."""
    try:
        return read_json(Path(directory, 'config.json')) is not None
    except UserError:
        return False


def read_json(path):
    """The dict in a JSON file that a script wrote for a run; it may have been edited since.

    None: there is no such file, or it is another program's, as it has no MARK.

    Raises:
        UserError: the file cannot be read, or is not JSON.
    """
    try:
        content = json.loads(Path(path).read_text('utf-8-sig'))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict) or MARK not in content:
        return None
    return content


def read_table(path, columns, optional=()):
    """The numbers of a CSV file, as a DataFrame with these columns, whose epochs count up.

    A column in optional that the file lacks is empty. None: there is no such file, or it is another
    program's, as it has none of the columns. The first one, epoch, does not count for that.

    Raises:
        UserError: the file cannot be read, or lacks a column.
    """
    try:
        found = pd.read_csv(path, encoding='utf-8-sig', nrows=0)
        if not set(found) & set(columns[1:]):
            return None
        table = pd.read_csv(path, encoding='utf-8-sig')
        for name in optional:
            if name not in table:
                table[name] = math.nan
        table = table[list(columns)].astype(float)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, pd.errors.ParserError) as error:
        raise _damaged(path, error) from None
    epochs = table['epoch']
    if (epochs.diff()[1:] != 1).any() or not epochs[:1].isin([0, 1]).all():
        raise UserError(f'{path} is damaged or not of a run: its epochs do not count up')
    return table


def _damaged(path, error):
    reason = f'{type(error).__name__}: {" ".join(str(error).split()):.80}'
    return UserError(f'{path} is damaged or not of a run ({reason})')


def read_checkpoint(path):
    """What torch.save() wrote to path, on the CPU: dense tensors and plain containers.

    Raises:
        UserError: the file is missing or damaged, by its archive's checksums too; it holds other
            objects, which are not unpickled; or its tensors are sparse, quantised, nested, or
            larger than what the file holds of them.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'checksum of {damaged} does not match')
        content = torch.load(path, map_location='cpu', weights_only=True)
        for name, x in tensors(content):
            _check_plain(path, name or 'it', x)
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(_what_is_there(Path(path))) from None
    except pickle.UnpicklingError as error:
        raise UserError(
            f'{path}: not a checkpoint of tensors alone; refused, and nothing in it was run. If '
            'you trust the file, save its tensors alone in the clone of this project: '
            f'{_saving_tensors(Path(path))}'
        ) from error
    except Exception as error:  # torch.load and zipfile raise many kinds for a damaged file
        if is_memory_error(error):
            raise
        reason = ''
        if isinstance(error, (OSError, zipfile.BadZipFile)):
            reason = f' ({error})'
        raise UserError(f'{path}: damaged or not a checkpoint{reason}') from error
    return content


def tensors(content, name=''):
    """Yield every (name, tensor) in nested dicts, lists, tuples and modules.

    A name is the keys on the way to the tensor, joined by dots.
    """
    items = ()
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, torch.nn.Module):
        items = content.state_dict().items()
    elif isinstance(content, dict):
        items = content.items()
    elif isinstance(content, (list, tuple)):
        items = enumerate(content)
    for key, value in items:
        inner = str(key)
        if name:
            inner = f'{name}.{key}'
        yield from tensors(value, inner)


def _saving_tensors(path):
    """The command that unpickles a file and saves the tensors in it, run in the clone."""
    old, new = json.dumps(str(path)), json.dumps(str(path.with_suffix('.tensors.pth')))
    code = (
        'import torch; from hardneg.files import tensors; '
        f'torch.save(dict(tensors(torch.load({old}, "cpu", weights_only=False))), {new})'
    )
    return shlex.join(['python', '-c', code])


def _check_plain(path, name, x):
    plain = x.layout == torch.strided and not (x.is_quantized or x.is_meta or x.is_nested)
    if not plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise UserError(f'{path}: {name} is not a plain tensor')


def _what_is_there(path):
    """The message for a checkpoint that is missing: which others lie in its directory."""
    what, directory = 'no such file', path.parent
    if path.is_dir():
        what, directory = 'a directory', path
    others = [
        p.name
        for p in sorted(directory.glob('*.pth'))
        if not re.search('last|linear|logistic', p.name)
    ]
    return f'{path}: {what}; in {directory} there is {", ".join(others) or "no checkpoint"}'
