"""Train a probe on a frozen encoder and report its accuracy on the test images.

    python linear.py --model_path results/model_400.pth                     # on random views, as published
    python linear.py --model_path results/model_400.pth --bn train          # BatchNorm's statistics drift, as published
    python linear.py --model_path results/model_400.pth --augment none      # on features computed once: seconds
    python linear.py --model_path results/model_400.pth --probe logistic    # scikit-learn's logistic regression on them
    python linear.py --model_path results/model_400.pth --label_fraction 0.01        # a hundredth of the labels

Data set and sizes come from the config.json beside the checkpoint unless a flag says otherwise. The probe leaves
model_400_linear.csv beside the checkpoint, a row an epoch, its settings in a .json, and its weights and classes in a
.pth; with the flags above, the names say linear_bn_train, linear_cached, logistic and linear_0.01, and with another
data set its name. An earlier probe's files are replaced only when the new probe has ended. The result is the last
epoch's accuracy, not the best on the test set. If the encoder before training, model_0.pth, lies beside the checkpoint,
it is probed as well, once for all probes with the same flags and data.
"""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

import flags
import runs
import runtime
from augment import normalize
from batches import Batches, DeviceViews, seeded
from data import load_data
from evaluate import encode, hits
from files import crc, lock, read_json, write_json, write_table, write_tensors
from model import load_model
from runtime import UserError, ranks

LABELS = ('--label_fraction', 1.0, flags.number(float, 'in (0, 1]', lambda x: 0 < x <= 1),
          'part of each class\'s training images to learn from, drawn by --seed')


def arguments(argv=None):
    parser = flags.Parser(prog='linear.py', description=__doc__.partition('\n')[0])
    flags.add(parser, 'encoder and data (default: as in the config.json beside the checkpoint)',
              ('--model_path', 'results/model_400.pth', flags.path, 'checkpoint'),
              *((name, None, kind, text) for name, _, kind, text in flags.DATA))
    flags.add(parser, 'probe',
              LABELS,
              ('--probe', 'linear', ('linear', 'logistic'), 'a linear layer by Adam, or a logistic regression'),
              ('--augment', 'views', ('views', 'none'), 'train on random views, or on features computed once'),
              ('--bn', 'eval', ('eval', 'train'), 'freeze BatchNorm\'s statistics, or let them drift, as published'),
              ('--batch_size', 512, flags.count, 'images in a batch, over all ranks'),
              ('--epochs', 100, flags.count, 'passes over the labelled images'),
              ('--lr', 1e-3, flags.positive(1000), 'learning rate of Adam'),
              ('--weight_decay', 1e-6, flags.real(0, 100), 'weight decay of Adam'),
              ('--precision', None, ('bf16', 'fp16', 'fp32'), 'precision of the encoder (default: bf16 on CUDA)'),
              ('--seed', 0, flags.seed, 'seed of the probe\'s weights, shuffles and views'))
    args = parser.parse_args(argv)
    if args.batch_size < (1 + (args.bn == 'train')) * ranks().world:
        parser.error(f'--batch_size {args.batch_size} leaves a rank less than it needs: 1 image, 2 with --bn train')
    if args.probe == 'logistic':
        args.augment, args.epochs = 'none', 1
    if args.augment == 'none' and args.bn == 'train':
        parser.error('--bn train needs --augment views and --probe linear: features computed once cannot drift')
    args.precision = args.precision or runtime.default_precision()
    return args


