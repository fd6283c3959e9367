"""Timings as ratios: our code and a reference take turns in one process on one machine.

    python misc/bench.py loss                          # the objective against its textbook form
    python misc/bench.py augment                       # views against PIL, torchvision and kornia
    python misc/bench.py step --arch resnet50          # main.py's step against the published one
    python misc/bench.py epoch                         # main.py itself against bare steps
    python misc/bench.py all --device cuda --csv FILE  # these four on a GPU; FILE gets the rows
    python misc/bench.py training --arch resnet18      # views and steps beside lightly's
    python misc/bench.py profile                       # where the time of main.py's steps goes

step, epoch, training and profile take all flags of main.py. A GPU starts from main.py's defaults, a
CPU from a ResNet-18 on 32 images of 16 px in fp32; flags change that. A row holds medians in
milliseconds. Its ratio says how many times as fast ours is as the reference. For the published
network on a GPU, roof is the share of the speed that the GPU's matmul rate and copy bandwidth,
measured in the same run, allow. lightly and kornia are timed if they are installed. On two CPU
cores each bench takes at most about two minutes; training takes longer.
"""

import contextlib
import copy
import importlib.util
import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import pandas as pd
import PIL.Image
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runtime
from hardneg.augment import BLUR_SIGMA, CROP_RATIO, JITTER, MEAN, STD, blur_kernel_size, normalize
from hardneg.batches import Batches, DeviceViews, seeded
from hardneg.files import write_table
from hardneg.losses import contrastive_loss, textbook_loss
from hardneg.runs import device_name
from hardneg.runtime import UserError
from main import TrainingStep, arguments, keep_on_device, needs_no_labels, network, training_views
from utils import ReferenceViews, load, load_data

HOME = Path(__file__).parents[1]
BENCHES = ('loss', 'augment', 'step', 'epoch')  # of all
TRAINING_BATCHES = 8
LOSS_SIZES = (256, 1024, 2048)  # images in a batch
LARGE_LOSS = 16384
AUGMENT_SIZE = 256
# A training step of ResNet-50 on a view of 32 px in bf16, if BatchNorm and ReLU are one kernel
FLOP_PER_VIEW = 7.8e9
BYTES_PER_VIEW = 131e6
SMALL = '--arch resnet18 --image_size 16 --test_size 16 --batch_size 32 --precision fp32'


def make_parser():
    parser = flags.Parser(
        prog='bench.py',
        description=__doc__.partition('\n')[0],
        epilog="Other flags are main.py's, for step, epoch, training and profile.",
    )
    parser.add_argument(
        'what', nargs='?', choices=[*BENCHES, 'all', 'training', 'profile'], help='what to time'
    )
    timing = parser.add_argument_group('timing')
    timing.add_argument(
        '--device', choices=('cuda', 'cpu'), help='what runs the code (cuda where there is one)'
    )
    timing.add_argument(
        '--repeat',
        type=flags.count,
        default=9,
        help='timings of each piece of code, or steps in the profile (%(default)s)',
    )
    timing.add_argument('--csv', type=flags.path, help='file for the rows, of all but profile')
    return parser


def main(argv=None):
    parser = make_parser()
    args, given = parser.parse_known_args(argv)
    if not args.what:
        print(__doc__)
        return
    cuda = torch.cuda.is_available()
    if args.device is None:
        args.device = 'cuda' if cuda else 'cpu'
    if args.device == 'cuda' and not cuda:
        parser.error('--device cuda, and there is no CUDA device')
    device = torch.device(args.device)
    command = ['--dataset_name', 'shapes']
    if args.device == 'cpu':
        command += [*SMALL.split(), '--compile', 'False']
    command += given
    with TemporaryDirectory() as empty:  # no run, whose settings would be taken
        settings, _, found = arguments([*command, '--results_dir', empty])
    versions = f'torch {torch.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}'
    print(f'{device_name(device)}; {versions}')
    torch.backends.cudnn.benchmark = True
    if args.what == 'profile':
        profile(args.repeat, device, settings, found)
        return

    names = BENCHES if args.what == 'all' else [args.what]
    rows = []
    for name in names:
        for row in timings(name, args.repeat, device, settings, command):
            row['ratio'] = row['reference_ms'] / row['ours_ms']
            print(described(row))
            rows.append({**row, 'device': device_name(device)})
            if args.csv:  # after every row: a later bench may fail
                write_table(args.csv, rows, None)


