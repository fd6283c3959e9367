"""Train an encoder by contrastive learning with hard negatives (HCL), debiased (DCL) or standard (SimCLR).

    python main.py --tau_plus 0.1 --beta 1.0                                  # the published run: STL10, ResNet-50
    torchrun --nproc_per_node 8 main.py --tau_plus 0.1 --beta 1.0             # the same batch over eight GPUs
    python main.py --dataset_name shapes --arch resnet18 --width 0.25 --results_dir results/shapes      # fit for a CPU

Everything that a run leaves is in --results_dir; the same command continues a run that was stopped. It runs on
CPUs and on GPUs with CUDA or ROCm, but not on Apple's GPUs. On two CPU cores a ResNet-18 takes about 180 views of 16 px
a second. ResNet-50 at 32 px needs a GPU.
"""

import math
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import flags
import runs
import runtime
from batches import Batches, DeviceViews, ReferenceViews
from data import load_data
from evaluate import encode, knn, label_free
from files import read_json, write_table
from folder import find_folder
from losses import contrastive_loss
from model import ARCHS
from runtime import UserError, ranks
from step import build, check_memory, compiled, starting_weights, train_step


def arguments(argv=None):
    parser = flags.Parser(prog='main.py', description=__doc__.partition('\n')[0])
    chosen = '--image_size', '--test_size', '--store_size'  # by choose_sizes()
    flags.add(parser, 'data and views',
              *((name, None if name in chosen else default, *rest) for name, default, *rest in flags.DATA),
              ('--views', 2, flags.integer(2, 16), 'random views of each image'),
              ('--positives', 'view', ('view', 'label'), 'views of one image, or of random ones of its class'),
              *flags.VIEWS,
              ('--augment', 'device', ('device', 'pil'), 'views in batches on the device, or by PIL in workers'),
              ('--workers', min(16, runtime.cores()), flags.integer(0, 256), 'processes of a rank for --augment pil'))
    flags.add(parser, 'model',
              ('--arch', 'resnet50', ARCHS, 'backbone f'),
              ('--width', 1.0, (0.125, 0.25, 0.5, 1.0, 2.0, 4.0), 'factor on the channels of f'),
              ('--stem', None, ('cifar', 'imagenet'), '3x3 of stride 1, or 7x7 of stride 2 and max-pool (default: '
               'cifar; for views of a folder above 64 px imagenet)'),
              ('--hidden_dim', None, flags.integer(1, 65536), 'hidden width of the head g (default: 512 times width)'),
              ('--feature_dim', 128, flags.integer(1, 65536), 'dimension of the embedding z'),
              ('--init', None, flags.path, 'weights that f starts from: a checkpoint, or torchvision\'s ImageNet file'))
    flags.add(parser, 'objective',
              ('--estimator', None, ('hard', 'debiased', 'standard', 'easy'),
               'easy = standard (default: hard; standard with --oracle)'),
              ('--debiased', None, flags.boolean, 'DCL\'s: True is debiased (with --beta hard), False is standard'),
              ('--temperature', 0.5, flags.positive(100), 'temperature t, by which similarities are divided'),
              ('--tau_plus', None, flags.fraction,
               'prior probability of a false negative (default: 0.1 where the estimator has it)'),
              ('--beta', None, flags.real(0, 1000), 'concentration on hard negatives (default: 1.0 for hard)'),
              ('--anneal', 'none', ('none', 'down'), 'lower beta to 0, in 9 values'),
              ('--oracle', False, bool, 'leave out false negatives by their labels: an upper bound'))
    flags.add(parser, 'training',
              ('--batch_size', 256, flags.integer(2, 1_000_000), 'images, over all ranks'),
              ('--epochs', 400, flags.count, 'passes over the training images'),
              ('--optimizer', 'adam', ('adam', 'sgd'), 'SGD has momentum 0.9'),
              ('--lr', 1e-3, flags.positive(1000), 'learning rate'),
              ('--schedule', 'constant', ('constant', 'cosine'), 'how the learning rate changes after the warm-up'),
              ('--warmup', 0, flags.integer(0, 1_000_000), 'epochs in which the learning rate rises from 0'),
              ('--weight_decay', 1e-6, flags.real(0, 100), 'weight decay'),
              ('--micro_batch', None, flags.integer(2, 1_000_000),
               'images of a rank that go through the network at once (default: all); the loss is the whole batch\'s'),
              ('--joint_views', False, bool, 'one BatchNorm batch of all views (as published: one after the other)'),
              ('--sync_bn', False, bool, 'BatchNorm over the whole batch, not each rank\'s part'),
              ('--seed', 0, flags.seed, 'seed of weights, shuffles and views'),
              ('--precision', None, ('bf16', 'fp16', 'fp32'),
               'numbers of the network; the loss is float32 (default: bf16 on a GPU that has it, else fp32)'),
              ('--compile', None, flags.SWITCH, 'compile views and, without --sync_bn, the network (default: on CUDA)'))
    flags.add(parser, 'monitor and results',
              ('--k', 200, flags.count, 'neighbours of the kNN monitor'),
              ('--knn_temperature', None, flags.positive(100), 'temperature of their votes (default: --temperature)'),
              ('--knn_every', 10, flags.integer(0, 1_000_000), 'epochs between evaluations of the encoder; 0: none'),
              ('--save_every', 25, flags.count, 'epochs between kept encoders'),
              ('--results_dir', 'results', flags.path, 'directory of all that the run writes'))
    args = parser.parse_args(argv)
    flags.resolve_objective(parser, args)
    world = ranks().world
    if args.batch_size % world:
        parser.error(f'--batch_size {args.batch_size} does not divide evenly over {world} ranks')
    if args.batch_size < 2 * world:
        parser.error(f'--batch_size {args.batch_size} leaves a rank less than the 2 images that BatchNorm needs')
    if args.micro_batch and args.batch_size // world % args.micro_batch:
        parser.error(f'--micro_batch {args.micro_batch} does not divide a rank\'s {args.batch_size // world} images')
    if args.sync_bn and not torch.cuda.is_available():
        parser.error('--sync_bn needs CUDA: PyTorch has no SyncBatchNorm for CPUs')
    if args.warmup >= args.epochs:
        parser.error(f'--warmup {args.warmup} must be less than --epochs {args.epochs}')
    args.hidden_dim = args.hidden_dim or int(512 * args.width)
    args.knn_temperature = args.knn_temperature or args.temperature
    args.precision = args.precision or runtime.default_precision()
    args.compile = torch.cuda.is_available() if args.compile is None else args.compile
    return args, parser


