"""What a run writes, and how it is read back: config.json, log.csv, checkpoints, probes."""

import hashlib
import math
import os
import platform
import re
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import PIL
import torch
import torchvision

from hardneg import timm_models
from hardneg.files import (
    crc,
    delete_parts,
    lock,
    read_checkpoint,
    read_json,
    read_table,
    write_json,
    write_table,
    write_tensors,
)
from hardneg.runtime import UserError, ranks, say

# Columns of log.csv, of which an earlier one may lack all but the first two, and of a probe's .csv
LOG = (
    'epoch',
    'train_loss',
    'test_acc@1',
    'test_acc@5',
    'alignment',
    'uniformity',
    'rankme',
    'lr',
    'images/s',
    'seconds',
)
PROBE = (
    'epoch',
    'train_loss',
    'train_acc@1',
    'train_acc@5',
    'test_loss',
    'test_acc@1',
    'test_acc@5',
)
PROBES = {  # by the names of their files
    'linear': 'linear probe',
    'linear_bn_train': 'probe, BatchNorm drifting',
    'linear_cached': 'linear probe on cached features',
    'logistic': 'logistic regression',
}
# Settings that may change when a run resumes
FREE = ('root', 'cache_dir', 'workers', 'results_dir', 'save_every', 'knn_every', 'compile')
# Settings that are directories. A relative one is relative to the working directory and, in a JSON
# file, to the directory of the file, so that the file says from anywhere where the data lie.
PLACES = ('root', 'cache_dir')
NAMES = dict(standard='SimCLR', debiased='DCL', hard='HCL')  # of the published estimators
OBJECTIVE = ('estimator', 'tau_plus', 'beta', 'anneal')
# What a config.json and the .json of a probe hold
CONFIG = dict(
    settings=dict,
    classes=list,
    images=dict,
    data_digest=str,
    command=str,
    ranks=int,
    device=str,
    versions=dict,
)
ABOUT = dict(settings=dict, command=str, data_digest=str, encoder=(int, type(None)))
# What last.pth holds
STATE = (
    'settings',
    'data_digest',
    'epoch',
    'step',
    'seconds',
    'log',
    'losses',
    'model',
    'optimizer',
    'scaler',
)
SAVE_SECONDS = 600  # last.pth is not older while steps are taken


# A run that is going on


@dataclass
class Progress:
    """How far a run has come. Shuffles and views depend on (seed, epoch, step), so this is all.

    losses (steps,) are those of the epoch that has begun, step the number of its steps taken,
    seconds the time that they took; epoch is the number of epochs that have ended, log their rows.
    """

    losses: torch.Tensor
    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    log: list = field(default_factory=list)

    def epoch_ended(self, row):
        """Count the epoch, whose row of the log is a dict."""
        self.epoch += 1
        self.step = 0
        self.seconds = 0.0
        self.log.append(row)


def open_run(results, settings, defaults, data, device):
    """Lock the directory, and write config.json at the start of a run.

    Args:
        results: Path of the directory.
        settings: dict of all settings.
        defaults: dict of the values of settings that an earlier config.json may lack.
        data: utils.Data.
        device: torch.device.

    Returns the content of last.pth, or None at the start.

    Raises:
        UserError: the directory holds another run, or one that cannot be continued. Nothing has
            been changed then.
    """
    lock(results)
    delete_parts(results, r'(config\.json|log\.csv|last\.pth|model_\d+\.pth)')
    config_file, state_file = results / 'config.json', results / 'last.pth'
    images = dict(train=len(data.train), test=len(data.test))
    if data.damaged:
        images |= dict(damaged=len(data.damaged), damaged_files=list(data.damaged))
    config = dict(
        settings=settings,
        classes=data.classes,
        images=images,
        data_digest=data.digest,
        **provenance(device),
    )

    trained = _trained(results)
    missing = [path.name for path in (config_file, state_file) if not path.exists()]
    differ = ''
    code = None
    before = config_of(results)
    if before:
        differ = difference(results, before, config, defaults)
        code = before.get('code')
    if trained and missing:
        if differ:
            raise UserError(differ)
        raise UserError(
            f'{results} holds {", ".join(trained)} but no {" and no ".join(missing)}, so the run '
            'there cannot be continued: choose another --results_dir'
        )
    saved = None
    if state_file.exists():
        if differ:
            raise UserError(differ)
        saved = _read_state(state_file, trained)
        differ = difference(state_file, saved, config, defaults)
        if differ:
            raise UserError(differ)
        if code not in (None, config['code']):
            say(f'{results}: the code has changed since this run began')
    else:  # a run that took no step, perhaps because memory was full, is replaced
        write_config(config_file, config)
    return saved


