"""Flags: a parser whose errors are one line, the types of values, and the data's flags, which both scripts have."""

import argparse
import os
import sys

from decoding import FITS
from folder import own_size, short_side
from runtime import ranks, say


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said once for all ranks. `--flag = value` is read as DCL's README prints it."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        kept = [word for before, word in zip(['', *words], words) if word != '=' or before[:2] != '--']
        return super().parse_known_args([negative(word) for word in kept], namespace)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n' if ranks().rank == 0 else None)


def negative(word):
    """The word, or with a space before it if it is a number such as -5e-1, which argparse takes for a flag."""
    try:
        return f' {word}' if word[:1] == '-' and float(word) <= 0 else word
    except ValueError:
        return word


def number(kind, text, valid):
    """An argparse type: a number of this kind for which valid(number) holds, described by text."""
    def parse(value):
        try:
            x = kind(value)
        except ValueError:
            x = None
        if x is None or not valid(x):
            raise argparse.ArgumentTypeError(f'must be {text}, got {value!r}')
        return x
    return parse


def real_number(text):
    return float(text) + 0.0  # -0 is 0


def integer(low, high):
    return number(int, f'an integer from {low} to {high}', lambda x: low <= x <= high)


def real(low, high):
    return number(real_number, f'a number from {low} to {high}', lambda x: low <= x <= high)


def positive(high):
    return real(1e-30, high)  # smaller ones overflow float32 as divisors


SWITCH = argparse.BooleanOptionalAction
count = integer(1, 1_000_000)
fraction = number(real_number, 'in [0, 1)', lambda x: 0 <= x < 1)
seed = integer(0, 2**32 - 1)
path = number(os.path.expanduser, 'the name of a file or directory', lambda x: (
    x.strip() and '\0' not in x and x.split('/')[0] != '~' and len(os.fsencode(x)) < 4000
    and all(len(part) < 256 for part in os.fsencode(x).split(b'/'))))  # a shell leaves the ~ in --flag=~/name
store_size = number(int, '0 or an integer from 8 to 1024', lambda x: x == 0 or 8 <= x <= 1024)


def boolean(value):
    """An argparse type: True/False, yes/no, 1/0."""
    if value.lower() not in ('true', 'yes', '1', 'false', 'no', '0'):
        raise argparse.ArgumentTypeError(f'must be True/False, yes/no or 1/0, got {value!r}')
    return value.lower() in ('true', 'yes', '1')


def add(parser, title, *rows):
    """A group of flags from rows of name, default, type (or tuple of choices, or bool, or SWITCH) and help text."""
    group = parser.add_argument_group(title)
    for name, default, kind, text in rows:
        if kind is bool:
            how = dict(action='store_true', default=default)
        elif kind is SWITCH:
            how = dict(action=kind, default=default)
        elif isinstance(kind, (tuple, dict)):
            how = dict(choices=list(kind), type=type(next(iter(kind))), default=default)
        else:
            how = dict(type=kind, default=default)
        told = default is None or default is False or 'default' in text
        group.add_argument(name, help=text if told else f'{text} (default: {default})', **how)


DATASETS = ('stl10', 'cifar10', 'cifar100', 'folder', 'shapes')
DATA = (
    ('--root', 'data', path, 'directory of the data set; stl10 and cifar are downloaded to it'),
    ('--dataset_name', 'stl10', DATASETS, 'what to train on'),
    ('--store_size', 0, store_size, 'pixels at which a folder\'s images are kept (default for views above 64 px: a '
     'seventh more than them; else 0: their own if squares of at most 256 px, else 96)'),
    ('--fit', 'crop', FITS, 'how a folder\'s images become squares: the central one, all squeezed, all on white'),
    ('--holdout', 0.0, real(0, 0.9), 'take a folder\'s directories as classes; test with this part of the images'),
    ('--cache_dir', None, path, 'where decoded images are kept (default: in the folder, or else in ~/.cache)'),
    ('--skip_damaged', False, bool, 'leave out damaged files of a folder'),
    ('--image_size', 32, integer(8, 512), 'pixels of the training views (default: 32; of a folder whose images have '
     'a median short side above 64 px, that side, at most 224)'),
    ('--test_size', 0, integer(0, 1024), 'pixels of the images that the monitor and the probe test; 0: their own'),
)
VIEWS = (
    ('--blur', 'published', ('published', 'none'), 'a tenth of the view, or none as leftthomas has it'),
    ('--crop_min', 0.08, number(float, 'in (0, 1]', lambda x: 0 < x <= 1), 'smallest part of the area in a view'),
    ('--jitter', 1.0, real(0, 2.5), 'strength of the changes in brightness, contrast, saturation and hue; 0: none'),
    ('--grayscale', 0.2, real(0, 1), 'part of the views that lose their colours'),
    ('--vertical_flip', False, bool, 'flip half of the views upside down, as satellite and microscope images allow'),
)


