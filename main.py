"""Train an encoder by contrastive learning with hard negatives (HCL), debiased (DCL) or SimCLR.

    python main.py --tau_plus 0.1 --beta 1.0                       # as published: STL10, ResNet-50
    torchrun --nproc_per_node 8 main.py --tau_plus 0.1 --beta 1.0  # the same batch on eight GPUs
    python main.py --dataset_name shapes --arch resnet18 --width 0.25 --results_dir results/shapes

The last command is small enough for a CPU. A run writes only to --results_dir, and the same command
resumes a run that was stopped. It runs on a CPU, or on a GPU with CUDA or ROCm; Apple GPUs are not
used. On two CPU cores a ResNet-18 takes about 180 views of 16 px a second; ResNet-50 at 32 px needs
a GPU.

The objectives come first: to add a method of your own, write a function and register its name
there. Then come the flags, main() with the epochs, and TrainingStep.
"""

import argparse
import math
import os
import shlex
import time
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from hardneg import flags, runs, runtime, timm_models
from hardneg.batches import Batches, DeviceViews
from hardneg.evaluate import Evaluator, all_finite, knn, label_free
from hardneg.files import crc, write_table
from hardneg.folder import find_folder
from hardneg.losses import TILE_SIZE, contrastive_loss
from hardneg.micro_batch import MicroBatches, kept_bytes, set_momentum
from hardneg.runtime import UsageError, UserError, ranks, say
from hardneg.timm_models import is_timm
from model import ARCHS, WIDTHS, Embeddings, Model, load_model, pretrained_model
from utils import ReferenceViews, load


def contrastive(z, labels, settings):
    """HCL's, DCL's and SimCLR's objective, which differ in tau_plus and beta alone.

    Args:
        z: V embeddings (b, D) of unit length, one of each view of this rank's images.
        labels: (b,) integers, -1 where an image has none.
        settings: all flags by name, with the value of beta in this epoch.

    Returns the loss, a scalar. If ranks share a batch, it is the whole batch's.
    """
    if not settings.oracle:
        labels = None
    return contrastive_loss(
        *z,
        temperature=settings.temperature,
        tau_plus=settings.tau_plus,
        beta=settings.beta,
        labels=labels,
    )


# The values of --estimator, and their functions
OBJECTIVES = {
    'hard': contrastive,
    'debiased': contrastive,
    'standard': contrastive,
}


def backbone(value):
    """An argparse type: one of ARCHS, or timm/NAME."""
    if value in ARCHS or is_timm(value):
        return value
    raise argparse.ArgumentTypeError(f'must be {", ".join(ARCHS)} or timm/NAME, got {value!r}')


