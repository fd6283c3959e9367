"""Command-line flags: a parser with errors of one line, checked types, flags that scripts share."""

import argparse
import difflib
import os
import sys

import torch

from hardneg import runtime
from hardneg.decoding import FITS
from hardneg.folder import TEST, own_size, short_side
from hardneg.runtime import UsageError, UserError, ranks, say
from hardneg.timm_models import is_timm

MODEL_PATH = 'results/model_400.pth'
PUBLISHED = ('standard', 'debiased', 'hard')  # SimCLR, DCL and HCL
DATASETS = ('stl10', 'cifar10', 'cifar100', 'folder', 'shapes')
# Values of the data's and the views' flags that are given neither by the user nor by a run
DATA = dict(
    root='data',
    dataset_name='stl10',
    store_size=0,
    fit='crop',
    holdout=0.0,
    cache_dir=None,
    skip_damaged=False,
    image_size=32,
    test_size=0,
)
VIEWS = dict(
    blur='published',
    crop_min=0.08,
    jitter=1.0,
    grayscale=0.2,
    horizontal_flip=0.5,
    vertical_flip=0.0,
)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, said once for all ranks.

    `--flag = value` is read as DCL's README prints it, and -5e-1 as a number.
    """

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:]
        if args is not None:
            words = list(args)
        kept = []
        for i, word in enumerate(words):
            lone = word == '=' and i > 0 and words[i - 1].startswith('--')
            if not lone:
                kept.append(_not_a_flag(word))
        return super().parse_known_args(kept, namespace)

    def parse_args(self, args=None, namespace=None):
        settings, unknown = self.parse_known_args(args, namespace)
        if unknown:
            message = f'unrecognized arguments: {" ".join(unknown)}'
            flag = unknown[0].partition('=')[0]
            known = [name for name in self._option_string_actions if name.startswith('--')]
            near = [name for name in known if name.startswith(flag)]
            near += difflib.get_close_matches(flag, known)
            if near and len(flag) > len('--'):
                message += f'. Did you mean {near[0]}?'
            self.error(message)
        return settings

    def error(self, message):
        text = None
        if ranks().rank == 0:
            text = f'{self.prog}: error: {message}\n'
        self.exit(2, text)


def _not_a_flag(word):
    """A negative number with a space before it, which argparse would take for a flag."""
    try:
        if word.startswith('-') and float(word) <= 0:
            return f' {word}'
    except ValueError:
        pass
    return word


# Types of values


def number(kind, text, valid):
    """An argparse type: a number of this kind for which valid(number) holds, described by text."""

    def parse(value):
        try:
            x = kind(value)
            if valid(x):
                return x
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f'must be {text}, got {value.strip()!r}')

    return parse


def real_number(text):
    return float(text) + 0.0  # -0 becomes 0


def integer(low, high):
    return number(int, f'an integer from {low} to {high}', lambda x: low <= x <= high)


def real(low, high):
    return number(real_number, f'a number from {low} to {high}', lambda x: low <= x <= high)


def positive(high):
    return real(1e-30, high)  # the inverse of a smaller one overflows float32


count = integer(1, 1_000_000)
seed = integer(0, 2**32 - 1)
fraction = number(real_number, 'in [0, 1)', lambda x: 0 <= x < 1)
part = number(real_number, 'in (0, 1]', lambda x: 0 < x <= 1)
store_size = number(int, '0 or an integer from 8 to 1024', lambda x: x == 0 or 8 <= x <= 1024)


def boolean(value):
    """An argparse type: True/False, yes/no, 1/0."""
    if value.lower() in ('true', 'yes', '1'):
        return True
    if value.lower() in ('false', 'no', '0'):
        return False
    raise argparse.ArgumentTypeError(f'must be True/False, yes/no or 1/0, got {value!r}')


def path(value):
    """An argparse type: the name of a file or directory, with ~ expanded.

    A shell leaves the ~ in --flag=~/name.
    """
    name = os.path.expanduser(value)
    whole = os.fsencode(name)
    too_long = len(whole) >= 4000 or any(len(part) >= 256 for part in whole.split(b'/'))
    no_home = name.split('/')[0] == '~'
    if not name.strip() or '\0' in name or no_home or too_long:
        raise argparse.ArgumentTypeError(
            f'must be the name of a file or directory, got {value!r:.80}'
        )
    return name


# Flags that scripts share


def add_data_flags(parser, title):
    """Add the flags of the data set. Each is None if it is not given."""
    group = parser.add_argument_group(title)
    group.add_argument(
        '--root',
        type=path,
        help='directory of the data set, to which stl10 and cifar are downloaded (data)',
    )
    group.add_argument('--dataset_name', choices=DATASETS, help='data set (stl10)')
    group.add_argument(
        '--store_size',
        type=store_size,
        help="pixels at which a folder's images are kept (for views above 64 px: 8/7 of them; else "
        '0, which is their own size if they are squares of at most 256 px, else 96)',
    )
    group.add_argument(
        '--fit',
        choices=FITS,
        help="how a folder's images become squares: centre crop, squeeze, or pad with white (crop)",
    )
    group.add_argument(
        '--holdout',
        type=real(0, 0.9),
        help="take a folder's directories as classes; test with this part of the images (0)",
    )
    group.add_argument(
        '--cache_dir',
        type=path,
        help='where decoded images are kept ($XDG_CACHE_HOME/hardneg, or else ~/.cache/hardneg)',
    )
    group.add_argument(
        '--skip_damaged',
        action='store_true',
        default=None,
        help='leave out files of a folder that are damaged, or too large (179 megapixels)',
    )
    group.add_argument(
        '--image_size',
        type=integer(8, 512),
        help='pixels of the training views (32; of a folder whose images have a median short side '
        'above 64 px, that side, at most 224)',
    )
    group.add_argument(
        '--test_size',
        type=integer(0, 1024),
        help='pixels of the images that monitor and probe test; 0: their own (0)',
    )


def add_seeds(parser):
    """Give the parser --seeds, of which a standard deviation needs two."""
    parser.add_argument(
        '--seeds',
        type=integer(2, 1000),
        default=5,
        help='runs of each objective (%(default)s)',
    )


def add_model_path(group, default=MODEL_PATH, note=MODEL_PATH):
    """The flags of the scripts that read an encoder. note tells the default."""
    group.add_argument(
        '--model_path',
        type=path,
        default=default,
        help=f"checkpoint, or timm/NAME: timm's weights ({note})",
    )
    add_encoder(group)


def add_encoder(group):
    """The flags that tell which encoder a checkpoint holds."""
    group.add_argument(
        '--arch',
        type=timm_name,
        help="timm/NAME, of a file of timm's weights (as in the config.json beside the checkpoint)",
    )
    add_prefix(group)


def timm_name(value):
    """An argparse type: timm/NAME."""
    if is_timm(value):
        return value
    raise argparse.ArgumentTypeError(f'must be timm/NAME, got {value!r}')


def add_prefix(group):
    group.add_argument(
        '--prefix',
        help='which encoder to take from a checkpoint that holds several: the prefix of its names '
        "in the state_dict, such as MoCo's encoder_q. (the only encoder's)",
    )


def add_view_flags(parser, title):
    """Add the flags of the random views, and return their group. Each is None if not given."""
    group = parser.add_argument_group(title)
    group.add_argument(
        '--blur',
        choices=('published', 'none'),
        help='Gaussian blur with a kernel of a tenth of the view, or none (published)',
    )
    group.add_argument('--crop_min', type=part, help='smallest part of the area in a crop (0.08)')
    group.add_argument(
        '--jitter',
        type=real(0, 2.5),
        help='strength of the changes in brightness, contrast, saturation and hue; 0: none (1)',
    )
    group.add_argument(
        '--grayscale', type=real(0, 1), help='probability that a view loses its colours (0.2)'
    )
    group.add_argument(
        '--horizontal_flip',
        type=real(0, 1),
        metavar='P',
        help='probability that a view is mirrored; 0 for text, signs and radiographs (0.5)',
    )
    group.add_argument(
        '--vertical_flip',
        type=real(0, 1),
        metavar='P',
        nargs='?',
        const=0.5,
        help='probability that a view is upside down; the bare flag: 0.5, for satellite or '
        'microscope images (0)',
    )
    return group


def add_precision(group, what):
    """The flag --precision of what computes, None if it is not given."""
    group.add_argument(
        '--precision',
        choices=('bf16', 'fp16', 'tf32', 'fp32'),
        help=f'number format of {what}; tf32: exact but for convolutions on a GPU (bf16 where the '
        'machine is faster with it, else fp32)',
    )


def default_precision(arch):
    """The precision in which this machine computes fastest with a network, 'bf16' or 'fp32'.

    On CPUs many of timm's models are slower in bf16 than in fp32.
    """
    if is_timm(arch) and not torch.cuda.is_available():
        return 'fp32'
    return runtime.default_precision()


def fill_precision(args, settings=None, arch=''):
    """Give --precision, where not given, its value in settings or this machine's, and say so."""
    if args.precision is None:
        fill(args, dict(precision=default_precision(arch)), settings)
        say(f'Precision: {args.precision} (change it with --precision)')


