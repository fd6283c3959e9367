"""What a run leaves in its directory, and how it is read back: config.json, log.csv, checkpoints and probes."""

import hashlib
import io
import json
import os
import platform
import re
import shlex
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import filelock
import numpy as np
import pandas as pd
import PIL
import torch
import torchvision

from model import read_checkpoint
from runtime import RANK, WORLD, UserError

LOG = ('epoch', 'train_loss', 'test_acc@1', 'test_acc@5', 'alignment', 'uniformity', 'rankme', 'lr', 'images/s',
       'seconds', 'encoder')  # encoder: CRC-32 of model_{epoch}.pth, if one was kept
PROBE = ('epoch', 'train_loss', 'train_acc@1', 'train_acc@5', 'test_loss', 'test_acc@1', 'test_acc@5')
FREE = ('root', 'cache_dir', 'workers', 'results_dir', 'save_every', 'knn_every', 'compile')  # may change in a run
OBJECTIVE = ('estimator', 'tau_plus', 'beta', 'anneal')
locks = []  # held until the process ends


def write(path, data):
    """Write the bytes so that path holds either what it held before or all of them, whatever happens meanwhile."""
    path, beside = Path(path), Path(f'{path}.part')
    try:
        with open(beside, 'wb') as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        if beside.is_file():
            beside.unlink()
        raise UserError(f'cannot write {path} ({error.strerror}); what was saved before is untouched') from error


def write_table(path, rows, columns):
    write(path, pd.DataFrame(rows, columns=columns).to_csv(index=False).encode())


def write_json(path, content):
    write(path, json.dumps({**content, 'digest': digest(content)}, indent=2).encode())


def write_tensors(path, content):
    """torch.save() to the path; returns the CRC of what was written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())
    return zlib.crc32(buffer.getbuffer())


def digest(content):
    """A checksum of nested dicts, lists, tensors and values, by which a file is known to hold what was written."""
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


def lock(directory):
    """Make this process the only one that writes in the directory, until it ends; UserError if it cannot be."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(Path(directory, '.lock').absolute(), blocking=False, is_singleton=True)
        held.acquire()
    except filelock.Timeout:
        raise UserError(f'another run is writing in {directory}: wait for it, or choose another directory') from None
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
        raise UserError(f'cannot write in {directory} ({error}): choose another --results_dir') from error
    locks.append(held)


def open_run(results, settings, data, device):
    """Lock the directory, refuse to mix runs in it, and return what its last.pth holds, or None at the start."""
    lock(results)
    state_file, config_file = results / 'last.pth', results / 'config.json'
    described = dict(classes=data.classes, images=dict(train=len(data.train), test=len(data.test)))
    if data.damaged:
        described['images'] |= dict(damaged=len(data.damaged), damaged_files=list(data.damaged))
    if config_file.exists():
        check_same_run(results, read_json(config_file), settings, described)
    missing = [path.name for path in (config_file, state_file) if not path.exists()]
    trained = [path.name for path in sorted(results.glob('*'))  # model_0.pth alone: killed before the first state
               if re.fullmatch(r'model_[1-9]\d*\.pth|last\.pth|log\.csv', path.name)]
    if trained and missing:
        raise UserError(f'{results} holds {", ".join(trained)} but no {" and no ".join(missing)}, so '
                        'the run there cannot be continued: choose another --results_dir')
    if state_file.exists():
        try:
            return verified(read_checkpoint(state_file), state_file)
        except UserError as error:
            raise UserError(f'{error}. The run cannot be continued; beside it is {", ".join(trained)}. Choose another '
                            '--results_dir, or restore the file from a copy') from None
    write_json(config_file, dict(settings=settings, **described, **provenance(device)))
    return None


def check_same_run(results, config, settings, described):
    """UserError if the config.json of results is that of a run with other settings or on other data."""
    before = config['settings']
    differ = [f'--{name} {before.get(name)} there, {settings.get(name)} here'
              for name in {**before, **settings} if name not in FREE and before.get(name) != settings.get(name)]
    if differ:
        raise UserError(f'{results} holds a run with other settings ({"; ".join(differ)}): choose another '
                        '--results_dir, or repeat its settings to continue it')
    if any(config[name] != value for name, value in described.items()):
        raise UserError(f'{results} holds a run on other data ({config["images"]} images there, '
                        f'{described["images"]} here): choose another --results_dir')


def fingerprint(settings, data):
    """Identifies, by its settings and data, the run to which a state or a probe belongs."""
    kept = {name: value for name, value in settings.items() if name not in FREE}
    return digest([kept, data.classes, data.train_labels, data.test_labels])


def restore(results, saved, state, net, optimizer):
    """Put what open_run() returned into the network, the optimizer and the state of a run at its start.

    Raises:
        UserError: last.pth or log.csv is of another run. Nothing has been changed then.
    """
    if saved['run'] != state['run']:
        raise UserError(f'{results / "last.pth"} is the state of another run: restore the one of this run, or choose '
                        'another --results_dir')
    if (results / 'log.csv').exists():
        there, here = (pd.DataFrame(rows, columns=LOG)['train_loss'].astype(float)
                       for rows in (read_table(results / 'log.csv', LOG), saved['log']))
        n = min(len(there), len(here))  # a later epoch may have been logged, but not saved
        if not np.allclose(there[:n], here[:n], equal_nan=True):
            raise UserError(f'{results / "log.csv"} is not the log of the run in last.pth: remove it, and it is '
                            'written anew')
    net.load_state_dict(saved.pop('model'))
    optimizer.load_state_dict(saved.pop('optimizer'))
    state['losses'][:saved['step']] = saved.pop('losses')
    state.update(saved)


