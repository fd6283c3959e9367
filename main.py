"""Train an encoder by contrastive learning with hard negatives (HCL), debiased (DCL) or standard (SimCLR).

    python main.py --tau_plus 0.1 --beta 1.0                                  # the published run: STL10, ResNet-50
    python main.py --dataset_name shapes --arch resnet18 --image_size 16      # embedded images, small enough for a CPU
    torchrun --nproc_per_node 8 main.py --tau_plus 0.1 --beta 1.0             # the same batch over eight GPUs

Everything that a run leaves is in --results_dir; the same command continues a run that was stopped. On two CPU
cores a ResNet-18 takes about 180 views of 16 px a second; for ResNet-50 at 32 px have a GPU.
"""

import argparse
import math
import time
from functools import partial
from inspect import signature
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flags
import runs
import runtime
from augment import DeviceViews
from data import load_data
from evaluate import encode, knn, label_free
from losses import contrastive_loss
from model import ARCHS, Model
from runtime import RANK, WORLD, UserError
from utils import ReferenceViews

SMALL = ('python main.py --dataset_name shapes --arch resnet18 --image_size 16 --test_size 16 --batch_size 64 '
         '--temperature 0.2 --k 20 --knn_every 1 --epochs 3')


def arguments(argv=None):
    parser = flags.Parser(prog='main.py', description=__doc__.partition('\n')[0])
    data = parser.add_argument_group('data and views')
    flags.add_data_flags(data)
    parser.set_defaults(**flags.DATA)
    data.add_argument('--views', default=2, type=flags.integer(2, 16), help='random views of each image')
    data.add_argument('--positives', default='view', choices=('view', 'label'),
                      help='views of one image, or of random images of its class (HCL\'s true-label variant)')
    data.add_argument('--blur', default='published', choices=('published', 'none'),
                      help='a tenth of the view with probability 0.5, or none, as in leftthomas\'s recipe')
    data.add_argument('--augment', default='device', choices=('device', 'pil'),
                      help='make views in batches on the device, or by PIL and OpenCV in workers')
    data.add_argument('--workers', default=min(16, runtime.CORES), type=flags.integer(0, 256),
                      help='processes of each rank for --augment pil')
    model = parser.add_argument_group('model')
    model.add_argument('--arch', default='resnet50', choices=ARCHS, help='backbone f')
    model.add_argument('--width', default=1, type=float, choices=(0.125, 0.25, 0.5, 1, 2, 4), help='of f, a factor')
    model.add_argument('--stem', default='cifar', choices=('cifar', 'imagenet'),
                       help='3x3 of stride 1, or 7x7 of stride 2 and a max-pool, for views of 96 pixels and more')
    model.add_argument('--hidden_dim', type=flags.integer(1, 65536), help='of g (default: 512 times width)')
    model.add_argument('--feature_dim', default=128, type=flags.integer(1, 65536), help='of the embedding z')
    loss = parser.add_argument_group('objective')
    loss.add_argument('--estimator', choices=('hard', 'debiased', 'standard', 'easy'),
                      help='hard negatives, debiased, or standard = easy (default: hard; standard with --oracle)')
    loss.add_argument('--debiased', type=flags.boolean,
                      help='DCL\'s flag: True is debiased, or hard with --beta; False is standard')
    loss.add_argument('--temperature', default=0.5, type=flags.positive(100), help='t')
    loss.add_argument('--tau_plus', type=flags.number(float, 'in [0, 1)', lambda x: 0 <= x < 1),
                      help='prior probability of a false negative (default: 0.1 where the estimator has it)')
    loss.add_argument('--beta', type=flags.real(0, 1000),
                      help='concentration on hard negatives (default: 1.0 where the estimator has it)')
    loss.add_argument('--anneal', default='none', choices=('none', 'down'), help='lower beta to 0, in 9 values')
    loss.add_argument('--oracle', action='store_true', help='leave out false negatives by their labels (upper bound)')
    train = parser.add_argument_group('training')
    train.add_argument('--batch_size', default=256, type=flags.integer(2, 1_000_000), help='images, over all ranks')
    train.add_argument('--epochs', default=400, type=flags.epochs, help='passes over the training images')
    train.add_argument('--optimizer', default='adam', choices=('adam', 'sgd'), help='SGD has momentum 0.9')
    train.add_argument('--lr', default=1e-3, type=flags.positive(1000), help='learning rate')
    train.add_argument('--schedule', default='constant', choices=('constant', 'cosine'), help='of the learning rate')
    train.add_argument('--warmup', default=0, type=flags.epochs_or_0, help='epochs in which the rate rises from 0')
    train.add_argument('--weight_decay', default=1e-6, type=flags.real(0, 100), help='the optimizer\'s')
    train.add_argument('--joint_views', action='store_true',
                       help='one BatchNorm batch of all views (as published: one after the other)')
    train.add_argument('--sync_bn', action='store_true', help='BatchNorm over the whole batch, not each rank\'s part')
    train.add_argument('--seed', default=0, type=flags.seed, help='of weights, shuffles and views')
    train.add_argument('--precision', choices=('bf16', 'fp32'),
                       help='bf16 autocast, or float32 with cuDNN\'s TF32; the loss is float32 (default: bf16 on CUDA)')
    train.add_argument('--compile', action=argparse.BooleanOptionalAction,
                       help='compile the views, and the network unless --sync_bn (default: on CUDA)')
    out = parser.add_argument_group('monitor and results')
    out.add_argument('--k', default=200, type=flags.images, help='neighbours of the kNN monitor')
    out.add_argument('--knn_temperature', type=flags.positive(100), help='of its weights (default: --temperature)')
    out.add_argument('--knn_every', default=10, type=flags.epochs, help='epochs between its evaluations')
    out.add_argument('--save_every', default=25, type=flags.epochs, help='epochs between kept encoders')
    out.add_argument('--results_dir', default='results', type=flags.path, help='directory of all that the run writes')
    args = parser.parse_args(argv)
    resolve_objective(parser, args)
    if args.batch_size % WORLD:
        parser.error(f'--batch_size {args.batch_size} does not divide evenly over {WORLD} ranks')
    if args.batch_size < 2 * WORLD:
        parser.error(f'--batch_size {args.batch_size} leaves a rank less than the 2 images that BatchNorm needs')
    if args.sync_bn and not torch.cuda.is_available():
        parser.error('--sync_bn needs CUDA: PyTorch has no SyncBatchNorm for CPUs')
    if args.warmup >= args.epochs:
        parser.error(f'--warmup {args.warmup} leaves nothing of --epochs {args.epochs}')
    args.hidden_dim = args.hidden_dim or int(512 * args.width)
    args.knn_temperature = args.knn_temperature or args.temperature
    args.precision = args.precision or runtime.default_precision()
    args.compile = torch.cuda.is_available() if args.compile is None else args.compile
    return args, parser