def fill(args, defaults, settings=None):
    """Give the flags named in defaults, where not given, their values in settings or defaults.

    Raises:
        UserError: a setting is of another kind than its default, as after a slip in editing.
    """
    for name, default in defaults.items():
        if getattr(args, name) is not None:
            continue
        value = (settings or {}).get(name, default)
        number = isinstance(default, (int, float)) and isinstance(value, (int, float))
        if default is not None and not number and not isinstance(value, type(default)):
            raise UserError(f'config.json: {name} is {value!r}, not a value like {default!r}')
        setattr(args, name, value)


def fill_data_flags(args, settings):
    """Give the data's flags that were not given the values of a run's settings, or the defaults.

    Sizes, and what makes images square, are the encoder's and so always taken from the run. The
    others describe the run's data set alone.

    Args:
        settings: those of the run, as runs.read_config() gives them, or {}.
    """
    if args.dataset_name is None and not settings:
        say(
            'No config.json of a run lies beside the checkpoint: the data set is stl10, as '
            'published'
        )
    taken = settings
    if args.dataset_name not in (None, settings.get('dataset_name')):
        encoders = 'image_size', 'test_size', 'store_size', 'fit'
        taken = {name: settings[name] for name in encoders if name in settings}
    fill(args, DATA, taken)
    tell_root(args, settings)