def make_parser():
    parser = flags.Parser(prog='main.py', description=__doc__.partition('\n')[0])
    flags.add_data_flags(parser, 'data set (default in brackets)')
    views = flags.add_view_flags(parser, 'random views (default in brackets)')
    views.add_argument(
        '--views',
        type=flags.integer(2, 16),
        default=2,
        help='random views of each image (%(default)s)',
    )
    views.add_argument(
        '--positives',
        choices=('view', 'label'),
        default='view',
        help='views of one image or, with labels, of random images of its class (%(default)s)',
    )
    views.add_argument(
        '--augment',
        choices=('device', 'pil'),
        default='device',
        help='views in batches on the device, or by PIL in workers (%(default)s)',
    )
    views.add_argument(
        '--workers',
        type=flags.integer(0, 256),
        default=min(16, runtime.cores()),
        help='processes for --augment pil, for each GPU (%(default)s)',
    )

    model = parser.add_argument_group('model')
    model.add_argument(
        '--arch',
        type=backbone,
        default='resnet50',
        help=f'backbone f: {", ".join(ARCHS)}, or timm/NAME, any model of timm (%(default)s)',
    )
    model.add_argument(
        '--width',
        type=float,
        choices=WIDTHS,
        default=1.0,
        help='factor on the channels of f (%(default)s)',
    )
    model.add_argument(
        '--stem',
        choices=('cifar', 'imagenet'),
        help='3x3 of stride 1, or 7x7 of stride 2 and max-pool (cifar; imagenet for views of a '
        'folder above 64 px)',
    )
    model.add_argument(
        '--hidden_dim',
        type=flags.integer(1, 65536),
        help='hidden dimension of the head g (512 times width)',
    )
    model.add_argument(
        '--feature_dim',
        type=flags.integer(1, 65536),
        default=128,
        help='dimension of the embedding z (%(default)s)',
    )
    model.add_argument(
        '--init',
        type=flags.path,
        help="weights that f starts from: a checkpoint, torchvision's ImageNet file, or timm for "
        'those of --arch timm/NAME, which timm downloads',
    )
    flags.add_prefix(model)

    # --tau_plus, --beta and --anneal get their values from flags.resolve_objective().
    objective = parser.add_argument_group('objective')
    objective.add_argument(
        '--estimator',
        choices=[*OBJECTIVES, 'easy'],
        help='hard: HCL; debiased: DCL; standard or easy: SimCLR (hard; standard with --oracle)',
    )
    objective.add_argument(
        '--debiased',
        type=flags.boolean,
        help="DCL's flag. True: --estimator debiased, or hard if --beta is given; False: standard",
    )
    objective.add_argument(
        '--temperature',
        type=flags.positive(100),
        default=0.5,
        help='temperature t, by which similarities are divided (%(default)s)',
    )
    objective.add_argument(
        '--tau_plus',
        type=flags.fraction,
        help='prior probability of a false negative (0.1 for hard and debiased)',
    )
    objective.add_argument(
        '--beta', type=flags.real(0, 1000), help='concentration on hard negatives (1 for hard)'
    )
    objective.add_argument(
        '--anneal',
        choices=('none', 'down'),
        help='down: lower beta to 0 over the run, in 9 values (none)',
    )
    objective.add_argument(
        '--oracle',
        action='store_true',
        help='leave out false negatives by their labels: an upper bound',
    )

    training = parser.add_argument_group('training')
    training.add_argument(
        '--batch_size',
        type=flags.integer(2, 1_000_000),
        default=256,
        help='images in a batch, over all ranks (%(default)s)',
    )
    training.add_argument(
        '--epochs', type=flags.count, default=400, help='passes over the images (%(default)s)'
    )
    training.add_argument(
        '--optimizer',
        choices=('adam', 'sgd'),
        default='adam',
        help='SGD has momentum 0.9 (%(default)s)',
    )
    training.add_argument(
        '--lr', type=flags.positive(1000), default=1e-3, help='learning rate (%(default)s)'
    )
    training.add_argument(
        '--schedule',
        choices=('constant', 'cosine'),
        default='constant',
        help='learning rate after the warm-up (%(default)s)',
    )
    training.add_argument(
        '--warmup',
        type=flags.integer(0, 1_000_000),
        default=0,
        help='epochs in which the learning rate rises from 0 (%(default)s)',
    )
    training.add_argument(
        '--weight_decay', type=flags.real(0, 100), default=1e-6, help='L2 penalty (%(default)s)'
    )
    training.add_argument(
        '--micro_batch',
        type=flags.integer(2, 1_000_000),
        help="images of a rank in the network at once (all); the loss is the whole batch's",
    )
    training.add_argument(
        '--joint_views',
        action='store_true',
        help="send all views through the network together, so that they share BatchNorm's "
        'statistics (as published: one view after the other)',
    )
    training.add_argument(
        '--sync_bn',
        action='store_true',
        help="BatchNorm over the whole batch, not each rank's part",
    )
    training.add_argument(
        '--seed',
        type=flags.seed,
        default=0,
        help='seed of weights, shuffles and views (%(default)s)',
    )
    flags.add_precision(training, 'the network; the loss is float32')
    training.add_argument(
        '--compile',
        nargs='?',
        const=True,
        type=flags.boolean,
        help='True or False: compile views, loss and, without --sync_bn, the network (True on '
        'CUDA)',
    )

    results = parser.add_argument_group('monitor and results')
    results.add_argument(
        '--k', type=flags.count, default=200, help='neighbours of the kNN monitor (%(default)s)'
    )
    results.add_argument(
        '--knn_temperature',
        type=flags.positive(100),
        help="temperature of the neighbours' votes (--temperature)",
    )
    results.add_argument(
        '--knn_every',
        type=flags.integer(0, 1_000_000),
        default=10,
        help='epochs between evaluations of the encoder; 0: none (%(default)s)',
    )
    results.add_argument(
        '--save_every',
        type=flags.count,
        default=25,
        help='epochs between kept encoders (%(default)s)',
    )
    results.add_argument(
        '--results_dir',
        type=flags.path,
        default='results',
        help='directory of all that the run writes (%(default)s)',
    )
    return parser


