"""What a run leaves in its directory, and how it is read back: config.json, log.csv, checkpoints and probes."""

import hashlib
import platform
import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import PIL
import torch
import torchvision

from files import crc, digest, lock, read_json, read_table, verified, write_json, write_table, write_tensors
from model import read_checkpoint
from runtime import UserError, ranks, say

LOG = ('epoch', 'train_loss', 'test_acc@1', 'test_acc@5', 'alignment', 'uniformity', 'rankme', 'lr', 'images/s',
       'seconds', 'encoder')  # encoder: CRC-32 of model_{epoch}.pth, if one was kept
PROBE = ('epoch', 'train_loss', 'train_acc@1', 'train_acc@5', 'test_loss', 'test_acc@1', 'test_acc@5')
PROBES = dict(linear='linear probe', linear_bn_train='probe, BatchNorm drifting',
              linear_cached='linear probe on cached features', logistic='logistic regression')  # by their files' names
LATER = dict(micro_batch=None, fit='crop', holdout=0.0, crop_min=0.08, jitter=1.0, grayscale=0.2, vertical_flip=False,
             init=None, label_fraction=1.0)  # settings that came after the first runs, at what the code had before
FREE = ('root', 'cache_dir', 'workers', 'results_dir', 'save_every', 'knn_every', 'compile')  # may change in a run
OBJECTIVE = ('estimator', 'tau_plus', 'beta', 'anneal')


def open_run(results, settings, data, device):
    """Lock the directory and refuse to mix runs in it.

    Returns the identity of the run, and what its last.pth holds, or None at the start.

    Raises:
        UserError: the directory holds another run, or one that cannot be continued. Nothing has been changed then.
    """
    lock(results)
    for path in results.glob('*.part'):
        if re.fullmatch(r'(config\.json|log\.csv|last\.pth|model_\d+\.pth)\.\d+\.part', path.name):
            path.unlink()  # of a run that was killed
    state_file, config_file = results / 'last.pth', results / 'config.json'
    described = dict(classes=data.classes, images=dict(train=len(data.train), test=len(data.test)),
                     data_digest=data.digest)
    if data.damaged:
        described['images'] |= dict(damaged=len(data.damaged), damaged_files=list(data.damaged))
    config = read_json(config_file) if config_file.exists() else None
    missing = [path.name for path in (config_file, state_file) if not path.exists()]
    trained = [path.name for path in sorted(results.glob('*'))  # model_0.pth alone: killed before the first state
               if re.fullmatch(r'model_[1-9]\d*\.pth|last\.pth|log\.csv', path.name)]
    saved = read_state(state_file, trained) if state_file.exists() else None
    differ = config and difference(results, config, settings, described)
    if differ and (trained and missing or saved and (saved['epoch'], saved['step']) != (0, 0)):
        raise UserError(differ)
    if trained and missing:
        raise UserError(f'{results} holds {", ".join(trained)} but no {" and no ".join(missing)}, so '
                        'the run there cannot be continued: choose another --results_dir')
    if differ:  # no step was taken, perhaps as memory was full: this run replaces it
        for path in state_file, results / 'log.csv':
            path.unlink(missing_ok=True)
        saved = None
    run = fingerprint(settings, data, by_content=not saved or 'data_digest' in config)
    if saved:
        if saved['run'] != run:
            raise UserError(f'{state_file} is the state of another run: restore the one of this run, or choose another '
                            '--results_dir')
        check_log(results / 'log.csv', saved['log'])
        if 'data_digest' not in config:
            say(f'{results} was begun by an earlier version: its images are compared by number and label alone')
    else:
        write_json(config_file, dict(settings=settings, **described, **provenance(device)))
    return run, saved


def read_state(file, trained):
    """What a last.pth holds; UserError, naming what else there is, if it is damaged."""
    try:
        return verified(read_checkpoint(file), file)
    except UserError as error:
        raise UserError(f'{error}. The run cannot be continued; beside it is {", ".join(trained)}. Choose another '
                        '--results_dir, or restore the file from a copy') from None


