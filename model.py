"""The encoder: a ResNet backbone f, a projection head g, and loading any checkpoint into them.

Layers have the names of the published checkpoints of HCL, DCL and leftthomas/SimCLR.
"""

import re
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from hardneg import timm_models
from hardneg.augment import MEAN, STD, standardize
from hardneg.files import read_checkpoint, tensors
from hardneg.runs import read_config
from hardneg.runtime import UserError, say
from hardneg.timm_models import is_timm

ARCHS = {  # the block, and the number of blocks in each stage
    'resnet18': (BasicBlock, (2, 2, 2, 2)),
    'resnet34': (BasicBlock, (3, 4, 6, 3)),
    'resnet50': (Bottleneck, (3, 4, 6, 3)),
    'resnet101': (Bottleneck, (3, 4, 23, 3)),
    'resnet152': (Bottleneck, (3, 8, 36, 3)),
}
WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
# torchvision's names of the layers, and ours
LAYERS = {
    'conv1': 'f.0',
    'bn1': 'f.1',
    'layer1': 'f.3',
    'layer2': 'f.4',
    'layer3': 'f.5',
    'layer4': 'f.6',
}
# Mean and standard deviation by which inputs are normalised: ours, and torchvision's
OURS = MEAN, STD
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ScaledResNet(ResNet):
    """torchvision's ResNet, all of whose stages have `width` times as many channels.

    Model takes its stages. As they are built in torchvision's order, a seed gives the weights that
    it gives torchvision's network.
    """

    def __init__(self, block, blocks, width):
        self.width = width  # before the constructor, which calls _make_layer()
        super().__init__(block, blocks)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage takes what the stem gives
            self.inplanes = int(64 * self.width)
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


def resnet(arch, stem, width):
    """f: (B, 3, H, W) -> (B, F, 1, 1). F is 2048, or 512 for ResNet-18 and 34, times width."""
    block, blocks = ARCHS[arch]
    scaled = ScaledResNet(block, blocks, width)
    channels = int(64 * width)
    if stem == 'cifar':
        conv = nn.Conv2d(3, channels, 3, stride=1, padding=1, bias=False)
        relu = scaled.relu
    else:
        conv = nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        # one module, so that f.3 to f.6 keep their names
        relu = nn.Sequential(scaled.relu, scaled.maxpool)
    return nn.Sequential(
        conv,
        nn.BatchNorm2d(channels),
        relu,
        scaled.layer1,
        scaled.layer2,
        scaled.layer3,
        scaled.layer4,
        scaled.avgpool,
    )


class Model(nn.Module):
    """SimCLR's network as HCL publishes it: a ResNet with a 3x3 stem of stride 1 and no max-pool.

    f is the backbone, whose features F are its own; g: F -> hidden_dim -> feature_dim.

    Args:
        feature_dim: dimension D of the embedding z that the loss sees.
        arch: one of ARCHS, or timm/NAME, to which stem and width do not apply.
        hidden_dim: dimension between the two layers of g; 0: 512 times width.
        stem: 'cifar', the published one, or 'imagenet': 7x7 of stride 2 and a max-pool.
        width: factor on all numbers of channels of f.
    """

    def __init__(self, feature_dim=128, arch='resnet50', hidden_dim=0, stem='cifar', width=1):
        super().__init__()
        self.backbone = dict(arch=arch, stem=stem, width=width)
        if is_timm(arch):
            self.f = timm_models.create(arch)  # (B, 3, H, W) -> (B, F)
            self.features = self.f.head_hidden_size
            self.mean_and_std = timm_models.mean_and_std(arch)
        else:
            self.f = resnet(arch, stem, width)
            self.features = int(512 * width) * ARCHS[arch][0].expansion
            self.mean_and_std = OURS
        hidden_dim = hidden_dim or int(512 * width)
        self.g = nn.Sequential(
            nn.Linear(self.features, hidden_dim, bias=False),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, feature_dim),
        )

    def forward(self, x):
        """Images (B, 3, H, W) -> features (B, F) and embeddings (B, D), both of unit length.

        Images are uint8, or what normalize() makes of them.
        """
        if x.dtype == torch.uint8:
            x = self.normalize(x)
        feature = self.f(x).flatten(1)  # (B, F, 1, 1) -> (B, F)
        return unit(feature), self.embed(feature)

    def sizes(self):
        """Sizes of images, as settings, where no run tells them: those of timm's weights."""
        arch = self.backbone['arch']
        if not is_timm(arch):
            return {}
        size = timm_models.configuration(arch).input_size[-1]
        return dict(image_size=size, test_size=size, store_size=size)

    def normalize(self, x):
        """Grey levels (B, 3, H, W), from 0 to 255 in any type -> what f takes, channels last."""
        return standardize(x, *self.mean_and_std)

    def embed(self, feature):
        """f's features (B, F) -> embeddings (B, D) of unit length."""
        return unit(self.g(feature))


