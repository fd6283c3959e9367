"""Train a probe on a frozen encoder and report its accuracy on the test images.

    python linear.py --model_path results/model_400.pth                     # on random views, as published
    python linear.py --model_path results/model_400.pth --bn train          # BatchNorm's statistics drift, as published
    python linear.py --model_path results/model_400.pth --augment none      # on features computed once: seconds
    python linear.py --model_path results/model_400.pth --probe logistic    # scikit-learn's logistic regression on them

Data set and sizes come from the config.json beside the checkpoint unless a flag says otherwise. The probe leaves
model_400_linear.csv beside the checkpoint, a row an epoch, its settings in a .json, and its weights and classes in a
.pth; with the flags above, the names say linear_bn_train, linear_cached and logistic, and with another data set its
name. An earlier probe's files are replaced only when the new probe has ended. The result is the last epoch's accuracy,
not the best on the test set. If the untrained encoder, model_0.pth, lies beside the checkpoint, it is probed as well,
once for all probes with the same flags and data.
"""

import hashlib
import math
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
from augment import DeviceViews, epoch_batches
from data import load_data
from evaluate import encode, hits
from model import load_model
from runtime import RANK, WORLD, UserError


def arguments(argv=None):
    parser = flags.Parser(prog='linear.py', description=__doc__.partition('\n')[0])
    flags.add(parser, 'encoder and data (default: as in the config.json beside the checkpoint)',
              ('--model_path', 'results/model_400.pth', flags.path, 'checkpoint'),
              *((name, None, kind, text) for name, _, kind, text in flags.DATA))
    flags.add(parser, 'probe',
              ('--probe', 'linear', ('linear', 'logistic'), 'by Adam, or logistic regression without the flags below'),
              ('--augment', 'views', ('views', 'none'), 'train on random views, or on features computed once'),
              ('--bn', 'eval', ('eval', 'train'), 'freeze BatchNorm\'s statistics, or let them drift, as published'),
              ('--batch_size', 512, flags.count, 'images in a batch, over all ranks'),
              ('--epochs', 100, flags.count, 'passes over the labelled images'),
              ('--lr', 1e-3, flags.positive(1000), 'learning rate of Adam'),
              ('--weight_decay', 1e-6, flags.real(0, 100), 'weight decay of Adam'),
              ('--precision', None, ('bf16', 'fp32'), 'of the encoder (default: bf16 on CUDA)'),
              ('--seed', 0, flags.seed, 'of the probe\'s weights, shuffles and views'))
    args = parser.parse_args(argv)
    if args.batch_size < (1 + (args.bn == 'train')) * WORLD:
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
    net, log = load_model(path, head=False), runs.accuracies(path)
    untrained, config = path.with_name('model_0.pth'), path.with_name('config.json')
    settings = runs.read_json(config)['settings'] if config.exists() else {}
    if args.dataset_name is None and not settings:
        runtime.say(f'No {config.name} beside {path}: taking stl10, as published')
    flags.fill_data_flags(args, settings)
    args.blur = settings.get('blur', 'published')
    here = runs.data_name(vars(args))
    other = here != (runs.data_name(settings) if settings else 'stl10')
    parts = [(args.probe, True), ('bn_train', args.bn == 'train'), (here, other),
             ('cached', args.augment == 'none' and args.probe == 'linear')]
    name = '_'.join(part for part, there in parts if there)
    log = {} if other else log  # its accuracies are on the run's own data
    data = load_data(args.dataset_name, args.root, args.store_size, False, args.cache_dir, args.skip_damaged)
    device = runtime.start()
    knn = f'kNN {log[path.name]:.2f} %, ' if path.name in log else ''
    first, five = probe_encoder(args, path, name, net, data, device)
    text = f'{knn}{args.probe} probe {first:.2f} % (@5 {five:.2f} %)'
    if untrained.exists() and untrained != path:
        knn = f'kNN {log[untrained.name]:.2f} %, ' if untrained.name in log else ''
        before, last = runtime.on_rank0(lambda: runs.read_probe(path.parent, 0, name))  # beside an earlier checkpoint
        wanted = dict(vars(args), data=runs.fingerprint({}, data))
        if before and all(before.get(flag) == value for flag, value in wanted.items() if flag != 'model_path'):
            first = last['test_acc@1']
        else:
            first, _ = probe_encoder(args, untrained, name, load_model(untrained, head=False), data, device)
        text += f'; untrained: {knn}{args.probe} probe {first:.2f} %'
    runtime.say(f'{text}; files in {path.parent}')