def defaults():
    """The settings of a run without flags, which stand in for what a config.json lacks.

    A flag whose default is None is left out, as its value depends on others, on the machine or on
    the data. If None may be the final value, it is named here.
    """
    settings = vars(make_parser().parse_args([]))
    known = dict(init=None, micro_batch=None, **flags.DATA, **flags.VIEWS)
    for name, value in settings.items():
        if value is not None:
            known[name] = value
    return known


def arguments(argv=None):
    """The final settings; the Model of --init and the Folder of a folder data set, each or None.

    Raises:
        UsageError: flags contradict each other, or do not fit --init.
        UserError: the machine or a file cannot be used.
    """
    args = parse(argv)
    # A resumed run keeps choices that depend on the machine.
    before = {}
    results = Path(args.results_dir)
    config = runs.config_of(results)
    if config and runs.has_begun(results):
        before = config['settings']
    flags.tell_root(args, before)
    flags.fill_precision(args, before, args.arch)
    flags.fill(args, dict(compile=torch.cuda.is_available()), before)
    runtime.check_machine(args.precision)
    init = starting_weights(args, before)
    found = None
    if args.dataset_name == 'folder':
        found = find_folder(args.root, needs_no_labels(args), args.holdout)
    flags.choose_sizes(args, found, before)
    return args, init, found


def parse(argv=None):
    """The settings, but for those that depend on the machine, the images or an earlier run.

    Raises:
        UsageError: flags do not fit each other.
    """
    args = make_parser().parse_args(argv)
    if is_timm(args.arch):
        args.arch = timm_models.full_name(args.arch)
        if args.width != 1 or args.stem:
            raise UsageError(f'--width and --stem are of ResNets, not of {args.arch}')
        args.stem = 'none'
    flags.resolve_objective(args)
    flags.fill(args, flags.VIEWS)
    for name in ('root', 'dataset_name', 'fit', 'holdout', 'skip_damaged'):
        flags.fill(args, {name: flags.DATA[name]})
    depending = dict(
        hidden_dim=int(512 * args.width),
        knn_temperature=args.temperature,
    )
    flags.fill(args, depending)
    check_flags(args)
    return args


def check_flags(args):
    world = ranks().world
    own = args.batch_size // world
    if args.batch_size % world:
        raise UsageError(
            f'--batch_size {args.batch_size} does not divide evenly over {world} ranks'
        )
    if own < 2:
        raise UsageError(
            f'--batch_size {args.batch_size} leaves a rank less than the 2 images that BatchNorm '
            'needs'
        )
    if args.micro_batch and own % args.micro_batch:
        raise UsageError(f"--micro_batch {args.micro_batch} does not divide a rank's {own} images")
    if args.sync_bn and not torch.cuda.is_available():
        raise UsageError('--sync_bn needs CUDA: PyTorch has no SyncBatchNorm for CPUs')
    if args.warmup >= args.epochs:
        raise UsageError(f'--warmup {args.warmup} must be less than --epochs {args.epochs}')


