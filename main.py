"""Train an encoder by contrastive learning with hard negatives (HCL), debiased (DCL) or standard (SimCLR).

    python main.py --tau_plus 0.1 --beta 1.0                                  # the published run: STL10, ResNet-50
    python main.py --dataset_name shapes --arch resnet18 --image_size 16      # embedded images, small enough for a CPU
    torchrun --nproc_per_node 8 main.py --tau_plus 0.1 --beta 1.0             # the same batch over eight GPUs

Everything that a run leaves is in --results_dir; the same command continues a run that was stopped. On two CPU
cores a ResNet-18 takes about 180 views of 16 px a second; for ResNet-50 at 32 px have a GPU.
"""

import argparse
import io
import json
import os
import platform
import shlex
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import PIL
import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import runtime
from augment import DeviceViews, normalize
from losses import contrastive_loss
from model import ARCHS, Model, read_checkpoint
from runtime import LOCAL_WORLD, RANK, WORLD, number
from utils import DATASETS, ReferenceViews, load_data

SMALL = ('python main.py --dataset_name shapes --arch resnet18 --image_size 16 --test_size 16 --batch_size 64 '
         '--temperature 0.2 --k 20 --knn_every 1 --epochs 3')
COLUMNS = ('epoch', 'train_loss', 'test_acc@1', 'test_acc@5', 'lr', 'images/s', 'seconds')
FREE = ('root', 'workers', 'results_dir', 'save_every', 'knn_every', 'compile')  # a resumed run may change these


