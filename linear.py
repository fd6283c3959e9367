"""Train a probe on a frozen encoder and report its accuracy on the test images.

    python linear.py --model_path results/model_400.pth        # on random views, as published

--bn train         BatchNorm's statistics keep updating, as in HCL's and DCL's code
--cached           on features of the images, computed once: seconds
--probe logistic   scikit-learn's logistic regression on such features
--label_fraction   on a part of the labels

Data set and sizes come from the config.json beside the checkpoint unless a flag says otherwise. The
probe writes model_400_linear.csv, with a row for each epoch, its settings in a .json, and its
weights and classes in a .pth, beside the checkpoint. With the flags above the names are
linear_bn_train, linear_cached, logistic and linear_0.01; with another data set they have its name.
An earlier probe's files are replaced only when the new probe has ended. The result is that of the
last epoch, not the best on the test set. If the checkpoint is of a run, and the encoder before
training, model_0.pth, lies beside it, that is probed too, once for all probes with the same flags
and data. --prefix takes one encoder of a checkpoint that holds several, as MoCo's do.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from hardneg import flags, runs, runtime, timm_models
from hardneg.batches import Batches, DeviceViews, seeded
from hardneg.evaluate import Evaluator, all_finite, hits
from hardneg.files import lock, write_table, write_tensors
from hardneg.runtime import UsageError, UserError, ranks, say
from hardneg.timm_models import encoder_crc
from model import load_encoder, load_model
from utils import Data, load

# Flags that say where the encoder is, not how it is probed
ENCODER = ('model_path', 'prefix', 'arch')


def make_parser():
    parser = flags.Parser(prog='linear.py', description=__doc__.partition('\n')[0])
    flags.add_model_path(parser)
    parser.add_argument(
        '--results_dir',
        type=flags.path,
        help='directory of what a probe of timm/NAME writes (results/NAME)',
    )
    flags.add_data_flags(parser, 'data set (default: as in the config.json beside the checkpoint)')
    probe = parser.add_argument_group('probe')
    add_label_fraction(probe)
    probe.add_argument(
        '--probe',
        choices=('linear', 'logistic'),
        default='linear',
        help='a linear layer by Adam, or logistic regression on cached features (%(default)s)',
    )
    probe.add_argument(
        '--cached',
        action='store_true',
        help='train on features of the images, computed once (as published: on random views)',
    )
    probe.add_argument(
        '--bn',
        choices=('eval', 'train'),
        default='eval',
        help="BatchNorm. eval: fixed statistics; train: keep updating, as HCL's code does "
        '(%(default)s)',
    )
    probe.add_argument(
        '--batch_size',
        type=flags.count,
        default=512,
        help='images in a batch, over all ranks (%(default)s)',
    )
    probe.add_argument(
        '--epochs',
        type=flags.count,
        default=100,
        help='passes over the labelled images (%(default)s)',
    )
    probe.add_argument(
        '--lr', type=flags.positive(1000), default=1e-3, help='learning rate of Adam (%(default)s)'
    )
    probe.add_argument(
        '--weight_decay', type=flags.real(0, 100), default=1e-6, help='L2 penalty (%(default)s)'
    )
    flags.add_precision(probe, 'the encoder')
    probe.add_argument(
        '--seed',
        type=flags.seed,
        default=0,
        help="seed of the probe's weights, shuffles and views (%(default)s)",
    )
    return parser


def add_label_fraction(group):
    group.add_argument(
        '--label_fraction',
        type=flags.part,
        default=1.0,
        help="part of each class's training images to learn from, drawn with --seed (%(default)s)",
    )


def arguments(argv=None):
    """The settings, without those of the data that come from the checkpoint's run."""
    args = make_parser().parse_args(argv)
    if args.probe == 'logistic':
        args.cached, args.epochs = True, 1
    if args.cached and args.bn == 'train':
        raise UsageError('--bn train needs random views: cached features cannot drift')
    least = 2 if args.bn == 'train' else 1
    if args.batch_size < least * ranks().world:
        raise UsageError(
            f'--batch_size {args.batch_size} leaves a rank less than it needs: 1 image, 2 with '
            '--bn train'
        )
    timm_models.check_results_dir(args.model_path, args.results_dir)
    return args