class Saver:
    """Writes a run's state, its kept encoders and its log, beside a GPU in a thread; ranks other than 0 do nothing."""

    def __init__(self, results, net, optimizer):
        self.results, self.net, self.optimizer, self.last = results, net, optimizer, time.monotonic()
        self.thread, self.writing = ThreadPoolExecutor(1), None

    def wait(self):
        """Return when all is written; UserError if something cannot be."""
        if self.writing:
            self.writing.result()

    def epoch_ended(self, state, keep):
        """Write the log; the encoder, if it is to be kept; and the state with it, or once a minute."""
        if keep or time.monotonic() - self.last > 60:
            self.save(state, keep)
        elif RANK == 0:
            self.wait()
            write_table(self.results / 'log.csv', state['log'], LOG)

    def save(self, state, keep=False):
        """Write last.pth, all that resuming needs, and the log; with keep, first the encoder as model_{epoch}.pth."""
        self.wait()
        self.last = time.monotonic()
        if RANK != 0:
            return

        def host(x):  # loads without a GPU; from one the copy is under way while training goes on
            return x.detach().to('cpu', non_blocking=True)

        weights, optimizer = {name: host(x) for name, x in self.net.state_dict().items()}, self.optimizer.state_dict()
        optimizer['state'] = {i: {name: host(x) for name, x in s.items()} for i, s in optimizer['state'].items()}
        whole = dict(state, model=weights, optimizer=optimizer, losses=host(state['losses'][:state['step']]))
        if state['losses'].is_cuda:
            copied = torch.cuda.current_stream().record_event()
            self.writing = self.thread.submit(self.write, whole, keep, copied)
        else:  # on a CPU a second thread would take cores from the training, a fifth of its speed
            self.write(whole, keep)

    def write(self, whole, keep, copied=None):
        if copied:
            copied.synchronize()
        if not all(value.isfinite().all() for value in whole['model'].values()):
            raise UserError(f'weights are not finite after epoch {whole["epoch"]}: not saved; the last good state in '
                            f'{self.results} is untouched')
        if keep:  # the row is the one in the log of later states
            whole['log'][-1]['encoder'] = write_tensors(self.results / f'model_{whole["epoch"]}.pth', whole['model'])
        write_tensors(self.results / 'last.pth', {**whole, 'digest': digest(whole)})
        write_table(self.results / 'log.csv', whole['log'], LOG)


def provenance(device):
    """What made the files of a run, for its JSON."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                    numpy=np.__version__, pillow=PIL.__version__, opencv=cv2.__version__)
    return dict(command=shlex.join(sys.argv), ranks=WORLD, device=device_name(device), versions=versions)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'


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


def read_run(directory):
    """The config.json of a run, its log (a DataFrame), its objective and data set as people name them, its identity.

    The identity holds the settings that decide results: runs that differ in the seed alone form a row of a table.

    Raises:
        UserError: naming what is missing or not of a run.
    """
    for name in ('config.json', 'log.csv'):
        if not (directory / name).is_file():
            raise UserError(f'{directory} is not the directory of a run: {name} is missing')
    run, log = read_json(directory / 'config.json'), read_table(directory / 'log.csv', LOG)
    settings = run['settings']
    run.update(log=log, objective=objective_name(settings), data=data_name(settings))
    run['identity'] = {name: value for name, value in settings.items() if name not in FREE} | dict(
        objective=run['objective'], data=run['data'], ranks=run['ranks'],
        images='{train} + {test}'.format(**run['images']))
    return run


def data_name(settings):
    """A data set as people call it: a folder by its own name."""
    return Path(settings['root']).absolute().name if settings['dataset_name'] == 'folder' else settings['dataset_name']


def objective_name(settings):
    """An objective as people write it: 'hard, τ⁺ = 0.1, β = 1'."""
    parts = [(True, settings['estimator']), (settings['tau_plus'], f'τ⁺ = {settings["tau_plus"]:g}'),
             (settings['beta'], f'β = {settings["beta"]:g}'), (settings['anneal'] == 'down', 'annealed'),
             (settings['oracle'], 'oracle'), (settings['positives'] == 'label', 'positives by label')]
    return ', '.join(text for there, text in parts if there)


def read_probe(directory, epochs, name):
    """Settings and last row of a finished probe of the encoder after so many epochs, or None and None.

    A probe of another encoder of that name does not count. If the encoder was deleted, its probe still counts.
    """
    file, checkpoint = directory / f'model_{epochs}_{name}.csv', directory / f'model_{epochs}.pth'
    if not file.exists() or not file.with_suffix('.json').exists():
        return None, None
    about, rows = read_json(file.with_suffix('.json')), read_table(file, PROBE)
    if checkpoint.exists() and about['encoder'] != hashlib.sha256(checkpoint.read_bytes()).hexdigest():
        return None, None
    settings = about['settings'] | {'command': about['command'], 'data': about.get('data')}
    return (settings, rows.iloc[-1]) if rows['epoch'].max() == settings['epochs'] else (None, None)


def accuracies(checkpoint):
    """The kNN accuracy (percent) of each encoder, by file name, in the log beside a checkpoint; none without a log.

    Raises:
        UserError: the log is damaged, or says that the checkpoint is another file than its run wrote.
    """
    if not checkpoint.with_name('log.csv').exists():
        return {}
    log = read_table(checkpoint.with_name('log.csv'), LOG)
    names = [f'model_{epoch:.0f}.pth' for epoch in log['epoch']]
    written = dict(zip(names, log['encoder'])).get(checkpoint.name)
    if not pd.isna(written) and written != zlib.crc32(checkpoint.read_bytes()):
        raise UserError(f'{checkpoint} is not what the run in {checkpoint.parent} wrote: move it elsewhere to use it')
    return {name: accuracy for name, accuracy in zip(names, log['test_acc@1']) if not pd.isna(accuracy)}