def resolve_objective(parser, args):
    """Turn the objective's flags into the values that act. Contradictions are errors; what has no effect is told."""
    estimator = 'standard' if args.estimator == 'easy' else args.estimator
    if args.debiased is False and estimator in ('hard', 'debiased'):
        parser.error(f'--debiased False contradicts --estimator {estimator}')
    if args.debiased and estimator == 'standard':
        parser.error(f'--debiased True contradicts --estimator {args.estimator}')
    if args.oracle and (args.debiased or estimator == 'debiased'):
        parser.error('--oracle leaves no false negatives, for which the debiased objective would correct: choose one')
    if estimator is None and args.debiased is not None:
        estimator = 'standard' if not args.debiased else 'hard' if args.beta else 'debiased'
    args.estimator = estimator or ('standard' if args.oracle and not args.beta else 'hard')
    hard, corrected = args.estimator == 'hard', args.estimator != 'standard' and not args.oracle
    for name, acts, default, off in (('tau_plus', corrected, 0.1, 0.0), ('beta', hard, 1.0, 0.0),
                                     ('anneal', hard, 'none', 'none')):
        given = getattr(args, name)
        if given not in (None, off) and not acts:
            runtime.say(f'--{name} {given} has no effect on the {args.estimator} objective'
                        + (' with --oracle' if args.oracle else ''))
        setattr(args, name, off if not acts else default if given is None else given)
    del args.debiased