def starting_weights(args, before):
    """The Model in --init, or None. The setting becomes the file's name, CRC and any --prefix.

    before are the settings of the run that --results_dir holds.
    """
    prefix = args.prefix
    del args.prefix
    if prefix is not None and args.init in (None, 'timm'):
        raise UsageError('--prefix tells which encoder of an --init FILE to take')
    if not args.init:
        return None
    if args.init == 'timm':
        return timm_weights(args, before)
    path = Path(args.init)
    arch = args.arch if is_timm(args.arch) else None
    net = load_model(path, head=False, prefix=prefix, arch=arch)
    if is_timm(net.backbone['arch']) and not arch:
        raise UsageError(
            f'--init {path} is a {net.backbone["arch"]}: give --arch {net.backbone["arch"]}'
        )
    if args.stem is None:
        args.stem = net.backbone['stem']
    differ = []
    for name, value in net.backbone.items():
        if getattr(args, name) != value:
            differ.append(f'--{name} {value}')
    if differ:
        raise UsageError(f'--init {path} holds another network: give {" ".join(differ)}')
    args.init = f'{path.name}, CRC {crc(path):08x}'
    if prefix is not None:
        args.init += f', prefix {prefix}'
    return net


def timm_weights(args, before):
    """The Model of --init timm, or None when a run resumes, which needs no weights.

    The setting becomes the full name of the weights, and their CRC.
    """
    if not is_timm(args.arch):
        raise UsageError(
            '--init timm takes the weights of one of its models: give --arch timm/NAME'
        )
    recorded = before.get('init') or ''
    goes_on = Path(args.results_dir, 'last.pth').exists()
    if goes_on and recorded.startswith(f'{args.arch}, CRC '):
        args.init = recorded
        return None
    net = pretrained_model(args.arch)
    args.init = f'{args.arch}, CRC {timm_models.tensors_crc(net.f):08x}'
    return net


def needs_no_labels(args):
    """Whether images without labels are trained on."""
    return not args.oracle and args.positives == 'view'


