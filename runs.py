"""What a run leaves in its directory, and how it is read back: config.json, log.csv, checkpoints and probes."""

import hashlib
import io
import json
import os
import platform
import shlex
import sys
import time
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

LOG = ('epoch', 'train_loss', 'test_acc@1', 'test_acc@5', 'lr', 'images/s', 'seconds')
PROBE = ('epoch', 'train_loss', 'train_acc@1', 'train_acc@5', 'test_loss', 'test_acc@1', 'test_acc@5')
FREE = ('root', 'workers', 'results_dir', 'save_every', 'knn_every', 'compile')  # a resumed run may change these
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
    write(path, json.dumps(content, indent=2).encode())


def write_tensors(path, content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write(path, buffer.getbuffer())


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
    """Lock the directory, refuse to mix runs in it, and return the state to continue from, or None at the start."""
    lock(results)
    state_file, config_file = results / 'last.pth', results / 'config.json'
    kept = sorted(path.name for path in results.glob('model_*.pth'))
    described = dict(classes=data.classes, images=dict(train=len(data.train), test=len(data.test)))
    if config_file.exists():
        check_same_run(results, read_config(config_file), settings, described)
    missing = [path.name for path in (config_file, state_file) if not path.exists()]
    trained = [*kept, *(name for name in ('last.pth', 'log.csv') if (results / name).exists())]
    if trained and missing:
        raise UserError(f'{results} holds {", ".join(trained)} but no {" and no ".join(missing)}, so '
                        'the run there cannot be continued: choose another --results_dir')
    if not state_file.exists():
        write_json(config_file, dict(settings=settings, **described, **provenance(device)))
        return None
    try:
        state = read_checkpoint(state_file)
        if not isinstance(state, dict) or not {'model', 'optimizer', 'epoch', 'step', 'losses', 'log'} <= {*state}:
            raise UserError(f'{state_file}: not the state of a run')
    except UserError as error:
        raise UserError(f'{error}. The run cannot be continued; intact beside it: {", ".join(kept) or "nothing"}. '
                        'Choose another --results_dir, or restore the file from a copy') from None
    write_table(results / 'log.csv', state['log'], LOG)  # a later epoch may have been logged, but not saved
    return state


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


class Saver:
    """Writes a run's state, its kept encoders and its log; rank 0 does, the others do nothing."""

    def __init__(self, results, net, optimizer):
        self.results, self.net, self.optimizer, self.last = results, net, optimizer, time.monotonic()

    def epoch_ended(self, state, keep):
        """Write the log; the encoder, if it is to be kept; and the state with it, or once a minute."""
        if keep or time.monotonic() - self.last > 60:
            self.save(state, keep)
        elif RANK == 0:
            write_table(self.results / 'log.csv', state['log'], LOG)

    def save(self, state, keep=False):
        """Write last.pth, all that resuming needs, and the log; with keep, first the encoder as model_{epoch}.pth."""
        self.last = time.monotonic()
        if RANK != 0:
            return
        weights = {name: value.cpu() for name, value in self.net.state_dict().items()}  # loads without a GPU too
        if not all(value.isfinite().all() for value in weights.values()):
            raise UserError(f'weights are not finite after epoch {state["epoch"]}: not saved; the last good state in '
                            f'{self.results} is untouched')
        if keep:
            write_tensors(self.results / f'model_{state["epoch"]}.pth', weights)
        losses, optimizer = state['losses'][:state['step']], self.optimizer.state_dict()
        write_tensors(self.results / 'last.pth', dict(state, model=weights, optimizer=optimizer, losses=losses))
        write_table(self.results / 'log.csv', state['log'], LOG)


def provenance(device):
    """What made the files of a run, for its JSON."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                    numpy=np.__version__, pillow=PIL.__version__, opencv=cv2.__version__)
    return dict(command=shlex.join(sys.argv), ranks=WORLD, device=device_name(device), versions=versions)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'


def read_config(path):
    """The config.json of a run, its settings checked to be a dict; UserError if it is not."""
    try:
        config = json.loads(Path(path).read_text())
        if isinstance(config['settings'], dict) and {'classes', 'images'} <= {*config}:
            return config
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f'{path} is damaged or not of a run: restore it, or choose another place')


def read_run(directory):
    """The config.json of a run, its log (a DataFrame), and the objective's and the data set's names for people.

    Raises:
        UserError: naming what is missing or not of a run.
    """
    for name in ('config.json', 'log.csv'):
        if not (directory / name).is_file():
            raise UserError(f'{directory} is not the directory of a run: {name} is missing')
    run = read_config(directory / 'config.json')
    settings = run['settings']
    try:
        run['log'] = pd.read_csv(directory / 'log.csv')[list(LOG)].astype(float)
        run['objective'] = objective_name(**{name: settings[name] for name in OBJECTIVE}, oracle=settings['oracle'])
        folder = settings['dataset_name'] == 'folder'
        run['data'] = Path(settings['root']).absolute().name if folder else settings['dataset_name']
        run['identity'] = {name: value for name, value in settings.items() if name not in FREE}
        run['identity'] |= dict(objective=run['objective'], data=run['data'], ranks=run['ranks'],
                                images='{train} + {test}'.format(**run['images']))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{directory}: config.json or log.csv is not of a run ({error!r})') from None
    return run


OBJECTIVE = ('estimator', 'tau_plus', 'beta', 'anneal')


def objective_name(estimator, tau_plus, beta, anneal, oracle):
    """An objective as people write it: 'hard, τ⁺ = 0.1, β = 1'."""
    parts = [(True, estimator), (tau_plus, f'τ⁺ = {tau_plus:g}'), (beta, f'β = {beta:g}'),
             (anneal == 'down', 'annealed'), (oracle, 'oracle')]
    return ', '.join(text for there, text in parts if there)


def read_probe(directory, epochs, name):
    """Settings and last row of a finished probe of the run's last encoder, or None and None.

    A probe of an encoder that was there before does not count; where the encoder is gone, its probe does.
    """
    file, checkpoint = directory / f'model_{epochs}_{name}.csv', directory / f'model_{epochs}.pth'
    try:
        about = json.loads(file.with_suffix('.json').read_text())
        row, settings = pd.read_csv(file).iloc[-1], about['settings'] | {'command': about['command']}
        probed = not checkpoint.exists() or about['encoder'] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        if probed and row['epoch'] == settings['epochs']:
            return settings, row
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return None, None


def knn_accuracy(path):
    """'kNN x %, ' from the log beside a checkpoint, if it has one for the checkpoint's epoch."""
    try:
        rows = pd.read_csv(path.with_name('log.csv'))
        accuracy = rows.loc[rows['epoch'].astype(str) == path.stem.rpartition('_')[2], 'test_acc@1'].dropna()
    except (OSError, ValueError, KeyError):  # no log, or not one of ours
        return ''
    return f'kNN {accuracy.iloc[0]:.2f} %, ' if len(accuracy) else ''