class Embeddings(nn.Module):
    """The embeddings of all views in one forward pass, and so in one graph if it is compiled.

    Args:
        net: Model.
        joint: whether the views go through the network together, so that they share BatchNorm's
            statistics; else one view after the other, as published.
    """

    def __init__(self, net, joint=False):
        super().__init__()
        self.net = net
        self.joint = joint

    def forward(self, *views):
        """V views (B, 3, H, W) -> a list of V embeddings (B, D)."""
        if self.joint:
            _, z = self.net(torch.cat(views))  # V x (B, 3, H, W) -> (V B, D)
            return list(z.chunk(len(views)))
        return [self.net(x)[1] for x in views]


def unit(x):
    """Rows (n, D) scaled to unit length, in float32 or more."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def load_encoder(source, prefix=None, arch=None):
    """The Model of a checkpoint or, where no file has this name, timm/NAME with timm's weights.

    Only f is required: g is None if the weights contain no head like ours.

    Args:
        source: path, or timm/NAME.
        prefix, arch: as load_model() takes them, for a checkpoint.
    """
    if timm_models.names_weights(source):
        return pretrained_model(timm_models.full_name(source))
    return load_model(source, head=False, prefix=prefix, arch=arch)


def pretrained_model(arch):
    """The Model timm/NAME with timm's weights, without g."""
    with torch.device('meta'):  # f and g are replaced
        model = Model(arch=arch, stem='none')
    model.f = timm_models.pretrained(arch)
    model.g = None
    return model


def load_model(path, head=True, prefix=None, arch=None):
    """The Model in a checkpoint, whose architecture and widths are read off the tensors.

    The checkpoint is from here, a published one, or any other that holds a ResNet by our names of
    its layers or torchvision's. A prefix may stand before them, as encoder_q. in MoCo's files. A
    line then says which, and what else in the file is left out. Weights in half precision become
    float32. All names and shapes of the ResNet must fit exactly, since an encoder with some random
    weights would go unnoticed.

    Weights by torchvision's names are taken to expect images normalised by ImageNet's mean and
    standard deviation, as torchvision's do, and renormalize() changes them to take ours.

    Args:
        head: whether g is needed. If not, a checkpoint without a head like ours loads, with g None.
        prefix: what stands before the names of the encoder to take; None: nothing, or what stands
            before the only ResNet.
        arch: timm/NAME, of a state_dict by timm's names or by ours. None: that of the run whose
            config.json lies beside the checkpoint, if it is timm's, or else a ResNet.

    Raises:
        UserError: the file holds no encoder with that prefix, or several; or it names the first
            tensor that is missing, unexpected, not finite or of another shape.
    """
    named = _named_tensors(path, read_checkpoint(path))
    arch = arch or _arch_beside(path)
    if arch and is_timm(arch):
        return _timm_model(path, _without_prefix(path, named, prefix), arch, head)
    found = _prefix_of_encoder(path, named, prefix)
    from_torchvision = f'{found}layer1.0.conv1.weight' in named
    state, left = _parts(named, found, from_torchvision)
    model = _matching_model(path, state, head)
    if model.g is None and any(name.startswith('g.') for name in state):
        state = {name: x for name, x in state.items() if name.startswith('f.')}
        left.append(f'{found}g')
    for name, x in model.state_dict().items():
        if from_torchvision and name.endswith('num_batches_tracked'):
            state.setdefault(name, torch.zeros(x.shape, dtype=x.dtype))  # not in its oldest files
    _fill(path, model, state)
    if from_torchvision:
        renormalize(model, IMAGENET, OURS)
    _tell(path, model, found, left)
    return model


def _arch_beside(path):
    """The architecture of the run in a checkpoint's directory, or None."""
    config = read_config(Path(path).with_name('config.json')) or {}
    return config.get('settings', {}).get('arch')