def timings(name, repeat, device, settings, command):
    """The rows of a bench, dicts with what, size, reference_ms, ours_ms and more."""
    if name == 'loss':
        return bench_loss(repeat, device)
    if name == 'augment':
        return bench_augment(repeat, device)
    if name == 'step':
        return bench_step(repeat, device, settings)
    if name == 'training':
        return bench_training(repeat, device, settings)
    return bench_epoch(repeat, device, settings, command)


def described(row):
    """A row as a line of text, without the numbers that it lacks."""
    parts = [row['what'], row['size']]
    for name, x in row.items():
        if name in ('what', 'size') or math.isnan(x):
            continue
        number = f'{x:,.0f}' if x >= 1000 else f'{x:.3g}'
        parts.append(f'{name} {number}')
    return ', '.join(parts)


def alternate(repeat, device, *functions):
    """Median milliseconds of each function. They are called in turn; the first turn is a warm-up.

    On CUDA a turn is 10 calls, so that the host's time to start the first hardly counts.
    """
    calls = 10 if device.type == 'cuda' else 1
    times = [[] for _ in functions]
    for _ in range(repeat + 1):
        for function, own in zip(functions, times):
            wait(device)
            began = time.perf_counter()
            for _ in range(calls):
                function()
            wait(device)
            own.append(1e3 * (time.perf_counter() - began) / calls)
    return [statistics.median(own[1:]) for own in times]


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def is_installed(package):
    if importlib.util.find_spec(package):
        return True
    print(f'{package} is not installed: its rows are left out')
    return False


# The loss


def bench_loss(repeat, device):
    """Forward and backward of the hard objective, against other code and the standard one."""
    yield large_loss(device)  # first: the process holds no memory yet that it could use again
    references = {'cross-entropy, standard': cross_entropy, 'textbook': textbook_loss}
    if is_installed('lightly'):
        from lightly.loss import NTXentLoss

        references['lightly, standard'] = NTXentLoss()
    references['standard here'] = partial(contrastive_loss, tau_plus=0, beta=0)
    for B in LOSS_SIZES:
        z = embeddings(B, device)
        losses = [*references.values(), contrastive_loss]
        *others, ours = alternate(repeat, device, *(gradient(loss, z) for loss in losses))
        for name, other in zip(references, others):
            yield dict(
                what=f'loss forward + backward, hard against {name}',
                size=f'B={B}',
                reference_ms=other,
                ours_ms=ours,
            )


def large_loss(device):
    """The row of a batch whose matrix of similarities few machines could hold."""
    B = LARGE_LOSS
    z = embeddings(B, device)
    for x in z:
        x.grad = torch.zeros_like(x)
    before = peak_memory(device, reset=True)
    (elapsed,) = alternate(1, device, gradient(contrastive_loss, z))
    return dict(
        what='loss forward + backward, hard',
        size=f'B={B}',
        reference_ms=math.nan,
        ours_ms=elapsed,
        beyond_inputs_GB=(peak_memory(device) - before) / 1e9,
        one_matrix_of_the_textbook_GB=4 * (2 * B) ** 2 / 1e9,
    )


def embeddings(B, device):
    """Two views (B, 128) that take a gradient."""
    return [torch.randn(B, 128, device=device).requires_grad_() for _ in range(2)]


def gradient(loss, z):
    """A function that computes the loss of z and its gradient."""
    return lambda: loss(*z).backward()