def tell_root(args, settings):
    """Say where the data are looked for, if the run with these settings had its data elsewhere."""
    without_files = 'shapes' in (args.dataset_name, settings.get('dataset_name'))
    if without_files or not settings.get('root'):
        return
    here = os.path.abspath(args.root)
    there = os.path.abspath(settings['root'])
    if here != there:
        say(f'Looking for {args.dataset_name} in {here}; the data of the run were in {there}')


def check_views(image_size, stem):
    """Raise UsageError if an encoder with this stem cannot train on views of image_size px."""
    if stem == 'imagenet' and image_size <= 16:
        # Layer 4 would see a single pixel, for which torch's gradient in bf16 on CPUs is wrong.
        raise UsageError(
            f'--stem imagenet needs views of more than 16 px, not {image_size}: choose --stem cifar'
        )


def recipe(settings):
    """What augment.draw() takes, from the settings of a run."""
    values = {name: settings.get(name, default) for name, default in VIEWS.items()}
    values['blur'] = values['blur'] == 'published'
    return values


def choose_sizes(args, found, before):
    """Give sizes and stem, where not given, values that fit the images.

    Args:
        found: folder.Folder of a folder data set, or None.
        before: settings of the run that the directory holds, which come first, or {}.
    """
    side = None
    if found and not before:
        side = short_side(found.root, found.files)
    if not side:
        sizes = {name: DATA[name] for name in ('image_size', 'test_size', 'store_size')}
        fill(args, dict(sizes, stem='cifar'), before)
        return
    image_size = DATA['image_size']
    if side > 64:
        image_size = min(224, side)
    fill(args, dict(image_size=image_size, test_size=DATA['test_size']))
    store_size, stem = DATA['store_size'], 'cifar'
    if args.image_size > 64:
        store_size, stem = round(args.image_size * 8 / 7), 'imagenet'
    fill(args, dict(store_size=store_size, stem=stem))
    report_sizes(args, found, side)