def main(argv=None):
    args = arguments(argv)
    runtime.check_machine(args.precision)
    path = Path(args.model_path)
    net, knn = load_model(path, head=False), runs.accuracies(path)
    data, settings, own = labelled_data(args, path)
    kind, cached = args.probe + '_bn_train' * (args.bn == 'train'), args.probe == 'linear' and args.augment == 'none'
    device, name = runtime.start(), probe_name(args, data, own, kind, 'cached' * cached)
    runtime.on_rank0(lambda: lock(path.parent, f'.{name}.lock', wait=True))  # probes of one kind share model_0's
    probe = partial(probe_encoder, args, name=name, data=data, recipe=flags.recipe(settings), device=device)

    def said(checkpoint, accuracy):
        known = f'kNN {knn[checkpoint.name]:.2f} %, ' if own and checkpoint.name in knn else ''
        return f'{known}{args.probe} probe {accuracy:.2f} %'

    first, five = probe(path, net)
    text, untrained = f'{said(path, first)} (@5 {five:.2f} %)', path.with_name('model_0.pth')
    if untrained.exists() and untrained != path:
        before, last = runtime.on_rank0(lambda: runs.read_probe(path.parent, 0, name))  # beside an earlier checkpoint
        before = before and {**runs.LATER, **before}
        same = before and all(before.get(flag) == value for flag, value in vars(args).items() if flag != 'model_path')
        if same and runs.is_data_of(before, data):
            first = last['test_acc@1']
        else:
            first, _ = probe(untrained, load_model(untrained, head=False))
        text += f'; {"before training" if settings.get("init") else "untrained"}: {said(untrained, first)}'
    runtime.say(f'{text}; files in {path.parent}')


def labelled_data(args, path):
    """The labelled data, the settings of the run beside the checkpoint, and whether the data are that run's own.

    Flags of data that were not given get the run's values. With --label_fraction the training images are that part.
    """
    config = read_json(path.with_name('config.json')) if path.with_name('config.json').exists() else {}
    settings = config.get('settings', {})
    if args.dataset_name is None and not settings:
        runtime.say(f'No config.json beside {path}: taking stl10, as published')
    flags.fill_data_flags(args, settings)
    data = load_data(args.dataset_name, args.root, args.store_size, False, args.cache_dir, args.skip_damaged, args.fit,
                     args.holdout)
    own = runs.is_data_of(config, data) if config else args.dataset_name == 'stl10'
    if args.label_fraction < 1:
        chosen = stratified(data.train_labels, args.label_fraction, args.seed)
        data.train, data.train_labels = data.train.index_select(0, chosen), data.train_labels[chosen]
    return data, settings, own


def stratified(labels, fraction, seed):
    """Sorted indices (m,) of a random part of each class of labels (n,), rounded to images, but at least one."""
    order = torch.randperm(len(labels), generator=seeded(seed, fraction))  # the parts of two fractions are not nested
    by_class = [order[labels[order] == label] for label in labels.unique()]
    return torch.cat([index[:max(1, round(fraction * len(index)))] for index in by_class]).sort().values


def probe_name(args, data, own, kind, cached=''):
    """What the files of a probe are called, after their checkpoint: its kind, and data that are not the run's own."""
    other = '' if own else runs.data_name(vars(args))[:40] + f'_{data.digest[:8]}' * (args.dataset_name == 'folder')
    parts = kind, other, cached, f'{args.label_fraction:g}' * (args.label_fraction < 1)
    return '_'.join(part for part in parts if part)


