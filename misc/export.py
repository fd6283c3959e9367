"""Write an encoder for other programs.

    python misc/export.py torchvision results/model_400.pth --out resnet50.pth           # for torchvision and timm
    python misc/export.py torchvision results/model_400.pth --out resnet50.pth --fold    # for ImageNet's inputs
    python misc/export.py hcl results/model_400.pth --out theirs.pth                     # for HCL's and DCL's scripts

The first two write f alone, at width 1, and print the lines that load it. What the model then returns are f's features,
before they are scaled to unit length. The same file is read by timm.create_model('resnet50', num_classes=0).
main.py --init takes it, too, but only if it was written with --fold.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg import runtime
from hardneg.files import write_tensors
from model import IMAGENET, LAYERS, OURS, load_model, renormalize
from hardneg.runtime import UserError

THEIRS = dict(arch='resnet50', stem='cifar', width=1, hidden_dim=512, feature_dim=128)  # what HCL's scripts build


def main(argv=None):
    parser = flags.Parser(prog='export.py', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='what', required=True, metavar='FORMAT', prog='export.py')
    for name, text in (('torchvision', 'torchvision\'s names: f alone'), ('hcl', 'HCL\'s and DCL\'s names: f and g')):
        command = commands.add_parser(name, help=text)
        command.add_argument('path', type=flags.path, help='checkpoint')
        command.add_argument('--out', type=flags.path, required=True, help='file to write')
        if name == 'torchvision':
            command.add_argument('--fold', action='store_true',
                                 help='inputs have ImageNet\'s mean and deviation (default: CIFAR-10\'s, as here)')
    args = parser.parse_args(argv)
    if args.what == 'hcl':
        write_tensors(args.out, hcl(args.path))
        return print(f'{args.out}: for HCL\'s and DCL\'s linear.py --model_path')
    net = load_model(args.path, head=False)
    write_tensors(args.out, torchvision(net, args.path, args.fold))
    print(usage(args.out, args.fold, **net.backbone))


def torchvision(net, path, fold):
    """The weights of f by torchvision's names; with fold net itself is changed, to take ImageNet's normalisation."""
    if net.backbone['width'] != 1:
        raise UserError(f'{path}: torchvision and timm have width 1 alone, and this is width {net.backbone["width"]:g}')
    if fold:
        renormalize(net, OURS, IMAGENET)
    names = {ours: theirs for theirs, ours in LAYERS.items()}
    return {names[name[:3]] + name[3:]: x for name, x in net.f.state_dict(prefix='f.').items()}


def hcl(path):
    """The weights by HCL's names, which are those of a network in DataParallel."""
    net = load_model(path)
    found = net.backbone | dict(hidden_dim=len(net.g[0].weight), feature_dim=len(net.g[3].weight))
    differ = [f'{name} {value}, not {THEIRS[name]}' for name, value in found.items() if value != THEIRS[name]]
    if differ:
        raise UserError(f'{path}: HCL\'s and DCL\'s scripts cannot build this network, of {"; ".join(differ)}')
    return {f'module.{name}': x for name, x in net.state_dict().items()}


def usage(file, fold, arch, stem, width):
    """The lines of Python that load a file of torchvision's names, and what the model takes."""
    mean, std = IMAGENET if fold else OURS
    lines = [f'model = torchvision.models.{arch}()']
    if stem == 'cifar':
        lines += ['model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)',
                  'model.maxpool = torch.nn.Identity()']
    lines += ['model.fc = torch.nn.Identity()', f'model.load_state_dict(torch.load({str(file)!r}))',
              f'# inputs: torchvision.transforms.Normalize({mean}, {std}) of RGB in [0, 1]']
    return '\n'.join(lines)


if __name__ == '__main__':
    runtime.run(main)