def main(argv=None):
    args, parser = arguments(argv)
    runtime.check_machine(args.precision)
    init = starting_weights(parser, args)
    data, results = load(args), Path(args.results_dir)
    steps, device = check_sizes(parser, args, data), runtime.start()
    run, saved = runtime.on_rank0(lambda: runs.open_run(results, vars(args), data, device))
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    net, optimizer, scaler = build(args, device, init)
    # All that resuming needs: shuffles and views are functions of (seed, epoch, step), so no generator has a state.
    state = dict(run=run, epoch=0, step=0, seconds=0.0, log=[], losses=torch.zeros(steps, device=device),
                 skipped=torch.zeros((), device=device))
    if saved:
        runs.restore(saved, state, net, optimizer, scaler)
        if state['epoch'] == args.epochs:
            runtime.on_rank0(lambda: write_table(results / 'log.csv', state['log'], runs.LOG))  # it may be lost
            return runtime.say(f'{results} holds this run, finished: {describe(state["log"][-1])}')
        runtime.say(f'Continuing {results} in epoch {state["epoch"] + 1} after step {state["step"]}')
    batches, labels = place(args, data, device), (data.train_labels.to(device) if args.oracle else None)
    autocast = runtime.autocast(device, args.precision)
    check_memory(args, device)
    train_net = compiled(net, batches, autocast, args) if args.compile and not args.sync_bn else net
    ddp, saver = runtime.distributed(train_net, device), runs.Saver(results, net, optimizer, scaler)
    bar = tqdm(total=args.epochs * steps, initial=state['epoch'] * steps + state['step'], unit='step',
               disable=None if ranks().rank == 0 else True)
    try:
        with runtime.Signals() as signals:
            see = partial(encode, net, autocast=autocast, device=device, signals=signals)
            monitored = partial(monitor, see, data, args)
            if not state['log']:  # at the start, or stopped before the untrained encoder was measured
                measure_untrained(monitored, args, device, state, saver)
            for epoch in range(state['epoch'] + 1, args.epochs + 1):
                train_epoch(ddp, batches, labels, optimizer, scaler, args, autocast, state, signals, saver, bar)
                net.load_state_dict(runtime.averaged_buffers(net), strict=False)
                row = {'epoch': epoch, 'train_loss': state['losses'].mean().item(), 'lr': learning_rate(args, epoch),
                       'images/s': args.batch_size * steps / state['seconds'], 'seconds': state['seconds']}
                if args.knn_every and (epoch % args.knn_every == 0 or epoch == args.epochs):
                    row |= monitored()
                state.update(epoch=epoch, step=0, seconds=0.0, log=[*state['log'], row])
                saver.epoch_ended(state, keep=epoch % args.save_every == 0 or epoch == args.epochs)
                runtime.say(f'epoch {epoch}/{args.epochs}: {describe(row)}')
    except runtime.Stopped as stopped:
        saver.save(state, buffers=runtime.averaged_buffers(net))
        saver.wait()
        runtime.say(f'Stopped in epoch {state["epoch"] + 1} after step {state["step"]}, saved in {results}; '
                    'the same command continues')
        raise SystemExit(128 + stopped.signum) from None
    finally:
        bar.close()
        saver.wait()
    more = '' if data.classes else ' --dataset_name … --root …, of a set with labels'
    skipped = f' {state["skipped"]:.0f} steps were skipped, as fp16 overflowed.' if state['skipped'] else ''
    runtime.say(f'Finished.{skipped} Next: python linear.py --model_path {results}/model_{args.epochs}.pth{more}')