def probe_encoder(args, path, net, name, data, recipe, device):
    """Train and test the probe of one encoder, write its files, and return its test accuracies @1 and @5 in percent."""
    torch.manual_seed(args.seed)
    rank, world, _, _ = ranks()
    out = path.with_name(f'{path.stem}_{name}')
    net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    probe = torch.nn.Linear(net.features, len(data.classes), device=device)
    optimizer = torch.optim.Adam(probe.parameters(), args.lr, weight_decay=args.weight_decay)
    autocast, resident = runtime.autocast(device, args.precision), runtime.fits(device, data.train, data.test)
    labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
    batches = Batches(len(labels), args.batch_size, 1, args.seed, drop_last=False, rank=rank, world=world)
    about = dict(settings={**vars(args), 'model_path': str(path)}, **runs.provenance(device), data_digest=data.digest,
                 encoder=crc(path))

    def features(images):
        return encode(net, images, torch.arange(len(images)), args.test_size, autocast, device)

    rows, test_features = [], features(data.test)
    if args.augment == 'none':
        train_features = features(data.train)
    else:
        views = DeviceViews(data.train, batches, args.image_size, device, resident, **recipe)
    for epoch in tqdm(range(1, args.epochs + 1), out.name, disable=None if rank == 0 else True, leave=False):
        if args.probe == 'logistic':
            fit_logistic(probe, train_features, labels)
            train = one_epoch(probe, [(train_features, labels)], len(labels))
        else:
            if args.augment == 'none':
                pairs = ((train_features[batch[0]], labels[batch[0]]) for batch in batches.epoch(epoch))
            else:
                pairs = features_of_views(net, views.epoch(epoch), labels, autocast, args.bn == 'train')
            train = one_epoch(probe, pairs, len(labels), optimizer)
        if not math.isfinite(train[0]):
            raise UserError(f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} is too high')
        tested = args.bn == 'eval' or epoch % 10 == 0 or epoch == args.epochs
        if tested and args.bn == 'train':  # frozen entirely, the encoder gives the same features every time
            net.load_state_dict(runtime.averaged_buffers(net), strict=False)
            test_features = features(data.test)
        test = one_epoch(probe, [(test_features, test_labels)], len(test_labels)) if tested else (math.nan,) * 3
        rows.append((epoch, *train, *test))
        if rank == 0:
            write_table(f'{out}.partial.csv', rows, runs.PROBE)
    if rank == 0:
        replace_files(out, dict(probe.cpu().state_dict(), classes=data.classes), about)
    return rows[-1][-2:]


def replace_files(out, weights, about):
    """Put the files of a probe that has ended in the place of an earlier one's."""
    Path(f'{out}.json').unlink(missing_ok=True)  # never the settings of one with the rows of another
    write_tensors(f'{out}.pth', weights)
    Path(f'{out}.partial.csv').replace(f'{out}.csv')
    write_json(f'{out}.json', about)


def features_of_views(net, batches, labels, autocast, drift):
    """For every batch of views the features (B, F) and labels (B,) of its images on all ranks.

    Features have a graph if the encoder is not frozen. With drift BatchNorm is in training mode.
    """
    for (x,), index in batches:
        net.train(drift and len(x) > 1)  # BatchNorm needs more than one image
        with autocast:
            feature = net.f(normalize(x)).flatten(1).float()  # (b, 3, h, w) -> (b, F)
        yield runtime.gather(feature), runtime.gather(labels[index])


def one_epoch(probe, pairs, n, optimizer=None):
    """Mean loss, and accuracies @1 and @5 in percent, over n images in pairs of features (B, F) and labels (B,).

    With an optimizer the probe is trained, and the numbers are those of each batch before its step.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=probe.weight.device)  # losses, hits @1 and @5
    for feature, target in pairs:
        with torch.set_grad_enabled(optimizer is not None):
            output = probe(feature)
            loss = F.cross_entropy(output, target)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums += torch.cat([(len(target) * loss.detach())[None], hits(output.detach(), target)])
    loss, first, five = (sums / n).tolist()
    return loss, 100 * first, 100 * five


def fit_logistic(probe, features, labels):
    """Give the probe the weights of scikit-learn's logistic regression on standardised features (n, F), labels (n,)."""
    scaler = StandardScaler().fit(features.cpu())
    found = LogisticRegression(max_iter=2000).fit(scaler.transform(features.cpu()), labels.cpu())
    weight, bias = found.coef_ / scaler.scale_, found.intercept_ - found.coef_ @ (scaler.mean_ / scaler.scale_)
    if len(found.classes_) == 2:  # of two classes it keeps the difference
        weight, bias = [-weight[0] / 2, weight[0] / 2], [-bias[0] / 2, bias[0] / 2]
    with torch.no_grad():
        for own, values in (probe.weight, weight), (probe.bias, bias):
            own[torch.as_tensor(found.classes_)] = torch.as_tensor(np.array(values), dtype=own.dtype, device=own.device)


if __name__ == '__main__':
    runtime.run(main, 'lower --batch_size, choose --augment none, or start more ranks')