def main(argv=None):
    args, parser = arguments(argv)
    # Before runtime.start(): a download may take longer than the ranks wait for each other.
    data = load_data(args.dataset_name, args.root, args.store_size, not needs_labels(args), args.cache_dir,
                     args.skip_damaged)
    steps = check_sizes(parser, args, data)
    device, results = runtime.start(), Path(args.results_dir)
    saved = runtime.on_rank0(lambda: runs.open_run(results, vars(args), data, device))

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    net, optimizer = build(args, device)
    # All that resuming needs: shuffles and views are functions of (seed, epoch, step), so no generator has a state.
    state = dict(run=runs.fingerprint(vars(args), data), epoch=0, step=0, seconds=0.0, log=[],
                 losses=torch.zeros(steps, device=device))
    if saved:
        runs.restore(results, saved, state, net, optimizer)
        if state['epoch'] == args.epochs:
            return runtime.say(f'{results} holds this run, finished: {describe(state["log"][-1])}')
        runtime.say(f'Continuing {results} in epoch {state["epoch"] + 1} after step {state["step"]}')
    batches, data = place(args, data, device)
    labels = data.train_labels.to(device) if args.oracle else None
    ddp, autocast = distributed(net, device), runtime.autocast(device, args.precision)
    saver, signals = runs.Saver(results, net, optimizer), runtime.Signals()
    bar = tqdm(total=args.epochs * steps, initial=state['epoch'] * steps + state['step'], unit='step',
               disable=None if RANK == 0 else True)
    try:
        if not saved:
            state['log'].append({'epoch': 0, **monitor(net, data, args, autocast, device, signals)})
            saver.save(state, keep=True)  # from here on there is always a state to continue from
            runtime.say(f'untrained: {describe(state["log"][0])}')
        for epoch in range(state['epoch'] + 1, args.epochs + 1):
            train_epoch(ddp, batches, labels, optimizer, args, autocast, state, signals, bar)
            runtime.average_buffers(net)
            row = {'epoch': epoch, 'train_loss': state['losses'].mean().item(), 'lr': learning_rate(args, epoch),
                   'images/s': args.batch_size * steps / state['seconds'], 'seconds': state['seconds']}
            if epoch % args.knn_every == 0 or epoch == args.epochs:
                row |= monitor(net, data, args, autocast, device, signals)
            state.update(epoch=epoch, step=0, seconds=0.0, log=[*state['log'], row])
            saver.epoch_ended(state, keep=epoch % args.save_every == 0 or epoch == args.epochs)
            runtime.say(f'epoch {epoch}/{args.epochs}: {describe(row)}')
    except runtime.Stopped as stopped:
        runtime.average_buffers(net)
        saver.save(state)
        runtime.say(f'Stopped in epoch {state["epoch"] + 1} after step {state["step"]}, saved in {results}; '
                    'the same command continues')
        raise SystemExit(128 + stopped.signum) from None
    finally:
        bar.close()
    runtime.say(f'Finished: files in {results}. Next: python linear.py --model_path {results}/model_{args.epochs}.pth')


def train_epoch(net, batches, labels, optimizer, args, autocast, state, signals, bar):
    """The rest of an epoch, from state's step on. Now and then it waits for the device: loss, progress, signals."""
    net.train()
    began, first, steps = time.monotonic() - state['seconds'], state['step'], len(state['losses'])
    look_every = 20 if state['losses'].is_cuda or WORLD > 1 else 1  # a look waits for the device and the other ranks
    loss_of = objective(args, state['epoch'] + 1)
    for views, index in batches.epoch(state['epoch'] + 1, state['step']):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(args, state['epoch'] + state['step'] / steps)
        batch_labels = None if labels is None else labels[index]
        loss = train_step(net, views, batch_labels, optimizer, loss_of, autocast, args.joint_views)
        state['losses'][state['step']] = loss
        state.update(step=state['step'] + 1, seconds=time.monotonic() - began)
        if state['step'] % look_every == 0 or state['step'] == steps:
            losses = state['losses'][:state['step']].cpu()
            check_finite(losses, state['epoch'] + 1)
            bar.update(state['epoch'] * steps + state['step'] - bar.n)
            bar.set_postfix_str(f'epoch {state["epoch"] + 1}, loss {losses.mean():.4f}')
            if state['step'] == first + 3 and state['epoch'] == 0 and not state['losses'].is_cuda:
                tell_time(state['seconds'] / state['step'] * (bar.total - state['step']))
            signals.check()


def train_step(net, views, labels, optimizer, objective, autocast, joint=False):
    """One step on V views (b, 3, h, w) of this rank's images; returns the loss of the whole batch."""
    with autocast:
        z = net(torch.cat(views))[1].chunk(len(views)) if joint else [net(x)[1] for x in views]  # V x (b, D)
    loss = objective(*z, labels=labels)
    optimizer.zero_grad()
    (WORLD * loss).backward()  # DDP averages gradients over ranks; the loss is the whole batch's already
    optimizer.step()
    return loss.detach()


def check_finite(losses, epoch):
    """End the run, on every rank, if one of the epoch's losses (steps,) so far is not a number or infinite."""
    if not losses.isfinite().all():
        step = int(losses.isfinite().logical_not().nonzero()[0])
        raise UserError(f'the loss is {losses[step]} at epoch {epoch}, step {step + 1}; the last good state is '
                        'untouched. Common causes: --lr too high, --temperature too low, --precision bf16')


def tell_time(seconds):
    """On a CPU, say at once how long the run will take, and what takes less."""
    hint = f'. A run of minutes: {SMALL}' if seconds > 1200 else ''
    runtime.say(f'No CUDA device: about {tqdm.format_interval(seconds)} to go on this CPU{hint}')