class NotFinite(UserError):
    """Features overflow the precision."""


@dataclass
class Probe:
    """What the probes of the trained and of the untrained encoder share."""

    args: Any
    data: Data
    recipe: dict
    name: str
    device: torch.device


def main(argv=None):
    args = arguments(argv)
    runtime.check_machine(args.precision)
    net = load_encoder(args.model_path, args.prefix, args.arch)
    flags.fill_precision(args, arch=net.backbone['arch'])
    path = timm_models.place(args.model_path, args.results_dir)
    config = runs.config_beside(args.model_path)
    data, settings, own = labelled_data(args, config, net)
    device = runtime.start()
    runtime.check_same_data(data.digest, device)
    name = probe_name(args, data, own, kind(args))
    untrained = path.with_name('model_0.pth')
    logged = {}
    compares = False
    if config:
        logged = runs.logged_accuracies(path)
        compares = untrained.exists() and untrained != path
    lock_probe(path, name)
    probe = Probe(args, data, flags.recipe(settings), name, device)

    knn = logged if own else {}
    first, five = probe_encoder(probe, path, net, args.model_path)
    text = f'{summary(args.probe, first, knn.get(path.name))} (@5 {five:.2f} %)'
    if compares:
        lock_probe(untrained, name)  # which the probes of other checkpoints share
        accuracy = runtime.on_rank0(lambda: probed_before(probe, untrained))
        if accuracy is None:
            start = load_model(untrained, head=False)
            try:
                accuracy, _ = probe_encoder(probe, untrained, start, untrained)
            except NotFinite:  # the accuracy of the trained encoder is told all the same
                accuracy = math.nan
        before = 'untrained'
        if settings.get('init'):
            before = 'before training'
        text += f'; {before}: {summary(args.probe, accuracy, knn.get(untrained.name))}'
    say(f'{text}; files in {path.parent}')


def summary(probe, accuracy, knn):
    """The accuracies (percent) of an encoder as text: of the probe and, if not None, of kNN."""
    text = f'{probe} probe {accuracy:.2f} %'
    if knn is not None:
        text = f'kNN {knn:.2f} %, {text}'
    return text


def lock_probe(path, name):
    """Wait until no other process probes this checkpoint in this way, and keep others out.

    Several ranks do not wait: those that are not rank 0 would time out.
    """
    alone = ranks().world == 1
    runtime.on_rank0(lambda: lock(path.parent, f'.{path.stem}_{name}.lock', wait=alone))


def labelled_data(args, config, net):
    """The labelled data, the settings of the encoder's run, and whether the data are that run's.

    config is the run's config.json, or None. Flags of data that were not given get the run's
    values. With --label_fraction the training images are that part.

    Raises:
        UsageError: the encoder takes no images of the size of views, or of tests.
    """
    settings = net.sizes()
    if config:
        settings = config['settings']
    flags.fill_data_flags(args, settings)
    data = load(args, unlabeled=False)
    own = args.dataset_name == 'stl10'
    if config:
        own = config['data_digest'] == data.digest
    tested = args.test_size or data.test.shape[2]
    timm_models.check_sizes(net.backbone['arch'], args.image_size, tested)
    if args.label_fraction < 1:
        chosen = stratified(data.train_labels, args.label_fraction, args.seed)
        data.train = data.train.index_select(0, chosen)
        data.train_labels = data.train_labels[chosen]
    return data, settings, own


def stratified(labels, fraction, seed):
    """Sorted indices (m,) of a random part of each class of labels (n,): at least one image."""
    # Parts of different fractions are not nested.
    order = torch.randperm(len(labels), generator=seeded(seed, fraction))
    chosen = []
    for label in labels.unique():
        index = order[labels[order] == label]
        chosen.append(index[: max(1, round(fraction * len(index)))])
    return torch.cat(chosen).sort().values


def kind(args):
    """The kind of a probe, one of runs.PROBES."""
    if args.probe == 'logistic':
        return 'logistic'
    if args.bn == 'train':
        return 'linear_bn_train'
    return 'linear_cached' if args.cached else 'linear'


