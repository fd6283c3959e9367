"""Flags: a parser whose errors are one line, the types of values, and the flags that both scripts have."""

import argparse

from runtime import RANK

DATASETS = ('stl10', 'cifar10', 'cifar100', 'folder', 'shapes')
DATA = dict(dataset_name='stl10', root='data', store_size=96, image_size=32, test_size=0)  # defaults, as published


class Help(argparse.HelpFormatter):
    """Every help text ends with its default, unless it tells it itself or the default is nothing."""

    def _get_help_string(self, action):
        nothing = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        told = nothing or 'default' in action.help
        return action.help if told else f'{action.help} (default: %(default)s)'


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said once for all ranks."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

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


positive_int = number(int, 'an integer of at least 1', lambda x: x >= 1)
positive = number(float, 'a positive number', lambda x: 0 < x < float('inf'))
non_negative = number(float, 'a number of at least 0', lambda x: 0 <= x < float('inf'))
seed = integer(0, 2**32 - 1)


def boolean(value):
    """An argparse type: True/False, yes/no, 1/0."""
    if value.lower() not in ('true', 'yes', '1', 'false', 'no', '0'):
        raise argparse.ArgumentTypeError(f'must be True/False, yes/no or 1/0, got {value!r}')
    return value.lower() in ('true', 'yes', '1')


def add_data_flags(group):
    """Add the flags that name a data set and its sizes, without defaults: DATA holds those."""
    group.add_argument('--root', help='directory of the data set; stl10 and cifar are downloaded to it')
    group.add_argument('--dataset_name', choices=DATASETS, help='what to train on')
    group.add_argument('--store_size', type=integer(8, 1024), help='pixels at which the images of a folder are kept')
    group.add_argument('--image_size', type=integer(8, 512), help='pixels of the training views')
    group.add_argument('--test_size', type=integer(0, 1024),
                       help='pixels of the test images and of the kNN memory; 0: their own, 96 for stl10')