def cross_entropy(z1, z2, temperature=0.5):
    """The standard objective as its fastest usual form: a masked matrix through F.cross_entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # 2 x (B, D) -> (2B, D)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    s = (z @ z.T / temperature).masked_fill(itself, -math.inf)  # (2B, 2B)
    positive = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(s, positive)


def peak_memory(device, reset=False):
    """The most bytes held at once since the last reset: on a GPU by torch, else by this process.

    NaN where the system does not tell, as only Linux does.
    """
    if device.type == 'cuda':
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        if reset:
            Path('/proc/self/clear_refs').write_text('5')
        for line in Path('/proc/self/status').read_text().splitlines():
            name, *value = line.split()
            if name == 'VmHWM:':
                return 1024 * int(value[0])
    return math.nan


# Random views


def bench_augment(repeat, device):
    """Two views of 32 px of each of 256 images of 96 px, by one CPU thread.

    A row also tells what the views look like, in which libraries differ: mean, standard deviation,
    and mean difference of neighbouring pixels.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    size = 32
    images = textured(4 * AUGMENT_SIZE)
    batches = Batches(len(images), AUGMENT_SIZE)
    compile = device.type == 'cuda'
    pil = endless(ReferenceViews(images, batches, size))
    ours = endless(DeviceViews(images, batches, size, device, compile=compile))
    makers = {'PIL, image by image': partial(normalized_batch, pil)}
    makers |= peers(images[:AUGMENT_SIZE].repeat(2, 1, 1, 1), size, device)  # (B, …) -> (2B, …)
    makers['ours'] = partial(normalized_batch, ours)
    times = alternate(repeat, device, *makers.values())
    n = 2 * AUGMENT_SIZE
    for (name, make), elapsed in zip(makers.items(), times):
        x = torch.cat([make() for _ in range(4)])  # 4 x (n, 3, 32, 32) -> (4n, 3, 32, 32)
        yield dict(
            what=f'views on {device.type}, one CPU thread, against {name}',
            size=f'{n} views of {size} px',
            reference_ms=elapsed,
            ours_ms=times[-1],
            reference_views_s=1e3 * n / elapsed,
            mean=x.mean().item(),
            spread=x.std().item(),
            neighbours=x.diff(dim=3).abs().mean().item(),
        )
    torch.set_num_threads(threads)


def textured(n):
    """n images (n, 3, 96, 96) uint8 of the drawn data set, with noise in which aliasing shows."""
    drawn = load_data('shapes').train[:n].float()
    images = F.interpolate(drawn, 96, mode='bicubic', antialias=True)
    images += 16 * torch.randn(images.shape, generator=seeded(0))
    return images.round_().clamp_(0, 255).byte()


def endless(views):
    """Yield the views of batch after batch."""
    for epoch in itertools.count(1):
        for batch, _ in views.epoch(epoch):
            yield batch


def normalized_batch(batches):
    return normalize(torch.cat(next(batches)))  # V x (B, 3, h, w) -> (V B, 3, h, w)


def peers(images, size, device):
    """Functions () -> (n, 3, size, size), by name: a view of each image in other libraries.

    All follow the same recipe. images is (n, 3, H, W) uint8.
    """
    from torchvision.transforms import v2

    kernel = blur_kernel_size(size)
    view = v2.Compose(
        [
            v2.RandomResizedCrop(size, (0.08, 1.0), CROP_RATIO),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, BLUR_SIGMA)], 0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    found = {'torchvision v2, image by image': lambda: torch.stack([view(x) for x in images])}
    if is_installed('kornia'):
        there = images.to(device)
        for mode, name in (('slice', 'exact crop'), ('resample', 'resampled')):
            views = kornia_views(size, kernel, mode).to(device)
            found[f'kornia, {name}'] = partial(lambda views: views(there / 255), views)
    return found


