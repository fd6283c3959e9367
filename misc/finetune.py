"""Train encoder and classifier together on labelled images; report the accuracy on test images.

    python misc/finetune.py --model_path results/model_400.pth --label_fraction 0.01
    python misc/finetune.py --model_path none --like results/model_400.pth --label_fraction 0.01

The second line trains the same network from random weights. Data set, sizes and views come from the
config.json beside the checkpoint unless a flag says otherwise. Beside the checkpoint it writes
model_400_finetune_0.01.csv, with a row for each epoch, its settings in a .json, and f and the
classifier fc in a .pth, which load_model() reads; from random weights the names say scratch. Both
learning rates fall as half a cosine. The result is that of the last epoch, not the best on the test
set. It runs as one process, and takes as long for each view as main.py.
"""

import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runs, runtime, timm_models
from hardneg.batches import Batches
from hardneg.evaluate import Evaluator
from hardneg.files import lock, write_table
from hardneg.runtime import UserError, ranks, say
from hardneg.timm_models import encoder_crc
from linear import (
    add_label_fraction,
    features_of_views,
    labelled_data,
    labelled_views,
    one_epoch,
    probe_name,
    replace_files,
)
from model import Model, load_encoder


def make_parser():
    parser = flags.Parser(prog='finetune.py', description=__doc__.partition('\n')[0])
    encoder = parser.add_argument_group('encoder')
    encoder.add_argument(
        '--model_path',
        type=flags.path,
        default=flags.MODEL_PATH,
        help='checkpoint, or none for random weights (%(default)s)',
    )
    encoder.add_argument(
        '--like',
        type=flags.path,
        help='checkpoint whose network, data and views --model_path none takes',
    )
    flags.add_encoder(encoder)
    beside = '(default: as in the config.json beside the checkpoint)'
    flags.add_data_flags(parser, f'data set {beside}')
    flags.add_view_flags(parser, f'random views {beside}')

    training = parser.add_argument_group('training and results')
    add_label_fraction(training)
    training.add_argument(
        '--batch_size', type=flags.count, default=64, help='images in a batch (%(default)s)'
    )
    training.add_argument(
        '--epochs',
        type=flags.count,
        default=100,
        help='passes over the labelled images (%(default)s)',
    )
    training.add_argument(
        '--lr',
        type=flags.positive(1000),
        default=1e-3,
        help='learning rate of Adam for the classifier (%(default)s)',
    )
    training.add_argument(
        '--encoder_lr',
        type=flags.positive(1000),
        help='learning rate of Adam for f (1e-4; --lr from random weights)',
    )
    training.add_argument(
        '--weight_decay', type=flags.real(0, 100), default=1e-6, help='L2 penalty (%(default)s)'
    )
    training.add_argument(
        '--precision',
        choices=('bf16', 'fp32'),
        help='numbers of the encoder (bf16 where the machine is faster with it, else fp32)',
    )
    training.add_argument(
        '--seed',
        type=flags.seed,
        default=0,
        help='seed of the labelled part, new weights, shuffles and views (%(default)s)',
    )
    training.add_argument(
        '--results_dir', type=flags.path, help="directory to write in (the checkpoint's)"
    )
    return parser


def arguments(argv=None):
    """The settings, without those of data and views that come from the checkpoint's run."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if (args.model_path == 'none') != (args.like is not None):
        parser.error(
            '--model_path none and --like CHECKPOINT go together: random weights in the '
            "checkpoint's network"
        )
    if ranks().world > 1:
        parser.error('it runs as one process: start it by python')
    if args.encoder_lr is None:
        args.encoder_lr = args.lr if args.like else 1e-4
    return args


def main(argv=None):
    args = arguments(argv)
    runtime.check_machine(args.precision)
    source = args.like or args.model_path
    net = load_encoder(source, args.prefix, args.arch)
    encoder = encoder_crc(source, net)
    flags.fill_precision(args, arch=net.backbone['arch'])
    path = timm_models.place(source, args.results_dir)
    data, settings, own = labelled_data(args, runs.config_beside(source), net)
    flags.fill(args, flags.VIEWS, settings)
    flags.check_views(args.image_size, net.backbone['stem'])
    device = runtime.start()
    torch.manual_seed(args.seed)
    if args.like:
        kind, start, encoder = 'scratch', 'from random weights', None
        net = Model(**net.backbone)
    else:
        kind, start = 'finetune', 'fine-tuned'
    directory = Path(args.results_dir or path.parent)
    name = f'{path.stem}_{probe_name(args, data, own, kind)}'
    lock(directory, f'.{name}.lock')
    net.to(device, memory_format=torch.channels_last)
    about = dict(
        settings=vars(args),
        **runs.provenance(device),
        data_digest=data.digest,
        classes=data.classes,
        labelled=len(data.train),
        encoder=encoder,
    )
    first, five = finetune(args, net, data, directory / name, about)
    say(
        f'{start} on {len(data.train)} labelled images: {first:.2f} % (@5 {five:.2f} %); files in '
        f'{directory}'
    )


def finetune(args, net, data, out, about):
    """Train f and a new classifier, and write their files.

    Args:
        args: the settings.
        net: model.Model on its device.
        data: utils.Data.
        out: Path of the files, without their suffixes.
        about: dict for the .json.

    Returns the test accuracies @1 and @5 in percent.
    """
    device = next(net.parameters()).device
    classifier = torch.nn.Linear(net.features, len(data.classes), device=device)
    groups = [
        dict(params=net.f.parameters(), lr=args.encoder_lr),
        dict(params=classifier.parameters()),
    ]
    optimizer = torch.optim.Adam(groups, args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    autocast = runtime.autocast(device, args.precision)
    evaluator = Evaluator(net, device, autocast)
    labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
    batches = Batches(len(labels), args.batch_size, views=1, seed=args.seed, drop_last=False)
    views = labelled_views(args, data.train, batches, device, flags.recipe(vars(args)))

    rows = []
    epochs = range(1, args.epochs + 1)
    for epoch in tqdm(epochs, out.name, disable=runtime.no_bar(), leave=False):
        pairs = features_of_views(net, views.epoch(epoch), labels, autocast, update_bn=True)
        train = one_epoch(classifier, pairs, len(labels), optimizer)
        if not math.isfinite(train[0]):
            raise UserError(
                f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} or --encoder_lr '
                f'{args.encoder_lr} is too high'
            )
        schedule.step()
        test = math.nan, math.nan, math.nan
        if epoch % 10 == 0 or epoch == args.epochs:
            features = evaluator.features(data.test, torch.arange(len(data.test)), args.test_size)
            test = one_epoch(classifier, [(features, test_labels)], len(test_labels))
        rows.append((epoch, *train, *test))
        write_table(f'{out}.partial.csv', rows, runs.PROBE)
    weights = {**net.f.state_dict(prefix='f.'), **classifier.state_dict(prefix='fc.')}
    replace_files(out, {name: x.cpu() for name, x in weights.items()}, about)
    _, first, five = test
    return first, five


if __name__ == '__main__':
    runtime.run(main)