def report_sizes(args, found, side):
    """Say which sizes the images of a Folder are kept and seen in; side is their median."""
    n = len(found.files)
    kept = args.store_size or own_size(found.root, found.files[:1000])  # decoding reads all
    views = args.views * int((found.parts != TEST).sum())
    stem, flag = '', ''
    if args.stem != 'none':  # timm's models have their own
        stem, flag = f", the stem is {args.stem}'s", ', --stem'
    say(
        f'{found.root}: {n:,} images, the median of whose short sides is {side} px, are kept '
        f'at {kept} px, which takes {n * 3 * kept**2 / 1e9:.2f} GB.\n'
        f'Views have {args.image_size} px{stem}; an epoch is {views:,} views. Other values: '
        f'--image_size, --store_size{flag}'
    )


def resolve_objective(args):
    """Give the objective's flags their final values, and warn about those without effect.

    Raises:
        UsageError: they contradict each other.
    """
    estimator = args.estimator
    if estimator == 'easy':
        estimator = 'standard'
    if args.debiased is False and estimator in ('hard', 'debiased'):
        raise UsageError(f'--debiased False contradicts --estimator {estimator}')
    if args.debiased and estimator == 'standard':
        raise UsageError(f'--debiased True contradicts --estimator {args.estimator}')
    if args.oracle and (args.debiased or estimator == 'debiased'):
        raise UsageError(
            '--oracle leaves no false negatives, for which the debiased objective would correct: '
            'choose one'
        )
    if estimator is None:
        estimator = _implied_estimator(args)
    if estimator not in PUBLISHED and args.debiased is not None:
        raise UsageError(f'--debiased has no meaning for --estimator {estimator}')
    args.estimator = estimator
    del args.debiased
    if estimator not in PUBLISHED:  # a method of the user's own, which gets what was given
        fill(args, dict(tau_plus=0.0, beta=0.0, anneal='none'))
        return
    hard = estimator == 'hard'
    corrected = estimator != 'standard' and not args.oracle
    _set_or_tell(args, 'tau_plus', acts=corrected, default=0.1, off=0.0)
    _set_or_tell(args, 'beta', acts=hard, default=1.0, off=0.0)
    _set_or_tell(args, 'anneal', acts=hard, default='none', off='none')


def _implied_estimator(args):
    """The estimator that --debiased, --oracle and --beta mean."""
    if args.debiased is False:
        return 'standard'
    if args.debiased:
        return 'hard' if args.beta else 'debiased'
    if args.oracle and not args.beta:
        return 'standard'
    return 'hard'


def _set_or_tell(args, name, acts, default, off):
    """Give a flag that was not given its default, and one that does not act its value `off`."""
    given = getattr(args, name)
    if not acts:
        if given not in (None, off):
            oracle = ' with --oracle' if args.oracle else ''
            say(f'--{name} {given} has no effect on the {args.estimator} objective{oracle}')
        setattr(args, name, off)
    elif given is None:
        setattr(args, name, default)