def _without_prefix(path, named, prefix):
    """The tensors whose names begin with the prefix, by the rest of their names; all if None."""
    if not prefix:
        return named
    prefix = _unwrapped(f'{prefix.removesuffix(".")}.')
    found = {name.removeprefix(prefix): x for name, x in named.items() if name.startswith(prefix)}
    if not found:
        raise UserError(f'{path} has no tensor whose name begins with {prefix}')
    say(f'{path}: took {len(found)} tensors of prefix {prefix}, left out {len(named) - len(found)}')
    return found


def _timm_model(path, named, arch, head):
    """The Model timm/NAME whose tensors have timm's names or, after f. and g., ours."""
    arch = timm_models.full_name(arch)
    if not any(name.startswith('f.') for name in named):
        named = {f'f.{name}': x for name, x in named.items()}
    sizes = [1, 1]
    has_head = named.keys() >= {'g.0.weight', 'g.3.weight'}
    if has_head:
        sizes = [len(named['g.3.weight']), len(named['g.0.weight'])]
    elif head:
        raise UserError(f'{path}: no head g like ours: g.0.weight or g.3.weight is missing')
    feature_dim, hidden_dim = sizes
    model = Model(feature_dim, arch, hidden_dim, 'none')
    if not has_head:
        model.g = None
    classifiers = [f'f.{name}.' for name in timm_models.classifiers(arch)]
    state = {}
    for name, x in named.items():
        if not name.startswith(('fc.', *classifiers)):
            state[name] = x
    _fill(path, model, state)
    return model


def _fill(path, model, state):
    """Give the model the tensors in state, whose names and shapes must be its own."""
    for name, x in model.state_dict().items():
        if name in state:
            state[name] = _finite(path, name, state[name], x.dtype)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        wrong = str(error).splitlines()[1].strip()  # names what is missing, unexpected or misshapen
        raise UserError(f'{path}: not a {model.backbone["arch"]}: {wrong:.300}') from None


def _named_tensors(path, content):
    """The tensors in what a checkpoint holds, by name, without prefixes and counters of wrappers.

    Names are as in files.tensors().
    """
    named = {}
    for name, x in tensors(_state_dict(content)):
        if name.rpartition('.')[2] in ('total_ops', 'total_params'):
            continue
        plain = _unwrapped(name)
        if plain in named:
            raise UserError(f"{path} holds {plain} twice, with and without a wrapper's prefix")
        named[plain] = x
    return named


def _state_dict(content):
    """What a checkpoint holds as its model's state_dict, or all of it."""
    for key in 'model', 'state_dict':
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            others = {name: x for name, x in content.items() if name != key}
            if _prefixes(name for name, _ in tensors(others)):
                return content  # of several encoders, such as model_ema beside model
            return _state_dict(content[key])
    return content


def _unwrapped(name):
    """The name without what DataParallel, DistributedDataParallel and torch.compile() put in it."""
    return re.sub(r'(?<![^.])(module|_orig_mod)\.', '', name)


def _prefixes(names):
    """The prefixes of the ResNets among names of tensors."""
    found = []
    for name in names:
        match = re.fullmatch(r'(|.*\.)(f\.3|layer1)\.0\.conv1\.weight', name)
        if match:
            found.append(match[1])
    return found


def _prefix_of_encoder(path, named, wanted):
    """The prefix of the ResNet among the tensors: the one that is wanted, or the only one."""
    found = _prefixes(named)
    if not found:
        raise UserError(
            f'{path}: no model weights of a ResNet in it: no name ends in f.3.0.conv1.weight or, '
            'as in torchvision, in layer1.0.conv1.weight. For one of timm, give --arch timm/NAME'
        )
    choice = ' or '.join(f'--prefix {shlex.quote(prefix)}' for prefix in found)
    if wanted is None:
        if len(found) > 1:
            raise UserError(f'{path} holds {len(found)} encoders: choose one by {choice}')
        return found[0]
    prefix = wanted
    if wanted and not wanted.endswith('.'):
        prefix += '.'
    prefix = _unwrapped(prefix)
    if prefix not in found:
        if found == ['']:
            choice = 'no --prefix'
        raise UserError(f'{path} has no encoder of prefix {wanted!r}: give {choice}')
    return prefix