def kornia_views(size, kernel, cropping_mode):
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.RandomResizedCrop((size, size), (0.08, 1.0), CROP_RATIO, cropping_mode=cropping_mode),
        K.RandomHorizontalFlip(),
        K.ColorJitter(*JITTER, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((kernel, kernel), BLUR_SIGMA),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


# Training steps


def training_step(args, device):
    """main.py's step on a new network. Returns the network, and a function: views -> the loss.

    views are V tensors (B, 3, h, w) uint8.
    """
    step = TrainingStep(args, device)
    step.prepare()
    labels = torch.randint(10, (args.batch_size,), device=device)
    of_views = partial(step, labels=labels, lr=args.lr)
    return step.net, with_tf32(args.precision == 'tf32', of_views)


def with_tf32(allowed, function):
    """The function, with convolutions on a GPU that may round to TF32 or not, as it runs.

    torch's default, which other code has, is True.
    """

    def run(*args):
        torch.backends.cudnn.allow_tf32 = allowed
        return function(*args)

    return run


def published_step(args, device):
    """The step of HCL's code on a new network, as a function: two normalised views -> the loss."""
    torch.manual_seed(args.seed)
    net = network(args).to(device)
    optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay)

    def step(views):
        z1, z2 = (net(x)[1] for x in views)
        loss = textbook_loss(z1, z2, args.temperature, args.tau_plus, args.beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return with_tf32(True, step)


def bench_step(repeat, device, settings):
    """Steps on one batch of views that stays the same."""
    views = fixed_views(settings, device)
    references = {}
    if settings.views == 2:  # the textbook form has no more
        normalized = [normalize(x).contiguous() for x in views]
        published = published_step(settings, device)
        references['published configuration'] = partial(published, normalized)
    standard = copy.copy(settings)
    standard.tau_plus = 0
    standard.beta = 0
    _, standard_step = training_step(standard, device)
    references['standard objective'] = partial(standard_step, views)
    _, step = training_step(settings, device)
    for name, reference in references.items():
        times = alternate(repeat, device, reference, partial(step, views))
        yield step_row(f' step against the {name}', settings, device, *times)


def fixed_views(settings, device):
    """V views (B, 3, h, w) uint8 of random pixels."""
    size = settings.image_size
    shape = settings.views, settings.batch_size, 3, size, size
    return [*torch.randint(256, shape, dtype=torch.uint8, device=device)]


def step_row(what, settings, device, reference, ours):
    """The row of two times of a step in milliseconds."""
    n = settings.views * settings.batch_size
    row = dict(
        what=f'{settings.arch}{what}',
        size=f'{n} views of {settings.image_size} px',
        reference_ms=reference,
        ours_ms=ours,
        views_s=1e3 * n / ours,
    )
    published = settings.arch, settings.width, settings.stem, settings.image_size
    counted = published == ('resnet50', 1, 'cifar', 32)
    if counted and device.type == 'cuda' and settings.precision == 'bf16':
        row['roof'] = least_ms(n, device) / ours
    return row


def least_ms(n, device, side=8192, size=2**30):
    """The least time of a ResNet-50's step on n views of 32 px, by rates that are measured here.

    Args:
        side: of the square matrices whose product is timed.
        size: bytes whose copy is timed.
    """
    a = torch.randn(side, side, device=device).bfloat16()
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)
    matmul, copying = alternate(5, device, lambda: a @ a, lambda: y.copy_(x))
    computing = FLOP_PER_VIEW * matmul / (2 * side**3)
    moving = BYTES_PER_VIEW * copying / (2 * size)  # a copy reads and writes
    return n * max(computing, moving)