def arguments(argv=None):
    parser = runtime.Parser(prog='main.py', description=__doc__.partition('\n')[0])
    data = parser.add_argument_group('data')
    data.add_argument('--root', default='data', help='directory of the data set; stl10 and cifar are downloaded to it')
    data.add_argument('--dataset_name', default='stl10', choices=DATASETS, help='what to train on')
    data.add_argument('--store_size', default=96, type=runtime.integer(8, 1024),
                      help='pixels at which the images of a folder are kept')
    data.add_argument('--image_size', default=32, type=runtime.integer(8, 512), help='pixels of the training views')
    data.add_argument('--test_size', type=runtime.integer(8, 1024),
                      help='pixels of the kNN monitor\'s images (default: their own, 96 for stl10)')
    data.add_argument('--views', default=2, type=runtime.integer(2, 16), help='random views of each image')
    data.add_argument('--joint_views', action='store_true',
                      help='one BatchNorm batch of all views (as published: one after the other)')
    data.add_argument('--augment', default='device', choices=('device', 'pil'),
                      help='make views in batches on the device, or by PIL and OpenCV in workers')
    data.add_argument('--workers', default=max(1, min(16, os.cpu_count() // LOCAL_WORLD)),
                      type=runtime.integer(0, 256), help='processes of each rank for --augment pil')
    model = parser.add_argument_group('model')
    model.add_argument('--arch', default='resnet50', choices=ARCHS, help='backbone f')
    model.add_argument('--feature_dim', default=128, type=runtime.integer(1, 65536),
                       help='dimension of the embedding z')
    loss = parser.add_argument_group('objective')
    loss.add_argument('--estimator', choices=('hard', 'debiased', 'standard', 'easy'),
                      help='hard negatives, debiased, or standard = easy (default: hard; standard with --oracle)')
    loss.add_argument('--debiased', type=runtime.boolean, help='False is short for --estimator standard')
    loss.add_argument('--temperature', default=0.5, type=runtime.positive, help='t')
    loss.add_argument('--tau_plus', type=number(float, 'in [0, 1)', lambda x: 0 <= x < 1),
                      help='prior probability of a false negative (default: 0.1 where the estimator has it)')
    loss.add_argument('--beta', type=runtime.non_negative,
                      help='concentration on hard negatives (default: 1.0 where the estimator has it)')
    loss.add_argument('--anneal', default='none', choices=('none', 'down'),
                      help='lower beta to 0: after every ninth of the epochs the next of 9 values')
    loss.add_argument('--oracle', action='store_true', help='leave out false negatives by their labels (upper bound)')
    train = parser.add_argument_group('training')
    train.add_argument('--batch_size', default=256, type=number(int, 'an integer of at least 2', lambda x: x >= 2),
                       help='images in the whole batch, over all ranks')
    train.add_argument('--epochs', default=400, type=runtime.positive_int, help='passes over the training images')
    train.add_argument('--lr', default=1e-3, type=runtime.positive, help='learning rate of Adam')
    train.add_argument('--weight_decay', default=1e-6, type=runtime.non_negative, help='weight decay of Adam')
    train.add_argument('--seed', default=0, type=runtime.seed, help='of weights, shuffles and views')
    train.add_argument('--precision', choices=('bf16', 'fp32'),
                       help='bf16 autocast, or float32 with cuDNN\'s TF32; the loss is float32 (default: bf16 on CUDA)')
    train.add_argument('--compile', action=argparse.BooleanOptionalAction,
                       help='compile the views, and the network unless --sync_bn (default: on CUDA)')
    train.add_argument('--sync_bn', action='store_true', help='BatchNorm over the whole batch, not each rank\'s part')
    out = parser.add_argument_group('monitor and results')
    out.add_argument('--k', default=200, type=runtime.positive_int, help='neighbours of the kNN monitor')
    out.add_argument('--knn_every', default=10, type=runtime.positive_int, help='epochs between kNN evaluations')
    out.add_argument('--save_every', default=25, type=runtime.positive_int, help='epochs between kept encoders')
    out.add_argument('--results_dir', default='results', help='directory of everything that the run writes')
    args = parser.parse_args(argv)
    resolve_objective(parser, args)
    if args.batch_size % WORLD:
        parser.error(f'--batch_size {args.batch_size} does not divide evenly over {WORLD} ranks')
    if args.batch_size < 2 * WORLD:
        parser.error(f'--batch_size {args.batch_size} leaves a rank less than the 2 images that BatchNorm needs')
    if args.sync_bn and not torch.cuda.is_available():
        parser.error('--sync_bn needs CUDA: PyTorch has no SyncBatchNorm for CPUs')
    args.precision = args.precision or runtime.default_precision()
    if args.compile is None:
        args.compile = torch.cuda.is_available()
    return args, parser


def resolve_objective(parser, args):
    """Turn --estimator, --debiased, --oracle, --tau_plus, --beta and --anneal into one objective, or one error."""
    if args.debiased is False:
        if args.estimator in ('hard', 'debiased'):
            parser.error(f'--debiased False contradicts --estimator {args.estimator}')
        args.estimator = 'standard'
    if args.debiased and args.oracle:
        parser.error('--debiased True contradicts --oracle, which has no false negatives to correct for')
    args.estimator = args.estimator or ('standard' if args.oracle else 'hard')
    args.estimator = 'standard' if args.estimator == 'easy' else args.estimator
    if args.oracle and args.estimator == 'debiased':
        parser.error('--estimator debiased contradicts --oracle, which has no false negatives to correct for')
    if args.debiased and args.estimator == 'standard':
        parser.error('--debiased True contradicts --estimator standard')
    if args.tau_plus and (args.estimator == 'standard' or args.oracle):
        parser.error(f'--tau_plus {args.tau_plus} has no effect with '
                     f'{"--oracle" if args.oracle else "--estimator standard"}: leave it out')
    if args.beta and args.estimator != 'hard':
        parser.error(f'--beta {args.beta} has no effect with --estimator {args.estimator}: leave it out')
    if args.anneal == 'down' and args.estimator != 'hard':
        parser.error(f'--anneal down needs --estimator hard, got {args.estimator}')
    if args.tau_plus is None:
        args.tau_plus = 0.0 if args.oracle or args.estimator == 'standard' else 0.1
    if args.beta is None:
        args.beta = 1.0 if args.estimator == 'hard' else 0.0
    del args.debiased


def main(argv=None):
    args, parser = arguments(argv)
    with runtime.one_line_errors():
        data = load_data(args.dataset_name, args.root, args.store_size, unlabeled=not args.oracle)
    labelled, everything = (data.train_labels >= 0).nonzero()[:, 0], torch.arange(len(data.test))  # memory, queries
    steps = len(data.train) // args.batch_size
    if steps == 0:
        parser.error(f'--batch_size {args.batch_size} is larger than the data set, {len(data.train)} images')
    if args.k > len(labelled):
        parser.error(f'--k {args.k} is larger than the kNN memory, {len(labelled)} images')
    with runtime.one_line_errors():
        device = runtime.start()
        saved = runtime.on_rank0(lambda: open_run(Path(args.results_dir), args, data, device))

    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    cuda = device.type == 'cuda'
    net, optimizer = build(args, device)
    # All that resuming needs: shuffles and views are functions of (seed, epoch, step), so no generator has a state.
    state = dict(epoch=0, step=0, seconds=0.0, losses=torch.zeros(steps, device=device), log=[])
    if saved:
        net.load_state_dict(saved.pop('model'))
        optimizer.load_state_dict(saved.pop('optimizer'))
        state['losses'][:saved['step']] = saved.pop('losses')
        state.update(saved)
        if state['epoch'] == args.epochs:
            return runtime.say(f'{args.results_dir} holds this run, finished: {describe(state["log"][-1])}')
        runtime.say(f'Continuing {args.results_dir} in epoch {state["epoch"] + 1} after step {state["step"]}')
    # Views go through the network one by one, and DDP must not overwrite BatchNorm's buffers between two forwards.
    warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated', FutureWarning)
    ddp = DistributedDataParallel(net, [device] if cuda else None, broadcast_buffers=False) if WORLD > 1 else net
    autocast = runtime.autocast(device, args.precision)

    common = dict(batch_size=args.batch_size, size=args.image_size, views=args.views, seed=args.seed, device=device,
                  rank=RANK, world=WORLD)
    resident = runtime.fits(device, data.train, data.test)
    if args.augment == 'pil':
        batches = ReferenceViews(data.train, **common, workers=args.workers)
    else:
        batches = DeviceViews(data.train, **common, resident=resident, compile=args.compile)
    classes = data.train_labels.to(device) if args.oracle else None
    data.train, data.test = batches.images, data.test.to(device) if resident else data.test  # not on the host as well

    results, signals, last_save = Path(args.results_dir), runtime.Signals(), time.monotonic()
    if not saved:
        save(results, net, optimizer, state)  # from here on there is always a state to continue from
    look_every = 20 if cuda or WORLD > 1 else 1  # steps between those that wait for the device and the other ranks
    progress = Progress(args, steps, state['epoch'] * steps + state['step'], cuda)
    try:
        for epoch in range(state['epoch'] + 1, args.epochs + 1):
            began = time.monotonic() - state['seconds']
            beta = annealed(args.beta, epoch, args.epochs) if args.anneal == 'down' else args.beta
            objective = partial(contrastive_loss, temperature=args.temperature, tau_plus=args.tau_plus, beta=beta)
            net.train()
            for views, index in batches.epoch(epoch, state['step']):
                labels = None if classes is None else classes[index]
                loss = train_step(ddp, views, labels, optimizer, objective, autocast, args.joint_views)
                state['losses'][state['step']] = loss
                state.update(step=state['step'] + 1, seconds=time.monotonic() - began)
                if state['step'] % look_every == 0 or state['step'] == steps:
                    losses = state['losses'][:state['step']].cpu()
                    check_finite(losses, epoch, args)
                    progress.show(epoch, state['step'], losses.mean())
                    signals.check()
            seconds = time.monotonic() - began

            row = dict(zip(COLUMNS, (epoch, state['losses'].mean().item(), None, None, args.lr,
                                     args.batch_size * steps / seconds, seconds)))
            average_buffers(net)
            if epoch % args.knn_every == 0 or epoch == args.epochs:
                memory, queries = (encode(net, images, index, args.test_size, autocast, device, signals)
                                   for images, index in ((data.train, labelled), (data.test, everything)))
                row['test_acc@1'], row['test_acc@5'] = knn(memory, queries, data.train_labels[labelled].to(device),
                                                           data.test_labels.to(device), args.k)
            state['log'].append(row)
            state.update(epoch=epoch, step=0, seconds=0.0)
            keep = epoch % args.save_every == 0 or epoch == args.epochs
            if keep or time.monotonic() - last_save > 60:
                last_save = time.monotonic()
                save(results, net, optimizer, state, keep)
            elif RANK == 0:
                write_log(results, state['log'])
            runtime.say(f'epoch {epoch}/{args.epochs}: {describe(row)}')
    except runtime.Stopped as stopped:
        average_buffers(net)
        save(results, net, optimizer, state)
        runtime.say(f'Stopped in epoch {state["epoch"] + 1} after step {state["step"]}, saved in {results}; '
                 'the same command continues')
        sys.exit(128 + stopped.signum)
    finally:
        progress.close()
    runtime.say(f'Finished: files in {results}. Next: python linear.py --model_path {results}/model_{args.epochs}.pth')


def build(args, device):
    """The network on its device, ready to train, and its optimizer."""
    net = Model(args.feature_dim, args.arch)
    if args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    if args.compile and not args.sync_bn:  # SyncBatchNorm breaks the graph at every layer
        net.compile(dynamic=False)  # in place: the names of the weights stay as they are
    return net, torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)


def train_step(net, views, labels, optimizer, objective, autocast, joint=False):
    """One step on V views (b, 3, h, w) of this rank's images; returns the loss of the whole batch."""
    with autocast:
        z = net(torch.cat(views))[1].chunk(len(views)) if joint else [net(x)[1] for x in views]  # V x (b, D)
    loss = objective(*z, labels=labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def annealed(beta, epoch, epochs, steps=9):
    """The epoch's value as beta falls to 0 in 9 values.

    As published, the next value (at first beta itself) comes after every multiple of epochs // 9: for 400 epochs after
    44, 88, ..., 396. Where that does not reach 0 just in time, in some runs below 81 epochs and at multiples of 9, beta
    falls evenly.
    """
    each = epochs // steps
    if each and (epochs - 1) // each == steps:
        part = max((epoch - 1) // each - 1, 0)
    else:
        part = int((steps - 1) * (epoch - 1) / max(epochs - 1, 1) + 0.5)
    return beta * (1 - part / (steps - 1))


def average_buffers(net):
    """BatchNorm's running statistics, kept by each rank of its own part, become their mean over ranks."""
    for buffer in net.buffers():
        if WORLD > 1 and buffer.is_floating_point():
            runtime.sum_ranks(buffer).div_(WORLD)


@torch.no_grad()
def encode(net, images, index, size, autocast, device, signals=None, batch_size=256):
    """f's features (n, width) in eval mode, float32, on every rank, of the uint8 images (N, 3, H, W) at index (n,).

    Images are resized to size pixels, unless it is None. Of batches that do not depend on the number of ranks,
    each rank encodes every WORLD-th, so that no image counts twice and features are the same.
    """
    net.eval()
    features = torch.zeros(len(index), net.width, device=device)
    for i in range(RANK * batch_size, len(index), WORLD * batch_size):
        x = images[index[i:i + batch_size].to(images.device)].to(device).float() / 255
        if size:
            x = F.interpolate(x, (size, size), mode='bilinear', antialias=True)
        with autocast:
            features[i:i + batch_size] = net.f(normalize(x)).flatten(1)
        if signals and WORLD == 1:
            signals.check()
    return runtime.sum_ranks(features)


def knn(memory, queries, memory_labels, labels, k, temperature=0.5):
    """Accuracies @1 and @5, in percent, of the vote of the k nearest of memory, weighted by exp(cosine / temperature).

    memory (n, d) and queries (m, d) are features of any length, with integer labels (n,) and (m,).
    """
    memory, classes = F.normalize(memory, dim=1), int(memory_labels.max()) + 1
    hits = torch.zeros(2, dtype=torch.float64)
    for query, label in zip(F.normalize(queries, dim=1).split(512), labels.split(512)):
        similarity, nearest = (query @ memory.T).topk(k)  # (b, k)
        votes = query.new_zeros(len(query), classes)
        votes.scatter_add_(1, memory_labels[nearest], (similarity / temperature).exp())
        hit = votes.topk(min(5, classes)).indices == label[:, None]  # (b, 5)
        hits += torch.stack([hit[:, 0].sum(), hit.sum()]).cpu()
    return (100 * hits / len(queries)).tolist()


def check_finite(losses, epoch, args):
    """End the run, on every rank, if one of the epoch's losses (steps,) so far is not a number or infinite."""
    if losses.isfinite().all():
        return
    step = int(losses.isfinite().logical_not().nonzero()[0]) + 1
    raise SystemExit(f'error: the loss is {losses[step - 1]} at epoch {epoch}, step {step}; the last good state in '
                     f'{args.results_dir} is untouched. Common causes: --lr {args.lr} too high, --temperature '
                     f'{args.temperature} too low, --precision {args.precision}' if RANK == 0 else 1)


class Progress:
    """A bar for each epoch, with loss, speed and the time left of the run; without CUDA it says that time at once."""

    def __init__(self, args, steps, first, cuda):
        self.args, self.steps, self.first, self.said = args, steps, first, cuda
        self.bar, self.began = None, time.monotonic()

    def show(self, epoch, step, loss):
        args, whole = self.args, (epoch - 1) * self.steps + step  # steps of the run so far
        pace = (time.monotonic() - self.began) / (whole - self.first)
        seconds = pace * (args.epochs * self.steps - whole)
        left = duration(seconds)
        if self.bar is None:
            self.bar = tqdm(total=self.steps, desc=f'epoch {epoch}/{args.epochs}', unit='step', leave=False,
                            disable=None if RANK == 0 else True)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f'loss {loss:.4f}, {args.batch_size * args.views / pace:.0f} views/s, {left} left')
        if not self.said and whole >= self.first + 3:
            self.said = True
            runtime.say(f'No CUDA device: about {left} to go on this CPU'
                        + f'. A run of minutes: {SMALL}' * (seconds > 1200))
        if step == self.steps:
            self.close()

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def open_run(results, args, data, device):
    """Lock the directory, refuse to mix runs in it, and return the state to continue from, or None at the start."""
    runtime.lock(results)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    state_file, config_file = results / 'last.pth', results / 'config.json'
    kept = sorted(path.name for path in results.glob('model_*.pth'))
    described = dict(classes=data.classes, images=dict(train=len(data.train), test=len(data.test)))
    if config_file.exists():
        config = runtime.read_config(config_file)
        before, data_before = config['settings'], {name: config[name] for name in ('classes', 'images')}
        differ = [f'--{name} {before.get(name)} there, {settings.get(name)} here'
                  for name in {**before, **settings} if name not in FREE and before.get(name) != settings.get(name)]
        if differ:
            raise ValueError(f'{results} holds a run with other settings ({"; ".join(differ)}): choose another '
                             '--results_dir, or repeat its settings to continue it')
        if data_before != described:
            raise ValueError(f'{results} holds a run on other data ({data_before["images"]} images there, '
                             f'{described["images"]} here): choose another --results_dir')
    missing = [path.name for path in (config_file, state_file) if not path.exists()]
    trained = [*kept, *(name for name in ('last.pth', 'log.csv') if (results / name).exists())]
    if trained and missing:
        raise ValueError(f'{results} holds {", ".join(trained)} but no {" and no ".join(missing)}, so '
                         'the run there cannot be continued: choose another --results_dir')
    if state_file.exists():
        try:
            state = read_checkpoint(state_file)
            if not isinstance(state, dict) or not {'model', 'optimizer', 'epoch', 'step', 'losses', 'log'} <= {*state}:
                raise ValueError(f'{state_file}: not the state of a run')
        except ValueError as error:
            raise ValueError(f'{error}. The run cannot be continued; intact beside it: {", ".join(kept) or "nothing"}. '
                             'Choose another --results_dir, or restore the file from a copy') from None
        write_log(results, state['log'])  # a later epoch may have been logged, but not saved
        return state
    config = dict(settings=vars(args), **described, **provenance(device))
    runtime.write(config_file, json.dumps(config, indent=2).encode())
    return None


def save(results, net, optimizer, state, keep=False):
    """Write last.pth, all that resuming needs, and the log; with keep, first the encoder as model_{epoch}.pth."""
    if RANK != 0:
        return
    weights = {name: value.cpu() for name, value in net.state_dict().items()}  # loads without a GPU too
    with runtime.one_line_errors():
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError(f'weights are not finite after epoch {state["epoch"]}: not saved; the last good state in '
                             f'{results} is untouched')
        if keep:
            runtime.write(results / f'model_{state["epoch"]}.pth', dump(weights))
        whole = dict(state, model=weights, optimizer=optimizer.state_dict(), losses=state['losses'][:state['step']])
        runtime.write(results / 'last.pth', dump(whole))
        write_log(results, state['log'])


def dump(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return buffer.getbuffer()


def write_log(results, rows):
    with runtime.one_line_errors():
        runtime.write(results / 'log.csv', pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False).encode())


def describe(row):
    accuracy = '' if row['test_acc@1'] is None else f', kNN {row["test_acc@1"]:.2f} %'
    return f'loss {row["train_loss"]:.4f}{accuracy}, {row["seconds"]:.1f} s'


def provenance(device):
    """What made the files of a run, for its JSON."""
    versions = dict(python=platform.python_version(), torch=torch.__version__, torchvision=torchvision.__version__,
                    numpy=np.__version__, pillow=PIL.__version__, opencv=cv2.__version__)
    return dict(command=shlex.join(sys.argv), ranks=WORLD, device=device_name(device), versions=versions)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'CPU, {torch.get_num_threads()} threads'


def duration(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min {seconds} s'


if __name__ == '__main__':
    runtime.run(main)