def probe_name(args, data, own, kind):
    """What the files of a probe are called, after their checkpoint.

    It has the kind, and the data's name if they are not the run's own, and the part of the labels.
    """
    name = kind
    if not own:
        name += f'_{runs.data_name(vars(args))[:40]}'
        if args.dataset_name == 'folder':
            name += f'_{data.digest[:8]}'
    if args.label_fraction < 1:
        name += f'_{args.label_fraction:g}'
    return name


def probed_before(probe, path):
    """The test accuracy of a finished probe of this encoder, flags and data, or None."""
    settings, last = runs.read_probe(path.parent, 0, probe.name, probe.data.digest)
    if settings is None:
        return None
    for flag, value in runs.deciding(vars(probe.args)).items():
        if flag not in ENCODER and settings.get(flag) != value:
            return None
    return last['test_acc@1']


def probe_encoder(probe, path, net, source):
    """Train and test the probe of an encoder and write its files.

    Args:
        probe: Probe.
        path: Path beside which the files lie, that of the encoder's checkpoint.
        net: model.Model.
        source: the checkpoint, or timm/NAME.

    Returns the test accuracies @1 and @5 in percent.
    """
    args, data, device = probe.args, probe.data, probe.device
    about = dict(
        settings={**vars(args), 'model_path': str(Path(source))},
        **runs.provenance(device),
        data_digest=data.digest,
        encoder=encoder_crc(source, net),
    )
    out = path.with_name(f'{path.stem}_{probe.name}')
    torch.manual_seed(args.seed)
    net.to(device, memory_format=torch.channels_last).requires_grad_(False)
    layer = torch.nn.Linear(net.features, len(data.classes), device=device)
    evaluator = Evaluator(net, device, runtime.autocast(device, args.precision))
    if args.probe == 'logistic':
        row = train_logistic(probe, evaluator, layer)
        write_rows(out, [row])
    else:
        row = train_linear(probe, evaluator, layer, out)
    if ranks().rank == 0:
        replace_files(out, dict(layer.cpu().state_dict(), classes=data.classes), about)
    return row[-2:]


def train_linear(probe, evaluator, layer, out):
    """Train the layer by Adam, write a row for each epoch, and return the last one."""
    args, data, net = probe.args, probe.data, evaluator.net
    optimizer = torch.optim.Adam(layer.parameters(), args.lr, weight_decay=args.weight_decay)
    labels = data.train_labels.to(probe.device)
    batches = Batches(len(labels), args.batch_size, views=1, seed=args.seed, drop_last=False)
    if args.cached:
        features = all_features(probe, evaluator, data.train)
    else:
        loader = labelled_views(args, data.train, batches, probe.device, probe.recipe)
    update_bn = args.bn == 'train'
    if not update_bn:
        test_features = all_features(probe, evaluator, data.test)
    test_labels = data.test_labels.to(probe.device)
    rows = []
    epochs = range(1, args.epochs + 1)
    for epoch in tqdm(epochs, out.name, disable=runtime.no_bar(), leave=False):
        if args.cached:
            pairs = cached_pairs(features, labels, batches.epoch(epoch, features.device))
        else:
            views = loader.epoch(epoch)
            pairs = features_of_views(net, views, labels, evaluator.autocast, update_bn)
        train = one_epoch(layer, pairs, len(data.train), optimizer)
        if not math.isfinite(train[0]):
            raise UserError(f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} is too high')
        tested = True
        if update_bn:
            # The features of the test images change. They take as long as an epoch.
            tested = epoch % 10 == 0 or epoch == args.epochs
            if tested:
                net.load_state_dict(runtime.averaged_buffers(net), strict=False)
                test_features = all_features(probe, evaluator, data.test)
        test = math.nan, math.nan, math.nan
        if tested:
            test = one_epoch(layer, [(test_features, test_labels)], len(test_labels))
        rows.append((epoch, *train, *test))
        write_rows(out, rows)
    return rows[-1]


