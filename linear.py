"""Train a linear probe on a frozen encoder and report its accuracy on the test images.

    python linear.py --model_path results/model_400.pth               # frozen BatchNorm statistics
    python linear.py --model_path results/model_400.pth --bn train    # the published protocol: they drift

Data set, root and sizes come from the config.json beside the checkpoint unless a flag says otherwise. The probe leaves
model_400_linear.csv (with --bn train: model_400_linear_bn_train.csv), a row an epoch, beside the checkpoint, and its
settings in a .json beside that; both replace those of a former probe only when it ends, until then the rows are in
model_400_linear.partial.csv. The result is the last epoch's accuracy, not the best on the test set.
"""

import hashlib
import json
import math
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

import runtime
from augment import DeviceViews
from main import average_buffers, encode, provenance
from model import load_model
from runtime import RANK, WORLD
from utils import DATASETS, load_data

FALLBACK = dict(dataset_name='stl10', root='data', store_size=96, image_size=32, test_size=None)
COLUMNS = ('epoch', 'train_loss', 'train_acc@1', 'train_acc@5', 'test_loss', 'test_acc@1', 'test_acc@5')


def arguments(argv=None):
    parser = runtime.Parser(prog='linear.py', description=__doc__.partition('\n')[0])
    data = parser.add_argument_group('encoder and data (default: as in the config.json beside the checkpoint)')
    data.add_argument('--model_path', default='results/model_400.pth', help='checkpoint of the encoder')
    data.add_argument('--root', help='directory of the data set')
    data.add_argument('--dataset_name', choices=DATASETS, help='what to train and test the probe on')
    data.add_argument('--image_size', type=runtime.integer(8, 512), help='pixels of the training views')
    data.add_argument('--test_size', type=runtime.integer(8, 1024), help='pixels of the test images')
    data.add_argument('--store_size', type=runtime.integer(8, 1024), help='pixels at which a folder\'s images are kept')
    train = parser.add_argument_group('probe')
    train.add_argument('--bn', default='eval', choices=('eval', 'train'),
                       help='freeze BatchNorm\'s statistics too, or let them drift as in the published code '
                            '(under torchrun: by each rank\'s part of a batch)')
    train.add_argument('--batch_size', default=512, type=runtime.positive_int, help='images in a batch, over all ranks')
    train.add_argument('--epochs', default=100, type=runtime.positive_int, help='passes over the labelled images')
    train.add_argument('--lr', default=1e-3, type=runtime.positive, help='learning rate of Adam')
    train.add_argument('--weight_decay', default=1e-6, type=runtime.non_negative, help='weight decay of Adam')
    train.add_argument('--precision', choices=('bf16', 'fp32'), help='of the encoder (default: bf16 on CUDA)')
    train.add_argument('--seed', default=0, help='of the probe\'s weights, shuffles and views', type=runtime.seed)
    args = parser.parse_args(argv)
    if args.batch_size < WORLD:
        parser.error(f'--batch_size {args.batch_size} leaves some of {WORLD} ranks without an image')
    return args