def monitor(net, data, args, autocast, device, signals):
    """Label-free measures, and kNN accuracy on the test images by the labelled training images: columns of the log."""
    row = label_free(net, data.train, args.image_size, args.test_size, autocast, device, signals)
    if not data.classes:
        return row
    labelled, everything = (data.train_labels >= 0).nonzero()[:, 0], torch.arange(len(data.test))
    memory = encode(net, data.train, labelled, args.test_size, autocast, device, signals)
    queries = encode(net, data.test, everything, args.test_size, autocast, device, signals)
    labels = data.train_labels[labelled].to(device), data.test_labels.to(device)
    first, five = knn(memory, queries, *labels, args.k, args.knn_temperature)
    return {'test_acc@1': first, 'test_acc@5': five, **row}


def learning_rate(args, epochs):
    """The rate after so many epochs, a fraction within one: it rises linearly, then stays or falls as half a cosine."""
    if epochs < args.warmup:
        return args.lr * epochs / args.warmup
    done = (epochs - args.warmup) / (args.epochs - args.warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * done) if args.schedule == 'cosine' else 1)


def objective(args, epoch):
    """The epoch's loss as a function of views and labels."""
    beta = annealed(args.beta, epoch, args.epochs) if args.anneal == 'down' else args.beta
    return partial(contrastive_loss, temperature=args.temperature, tau_plus=args.tau_plus, beta=beta)


def annealed(beta, epoch, epochs, steps=9):
    """The epoch's value as beta falls to 0 in 9 values.

    As published, the next value (at first beta itself) comes after every multiple of epochs // 9: for 400 epochs after
    44, 88, ..., 396. Where the published code runs out of values and crashes, in some runs below 81 epochs, beta falls
    evenly.
    """
    each = epochs // steps
    if each and epochs // each == steps:
        part = max((epoch - 1) // each - 1, 0)
    else:
        part = int((steps - 1) * (epoch - 1) / max(epochs - 1, 1) + 0.5)
    return beta * (1 - part / (steps - 1))


def build(args, device):
    """The network on its device, ready to train, and its optimizer."""
    net = Model(args.feature_dim, args.arch, args.hidden_dim, args.stem, args.width)
    if args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    if args.compile and not args.sync_bn:  # SyncBatchNorm breaks the graph at every layer
        net.compile(dynamic=False)  # in place: the names of the weights stay as they are
    if args.optimizer == 'sgd':
        return net, torch.optim.SGD(net.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, fused=True)
    return net, torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)


def distributed(net, device):
    """The network under DDP, if there are several ranks; the views of a step go through it one after the other."""
    if WORLD == 1:
        return net
    # DDP must not overwrite BatchNorm's buffers between two forwards; torch 2.13 renamed the flag that says so.
    known = signature(DistributedDataParallel).parameters
    name = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(net, [device] if device.type == 'cuda' else None, **{name: False})


def place(args, data, device):
    """The training views, epoch(e) of which yields (views, index) batches, and the data, on the device if it fits."""
    resident = runtime.fits(device, data.train, data.test)
    common = dict(batch_size=args.batch_size, size=args.image_size, views=args.views, seed=args.seed, device=device,
                  rank=RANK, world=WORLD, blur=args.blur == 'published',
                  labels=data.train_labels if args.positives == 'label' else None)
    if args.augment == 'pil':
        batches = ReferenceViews(data.train, **common, workers=args.workers)
    else:
        batches = DeviceViews(data.train, **common, resident=resident, compile=args.compile)
    data.train, data.test = batches.images, data.test.to(device) if resident else data.test  # not on the host as well
    return batches, data


def needs_labels(args):
    """Whether images without labels are of no use to the run."""
    return args.oracle or args.positives == 'label'


def check_sizes(parser, args, data):
    """The steps of an epoch, or an error if a flag does not fit the data."""
    labelled = int((data.train_labels >= 0).sum())
    if args.batch_size > len(data.train):
        parser.error(f'--batch_size {args.batch_size} is larger than the data set, {len(data.train)} images')
    if data.classes and args.k > labelled:
        parser.error(f'--k {args.k} is larger than the kNN memory, {labelled} images')
    return len(data.train) // args.batch_size


def describe(row):
    names = (('train_loss', 'loss {:.4f}'), ('test_acc@1', 'kNN {:.2f} %'), ('alignment', 'alignment {:.3f}'),
             ('uniformity', 'uniformity {:.3f}'), ('rankme', 'RankMe {:.1f}'), ('seconds', '{:.1f} s'))
    return ', '.join(text.format(row[name]) for name, text in names if name in row)


if __name__ == '__main__':
    runtime.run(main)
