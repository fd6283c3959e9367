"""The encoder: a ResNet backbone f for small images and a projection head g, under the published layer names."""

import pickle
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from augment import MEAN, STD, normalize
from runtime import UserError

ARCHS = {  # blocks, and how many of them in each stage: a checkpoint is recognised by that
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, (3, 4, 23, 3)),
    'resnet152': (Bottleneck, (3, 8, 36, 3)),
}
LAYERS = dict(conv1='f.0', bn1='f.1', layer1='f.3', layer2='f.4', layer3='f.5', layer4='f.6')  # by torchvision's names
OURS = MEAN, STD  # of the inputs' channels
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the same, of torchvision's weights


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, but Model counts the batches: each layer for itself would start a kernel for that."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                            self.momentum, self.eps)


class BatchNorm1d(nn.BatchNorm1d):
    forward = BatchNorm2d.forward


def every_second_pixel(conv, inputs):
    return inputs[0][:, :, ::2, ::2]  # what a 1x1 convolution of stride 2 takes


class Scaled(ResNet):
    """torchvision's ResNet with all numbers of channels multiplied."""

    def __init__(self, block, blocks, factor):
        self.factor = factor  # set first: the constructor calls _make_layer
        super().__init__(block, blocks, norm_layer=BatchNorm2d)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage takes what the stem gives
            self.inplanes = int(64 * self.factor)
        return super()._make_layer(block, int(planes * self.factor), *args, **kwargs)


class Model(nn.Module):
    """SimCLR's network as HCL publishes it: ResNet with a 3x3 stride-1 stem and no max-pool, then a two-layer head.

    f: (B, 3, H, W) -> (B, features, 1, 1), 2048 features (512 for ResNet-18 and 34) times width;
    g: features -> hidden_dim -> feature_dim.

    Args:
        feature_dim: dimension D of the embedding that the loss sees.
        arch: one of ARCHS.
        hidden_dim: dimension between the two layers of g; 0: 512 times width, as published for width 1.
        stem: 'cifar', the published one, or 'imagenet', 7x7 of stride 2 and a max-pool, a sixteenth of the pixels.
        width: factor on all numbers of channels of f.
    """

    def __init__(self, feature_dim=128, arch='resnet50', hidden_dim=0, stem='cifar', width=1):
        super().__init__()
        block, blocks = ARCHS[arch]
        resnet, channels, hidden_dim = Scaled(block, blocks, width), int(64 * width), hidden_dim or int(512 * width)
        self.backbone = dict(arch=arch, stem=stem, width=width)
        self.features = int(512 * width) * block.expansion
        kernel, stride = (3, 1) if stem == 'cifar' else (7, 2)
        conv = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        relu = resnet.relu if stem == 'cifar' else nn.Sequential(resnet.relu, resnet.maxpool)  # keeps f.3 to f.6
        stages = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
        self.f = nn.Sequential(conv, BatchNorm2d(channels), relu, *stages, resnet.avgpool)
        for m in self.f.modules():  # of width 0.125, where torch 2.14's backward on CPUs writes beyond its memory
            if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) and m.stride == (2, 2) and m.in_channels < 16:
                m.stride = 1, 1
                m.register_forward_pre_hook(every_second_pixel)
        self.g = nn.Sequential(nn.Linear(self.features, hidden_dim, bias=False), BatchNorm1d(hidden_dim),
                               nn.ReLU(inplace=True), nn.Linear(hidden_dim, feature_dim))

    def forward(self, x):
        """Features (B, F) and embeddings (B, feature_dim) of images (B, 3, H, W): rows of unit length, float32 or more.

        Images are uint8, or normalised as augment.normalize() does it.
        """
        x = normalize(x) if x.dtype == torch.uint8 else x
        if self.training:
            counts = [m.num_batches_tracked for m in self.modules() if isinstance(m, (BatchNorm1d, BatchNorm2d))]
            if counts:  # SyncBatchNorm counts itself
                torch._foreach_add_(counts, 1)
        feature = self.f(x).flatten(1)
        return unit(feature), unit(self.g(feature))


def unit(x):
    """(n, D) -> rows of unit length, float32 or more."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def read_checkpoint(path):
    """What torch.save wrote to path, on the CPU: dense tensors and plain containers only, no objects.

    Raises:
        UserError: naming the file: missing, damaged (zip checksums are verified), with pickled objects in it, or with
            tensors that are sparse, quantised, nested, or larger than what the file holds of them.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise zipfile.BadZipFile(f'checksum of {damaged} does not match')
        content = torch.load(path, map_location='cpu', weights_only=True)
        for name, x in tensors(content):
            plain = x.layout == torch.strided and not (x.is_quantized or x.is_meta or x.is_nested)
            if not plain or x.numel() * x.element_size() > x.untyped_storage().nbytes():
                raise UserError(f'{path}: {name} is not a plain tensor')
        return content
    except UserError:
        raise
    except (FileNotFoundError, IsADirectoryError):
        what, folder = ('a directory', Path(path)) if Path(path).is_dir() else ('no such file', Path(path).parent)
        there = sorted(p.name for p in folder.glob('*.pth') if not re.search('last|linear|logistic', p.name))
        raise UserError(f'{path}: {what}; in {folder} there is {", ".join(there) or "no checkpoint"}') from None
    except pickle.UnpicklingError as error:
        raise UserError(f'{path}: not a checkpoint of tensors alone; refused, and nothing in it was run') from error
    except Exception as error:  # torch.load and zipfile raise many kinds for a damaged file
        reason = f' ({error})' if isinstance(error, (OSError, zipfile.BadZipFile)) else ''
        raise UserError(f'{path}: damaged or not a checkpoint{reason}') from error