def main(argv=None):
    args, init, found = arguments(argv)
    results = Path(args.results_dir)
    data = load(args, needs_no_labels(args), found)
    check_data(args, data)
    device = runtime.start()
    runtime.check_same_data(data.digest, device)
    saved = runtime.on_rank0(lambda: runs.open_run(results, vars(args), defaults(), data, device))

    torch.backends.cudnn.benchmark = True
    train_step = TrainingStep(args, device, init)
    net, scaler = train_step.net, train_step.scaler
    steps = len(data.train) // args.batch_size
    progress = runs.Progress(losses=torch.zeros(steps, device=device))
    resumed = saved is not None
    if resumed:
        runs.restore(results, saved, progress, net, train_step.optimizer, scaler)
    del init, found, saved  # they may take gigabytes
    if progress.epoch == args.epochs:
        # A kill between the two writes leaves last.pth without the last row of the log.
        runtime.on_rank0(lambda: write_table(results / 'log.csv', progress.log, runs.LOG))
        say(f'{results} holds this run, finished: {describe(progress.log[-1])}')
        return
    if resumed:
        say(f'Continuing {results} in epoch {progress.epoch + 1} after step {progress.step}')
    if args.compile:
        say('Compiling takes one to three minutes, before the first step')
    train_step.prepare()

    check_memory(args, device)
    keep_on_device(args, data, device)
    loader = training_views(args, data, device)
    labels = data.train_labels.to(device)
    identity = dict(settings=vars(args), data_digest=data.digest)
    saver = runs.Saver(results, identity, net, train_step.optimizer, scaler, resumed)
    look_every = 20 if device.type == 'cuda' else 1  # a look waits for the device
    bar = tqdm(
        total=args.epochs * steps,
        initial=progress.epoch * steps + progress.step,
        unit='step',
        disable=runtime.no_bar(),
    )
    with runtime.Signals() as signals:  # to the end of the last write
        try:
            evaluator = Evaluator(net, device, train_step.autocast, signals)
            if not progress.log:
                measure_untrained(args, data, evaluator, progress, saver)

            for epoch in range(progress.epoch + 1, args.epochs + 1):
                net.train()
                if args.anneal == 'down':
                    train_step.settings.beta = annealed(args.beta, epoch, args.epochs)
                began = time.monotonic() - progress.seconds

                # A resumed run skips the steps of the epoch that it has taken.
                batches = loader.epoch(epoch, progress.step)
                if args.augment == 'pil':  # a worker may stand still
                    batches = signals.awaited(batches)
                for views, index in batches:
                    lr = learning_rate(args, epoch - 1 + progress.step / steps)
                    progress.losses[progress.step] = train_step(views, labels[index], lr)
                    progress.step += 1
                    if progress.step % look_every == 0 or progress.step == steps:
                        losses = progress.losses[: progress.step].cpu()
                        progress.seconds = time.monotonic() - began  # after the wait
                        check_finite(losses, scaler, epoch)
                        bar.update((epoch - 1) * steps + progress.step - bar.n)
                        bar.set_postfix_str(f'epoch {epoch}, loss {losses.mean():.4f}')
                        if signals.check(due=saver.due()):
                            saver.save(progress, buffers=runtime.averaged_buffers(net))

                # Each rank has BatchNorm's statistics of its own images.
                net.load_state_dict(runtime.averaged_buffers(net), strict=False)
                row = {
                    'epoch': epoch,
                    'train_loss': progress.losses.mean().item(),
                    'lr': learning_rate(args, epoch),
                    'images/s': args.batch_size * steps / progress.seconds,
                    'seconds': progress.seconds,
                }
                last = epoch == args.epochs
                if args.knn_every and (epoch % args.knn_every == 0 or last):
                    row |= monitor(args, data, evaluator)
                progress.epoch_ended(row)
                saver.epoch_ended(progress, keep=epoch % args.save_every == 0 or last)
                scale = ''
                if scaler.is_enabled():  # halved at each step that fp16's overflow skips
                    scale = f', fp16 scale {scaler.get_scale():g}'
                say(f'epoch {epoch}/{args.epochs}: {describe(row)}{scale}')
        except runtime.Stopped as stopped:
            if progress.epoch or progress.step:
                saver.save(progress, buffers=runtime.averaged_buffers(net))
                saver.wait()
                say(
                    f'Stopped in epoch {progress.epoch + 1} after step {progress.step}, saved in '
                    f'{results}; the same command continues'
                )
            else:
                say('Stopped before the first step; the same command begins anew')
            raise SystemExit(128 + stopped.signum) from None
        except torch.OutOfMemoryError as error:
            raise SystemExit(f'error: {out_of_memory(args, error)}') from None
        finally:
            bar.close()
            saver.wait()
    say(f'Finished. Next: {next_command(args, data)}')