def load(args):
    """The data of a run, and in args the sizes that were not given."""
    unlabeled, found, before = not (args.oracle or args.positives == 'label'), None, {}
    if args.dataset_name == 'folder':
        found, config = find_folder(args.root, unlabeled, args.holdout), Path(args.results_dir, 'config.json')
        before = read_json(config)['settings'] if config.exists() else {}
    flags.choose_sizes(args, found, before)
    return load_data(args.dataset_name, args.root, args.store_size, unlabeled, args.cache_dir, args.skip_damaged,
                     args.fit, args.holdout, found)


def measure_untrained(monitored, args, device, state, saver):
    """The log's row of epoch 0, and the first state from which the run can continue."""
    if device.type == 'cpu' and args.dataset_name != 'shapes':
        runtime.say('No CUDA device: training on the CPU, which is slow. The README has a run of minutes')
    state['log'].append({'epoch': 0, **(monitored() if args.knn_every else {})})
    saver.save(state, keep=True)
    saver.wait()
    if args.knn_every:
        runtime.say(f'{"before training" if args.init else "untrained"}: {describe(state["log"][0])}')


def train_epoch(net, batches, labels, optimizer, scaler, args, autocast, state, signals, saver, bar):
    """Train from state['step'] to the end of the epoch; every 20 steps on a GPU, every step on a CPU, synchronise to
    check the loss, update the bar and handle signals."""
    net.train()
    began, steps = time.monotonic() - state['seconds'], len(state['losses'])
    look_every = 20 if state['losses'].is_cuda else 1  # a look waits for the device
    beta = annealed(args.beta, state['epoch'] + 1, args.epochs) if args.anneal == 'down' else args.beta
    loss_of = partial(contrastive_loss, temperature=args.temperature, tau_plus=args.tau_plus, beta=beta)
    for views, index in batches.epoch(state['epoch'] + 1, state['step']):
        for group in optimizer.param_groups:
            group['lr'] = learning_rate(args, state['epoch'] + state['step'] / steps)
        batch_labels = None if labels is None else labels[index]
        loss, skipped = train_step(net, views, batch_labels, optimizer, loss_of, autocast, scaler, args.joint_views,
                                   args.micro_batch)
        state['losses'][state['step']] = loss
        state['skipped'] += skipped
        state['step'] += 1
        if state['step'] % look_every == 0 or state['step'] == steps:
            losses = state['losses'][:state['step']].cpu()
            state['seconds'] = time.monotonic() - began  # after the wait
            check_finite(losses, scaler, state['epoch'] + 1)
            bar.update(state['epoch'] * steps + state['step'] - bar.n)
            bar.set_postfix_str(f'epoch {state["epoch"] + 1}, loss {losses.mean():.4f}')
            if signals.check(due=saver.due()):
                saver.save(state, buffers=runtime.averaged_buffers(saver.net))


