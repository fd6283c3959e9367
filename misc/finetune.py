"""Train encoder and classifier together on labelled images, and report the accuracy on the test images.

    python misc/finetune.py --model_path results/model_400.pth --label_fraction 0.01
    python misc/finetune.py --model_path none --like results/model_400.pth --label_fraction 0.01    # no pretraining

Data set, sizes and views come from the config.json beside the checkpoint unless a flag says otherwise. The files
model_400_finetune_0.01.csv (a row an epoch), .json (settings) and .pth (f and the classifier fc, which load_model()
reads) are written beside the checkpoint; without pretraining they say scratch. Both learning rates fall as half a
cosine. The result is the last epoch's accuracy, not the best on the test set. It runs as one process.
"""

import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg import runs
from hardneg import runtime
from hardneg.batches import Batches, DeviceViews
from hardneg.evaluate import encode
from hardneg.files import crc, lock, write_table
from linear import LABELS, features_of_views, labelled_data, one_epoch, probe_name, replace_files
from model import Model, load_model
from hardneg.runtime import UserError, ranks


def arguments(argv=None):
    parser = flags.Parser(prog='finetune.py', description=__doc__.partition('\n')[0])
    flags.add(parser, 'encoder, data and views (default: as in the config.json beside the checkpoint)',
              ('--model_path', 'results/model_400.pth', flags.path, 'checkpoint, or none: random weights'),
              ('--like', None, flags.path, 'checkpoint whose network, data and views --model_path none takes'),
              *((name, None, kind, text) for name, _, kind, text in flags.DATA + flags.VIEWS))
    flags.add(parser, 'training and results',
              LABELS,
              ('--batch_size', 64, flags.count, 'images in a batch'),
              ('--epochs', 100, flags.count, 'passes over the labelled images'),
              ('--lr', 1e-3, flags.positive(1000), 'learning rate of Adam, for the classifier'),
              ('--encoder_lr', None, flags.positive(1000), 'of Adam, for f (default: 1e-4; --lr from random weights)'),
              ('--weight_decay', 1e-6, flags.real(0, 100), 'weight decay of Adam'),
              ('--precision', None, ('bf16', 'fp32'), 'of the encoder (default: bf16 on GPUs that have it)'),
              ('--seed', 0, flags.seed, 'of labelled part, new weights, shuffles and views'),
              ('--results_dir', None, flags.path, 'directory to write in (default: the checkpoint\'s)'))
    args = parser.parse_args(argv)
    if (args.model_path == 'none') != (args.like is not None):
        parser.error('--model_path none and --like CHECKPOINT go together: random weights in the checkpoint\'s network')
    if ranks().world > 1:
        parser.error('it runs as one process: start it by python')
    args.encoder_lr = args.encoder_lr or (args.lr if args.like else 1e-4)
    args.precision = args.precision or runtime.default_precision()
    return args


def main(argv=None):
    args = arguments(argv)
    runtime.check_machine(args.precision)
    path = Path(args.like or args.model_path)
    net = load_model(path, head=False)
    data, settings, own = labelled_data(args, path)
    for flag, default, *_ in flags.VIEWS:
        if getattr(args, flag[2:]) is None:
            setattr(args, flag[2:], settings.get(flag[2:], default))
    directory, device = Path(args.results_dir or path.parent), runtime.start()
    name = f'{path.stem}_{probe_name(args, data, own, "scratch" if args.like else "finetune")}'
    lock(directory, f'.{name}.lock')
    torch.manual_seed(args.seed)
    net = Model(**net.backbone) if args.like else net
    about = dict(settings=vars(args), **runs.provenance(device), data_digest=data.digest, classes=data.classes,
                 labelled=len(data.train), encoder=None if args.like else crc(path))
    first, five = finetune(args, net.to(device, memory_format=torch.channels_last), data, device, directory / name,
                           about)
    runtime.say(f'{"from random weights" if args.like else "fine-tuned"} on {len(data.train)} labelled images: '
                f'{first:.2f} % (@5 {five:.2f} %); files in {directory}')


def finetune(args, net, data, device, out, about):
    """Train f and a new classifier, write their files, and return the test accuracies @1 and @5 in percent."""
    head = torch.nn.Linear(net.features, len(data.classes), device=device)
    optimizer = torch.optim.Adam([dict(params=net.f.parameters(), lr=args.encoder_lr), dict(params=head.parameters())],
                                 args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    autocast, resident = runtime.autocast(device, args.precision), runtime.fits(device, data.train, data.test)
    labels, test_labels = data.train_labels.to(device), data.test_labels.to(device)
    batches = Batches(len(labels), args.batch_size, 1, args.seed, drop_last=False)
    views, rows = DeviceViews(data.train, batches, args.image_size, device, resident, **flags.recipe(vars(args))), []
    for epoch in tqdm(range(1, args.epochs + 1), out.name, leave=False, disable=None):
        pairs = features_of_views(net, views.epoch(epoch), labels, autocast, drift=True)
        train, test = one_epoch(head, pairs, len(labels), optimizer), (math.nan,) * 3
        if not math.isfinite(train[0]):
            raise UserError(f'the loss is {train[0]} in epoch {epoch}: --lr {args.lr} or --encoder_lr '
                            f'{args.encoder_lr} is too high')
        schedule.step()
        if epoch % 10 == 0 or epoch == args.epochs:
            features = encode(net, data.test, torch.arange(len(data.test)), args.test_size, autocast, device)
            test = one_epoch(head, [(features, test_labels)], len(test_labels))
        rows.append((epoch, *train, *test))
        write_table(f'{out}.partial.csv', rows, runs.PROBE)
    weights = {**net.f.state_dict(prefix='f.'), **head.state_dict(prefix='fc.')}
    replace_files(out, {name: x.cpu() for name, x in weights.items()}, about)
    return rows[-1][-2:]


if __name__ == '__main__':
    runtime.run(main, 'lower --batch_size')