def bench_epoch(repeat, device, settings, command):
    """Epochs of main.py in a process of its own, as it logs them, against bare steps.

    The first epoch is left out, as it compiles and warms up.
    """
    _, step = training_step(settings, device)
    bare = partial(step, fixed_views(settings, device))
    before = alternate(repeat, device, bare)
    torch.cuda.empty_cache()  # memory for the other process
    environment = dict(os.environ)
    epochs = '5'
    if device.type == 'cpu':
        environment['CUDA_VISIBLE_DEVICES'] = ''
        epochs = '2'
    with TemporaryDirectory() as results:
        own = ['--epochs', epochs, '--results_dir', results]
        run = [sys.executable, HOME / 'main.py', *command, *own]
        done = subprocess.run(run, env=environment, stdout=subprocess.DEVNULL)
        if done.returncode:
            raise UserError('main.py failed; its message is above')
        log = pd.read_csv(Path(results, 'log.csv'))
    images_s = log['images/s'][2:].median()  # row 0 is that of the untrained encoder
    reference = statistics.median(before + alternate(repeat, device, bare))
    what = ", main.py's training loop against bare steps"
    yield step_row(what, settings, device, reference, 1e3 * settings.batch_size / images_s)


def bench_training(repeat, device, settings):
    """A few batches of main.py's views and steps beside lightly's, on the same images and network.

    lightly trains in fp32, as its documentation has it, and once more under bf16 autocast.
    """
    if not is_installed('lightly'):
        return
    data = load(settings, needs_no_labels(settings))
    steps = min(TRAINING_BATCHES, len(data.train) // settings.batch_size)
    data.train = images = data.train[: steps * settings.batch_size]
    data.train_labels = data.train_labels[: len(data.train)]
    keep_on_device(settings, data, device)
    loader = training_views(settings, data, device)
    _, step = training_step(settings, device)
    epochs = itertools.count(1)

    def ours():
        for views, _ in loader.epoch(next(epochs)):
            step(views)

    for precision in ('fp32', 'bf16'):
        theirs = lightly_epoch(settings, images, device, precision)
        times = alternate(repeat, device, theirs, ours)
        what = f", main.py's training in {settings.precision} beside lightly's in {precision}"
        yield step_row(what, settings, device, *(ms / steps for ms in times))


def lightly_epoch(settings, images, device, precision):
    """An epoch as lightly's documentation writes it, with two workers, as a function.

    It has lightly's transform, head and loss, and our backbone f. images is (N, 3, H, W) uint8.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(input_size=settings.image_size, gaussian_blur=0.0)
    views = []
    for image in images:
        array = image.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        views.append(PIL.Image.fromarray(array))
    loader = torch.utils.data.DataLoader(
        Transformed(views, transform),
        batch_size=settings.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    net = network(settings)
    head = SimCLRProjectionHead(net.features, net.features, 128).to(device)
    f = net.f.to(device)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD([*f.parameters(), *head.parameters()], lr=0.06)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == 'bf16')

    def epoch():
        for x0, x1 in loader:
            with autocast:
                z0 = head(f(x0.to(device)).flatten(1))  # (B, 3, h, w) -> (B, D)
                z1 = head(f(x1.to(device)).flatten(1))
                loss = criterion(z0, z1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return with_tf32(True, epoch)


class Transformed(torch.utils.data.Dataset):
    """The views that a transform makes of PIL images."""

    def __init__(self, images, transform):
        self.images = images
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i])


def profile(repeat, device, settings, found):
    """Print torch.profiler's table of main.py's steps, the making of views included."""
    data = load(settings, needs_no_labels(settings), found)
    keep_on_device(settings, data, device)
    batches = endless(training_views(settings, data, device))
    _, step = training_step(settings, device)
    for _ in range(3):  # compiles and warms up
        step(next(batches))
    with torch.profiler.profile() as profiler:
        for _ in range(repeat):
            with torch.profiler.record_function('views'):
                views = next(batches)
            with torch.profiler.record_function('training step'):
                step(views)
        wait(device)
    print(profiler.key_averages().table(f'self_{device.type}_time_total', row_limit=25))


if __name__ == '__main__':
    runtime.run(main)