def check_finite(losses, scaler, epoch):
    """End the run, on every rank, if one of the epoch's losses (steps,) so far is not a number or infinite."""
    if not losses.isfinite().all():
        step = int(losses.isfinite().logical_not().nonzero()[0])
        raise UserError(f'the loss is {losses[step]} at epoch {epoch}, step {step + 1}; the last good state is '
                        'untouched. Common causes: --lr too high, --temperature too low, --precision bf16 or fp16. '
                        'Other values need another --results_dir')
    if scaler.is_enabled() and scaler.get_scale() < 1e-6:
        raise UserError(f'gradients overflow fp16 at any scale in epoch {epoch}: use --precision fp32 or bf16, or a '
                        'lower --lr, in another --results_dir')


def monitor(see, data, args):
    """Label-free measures, and kNN accuracy on the test images by the labelled training images: columns of the log.

    see(images, index, size) encodes, as evaluate.encode() with what it needs besides.
    """
    row = label_free(see, data.train, args.image_size, args.test_size, flags.recipe(vars(args)))
    if not data.classes:
        return row
    labelled, everything = (data.train_labels >= 0).nonzero()[:, 0], torch.arange(len(data.test))
    memory, queries = see(data.train, labelled, args.test_size), see(data.test, everything, args.test_size)
    labels = data.train_labels[labelled].to(memory.device), data.test_labels.to(memory.device)
    first, five = knn(memory, queries, *labels, args.k, args.knn_temperature)
    return {'test_acc@1': first, 'test_acc@5': five, **row}


def learning_rate(args, epochs):
    """The rate after so many epochs, a fraction within one: it rises linearly, then stays or falls as half a cosine."""
    if epochs < args.warmup:
        return args.lr * epochs / args.warmup
    done = (epochs - args.warmup) / (args.epochs - args.warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * done) if args.schedule == 'cosine' else 1)


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


def place(args, data, device):
    """The training views: epoch(e) yields batches (views, index). The data move to the device if they fit."""
    rank, world, _, _ = ranks()
    batches = Batches(len(data.train), args.batch_size, args.views, args.seed,
                      data.train_labels if args.positives == 'label' else None, rank=rank, world=world)
    resident, recipe = runtime.fits(device, data.train, data.test), flags.recipe(vars(args))
    if args.augment == 'pil':
        views = ReferenceViews(data.train, batches, args.image_size, device, args.workers, **recipe)
    else:
        views = DeviceViews(data.train, batches, args.image_size, device, resident, args.compile, args.micro_batch,
                            **recipe)
    data.train, data.test = views.images, data.test.to(device) if resident else data.test  # not on the host as well
    return views


def check_sizes(parser, args, data):
    """The steps of an epoch, or an error if a flag does not fit the data."""
    labelled = int((data.train_labels >= 0).sum())
    if args.stem == 'imagenet' and args.image_size <= 16:  # of which torch's gradient in bf16 on CPUs is wrong
        parser.error(f'--stem imagenet leaves less than a pixel of views of {args.image_size} px: choose cifar')
    if args.batch_size > len(data.train):
        parser.error(f'--batch_size {args.batch_size} is larger than the data set, {len(data.train)} images: lower it')
    if data.classes and args.k > labelled:
        parser.error(f'--k {args.k} is larger than the kNN memory, {labelled} images: lower it')
    kept = data.train.shape[2]
    if args.dataset_name == 'folder' and args.image_size > kept:
        runtime.say(f'Views of {args.image_size} px enlarge images that are kept at {kept} px: give --store_size '
                    f'{round(args.image_size * 8 / 7)}, or a lower --image_size')
    return len(data.train) // args.batch_size


def describe(row):
    names = (('train_loss', 'loss {:.4f}'), ('test_acc@1', 'kNN {:.2f} %'), ('alignment', 'alignment {:.3f}'),
             ('uniformity', 'uniformity {:.3f}'), ('rankme', 'RankMe {:.1f}'), ('seconds', '{:.1f} s'))
    return ', '.join(text.format(row[name]) for name, text in names if name in row)


if __name__ == '__main__':
    runtime.run(main, 'choose a --micro_batch, as the loss stays that of the whole batch, or start more ranks')