def recipe(settings):
    """What augment.parameters() takes, from the settings of a run, older ones too, which lack the later flags."""
    values = {flag[2:]: settings.get(flag[2:], default) for flag, default, *_ in VIEWS}
    return values | {'blur': values['blur'] == 'published'}


def fill_data_flags(args, settings):
    """Give the data flags that were not given the values of a run's settings, or their defaults.

    Sizes of views and tests, and what makes images square, are the encoder's and always kept. The others describe the
    run's data set alone.
    """
    if args.dataset_name not in (None, settings.get('dataset_name')):
        always = 'image_size', 'test_size', 'store_size', 'fit'
        settings = {name: value for name, value in settings.items() if name in always}
    for flag, default, *_ in DATA:
        if getattr(args, flag[2:]) is None:
            setattr(args, flag[2:], settings.get(flag[2:], default))


def choose_sizes(args, found, before):
    """Give the sizes and the stem that were not given their values: those of the run that the directory holds, if its
    settings are `before`; those that fit the images of the Folder `found`; or the published ones."""
    side = short_side(found.root, found.files) if found and not before else None
    views = args.image_size or before.get('image_size') or (min(224, side) if side and side > 64 else 32)
    large = side is not None and views > 64
    fitting = dict(store_size=round(views * 8 / 7), stem='imagenet') if large else dict(store_size=0, stem='cifar')
    for name, value in dict(image_size=views, test_size=0, **fitting).items():
        if getattr(args, name) is None:
            setattr(args, name, before.get(name, value))
    if side:
        n, kept = len(found.files), args.store_size or own_size(found.root, found.files[:1000])  # decoding reads all
        say(f'{found.root}: {n:,} images, the median of whose short sides is {side} px, are kept at {kept} px, which '
            f'takes {n * 3 * kept**2 / 1e9:.2f} GB.\nViews have {views} px, the stem is {args.stem}\'s; an epoch is '
            f'{args.views * int((found.parts < 2).sum()):,} views. Other values: --image_size, --store_size, --stem')


def resolve_objective(parser, args):
    """Turn the objective's flags into the values that act. Contradictions are errors; what has no effect is told."""
    estimator = 'standard' if args.estimator == 'easy' else args.estimator
    if args.debiased is False and estimator in ('hard', 'debiased'):
        parser.error(f'--debiased False contradicts --estimator {estimator}')
    if args.debiased and estimator == 'standard':
        parser.error(f'--debiased True contradicts --estimator {args.estimator}')
    if args.oracle and (args.debiased or estimator == 'debiased'):
        parser.error('--oracle leaves no false negatives, for which the debiased objective would correct: choose one')
    if estimator is None and args.debiased is not None:
        estimator = 'standard' if not args.debiased else 'hard' if args.beta else 'debiased'
    args.estimator = estimator or ('standard' if args.oracle and not args.beta else 'hard')
    hard, corrected = args.estimator == 'hard', args.estimator != 'standard' and not args.oracle
    for name, acts, default, off in (('tau_plus', corrected, 0.1, 0.0), ('beta', hard, 1.0, 0.0),
                                     ('anneal', hard, 'none', 'none')):
        given = getattr(args, name)
        if given not in (None, off) and not acts:
            say(f'--{name} {given} has no effect on the {args.estimator} objective'
                + (' with --oracle' if args.oracle else ''))
        setattr(args, name, off if not acts else default if given is None else given)
    del args.debiased
