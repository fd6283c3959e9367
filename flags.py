"""Flags: a parser whose errors are one line, the types of values, and the data's flags, which both scripts have."""

import argparse
import sys

from runtime import RANK

DATASETS = ('stl10', 'cifar10', 'cifar100', 'folder', 'shapes')
DATA = dict(dataset_name='stl10', root='data', store_size=0, cache_dir=None, skip_damaged=False, image_size=32,
            test_size=0)  # defaults, as published


class Help(argparse.HelpFormatter):
    """Every help text ends with its default, unless it tells it itself or the default is nothing."""

    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        told = nothing or 'default' in action.help
        return action.help if told else f'{action.help} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said once for all ranks. `--flag = value` is read as DCL's README prints it."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        kept = [word for before, word in zip(['', *words], words) if word != '=' or before[:2] != '--']
        return super().parse_known_args(kept, namespace)

    def error(self, message):
        self.exit(2, f'{self.prog}: error: {message}\n' if RANK == 0 else None)


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


def integer(low, high):
    return number(int, f'an integer from {low} to {high}', lambda x: low <= x <= high)


def real(low, high):
    return number(float, f'a number from {low} to {high}', lambda x: low <= x <= high)


def positive(high):
    return number(float, f'a positive number of at most {high}', lambda x: 0 < x <= high)


epochs, epochs_or_0 = integer(1, 1_000_000), integer(0, 1_000_000)
images = integer(1, 1_000_000)
seed = integer(0, 2**32 - 1)
store_size = number(int, '0 or an integer from 8 to 1024', lambda x: x == 0 or 8 <= x <= 1024)


def boolean(value):
    """An argparse type: True/False, yes/no, 1/0."""
    if value.lower() not in ('true', 'yes', '1', 'false', 'no', '0'):
        raise argparse.ArgumentTypeError(f'must be True/False, yes/no or 1/0, got {value!r}')
    return value.lower() in ('true', 'yes', '1')


def path(value):
    """An argparse type: the name of a file or directory."""
    if not value.strip() or '\0' in value:
        raise argparse.ArgumentTypeError(f'must name a file or directory, got {value!r}')
    return value


def add_data_flags(group):
    """Add the flags that name a data set and its sizes, without defaults: DATA holds those."""
    group.add_argument('--root', type=path, help='directory of the data set; stl10 and cifar are downloaded to it')
    group.add_argument('--dataset_name', choices=DATASETS, help='what to train on')
    group.add_argument('--store_size', type=store_size,
                       help='pixels at which a folder\'s images are kept; 0: their own if all are squares of one size, '
                            'at most 256, else 96')
    group.add_argument('--cache_dir', type=path, help='where they are kept, decoded (default: in the folder, or where '
                                                      'that cannot be written, in the user\'s cache directory)')
    group.add_argument('--skip_damaged', action='store_true', default=None, help='leave out its damaged files')
    group.add_argument('--image_size', type=integer(8, 512), help='pixels of the training views')
    group.add_argument('--test_size', type=integer(0, 1024),
                       help='pixels of the test images and of the kNN memory; 0: their own, 96 for stl10')


def fill_data_flags(args, settings):
    """Give the data flags that were not given the values of a run's settings, or DATA's.

    Sizes of views and tests belong to the run's encoder, the others to its data set: they go to no other one.
    """
    if args.dataset_name not in (None, settings.get('dataset_name')):
        settings = {name: value for name, value in settings.items() if name in ('image_size', 'test_size')}
    for name, default in DATA.items():
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name, default))