def _trained(results):
    """The names of the files in the directory that a run writes once it has taken a step."""
    names = []
    for path in sorted(results.glob('*')):
        if re.fullmatch(r'model_[1-9]\d*\.pth|last\.pth|log\.csv', path.name):
            names.append(path.name)
    return names


def _read_state(file, trained):
    """The content of a last.pth; UserError if it is damaged, which says what lies beside it."""
    try:
        saved = read_checkpoint(file)
        if not isinstance(saved, dict) or not set(STATE) <= set(saved):
            raise UserError(f'{file} is not the state of a run')
    except UserError as error:
        raise UserError(
            f'{error}. The run cannot be continued; beside it is {", ".join(trained)}. Choose '
            'another --results_dir, or restore the file from a copy'
        ) from None
    return saved


def difference(place, there, here, defaults):
    """How settings or data of a run, dicts like a config.json, differ from others; '' if not."""
    before = {**defaults, **there['settings']}
    now = {**defaults, **here['settings']}
    differ = []
    for name in {**before, **now}:
        if name not in FREE and before.get(name) != now.get(name):
            differ.append(f'--{name} {before.get(name)} there, {now.get(name)} here')
    if differ:
        return (
            f'{place} holds a run with other settings ({"; ".join(differ)}): choose another '
            '--results_dir, or repeat its settings to continue it'
        )
    if there['data_digest'] != here['data_digest']:
        counts = ''
        if 'images' in there:
            counts = f' ({_counted(there["images"])} there, {_counted(here["images"])} here)'
        return (
            f'{place} holds a run on other data{counts}: choose another --results_dir. There, '
            '--init with a model_*.pth of this run keeps what it has learned'
        )
    return ''


def _counted(images):
    """How many images a config.json says that its data have, as a text."""
    return f'{images.get("train", "?")} training and {images.get("test", "?")} test images'


def restore(results, saved, progress, net, optimizer, scaler):
    """Put what open_run() returned into a run at its start.

    Raises:
        UserError: it does not fit.
    """
    try:
        net.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        progress.losses[: saved['step']] = saved['losses']
        if not all(x.isfinite().all() for x in saved['model'].values()):
            raise ValueError('its weights are not finite')
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(
            f'{results / "last.pth"} does not fit this run ({reason:.200}): restore it from a '
            'copy, or choose another --results_dir'
        ) from None
    progress.epoch = saved['epoch']
    progress.step = saved['step']
    progress.seconds = saved['seconds']
    progress.log = saved['log']


class Saver:
    """Writes a run's state, kept encoders and log; on a GPU, in a thread beside the training.

    Rank 0 writes; on other ranks the methods do nothing.

    Args:
        results: Path of the directory.
        identity: dict with the settings and the data_digest of the run.
        net, optimizer, scaler: what is saved.
        resumed: whether the directory has a state. If not, the first one is due at once.
    """

    def __init__(self, results, identity, net, optimizer, scaler, resumed=False):
        self.results = results
        self.identity = identity
        self.net = net
        self.optimizer = optimizer
        self.scaler = scaler
        self.thread = ThreadPoolExecutor(1)
        self.writing = None
        self.last = time.monotonic() if resumed else -math.inf

    def wait(self):
        """Return when all is written; UserError if it cannot be."""
        if self.writing:
            self.writing.result()

    def due(self):
        """Whether the last state is too old."""
        return time.monotonic() - self.last > SAVE_SECONDS

    def keep_untrained(self):
        """Write the network as model_0.pth."""
        if ranks().rank == 0:
            state = {name: x.cpu() for name, x in self.net.state_dict().items()}
            write_tensors(self.results / 'model_0.pth', state)

    def epoch_ended(self, progress, keep):
        """Write the log; the encoder, if it is kept; the state with it, or once a minute."""
        if keep or time.monotonic() - self.last > 60:
            self.save(progress, keep)
        elif ranks().rank == 0:
            self.wait()
            write_table(self.results / 'log.csv', progress.log, LOG)

    def save(self, progress, keep=False, buffers=None):
        """Write last.pth, which is all that resuming needs, and the log.

        Args:
            progress: Progress.
            keep: first write the encoder as model_{epoch}.pth.
            buffers: dict, by name, of values that replace the network's own.
        """
        self.wait()
        self.last = time.monotonic()
        if ranks().rank != 0:
            return
        optimizer = self.optimizer.state_dict()
        moments = {}
        for i, state in optimizer['state'].items():
            moments[i] = _on_host(state)
        whole = dict(
            self.identity,
            epoch=progress.epoch,
            step=progress.step,
            seconds=progress.seconds,
            log=list(progress.log),
            losses=progress.losses[: progress.step].to('cpu', non_blocking=True),
            model=_on_host({**self.net.state_dict(), **(buffers or {})}),
            optimizer={**optimizer, 'state': moments},
            scaler=self.scaler.state_dict(),
        )
        if progress.losses.is_cuda:
            copied = torch.cuda.current_stream().record_event()
            self.writing = self.thread.submit(self.write, whole, keep, copied)
        else:  # on a CPU a thread would take cores from the training
            self.write(whole, keep)

    def write(self, whole, keep, copied=None):
        if copied:
            copied.synchronize()
        epoch = whole['epoch']
        if not all(x.isfinite().all() for x in whole['model'].values()):
            raise UserError(
                f'weights are not finite after epoch {epoch}: not saved; the last good state in '
                f'{self.results} is untouched'
            )
        if keep:
            write_tensors(self.results / f'model_{epoch}.pth', whole['model'])
        write_tensors(self.results / 'last.pth', whole)
        write_table(self.results / 'log.csv', whole['log'], LOG)