class TrainingStep:
    """The network, its optimizer, and the step that trains it.

    Args:
        args: all settings.
        device: torch.device.
        init: the Model that f starts from, or None.

    Attributes:
        net: model.Model.
        optimizer, scaler, autocast: as in PyTorch's recipe of mixed precision.
        settings: what the objective gets; beta may change between epochs.
    """

    def __init__(self, args, device, init=None):
        torch.manual_seed(args.seed)
        self.net = build_network(args, init).to(device, memory_format=torch.channels_last)
        self.optimizer = build_optimizer(args, self.net)
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.precision == 'fp16')
        self.autocast = runtime.autocast(device, args.precision)
        self.settings = argparse.Namespace(**vars(args))
        self.device = device

    def prepare(self):
        """Compile, if asked, and join the ranks. It comes before the first step."""
        args = self.settings
        self.objective = OBJECTIVES[args.estimator]
        embeddings = Embeddings(self.net, args.joint_views)
        if args.compile:
            self.objective = compiled(args, self.objective, self.net, embeddings, self.device)
        self.embed = runtime.distributed(embeddings, self.device)
        self.micro_batches = None
        if args.micro_batch:
            self.micro_batches = MicroBatches(self.embed, args.micro_batch, self.autocast)

    def __call__(self, views, labels, lr):
        """Take a step and return the loss before it.

        Args:
            views: V tensors (b, 3, h, w), the views of this rank's images.
            labels: (b,) integers.
            lr: learning rate.
        """
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        self.optimizer.zero_grad()
        loss_of = partial(self.objective, labels=labels, settings=self.settings)
        if self.micro_batches:
            loss = self.micro_batches.backward(views, loss_of, self.scaler)
        else:
            with self.autocast:
                z = self.embed(*views)  # V x (b, 3, h, w) -> V x (b, D)
            loss = loss_of(z)  # not under autocast: in float32
            self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def next_command(args, data):
    """The command that probes the encoder or, without labels, embeds the images, to be pasted."""
    script = 'linear.py'
    rest = []
    if not data.classes:
        script = 'misc/embed.py'
        rest = ['--root', args.root, '--out', str(Path(args.results_dir, 'features.npz'))]
    place = os.path.relpath(Path(__file__).parent / script)
    encoder = Path(args.results_dir, f'model_{args.epochs}.pth')
    return shlex.join(['python', place, '--model_path', str(encoder), *rest])


def network(args):
    return Model(args.feature_dim, args.arch, args.hidden_dim, args.stem, args.width)


