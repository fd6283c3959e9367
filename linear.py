"""Train a linear probe on a frozen encoder and report its accuracy on the test images.

    python linear.py --model_path results/model_400.pth               # frozen BatchNorm statistics
    python linear.py --model_path results/model_400.pth --bn train    # the published protocol: they drift

Data set and sizes come from the config.json beside the checkpoint unless a flag says otherwise. The probe leaves
model_400_linear.csv (with --bn train: model_400_linear_bn_train.csv), a row an epoch, beside the checkpoint, and its
settings in a .json beside that; both replace those of a former probe only when it ends, until then the rows are in
model_400_linear.partial.csv. The result is the last epoch's accuracy, not the best on the test set.
"""

import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import flags
import runs
import runtime
from augment import DeviceViews
from data import load_data
from evaluate import encode, hits
from model import load_model
from runtime import RANK, WORLD, UserError


def arguments(argv=None):
    parser = flags.Parser(prog='linear.py', description=__doc__.partition('\n')[0])
    data = parser.add_argument_group('encoder and data (default: as in the config.json beside the checkpoint)')
    data.add_argument('--model_path', default='results/model_400.pth', help='checkpoint of the encoder')
    flags.add_data_flags(data)
    train = parser.add_argument_group('probe')
    train.add_argument('--bn', default='eval', choices=('eval', 'train'),
                       help='freeze BatchNorm\'s statistics too, or let them drift as in the published code '
                            '(under torchrun: by each rank\'s part of a batch)')
    train.add_argument('--batch_size', default=512, type=flags.positive_int, help='images in a batch, over all ranks')
    train.add_argument('--epochs', default=100, type=flags.positive_int, help='passes over the labelled images')
    train.add_argument('--lr', default=1e-3, type=flags.positive, help='learning rate of Adam')
    train.add_argument('--weight_decay', default=1e-6, type=flags.non_negative, help='weight decay of Adam')
    train.add_argument('--precision', choices=('bf16', 'fp32'), help='of the encoder (default: bf16 on CUDA)')
    train.add_argument('--seed', default=0, help='of the probe\'s weights, shuffles and views', type=flags.seed)
    args = parser.parse_args(argv)
    if args.batch_size < WORLD:
        parser.error(f'--batch_size {args.batch_size} leaves some of {WORLD} ranks without an image')
    args.precision = args.precision or runtime.default_precision()
    return args


def main(argv=None):
    args = arguments(argv)
    path = Path(args.model_path)
    net = load_model(path)
    take_settings(args, path.with_name('config.json'))
    data = load_data(args.dataset_name, args.root, args.store_size, unlabeled=False)
    device = runtime.start()

    torch.manual_seed(args.seed)
    net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    kept = net.state_dict() if args.bn == 'eval' else dict(net.named_parameters())
    frozen = {name: value.clone() for name, value in kept.items()}
    probe = torch.nn.Linear(net.width, len(data.classes), device=device)
    optimizer = torch.optim.Adam(probe.parameters(), args.lr, weight_decay=args.weight_decay)
    autocast = runtime.autocast(device, args.precision)
    resident = runtime.fits(device, data.train, data.test)
    batches = DeviceViews(data.train, args.batch_size, args.image_size, views=1, seed=args.seed, device=device,
                          rank=RANK, world=WORLD, drop_last=False, resident=resident)
    train_labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)

    rows, features = [], None
    out = path.with_name(f'{path.stem}_linear' + ('_bn_train' if args.bn == 'train' else ''))
    about = dict(settings=vars(args), encoder=hashlib.sha256(path.read_bytes()).hexdigest(), **runs.provenance(device))
    bar = tqdm(range(1, args.epochs + 1), 'linear probe', disable=None if RANK == 0 else True, leave=False)
    for epoch in bar:
        train = train_epoch(net, probe, batches, train_labels, optimizer, autocast, args.bn == 'train', epoch)
        if features is None or args.bn == 'train':  # frozen entirely, the encoder gives the same every time
            runtime.average_buffers(net)
            features = encode(net, data.test, torch.arange(len(data.test)), args.test_size, autocast, device)
        test = tested(probe, features, test_labels)
        if not math.isfinite(train[0]):
            raise UserError(f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} is too high')
        rows.append((epoch, *train, *test))
        bar.set_postfix_str(f'train {train[1]:.2f} %, test {test[1]:.2f} %')
        if RANK == 0:
            runs.write_table(f'{out}.partial.csv', rows, runs.PROBE)

    after = net.state_dict()
    moved = [name for name, value in frozen.items() if not torch.equal(value, after[name])]
    assert not moved, f'the probe moved the encoder: {moved}'
    if RANK == 0:
        Path(f'{out}.json').unlink(missing_ok=True)  # never the settings of one with the rows of another
        Path(f'{out}.partial.csv').replace(f'{out}.csv')
        runs.write_json(f'{out}.json', about)
    runtime.say(f'{runs.knn_accuracy(path)}linear probe {test[1]:.2f} % (@5 {test[2]:.2f} %), files in {path.parent}')


def take_settings(args, config):
    """Fill the data flags that were not given: from the run's config.json where it is of this data set, else DATA."""
    settings = runs.read_config(config)['settings'] if config.exists() else {}
    if args.dataset_name is None and not settings:
        runtime.say(f'No {config.name} beside {args.model_path}: taking {flags.DATA["dataset_name"]}, as published')
    if args.dataset_name not in (None, settings.get('dataset_name')):
        settings = {}  # root and sizes of another data set
    for name, default in flags.DATA.items():
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name, default))


def train_epoch(net, probe, batches, labels, optimizer, autocast, drift, epoch):
    """Train the probe on every image once: mean loss, and accuracies @1 and @5 in percent, as it went."""
    sums = torch.zeros(3, dtype=torch.float64, device=labels.device)  # losses, hits @1 and @5
    for (x,), index in batches.epoch(epoch):
        net.train(drift and len(x) > 1)  # one tiny image has no variance, and an empty part of a batch no statistics
        with torch.no_grad(), autocast:
            feature = net.f(x).flatten(1).float()  # (b, 3, h, w) -> (b, width)
        output, target = probe(runtime.gather(feature)), runtime.gather(labels[index])
        loss = F.cross_entropy(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sums += sums_of(output.detach(), target, loss.detach())
    return means(sums, len(labels))


@torch.no_grad()
def tested(probe, features, labels):
    """What train_epoch() returns, of the probe on features (n, width)."""
    output = probe(features)
    return means(sums_of(output, labels, F.cross_entropy(output, labels)), len(labels))


def sums_of(output, target, loss):
    return torch.cat([(len(target) * loss)[None], hits(output, target)]).double()


def means(sums, n):
    loss, first, five = (sums / n).tolist()
    return loss, 100 * first, 100 * five


if __name__ == '__main__':
    runtime.run(main)
