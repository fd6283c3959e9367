"""Write an encoder for other programs.

    python misc/export.py torchvision results/model_400.pth --out resnet50.pth    # and for timm
    python misc/export.py torchvision results/model_400.pth --out resnet50.pth --fold
    python misc/export.py hcl results/model_400.pth --out theirs.pth    # HCL's and DCL's scripts

The first two write f alone, of width 1, and print the lines that load it. The model then returns
f's features, before they are scaled to unit length. timm.create_model('resnet50', num_classes=0)
reads the same file. With --fold, its inputs have ImageNet's mean and standard deviation, and not
CIFAR-10's as here; main.py --init takes only such a file. It takes seconds and no GPU.
"""

import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runtime, timm_models
from hardneg.files import write_tensors
from hardneg.runtime import UserError
from hardneg.timm_models import is_timm
from model import IMAGENET, LAYERS, OURS, load_encoder, load_model, renormalize

# The network that HCL's and DCL's scripts build
THEIRS = dict(arch='resnet50', stem='cifar', width=1, hidden_dim=512, feature_dim=128)


def main(argv=None):
    parser = flags.Parser(prog='export.py', description=__doc__.partition('\n')[0])
    formats = parser.add_subparsers(dest='what', required=True, metavar='FORMAT', prog='export.py')
    torchvision = formats.add_parser('torchvision', help="torchvision's names: f alone")
    hcl = formats.add_parser('hcl', help="HCL's and DCL's names: f and g")
    for command in torchvision, hcl:
        command.add_argument('path', type=flags.path, help='checkpoint')
        flags.add_encoder(command)
        command.add_argument('--out', type=flags.path, required=True, help='file to write')
    torchvision.add_argument(
        '--fold',
        action='store_true',
        help="inputs have ImageNet's mean and standard deviation (CIFAR-10's, as here)",
    )
    args = parser.parse_args(argv)
    if args.what == 'hcl':
        net = load_model(args.path, prefix=args.prefix, arch=args.arch)
        write_tensors(args.out, hcl_weights(net, args.path))
        print(f"For HCL's and DCL's scripts: linear.py --model_path {shlex.quote(args.out)}")
        return
    net = load_encoder(args.path, args.prefix, args.arch)
    write_tensors(args.out, torchvision_weights(net, args.path, args.fold))
    print(usage(args.out, args.fold, net))


def torchvision_weights(net, path, fold):
    """The weights of f by torchvision's names. With fold, net is changed to take ImageNet's inputs.

    Raises:
        UserError: torchvision has no network of this width.
    """
    arch, width = net.backbone['arch'], net.backbone['width']
    if is_timm(arch) and fold:
        raise UserError(f'{path}: {arch} takes inputs as timm has it: leave out --fold')
    if is_timm(arch):
        return net.f.state_dict()
    if width != 1:
        raise UserError(
            f'{path}: torchvision and timm have width 1 alone, and this is width {width:g}'
        )
    if fold:
        renormalize(net, OURS, IMAGENET)
    theirs = {ours: name for name, ours in LAYERS.items()}
    weights = {}
    for name, x in net.f.state_dict(prefix='f.').items():
        layer, rest = name[:3], name[3:]  # such as f.3 and .0.conv1.weight
        weights[theirs[layer] + rest] = x
    return weights


def hcl_weights(net, path):
    """The weights by HCL's names, which are those of a network in DataParallel.

    Raises:
        UserError: HCL's scripts build another network.
    """
    found = dict(net.backbone, hidden_dim=net.g[0].out_features, feature_dim=net.g[3].out_features)
    differ = []
    for name, value in found.items():
        if value != THEIRS[name]:
            differ.append(f'{name} {value}, not {THEIRS[name]}')
    if differ:
        raise UserError(
            f"{path}: HCL's and DCL's scripts cannot build this network, of {'; '.join(differ)}"
        )
    return {f'module.{name}': x for name, x in net.state_dict().items()}


def usage(file, fold, net):
    """The lines of Python that load a file of f's weights, and what the model takes."""
    arch = net.backbone['arch']
    mean, std = IMAGENET if fold else net.mean_and_std
    if is_timm(arch):
        name = arch.removeprefix(timm_models.PREFIX)
        lines = [f'model = timm.create_model({name!r}, num_classes=0)']
    else:
        lines = [f'model = torchvision.models.{arch}()']
        if net.backbone['stem'] == 'cifar':
            lines += [
                'model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)',
                'model.maxpool = torch.nn.Identity()',
            ]
        lines.append('model.fc = torch.nn.Identity()')
    lines += [
        f'model.load_state_dict(torch.load({str(file)!r}))',
        f'# inputs: torchvision.transforms.Normalize({mean}, {std}) of RGB in [0, 1]',
    ]
    return '\n'.join(lines)


if __name__ == '__main__':
    runtime.run(main)