def _on_host(tensors):
    """A dict of tensors on the CPU: the file then loads without a GPU."""
    return {name: x.detach().to('cpu', non_blocking=True) for name, x in tensors.items()}


def provenance(device):
    """What made the files of a run, as a dict for its JSON."""
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        numpy=np.__version__,
        pillow=PIL.__version__,
        opencv=cv2.__version__,
    )
    return dict(
        command=shlex.join(sys.argv),
        code=code_digest(),
        ranks=ranks().world,
        device=device_name(device),
        versions=versions,
    )


def code_digest():
    """A digest of the files that decide what a run computes."""
    home = Path(__file__).parents[1]
    files = [home / 'main.py', home / 'model.py', home / 'utils.py']
    digest = hashlib.sha256()
    for path in [*files, *sorted(Path(__file__).parent.glob('*.py'))]:
        if path.exists():  # where only the package is installed, the scripts are not
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def device_name(device):
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'CPU, {torch.get_num_threads()} threads'


# Runs that are read


def read_config(path, kinds=CONFIG):
    """The config.json of a run, as a dict, or None as read_json() gives it.

    Args:
        kinds: the type of what must be in it, by name.

    Raises:
        UserError: something is missing or of another type.
    """
    config = read_json(path)
    if config is None:
        return None
    for name, kind in kinds.items():
        if name not in config or not isinstance(config[name], kind):
            raise UserError(f'{path} is damaged or not of a run: {name} is missing or wrong')
    if not isinstance(config.get('code', ''), str):
        raise UserError(f'{path} is damaged or not of a run: code is not a digest')
    for name, value in config['settings'].items():
        if isinstance(value, (dict, list)):
            raise UserError(f'{path} is damaged or not of a run: {name} is not a setting')
    for name in PLACES:
        if not isinstance(config['settings'].get(name, ''), (str, type(None))):
            raise UserError(f'{path} is damaged or not of a run: {name} is not a directory')
    config['settings'] = _moved(config['settings'], Path(path).parent, '.')
    return config


def config_beside(source):
    """read_config() of the config.json beside a checkpoint; None for timm's weights, timm/NAME."""
    if timm_models.names_weights(source):
        return None
    return read_config(Path(source).with_name('config.json'))


def write_config(path, config):
    """Write a dict with settings as the JSON file that read_config() reads."""
    settings = _moved(config['settings'], '.', Path(path).parent)
    write_json(path, {**config, 'settings': settings})


def _moved(settings, old, new):
    """The settings, with PLACES that are relative to the directory old relative to new."""
    moved = dict(settings)
    for name in PLACES:
        place = settings.get(name)
        if place and not os.path.isabs(place):
            # The directory above a linked one is that above where the link leads.
            place = os.path.join(os.path.realpath(old), place)
            moved[name] = os.path.relpath(place, os.path.realpath(new))
    return moved


def config_of(results):
    """The config.json of the run in a directory, or None if no run is there.

    Raises:
        UserError: it is damaged, or another program's, which a run must not replace.
    """
    file = results / 'config.json'
    config = read_config(file)
    if config is None and file.exists():
        raise UserError(f"{file} is damaged or another program's: choose another --results_dir")
    return config


def has_begun(results):
    """Whether the run in a directory has left more than its config.json and untrained encoder."""
    return bool(_trained(results))