def train_logistic(probe, evaluator, layer):
    """Give the layer the weights of a logistic regression, and return the row of its accuracies."""
    data = probe.data
    row = [1]
    features = all_features(probe, evaluator, data.train)
    labels = data.train_labels.to(probe.device)
    fit_logistic(layer, features, labels)
    row += one_epoch(layer, [(features, labels)], len(labels))
    features = all_features(probe, evaluator, data.test)
    labels = data.test_labels.to(probe.device)
    row += one_epoch(layer, [(features, labels)], len(labels))
    return row


def all_features(probe, evaluator, images):
    """f's features (n, F) of all images at the size for tests; NotFinite if they overflow."""
    features = evaluator.features(images, torch.arange(len(images)), probe.args.test_size)
    if not all_finite(features):
        precision = probe.args.precision
        raise NotFinite(f'features are not finite with --precision {precision}: try fp32')
    return features


def labelled_views(args, images, batches, device, recipe):
    """DeviceViews of the images, which move to a GPU if they fit on it."""
    if runtime.fits(device, images):
        images = images.to(device)
    return DeviceViews(images, batches, args.image_size, device, recipe)


def write_rows(out, rows):
    if ranks().rank == 0:
        write_table(f'{out}.partial.csv', rows, runs.PROBE)


def replace_files(out, weights, about):
    """Put the files of a probe that has ended in the place of an earlier one's."""
    # Otherwise the settings of one probe would lie beside the rows of another for a moment.
    Path(f'{out}.json').unlink(missing_ok=True)
    write_tensors(f'{out}.pth', weights)
    Path(f'{out}.partial.csv').replace(f'{out}.csv')
    runs.write_config(f'{out}.json', about)


def cached_pairs(features, labels, batches):
    """Yield the features (B, F) and labels (B,) of each batch of indices (1, B)."""
    for batch in batches:
        yield features[batch[0]], labels[batch[0]]


def features_of_views(net, batches, labels, autocast, update_bn):
    """Yield the features (B, F) and labels (B,) of each batch of views, of all ranks.

    Features have a graph if the encoder is not frozen. update_bn updates BatchNorm's statistics.
    """
    for (x,), index in batches:
        net.train(update_bn and len(x) > 1)  # BatchNorm needs more than one image
        with autocast:
            feature = net.f(net.normalize(x)).flatten(1).float()  # (b, 3, h, w) -> (b, F)
        yield runtime.gather(feature), runtime.gather(labels[index])


def one_epoch(layer, pairs, n, optimizer=None):
    """Mean loss, and accuracies @1 and @5 in percent, over n images.

    pairs yields features (B, F) and labels (B,). With an optimizer the layer is trained, and the
    numbers are those of each batch before its step.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=layer.weight.device)  # losses, hits @1, @5
    for feature, target in pairs:
        with torch.set_grad_enabled(optimizer is not None):
            output = layer(feature)
            loss = F.cross_entropy(output, target)
        if optimizer:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        sums[0] += len(target) * loss.detach()
        sums[1:] += hits(output.detach(), target)
    loss, first, five = (sums / n).tolist()
    return loss, 100 * first, 100 * five


def fit_logistic(layer, features, labels):
    """Give the layer the weights of scikit-learn's logistic regression.

    features (n, F) are standardised for it; labels (n,).
    """
    scaler = StandardScaler().fit(features.cpu())
    found = LogisticRegression(max_iter=2000)
    found.fit(scaler.transform(features.cpu()), labels.cpu())
    weight = found.coef_ / scaler.scale_  # (C, F), or (1, F) for two classes
    bias = found.intercept_ - found.coef_ @ (scaler.mean_ / scaler.scale_)
    if len(found.classes_) == 2:  # for which scikit-learn keeps the difference
        weight = np.concatenate([-weight / 2, weight / 2])
        bias = np.concatenate([-bias / 2, bias / 2])
    classes = torch.as_tensor(found.classes_)
    with torch.no_grad():
        layer.weight[classes] = torch.as_tensor(weight).to(layer.weight)
        layer.bias[classes] = torch.as_tensor(bias).to(layer.bias)


if __name__ == '__main__':
    runtime.run(main)