def difference(results, config, settings, described):
    """How the run of a config.json differs in settings or data from the one described, in a line; '' if it does not."""
    before, now = {**LATER, **config['settings']}, {**LATER, **settings}
    differ = [f'--{name} {before.get(name)} there, {now.get(name)} here'
              for name in {**before, **now} if name not in FREE and before.get(name) != now.get(name)]
    if differ:
        return (f'{results} holds a run with other settings ({"; ".join(differ)}): choose another --results_dir, or '
                'repeat its settings to continue it')
    if any(config.get(name, value) != value for name, value in described.items()):
        return (f'{results} holds a run on other data ({config["images"]} images there, {described["images"]} here): '
                'choose another --results_dir')
    return ''


def deciding(settings):
    """The settings that decide results, without later ones at the values that the code had before them."""
    return {name: value for name, value in settings.items() if name not in FREE and (name, value) not in LATER.items()}


def fingerprint(settings, data, by_content=True):
    """Identifies a run by its settings and data: by their content, or, as runs without its digest do, by labels."""
    known = [data.digest] if by_content else [data.classes, data.train_labels, data.test_labels]
    return digest([deciding(settings), *known])


def check_log(file, rows):
    """UserError if a log.csv is not that of the rows in last.pth."""
    if file.exists():
        there, here = (pd.DataFrame(log, columns=LOG)['train_loss'].astype(float)
                       for log in (read_table(file, LOG), rows))
        n = min(len(there), len(here))  # a later epoch may have been logged, but not saved
        if not np.allclose(there[:n], here[:n], equal_nan=True):
            raise UserError(f'{file} is not the log of the run in last.pth: remove it, and it is written anew')


def restore(saved, state, net, optimizer, scaler):
    """Put what open_run() returned into the network, the optimizer, the scaler and the state of a run at its start."""
    net.load_state_dict(saved.pop('model'))
    optimizer.load_state_dict(saved.pop('optimizer'))
    scaler.load_state_dict(saved.pop('scaler', {}))
    state['losses'][:saved['step']] = saved.pop('losses')
    state['skipped'] += saved.pop('skipped', 0)
    state.update(saved)


class Saver:
    """Writes a run's state, its kept encoders and its log, on a GPU in a background thread. Other ranks do nothing."""

    def __init__(self, results, net, optimizer, scaler):
        self.results, self.net, self.optimizer, self.scaler = results, net, optimizer, scaler
        self.thread, self.writing, self.last = ThreadPoolExecutor(1), None, time.monotonic()

    def wait(self):
        """Return when all is written; UserError if something cannot be."""
        if self.writing:
            self.writing.result()

    def due(self):
        """Whether the last state is ten minutes old."""
        return time.monotonic() - self.last > 600

    def epoch_ended(self, state, keep):
        """Write the log; the encoder, if it is to be kept; and the state with it, or once a minute."""
        if keep or time.monotonic() - self.last > 60:
            self.save(state, keep)
        elif ranks().rank == 0:
            self.wait()
            write_table(self.results / 'log.csv', state['log'], LOG)

    def save(self, state, keep=False, buffers=None):
        """Write last.pth, all that resuming needs, and the log; with keep, first the encoder as model_{epoch}.pth.

        Args:
            buffers: by name, values that replace the network's own.
        """
        self.wait()
        self.last = time.monotonic()
        if ranks().rank != 0:
            return

        def host(x):  # loads without a GPU; from one the copy is under way while training goes on
            return x.detach().to('cpu', non_blocking=True)

        weights = {name: host(x) for name, x in {**self.net.state_dict(), **(buffers or {})}.items()}
        optimizer = self.optimizer.state_dict()
        optimizer['state'] = {i: {name: host(x) for name, x in s.items()} for i, s in optimizer['state'].items()}
        whole = dict(state, model=weights, optimizer=optimizer, scaler=self.scaler.state_dict(),
                     losses=host(state['losses'][:state['step']]), skipped=host(state['skipped']))
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
    return dict(command=shlex.join(sys.argv), ranks=ranks().world, device=device_name(device), versions=versions)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'


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
    run['identity'] = deciding(settings) | dict(objective=run['objective'], data=run['data'], ranks=run['ranks'],
                                  images='{train} + {test}'.format(**run['images']))
    return run