def read_run(directory, defaults=None):
    """The config.json and log.csv of a run.

    Args:
        directory: Path.
        defaults: dict of the values of settings that an earlier config.json may lack.

    Returns what find_run() does, and in it
        log: the log as a DataFrame.

    Raises:
        UserError: it names what is missing or not of a run.
    """
    run = find_run(directory, defaults)
    log = read_table(directory / 'log.csv', LOG, LOG[2:])
    for name, found in (('config.json', run), ('log.csv', log)):
        if found is None:
            raise UserError(
                f"{directory} is not the directory of a run: {name} is missing or another program's"
            )
    return run | dict(log=log)


def find_run(directory, defaults=None):
    """The run whose config.json lies in a directory, or None as read_config() gives it.

    Args:
        directory: Path.
        defaults: dict of the values of settings that an earlier config.json may lack.

    Returns the dict in config.json, and in it
        objective, data: their names as people write them,
        identity: the settings that decide results. Runs whose identities differ in the seed alone
            form a row of a table.

    Raises:
        UserError: it is damaged.
    """
    run = read_config(directory / 'config.json')
    if run is None:
        return None
    try:
        settings = run['settings'] = {**(defaults or {}), **run['settings']}
        run['objective'] = objective_name(settings)
        run['data'] = data_name(settings)
        run['identity'] = deciding(settings) | dict(
            objective=run['objective'],
            data=run['data'],
            ranks=run['ranks'],
            images=f'{run["images"]["train"]} + {run["images"]["test"]}',
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f'{directory / "config.json"} is damaged or not of a run ({error})'
        ) from None
    return run


def deciding(settings):
    """The settings that decide results."""
    return {name: value for name, value in settings.items() if name not in FREE}


def name_data(runs):
    """Give every data set of the runs a name of its own, in their identities too.

    Data are known by their digest: the same data get one name. Different data of one name get a
    part of their digest added.
    """
    names = {}
    for run in runs:
        names.setdefault(run['data_digest'], run['data'])
    for run in runs:
        name = names[run['data_digest']]
        if list(names.values()).count(name) > 1:
            name = f'{name} ({run["data_digest"][:8]})'
        run['data'] = run['identity']['data'] = name


def data_name(settings):
    """A data set as people call it: a folder by its own name."""
    if settings['dataset_name'] == 'folder':
        return os.path.basename(os.path.abspath(settings['root']))
    return settings['dataset_name']


def objective_name(settings):
    """An objective as people write it: 'HCL, τ⁺ = 0.1, β = 1'."""
    parts = [NAMES.get(settings['estimator'], settings['estimator'])]
    if settings['tau_plus']:
        parts.append(f'τ⁺ = {settings["tau_plus"]:g}')
    if settings['beta']:
        parts.append(f'β = {settings["beta"]:g}')
    if settings['anneal'] == 'down':
        parts.append('annealed')
    if settings['oracle']:
        parts.append('oracle')
    if settings['positives'] == 'label':
        parts.append('positives by label')
    return ', '.join(parts)


def read_probe(directory, epochs, name, data_digest=None):
    """Settings and last row of a finished probe of the encoder after so many epochs.

    Returns (None, None) if there is none, or if it is a probe of another encoder of that name or on
    data of another digest. The probe of an encoder that was deleted counts.
    """
    checkpoint = directory / f'model_{epochs}.pth'
    table = directory / f'model_{epochs}_{name}.csv'
    about_file = table.with_suffix('.json')
    about = read_config(about_file, ABOUT)
    rows = read_table(table, PROBE)
    if about is None or rows is None:
        return None, None
    if checkpoint.exists() and about['encoder'] != crc(checkpoint):
        return None, None
    if data_digest and about['data_digest'] != data_digest:
        return None, None
    settings = dict(about['settings'], command=about['command'])
    if rows['epoch'].max() != settings.get('epochs'):
        return None, None
    return settings, rows.iloc[-1]


def logged_accuracies(checkpoint):
    """The kNN accuracy (percent) of each encoder, by file name, in the log beside a checkpoint.

    Raises:
        UserError: the log is damaged.
    """
    log = read_table(checkpoint.with_name('log.csv'), LOG, LOG[2:])
    if log is None:
        return {}
    measured = log.dropna(subset='test_acc@1')
    return {
        f'model_{epoch:.0f}.pth': accuracy
        for epoch, accuracy in zip(measured['epoch'], measured['test_acc@1'])
    }


def markdown(rows):
    """A table for people, from rows of cells; the first row is the head."""
    lines = []
    for row in rows:
        cells = [' '.join(str(cell).replace('|', '\\|').splitlines()) for cell in row]
        lines.append(f'| {" | ".join(cells)} |\n')
        if len(lines) == 1:
            lines.append(f'| {" | ".join(["---"] * len(row))} |\n')
    return ''.join(lines)