def probe_encoder(args, path, name, net, data, device):
    """Train and test the probe of one encoder, write its files, and return its test accuracies @1 and @5 in percent."""
    torch.manual_seed(args.seed)
    net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    frozen = runs.digest(dict(net.named_parameters() if args.bn == 'train' else net.state_dict()))
    probe = torch.nn.Linear(net.features, len(data.classes), device=device)
    optimizer = torch.optim.Adam(probe.parameters(), args.lr, weight_decay=args.weight_decay)
    autocast, resident = runtime.autocast(device, args.precision), runtime.fits(device, data.train, data.test)
    labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)

    def features(images):
        return encode(net, images, torch.arange(len(images)), args.test_size, autocast, device)

    out = path.with_name(f'{path.stem}_{name}')
    about = dict(settings={**vars(args), 'model_path': str(path)}, **runs.provenance(device),
                 data=runs.fingerprint({}, data),
                 encoder=hashlib.sha256(path.read_bytes()).hexdigest())
    rows, test_features = [], features(data.test)
    if args.augment == 'none':
        train_features = features(data.train)
    else:
        batches = DeviceViews(data.train, args.batch_size, args.image_size, views=1, seed=args.seed, device=device,
                              rank=RANK, world=WORLD, drop_last=False, resident=resident,
                              blur=args.blur == 'published')
    for epoch in tqdm(range(1, args.epochs + 1), out.name, disable=None if RANK == 0 else True, leave=False):
        if args.probe == 'logistic':
            fit_logistic(probe, train_features, labels)
            train = one_epoch(probe, [(train_features, labels)], len(labels))
        elif args.augment == 'none':
            order = epoch_batches(len(labels), args.batch_size, args.seed, epoch, drop_last=False)
            pairs = ((train_features[batch[0]], labels[batch[0]]) for batch in order)
            train = one_epoch(probe, pairs, len(labels), optimizer)
        else:
            pairs = features_of_views(net, batches.epoch(epoch), labels, autocast, args.bn == 'train')
            train = one_epoch(probe, pairs, len(labels), optimizer)
        if args.bn == 'train':  # frozen entirely, the encoder gives the same features every time
            runtime.average_buffers(net)
            test_features = features(data.test)
        if not math.isfinite(train[0]):
            raise UserError(f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} is too high')
        rows.append((epoch, *train, *one_epoch(probe, [(test_features, test_labels)], len(test_labels))))
        if RANK == 0:
            runs.write_table(f'{out}.partial.csv', rows, runs.PROBE)

    after = runs.digest(dict(net.named_parameters() if args.bn == 'train' else net.state_dict()))
    assert after == frozen, 'the probe moved the encoder'
    if RANK == 0:
        Path(f'{out}.json').unlink(missing_ok=True)  # never the settings of one with the rows of another
        runs.write_tensors(f'{out}.pth', dict(probe.cpu().state_dict(), classes=data.classes))
        Path(f'{out}.partial.csv').replace(f'{out}.csv')
        runs.write_json(f'{out}.json', about)
    return rows[-1][-2:]


def features_of_views(net, batches, labels, autocast, drift):
    """For every batch of views the features (B, F) and labels (B,) of its images on all ranks."""
    for (x,), index in batches:
        net.train(drift and len(x) > 1)  # BatchNorm needs more than one image
        with torch.no_grad(), autocast:
            feature = net.f(x).flatten(1).float()  # (b, 3, h, w) -> (b, F)
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
    runtime.run(main)