def name_data(found):
    """Give every data set of the runs found a name of its own, in their identity too: the same data have one name.

    Data are known by their digest; those of a run without one by classes and numbers of images.
    """
    labels, keys, names = [(run['classes'], run['images']) for run in found], [], {}
    for run, own in zip(found, labels):
        alike = {other['data_digest'] for other, its in zip(found, labels) if 'data_digest' in other and its == own}
        key = alike.pop() if len(alike) == 1 else digest([run['data'], *own])
        keys.append(run.get('data_digest', key))
        names.setdefault(keys[-1], run['data'])
    for run, key in zip(found, keys):
        shared = list(names.values()).count(names[key]) > 1
        run['data'] = run['identity']['data'] = names[key] + f' ({key[:8]})' * shared


def is_data_of(about, data):
    """Whether a config.json, or the JSON of a probe, is of the data: by its digest; if older, by labels or counts."""
    if about.get('data_digest'):
        return about['data_digest'] == data.digest
    if about.get('data'):  # an older probe's
        return about['data'] == fingerprint({}, data, by_content=False)
    return about.get('classes') == data.classes and about['images']['test'] == len(data.test)


def data_name(settings):
    """A data set as people call it: a folder by its own name."""
    return Path(settings['root']).absolute().name if settings['dataset_name'] == 'folder' else settings['dataset_name']


def objective_name(settings):
    """An objective as people write it: 'hard, τ⁺ = 0.1, β = 1'."""
    parts = [(True, settings['estimator']), (settings['tau_plus'], f'τ⁺ = {settings["tau_plus"]:g}'),
             (settings['beta'], f'β = {settings["beta"]:g}'), (settings['anneal'] == 'down', 'annealed'),
             (settings['oracle'], 'oracle'), (settings['positives'] == 'label', 'positives by label')]
    return ', '.join(text for there, text in parts if there)


def read_probe(directory, epochs, name, data_digest=None):
    """Settings and last row of a finished probe of the encoder after so many epochs, or None and None.

    A probe of another encoder of that name, or on data of another digest, does not count. If the encoder was deleted,
    its probe still counts.
    """
    file, checkpoint = directory / f'model_{epochs}_{name}.csv', directory / f'model_{epochs}.pth'
    if not file.exists() or not file.with_suffix('.json').exists():
        return None, None
    about, rows = read_json(file.with_suffix('.json')), read_table(file, PROBE)
    known = (crc(checkpoint), hashlib.sha256(checkpoint.read_bytes()).hexdigest()) if checkpoint.exists() else ()
    other = known and about['encoder'] not in known  # an earlier version wrote the SHA-256
    if other or None not in (data_digest, about.get('data_digest')) and data_digest != about['data_digest']:
        return None, None
    settings = about['settings'] | {name: about.get(name) for name in ('command', 'data', 'data_digest')}
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
    if not pd.isna(written) and written != crc(checkpoint):
        raise UserError(f'{checkpoint} is not what the run in {checkpoint.parent} wrote: move it elsewhere to use it')
    return {name: accuracy for name, accuracy in zip(names, log['test_acc@1']) if not pd.isna(accuracy)}


def markdown(rows):
    """A table for people, from rows of cells, the first of which are heads."""
    head, *rows = [[' '.join(str(cell).replace('|', '\\|').splitlines()) for cell in row] for row in rows]
    return ''.join(f'| {" | ".join(row)} |\n' for row in [head, ['---'] * len(head), *rows])