def build_network(args, init=None):
    """The network before training. f starts from the Model init, if there is one."""
    net = network(args)
    if init:
        net.f.load_state_dict(init.f.state_dict())
    if args.micro_batch:
        set_momentum(net, args.batch_size // ranks().world // args.micro_batch)
    if args.sync_bn and is_timm(args.arch):
        # torch's own would drop the activations of timm's layers.
        net = timm_models.library().layers.convert_sync_batchnorm(net)
    elif args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return net


def compiled(args, objective, net, embeddings, device):
    """Let torch.compile() compile the network, in place.

    Args:
        objective: function of OBJECTIVES.
        net: Model.
        embeddings: Embeddings of it.

    Returns the objective, compiled if that pays.
    """
    runtime.compiles_or_goes_on()
    # One graph of both views casts the weights once, and sums the views' gradients. (Under
    # DistributedDataParallel torch cuts it.) A graph of more views would take long to compile.
    one_graph = embeddings if args.views == 2 else net
    if not args.sync_bn:  # which torch compiles in too many pieces
        one_graph.compile(dynamic=False)
    # Many tiles, or many values of beta, would take long to compile.
    few_tiles = args.views == 2 and args.batch_size <= TILE_SIZE[device.type]
    if few_tiles and args.anneal == 'none':
        objective = torch.compile(objective, dynamic=False)
    return objective


def build_optimizer(args, net):
    parameters = net.parameters()
    decay = args.weight_decay
    if args.optimizer == 'adam':
        return torch.optim.Adam(parameters, args.lr, weight_decay=decay, fused=True)
    if args.optimizer == 'sgd':
        # torch's fused SGD leaves the momentum uninitialised if fp16 overflows in the first step.
        fused = args.precision != 'fp16'
        return torch.optim.SGD(parameters, args.lr, momentum=0.9, weight_decay=decay, fused=fused)
    raise ValueError(f'no optimizer {args.optimizer}')


def keep_on_device(args, data, device):
    """Move the images of data to a GPU if they fit beside a step, the test images first.

    Training images stay in the host's memory if PIL makes their views there.
    """
    step = 0
    if device.type == 'cuda':
        step = step_bytes(args) + loss_bytes(args)
    if runtime.fits(device, data.test, reserved=step):
        data.test = data.test.to(device)
    if args.augment == 'device' and runtime.fits(device, data.train, reserved=step):
        data.train = data.train.to(device)


def training_views(args, data, device):
    """What yields the random views of each epoch, batch by batch."""
    labels = None
    if args.positives == 'label':
        labels = data.train_labels
    batches = Batches(len(data.train), args.batch_size, args.views, args.seed, labels)
    recipe = flags.recipe(vars(args))
    if args.augment == 'pil':
        return ReferenceViews(data.train, batches, args.image_size, device, recipe, args.workers)
    return DeviceViews(data.train, batches, args.image_size, device, recipe, args.compile)


def step_bytes(args):
    """What a step keeps for its backward pass, in bytes."""
    dtype = torch.float32
    if args.precision in ('bf16', 'fp16'):
        dtype = torch.float16
    images = args.batch_size // ranks().world
    together = args.views
    if args.micro_batch:
        images = args.micro_batch
        together = args.views if args.joint_views else 1
    return images * together * kept_bytes(lambda: network(args), args.image_size, dtype)


def loss_bytes(args):
    """What the loss takes on a GPU beyond its inputs, in bytes: at most ten tiles of float32."""
    columns = args.views * args.batch_size
    rows = columns // ranks().world
    return 10 * 4 * min(rows, TILE_SIZE['cuda']) * min(columns, TILE_SIZE['cuda'])


def check_memory(args, device):
    """Warn if a step on a CPU needs more memory than there is: the system kills such processes."""
    if device.type != 'cpu':
        return
    needed, free = step_bytes(args), runtime.free_memory()
    if free and needed > free:
        say(
            f'A step keeps {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: '
            f'choose a --micro_batch{smaller_micro_batch(args)}, or --arch resnet18 --width 0.25'
        )


def smaller_micro_batch(args):
    """The largest --micro_batch that takes less memory than now, as ' such as n'; '' if none."""
    images = args.batch_size // ranks().world
    most = images
    if args.micro_batch or args.joint_views:
        most = (args.micro_batch or images) - 1
    # Without --joint_views, all images at once are one view at a time, which takes less memory.
    for n in range(most, 1, -1):
        if images % n == 0:
            return f' such as {n}'
    return ''


def out_of_memory(args, error):
    reason = runtime.memory_reason(error)
    return (
        f"the GPU's memory is full ({reason}): choose a --micro_batch{smaller_micro_batch(args)}, "
        'as the loss stays that of the whole batch, or start more ranks'
    )


def measure_untrained(args, data, evaluator, progress, saver):
    """Add the log's row of epoch 0, and keep the encoder before training."""
    if evaluator.device.type == 'cpu' and args.dataset_name != 'shapes':
        say(
            'No CUDA device: training on the CPU. What is too slow or too large there gets faster '
            'with --arch resnet18 --width 0.25, a smaller --image_size, and --micro_batch 32'
        )
    row = {'epoch': 0}
    if args.knn_every:
        row |= monitor(args, data, evaluator)
    progress.log.append(row)
    saver.keep_untrained()
    if args.knn_every:
        name = 'before training' if args.init else 'untrained'
        say(f'{name}: {describe(row)}')


def check_finite(losses, scaler, epoch):
    """End the run, on every rank, if a loss of the epoch so far, (steps,), is not finite."""
    if not losses.isfinite().all():
        step = int(losses.isfinite().logical_not().nonzero()[0])
        raise UserError(
            f'the loss is {losses[step]} at epoch {epoch}, step {step + 1}; the last good state is '
            'untouched. Common causes: --lr too high, --temperature too low, --precision bf16 or '
            'fp16. Other values need another --results_dir'
        )
    if scaler.is_enabled() and scaler.get_scale() < 1e-6:
        raise UserError(
            f'gradients overflow fp16 at any scale in epoch {epoch}: use --precision fp32 or bf16, '
            'or a lower --lr, in another --results_dir'
        )


def monitor(args, data, evaluator):
    """Columns of the log: label-free measures, and kNN accuracy on the test images.

    The kNN memory are the training images that have labels.
    """
    recipe = flags.recipe(vars(args))
    row = label_free(evaluator, data.train, args.image_size, args.test_size, recipe)
    if not data.classes:
        return row
    labelled = (data.train_labels >= 0).nonzero()[:, 0]  # (n, 1) -> (n,)
    try:
        first, five = knn_accuracies(args, data, evaluator, labelled)
    except torch.OutOfMemoryError as error:
        reason = runtime.memory_reason(error)
        raise SystemExit(
            f"error: the GPU's memory is full as kNN compares {len(labelled):,} images ({reason}): "
            'free some, or train without the monitor, with --knn_every 0'
        ) from None
    return {'test_acc@1': first, 'test_acc@5': five, **row}


def knn_accuracies(args, data, evaluator, labelled):
    """kNN accuracies @1 and @5, in percent, by the training images at the indices labelled (n,).

    They are NaN if features overflow, as fp16 does in untrained networks of 100 layers.
    """
    memory = evaluator.features(data.train, labelled, args.test_size)
    queries = evaluator.features(data.test, torch.arange(len(data.test)), args.test_size)
    if not (all_finite(memory) and all_finite(queries)):
        return math.nan, math.nan
    memory_labels = data.train_labels[labelled].to(memory.device)
    labels = data.test_labels.to(memory.device)
    return knn(memory, queries, memory_labels, labels, args.k, args.knn_temperature)


def learning_rate(args, epochs_done):
    """The rate after so many epochs, a fraction within one.

    It rises linearly, then stays or falls as half a cosine.
    """
    if epochs_done < args.warmup:
        return args.lr * epochs_done / args.warmup
    if args.schedule == 'constant':
        return args.lr
    done = (epochs_done - args.warmup) / (args.epochs - args.warmup)
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * done))