def _parts(named, prefix, from_torchvision):
    """The tensors of f and g by our names, and the names of the other parts of a checkpoint.

    What is numbered as torchvision's layers are but is none of them, such as conv2, stays with f,
    since it makes another network.
    """
    own = 'f|g'
    if from_torchvision:
        own = r'(conv|bn|layer)\d+|g'
    state, left = {}, []
    for name, x in named.items():
        layer, dot, rest = name[len(prefix) :].partition('.')
        if name.startswith(prefix) and re.fullmatch(own, layer):
            state[LAYERS.get(layer, layer) + dot + rest] = x
            continue
        part = _beyond(prefix, name)
        if part not in left:
            left.append(part)
    return state, left


def _beyond(prefix, name):
    """The name up to and including its first step that is not the prefix's."""
    taken = []
    for step, other in zip(name.split('.'), prefix.split('.')):
        taken.append(step)
        if step != other:
            break
    return '.'.join(taken)


def _matching_model(path, state, head):
    """A Model without memory, on the meta device, of the sizes of the tensors in state.

    g is None if it is not needed and the tensors hold none like ours.
    """
    kernel = state.get('f.0.weight')
    if kernel is None or kernel.ndim != 4:
        raise UserError(
            f'{path}: a ResNet whose stem is not one convolution: f.0.weight is missing or has '
            "another shape (torchvision's conv1.weight)"
        )
    stem = 'imagenet' if kernel.shape[3] == 7 else 'cifar'
    sizes = {}
    for name in 'g.0.weight', 'g.3.weight':
        if name in state and state[name].ndim == 2:
            sizes[name] = len(state[name])
        elif head:
            raise UserError(f'{path}: no head g like ours: {name} is missing or has another shape')
    hidden_dim = sizes.get('g.0.weight', 1)
    feature_dim = sizes.get('g.3.weight', 1)
    with torch.device('meta'):
        model = Model(feature_dim, _architecture(path, state), hidden_dim, stem, len(kernel) / 64)
    needed = {name: x.shape for name, x in model.g.state_dict(prefix='g.').items()}
    there = {name: x.shape for name, x in state.items() if name.startswith('g.')}
    if not head and needed != there:
        model.g = None
    return model


def _finite(path, name, x, dtype):
    """A tensor of weights as numbers of this dtype, from floating-point numbers of any other."""
    if x.is_floating_point():
        x = x.to(dtype)
    if x.dtype != dtype or not x.isfinite().all():
        raise UserError(f'{path}: {name} is not finite, or not of {dtype}')
    return x


def _tell(path, model, prefix, left):
    """Say where in a checkpoint the encoder was, and what was left out, if anyone could doubt it.

    A classifier fc is nothing to tell: torchvision's weights and leftthomas's linear_model.pth have
    one.
    """
    text = f'{path}: took the {model.backbone["arch"]}'
    if prefix:
        text += f' of prefix {prefix}'
    if left:
        text += f', left out {", ".join(left):.300}'
    if prefix or left not in ([], ['fc']):
        say(text)


def _architecture(path, state):
    """The name in ARCHS of the network with these tensors."""
    found = {stage: set() for stage in '3456'}
    for name in state:
        match = re.match(r'f\.([3-6])\.(\d+)\.', name)
        if match:
            found[match[1]].add(match[2])
    depths = tuple(len(blocks) for blocks in found.values())
    block = Bottleneck if 'f.3.0.conv3.weight' in state else BasicBlock
    for arch, known in ARCHS.items():
        if known == (block, depths):
            return arch
    raise UserError(
        f'{path}: its stages f.3 to f.6 have {depths} blocks, which is none of {", ".join(ARCHS)}'
    )


@torch.no_grad()
def renormalize(net, old, new):
    """Change f, which takes images normalised by old, to take images normalised by new.

    old and new are (mean, standard deviation) of the channels. The convolution f.0 takes on the
    scale, and the running mean of f.1 the shift. In eval mode f's features stay the same, but for
    the borders: an image is padded with zeros, which are the mean and so another colour.
    """
    mean, std = torch.tensor(old, dtype=torch.float64).view(2, 3, 1, 1)  # from (2, 3)
    new_mean, new_std = torch.tensor(new, dtype=torch.float64).view(2, 3, 1, 1)
    weight = net.f[0].weight  # (C, 3, k, k)
    shift = weight * (new_mean - mean) / std
    net.f[1].running_mean -= shift.sum((1, 2, 3))
    weight *= new_std / std