def main(argv=None):
    args = arguments(argv)
    path = Path(args.model_path)
    with runtime.one_line_errors():
        net = load_model(path)
        config = read_config(path.with_name('config.json'))
        if not config and args.dataset_name is None:
            runtime.say(f'No config.json beside {path}: taking {FALLBACK["dataset_name"]}, as published')
        for name, fallback in FALLBACK.items():
            if getattr(args, name, None) is None:
                setattr(args, name, config.get(name, fallback))
        data = load_data(args.dataset_name, args.root, args.store_size, unlabeled=False)
        device = runtime.start()

    torch.manual_seed(args.seed)
    net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    kept = net.state_dict() if args.bn == 'eval' else dict(net.named_parameters())
    frozen = {name: value.clone() for name, value in kept.items()}
    probe = torch.nn.Linear(net.width, len(data.classes), device=device)
    optimizer = torch.optim.Adam(probe.parameters(), args.lr, weight_decay=args.weight_decay)
    args.precision = args.precision or runtime.default_precision()
    autocast = runtime.autocast(device, args.precision)
    resident = runtime.fits(device, data.train, data.test)
    batches = DeviceViews(data.train, args.batch_size, args.image_size, views=1, seed=args.seed, device=device,
                          rank=RANK, world=WORLD, drop_last=False, resident=resident)
    test = data.test.to(device) if resident else data.test
    train_labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)

    rows, features = [], None
    out = f'{path.stem}_linear' + ('_bn_train' if args.bn == 'train' else '')
    partial = path.with_name(f'{out}.partial.csv')
    about = dict(settings=vars(args), encoder=hashlib.sha256(path.read_bytes()).hexdigest(), **provenance(device))
    bar = tqdm(range(1, args.epochs + 1), 'linear probe', disable=None if RANK == 0 else True, leave=False)
    for epoch in bar:
        sums = torch.zeros(3, device=device, dtype=torch.float64)
        net.train(args.bn == 'train')
        for (x,), index in batches.epoch(epoch):
            with torch.no_grad(), autocast:
                feature = net.f(x).flatten(1).float()  # (b, 3, h, w) -> (b, width)
            output, target = probe(runtime.gather(feature)), runtime.gather(train_labels[index])
            loss = F.cross_entropy(output, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += score(output, target)
        if features is None or args.bn == 'train':
            if args.bn == 'train':
                average_buffers(net)
            features = encode(net, test, torch.arange(len(test)), args.test_size, autocast, device)
        with torch.no_grad():
            scores = [*(sums / len(train_labels)).tolist(),
                      *(score(probe(features), test_labels) / len(test_labels)).tolist()]
        if not math.isfinite(scores[0]):
            raise SystemExit(f'error: the loss is {scores[0]} in epoch {epoch}: --lr {args.lr} is too high'
                             if RANK == 0 else 1)
        rows.append(dict(zip(COLUMNS, [epoch, *scores])))
        bar.set_postfix_str(f'train {scores[1]:.2f} %, test {scores[4]:.2f} %')
        with runtime.one_line_errors():
            if RANK == 0:
                runtime.write(partial, pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False).encode())
    bar.close()

    after = net.state_dict()
    moved = [name for name, value in frozen.items() if not torch.equal(value, after[name])]
    assert not moved, f'the probe moved the encoder: {moved}'
    with runtime.one_line_errors():
        if RANK == 0:
            path.with_name(f'{out}.json').unlink(missing_ok=True)  # never the settings of one with the rows of another
            partial.replace(path.with_name(f'{out}.csv'))
            runtime.write(path.with_name(f'{out}.json'), json.dumps(about, indent=2).encode())
    runtime.say(f'{knn_accuracy(path)}linear probe {rows[-1]["test_acc@1"]:.2f} % (@5 {rows[-1]["test_acc@5"]:.2f} %), '
                f'files in {path.parent}')


def score(output, target):
    """Sums over a batch of cross-entropy, and of hits @1 and @5 in percent: (n, classes), (n,) -> (3,)"""
    hits = output.topk(min(5, output.shape[1])).indices == target[:, None]
    sums = F.cross_entropy(output, target, reduction='sum'), 100 * hits[:, 0].sum(), 100 * hits.sum()
    return torch.stack([x.double() for x in sums])


def read_config(path):
    """The settings of the run that wrote the checkpoint, or none if it has no config.json."""
    return runtime.read_config(path)['settings'] if path.exists() else {}


def knn_accuracy(path):
    """'kNN x %, ' from the log beside the checkpoint, if it has one for the checkpoint's epoch."""
    try:
        rows = pd.read_csv(path.with_name('log.csv'))
        accuracy = rows.loc[rows['epoch'].astype(str) == path.stem.rpartition('_')[2], 'test_acc@1'].dropna()
    except (OSError, ValueError, KeyError):  # no log, or not one of ours
        return ''
    return f'kNN {accuracy.iloc[0]:.2f} %, ' if len(accuracy) else ''


if __name__ == '__main__':
    runtime.run(main)