def annealed(beta, epoch, epochs, steps=9):
    """The epoch's value as beta falls to 0 in 9 values.

    As in HCL's code, the next value (at first beta itself) comes after every multiple of
    epochs // 9: for 400 epochs after 44, 88, ..., 396. Where that code runs out of values and
    crashes, in some runs below 81 epochs, beta falls evenly.
    """
    each = epochs // steps
    if each and epochs // each == steps:
        passed = max((epoch - 1) // each - 1, 0)
    else:
        passed = int((steps - 1) * (epoch - 1) / max(epochs - 1, 1) + 0.5)
    return beta * (1 - passed / (steps - 1))


def check_data(args, data):
    """Raise UsageError if a flag does not fit the data."""
    flags.check_views(args.image_size, args.stem)
    timm_models.check_sizes(args.arch, args.image_size, args.test_size or data.train.shape[2])
    if args.batch_size > len(data.train):
        raise UsageError(
            f'--batch_size {args.batch_size} is larger than the data set, {len(data.train)} '
            'images: lower it'
        )
    labelled = int((data.train_labels >= 0).sum())
    if args.knn_every and data.classes and args.k > labelled:
        raise UsageError(f'--k {args.k} is larger than the kNN memory, {labelled} images: lower it')
    kept = data.train.shape[2]
    if args.dataset_name == 'folder' and args.image_size > kept:
        say(
            f'Views of {args.image_size} px enlarge images that are kept at {kept} px: give '
            f'--store_size {round(args.image_size * 8 / 7)}, or a lower --image_size'
        )


def describe(row):
    """A row of the log in words."""
    words = {
        'train_loss': 'loss {:.4f}',
        'test_acc@1': 'kNN {:.2f} %',
        'alignment': 'alignment {:.3f}',
        'uniformity': 'uniformity {:.3f}',
        'rankme': 'RankMe {:.1f}',
        'seconds': '{:.1f} s',
    }
    return ', '.join(text.format(row[name]) for name, text in words.items() if name in row)


if __name__ == '__main__':
    runtime.run(main)
