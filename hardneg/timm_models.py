"""timm's models as backbones f, by the name `timm/NAME` or `timm/NAME.TAG`.

timm is optional. The tag names pretrained weights. timm's configuration of a tag says how inputs
are normalised, and at which size the weights were trained.
"""

import difflib
import zlib
from pathlib import Path

import torch

from hardneg import files
from hardneg.runtime import UsageError, UserError

PREFIX = 'timm/'


def is_timm(arch):
    return arch.startswith(PREFIX)


def library():
    """The module timm; UserError if it is not installed."""
    try:
        import timm
    except ImportError:
        raise UserError(f'{PREFIX}NAME needs the package timm: pip install timm') from None
    return timm


def full_name(arch):
    """`timm/NAME.TAG`, with timm's default tag if arch has none, or `timm/NAME` without weights.

    Raises:
        UsageError: timm has no such model, or no such weights of it.
    """
    timm = library()
    name, _, tag = arch.removeprefix(PREFIX).partition('.')
    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), cutoff=0.4)
        others = ', '.join(nearest) or 'timm.list_models() has all'
        raise UsageError(f'timm has no model {name!r}: {others}')
    tags = [known.partition('.')[2] for known in timm.list_pretrained(f'{name}.*')]
    if not tag:
        tag = timm.get_pretrained_cfg(name).tag
        if tag not in tags:  # none, or 'untrained'
            return f'{PREFIX}{name}'
    if tag not in tags:
        raise UsageError(f'timm has no weights {tag!r} of {name}: {", ".join(tags) or "none"}')
    return f'{PREFIX}{name}.{tag}'


def create(arch, pretrained=False, **options):
    """timm's model without its classifier: normalised images (B, 3, H, W) -> features (B, F).

    F is its head_hidden_size. Where timm can, positions of patches follow the size of the images.
    """
    timm = library()
    name = arch.removeprefix(PREFIX)
    options |= dict(pretrained=pretrained, num_classes=0)
    try:
        model = timm.create_model(name, dynamic_img_size=True, **options)
    except TypeError:  # this model knows no such option
        model = timm.create_model(name, **options)
    return without_dropout(model)


def without_dropout(model):
    """The model, with its dropout and stochastic depth off.

    Both passes of --micro_batch must compute the same, and so must a run that resumes.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in 'drop_prob', 'drop_rate', 'attn_drop_p':  # what timm's own layers pass on
            if hasattr(module, name):
                setattr(module, name, 0.0)
    return model


def configuration(arch):
    return library().get_pretrained_cfg(arch.removeprefix(PREFIX))


def mean_and_std(arch):
    """The mean and the standard deviation of three channels by which inputs are normalised."""
    config = configuration(arch)
    return config.mean, config.std


def classifiers(arch):
    """Names of the classifier layers, which f does not have."""
    names = configuration(arch).classifier or ()
    if isinstance(names, str):
        return (names,)
    return tuple(names)


def names_weights(source):
    """Whether the name of an encoder means timm's weights: timm/NAME, and no file has this name."""
    return is_timm(str(source)) and not Path(source).exists()


def place(source, results_dir=None):
    """The path beside which files about an encoder lie: its own.

    For timm's weights it is one that no file has, NAME.pth in results_dir, or in results/NAME.
    """
    if not names_weights(source):
        return Path(source)
    name = full_name(source).removeprefix(PREFIX)
    return Path(results_dir or Path('results', name), f'{name}.pth')


def check_results_dir(source, results_dir):
    """Raise UsageError if there is a results_dir, and source is a file."""
    if results_dir and not names_weights(source):
        raise UsageError('--results_dir is for timm/NAME: what a checkpoint gives lies beside it')


def encoder_crc(source, net):
    """The CRC-32 by which the files about an encoder know it: of its file, or of timm's weights."""
    if names_weights(source):
        return tensors_crc(net.f)
    return files.crc(source)


def check_sizes(arch, *sizes):
    """Raise UsageError, which names a size that fits, if the model takes no images of such a side.

    ResNets take all.
    """
    if not is_timm(arch):
        return
    with torch.device('meta'):
        model = create(arch).eval()
    for size in sizes:
        if _takes(model, size):
            continue
        own = configuration(arch).input_size[-1]
        near = sorted(range(max(8, size - 32), size + 33), key=lambda other: abs(other - size))
        fits = next(other for other in (*near, own) if _takes(model, other))
        raise UsageError(f'{arch} takes no images of {size} px: {fits} px fit')


@torch.no_grad()
def _takes(model, size):
    try:
        model(torch.empty(2, 3, size, size, device='meta'))
    except Exception:  # models tell in many ways
        return False
    return True


def pretrained(arch):
    """The model with timm's weights, which timm downloads to its cache if they are not there.

    Raises:
        UserError: there are none, or they cannot be had.
    """
    if not configuration(arch).has_weights:
        raise UserError(f'timm has no weights of {arch}: start without --init')
    try:
        return create(arch, pretrained=True)
    except Exception as error:  # of the network, of files, of the hub's library
        reason = ' '.join(str(error).split())[:120].rstrip(' .')
        raise UserError(
            f'the weights of {arch} could not be downloaded ({reason}): download them on a machine '
            'with a network, and copy its ~/.cache/huggingface here; or give a file of them, to '
            'main.py with --init FILE, to other scripts with --model_path FILE --arch timm/NAME'
        ) from None


def tensors_crc(module):
    """A CRC-32 of a module's tensors and their names."""
    value = 0
    for name, x in module.state_dict().items():
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(x.detach().cpu().contiguous().numpy(), value)
    return value
