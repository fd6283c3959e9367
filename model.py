"""The encoder: a ResNet backbone f for small images and a projection head g, under the published layer names."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from runtime import UserError

ARCHS = {  # (bottleneck blocks, blocks in each stage), by which a checkpoint is recognised
    'resnet18': (False, (2, 2, 2, 2)),
    'resnet34': (False, (3, 4, 6, 3)),
    'resnet50': (True, (3, 4, 6, 3)),
    'resnet101': (True, (3, 4, 23, 3)),
    'resnet152': (True, (3, 8, 36, 3)),
}


class Model(nn.Module):
    """SimCLR's network as HCL publishes it: ResNet with a 3x3 stride-1 stem and no max-pool, then a two-layer head.

    f: (B, 3, H, W) -> (B, width, 1, 1), width 2048 (512 for ResNet-18 and 34); g: width -> 512 -> feature_dim.

    Args:
        feature_dim: dimension D of the embedding that the loss sees.
        arch: one of ARCHS.
    """

    def __init__(self, feature_dim=128, arch='resnet50'):
        super().__init__()
        resnet = torchvision.models.get_model(arch, weights=None)
        resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        self.width = resnet.fc.in_features
        self.f = nn.Sequential(*[m for m in resnet.children() if not isinstance(m, (nn.MaxPool2d, nn.Linear))])
        self.g = nn.Sequential(nn.Linear(self.width, 512, bias=False), nn.BatchNorm1d(512), nn.ReLU(inplace=True),
                               nn.Linear(512, feature_dim))

    def forward(self, x):
        """(B, 3, H, W) -> features (B, width) and embeddings (B, feature_dim), rows of unit length, float32 or more."""
        feature = self.f(x).flatten(1)
        return unit(feature), unit(self.g(feature))


def unit(x):
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def read_checkpoint(path):
    """What torch.save wrote to path, on the CPU: tensors and plain containers only, no objects.

    Raises:
        UserError: naming the file: missing, damaged (zip checksums are verified), or with pickled objects in it.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f'checksum of {damaged} does not match')
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        there = ', '.join(sorted(p.name for p in Path(path).parent.glob('*.pth'))) or 'no other checkpoint'
        raise UserError(f'{path}: no such file; in {Path(path).parent} there is {there}') from None
    except pickle.UnpicklingError as error:
        raise UserError(f'{path}: not a checkpoint of tensors alone; refused, and nothing in it was run') from error
    except Exception as error:  # torch.load and zipfile raise many kinds for a damaged file
        reason = f' ({error})' if isinstance(error, (OSError, zipfile.BadZipFile)) else ''
        raise UserError(f'{path}: damaged or not a checkpoint{reason}') from error


def load_model(path):
    """The Model in a checkpoint, from here or the published ones, its architecture and widths read off the tensors.

    Prefixes of wrappers (module., _orig_mod.) and counters that profilers leave are dropped; anything else that
    does not fit exactly is an error, since an encoder with some random weights would go unnoticed.

    Raises:
        UserError: naming the file and the first tensor that is missing, unexpected or of a wrong shape.
    """
    state = read_checkpoint(path)
    while isinstance(state, dict) and isinstance(inner := state.get('model', state.get('state_dict')), dict):
        state = inner
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UserError(f'{path}: no model weights in it')
    state = {re.sub(r'^(module\.|_orig_mod\.)+', '', name): value for name, value in state.items()
             if name.rpartition('.')[2] not in ('total_ops', 'total_params')}
    depths = tuple(len({name.split('.')[2] for name in state if name.startswith(f'f.{i}.')}) for i in (3, 4, 5, 6))
    kind = 'f.3.0.conv3.weight' in state, depths
    arch = next((arch for arch, known in ARCHS.items() if known == kind), None)
    for name in ('f.0.weight', 'g.3.weight'):
        if name not in state:
            raise UserError(f'{path}: not a checkpoint of this encoder: {name} is missing')
    if arch is None:
        raise UserError(f'{path}: its stages f.3 to f.6 have {depths} blocks, which is none of {", ".join(ARCHS)}')
    model = Model(len(state['g.3.weight']), arch)
    expected = model.state_dict()
    for name in [*expected, *state]:
        if name not in state or name not in expected:
            raise UserError(f'{path}: {name} is {"missing" if name in expected else "unexpected"} for {arch}')
        if state[name].shape != expected[name].shape:
            raise UserError(f'{path}: {name} has shape {tuple(state[name].shape)}, {arch} needs '
                             f'{tuple(expected[name].shape)}')
    model.load_state_dict(state)
    return model