def tensors(content, name='it'):
    """All (name, tensor) in nested dicts, lists and tuples."""
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from tensors(value, str(key))


def load_model(path, head=True):
    """The Model in a checkpoint, its architecture and widths read off the tensors.

    The checkpoint is from here, a published one, or torchvision's ImageNet weights, which renormalize() changes to take
    the inputs of all others. Prefixes of wrappers (module., _orig_mod.) and counters that profilers leave are dropped.
    Anything else that does not fit exactly is an error, since an encoder with some random weights would go unnoticed.

    Args:
        head: whether g is needed. Where it is not, a checkpoint without it loads, with g None; a classifier fc,
            which torchvision's weights and leftthomas's linear_model.pth have in its place, is dropped.

    Raises:
        UserError: naming the file and the first tensor that is missing, unexpected, not finite or of a wrong shape.
    """
    state = read_checkpoint(path)
    while isinstance(state, dict) and isinstance(state.get('model', state.get('state_dict')), dict):
        state = state.get('model', state.get('state_dict'))
    if not isinstance(state, dict) or not all(
            isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()):
        raise UserError(f'{path}: no model weights in it')
    state = {re.sub(r'^(module\.|_orig_mod\.)+', '', name): value for name, value in state.items()
             if name.rpartition('.')[2] not in ('total_ops', 'total_params')}
    theirs = 'conv1.weight' in state
    if theirs:
        state = {re.sub(r'^\w+', lambda layer: LAYERS.get(layer[0], layer[0]), name): x for name, x in state.items()}
    headless = not head and not any(name.startswith('g.') for name in state)
    if headless:
        state = {name: value for name, value in state.items() if not name.startswith('fc.')}
    for name, ndim in {'f.0.weight': 4, **({} if headless else {'g.0.weight': 2, 'g.3.weight': 2})}.items():
        if name not in state or state[name].ndim != ndim:
            raise UserError(f'{path}: not a checkpoint of this encoder: {name} is missing or has another shape')
    places = {tuple(name.split('.')[1:3]) for name in state if re.match(r'f\.[3-6]\.\d+\.', name)}  # (stage, block)
    depths = tuple(sum(stage == i for stage, _ in places) for i in '3456')
    block = Bottleneck if 'f.3.0.conv3.weight' in state else BasicBlock
    arch = next((arch for arch, known in ARCHS.items() if known == (block, depths)), None)
    if arch is None:
        raise UserError(f'{path}: its stages f.3 to f.6 have {depths} blocks, which is none of {", ".join(ARCHS)}')
    hidden_dim, feature_dim = (1, 1) if headless else (len(state['g.0.weight']), len(state['g.3.weight']))
    channels, _, kernel, _ = state['f.0.weight'].shape
    with torch.device('meta'):  # the sizes that the file claims are compared before memory is taken for them
        model = Model(feature_dim, arch, hidden_dim, 'imagenet' if kernel == 7 else 'cifar', channels / 64)
    if headless:
        model.g = None
    if theirs:  # its oldest files count no batches
        state = {name: torch.zeros((), dtype=torch.int64) for name in model.state_dict() if 'tracked' in name} | state
    for name, x in model.state_dict().items():
        if name in state and (state[name].dtype != x.dtype or not state[name].isfinite().all()):
            raise UserError(f'{path}: {name} is not finite, or not of {x.dtype}')
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:  # its second line names what is missing, unexpected or of a wrong shape
        raise UserError(f'{path}: not a {arch}: {str(error).splitlines()[1].strip():.300}') from None
    if theirs:
        renormalize(model, IMAGENET, OURS)
    return model


@torch.no_grad()
def renormalize(net, old, new):
    """Change f, which takes images normalised by old, to take them normalised by new; both are (mean, deviation).

    The convolution f.0 takes on the scale, and the running mean of f.1 the shift. In eval mode f's features stay the
    same but for the borders: the zeros around an image are the mean, so they are of another colour.
    """
    (m, s), (m_new, s_new) = ([torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in pair] for pair in (old, new))
    weight = net.f[0].weight  # (C, 3, k, k)
    net.f[1].running_mean -= (weight * (m_new - m) / s).sum((1, 2, 3))
    weight *= s_new / s
