"""Timings of the project as ratios: two pieces of code take turns in one run on one machine.

    python misc/bench.py loss                            # the objective against its textbook form
    python misc/bench.py augment                         # views in batches against PIL's, torchvision's and kornia's
    python misc/bench.py step --arch resnet50            # main.py's step against the published configuration's
    python misc/bench.py epoch                           # main.py itself against bare steps on one fixed batch
    python misc/bench.py all --device cuda --csv FILE    # these four on a GPU, their rows kept in FILE
    python misc/bench.py profile                         # where the time of main.py's steps goes, by operation

step, epoch and profile take all flags of main.py. Without any, a GPU is timed with main.py's defaults and a CPU with a
ResNet-18 on 32 images of 16 px. A row holds medians in milliseconds; ratio says how many times as fast ours is as the
reference. With the published network on a GPU, roof is the share that ours reaches of the speed that the GPU's matmul
rate and copy bandwidth, measured in the same run, allow.
"""

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
import PIL
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg import runtime
from hardneg.augment import BLUR_SIGMA, CROP_RATIO, JITTER, MEAN, STD, blur_kernel_size, normalize
from hardneg.batches import Batches, DeviceViews, ReferenceViews, seeded
from data import load_data
from hardneg.files import write_table
from hardneg.losses import contrastive_loss
from main import arguments, place
from hardneg.runs import device_name
from step import build, train_step

HOME = Path(__file__).parents[1]
LOSS_SIZES, LARGE_LOSS, AUGMENT_SIZE = (256, 1024, 2048), 16384, 256  # images
FLOP_PER_VIEW, BYTES_PER_VIEW = 7.8e9, 131e6  # ResNet-50 at 32 px, a training step; bytes in bf16, BatchNorm+ReLU fused
SMALL = ('--arch', 'resnet18', '--image_size', '16', '--test_size', '16', '--batch_size', '32', '--no-compile',
         '--precision', 'fp32')


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = flags.Parser(prog='bench.py', description=__doc__.partition('\n')[0],
                          epilog='Other flags are main.py\'s, for step, epoch and profile.')
    parser.add_argument('what', nargs='?', choices=[*BENCHES, 'all', 'profile'], help='what to time')
    flags.add(parser, 'timing',
              ('--device', 'cuda' if cuda else 'cpu', ('cuda', 'cpu'), 'what runs the code'),
              ('--repeat', 9, flags.count, 'timings of each piece of code, or steps in the profile'),
              ('--csv', None, flags.path, 'file for the rows, of all but profile'))
    args, given = parser.parse_known_args(argv)
    if not args.what:
        return print(__doc__)
    if args.device == 'cuda' and not cuda:
        parser.error('--device cuda, and there is no CUDA device')
    device = torch.device(args.device)
    command = ['--dataset_name', 'shapes', *(SMALL if args.device == 'cpu' else ()), *given]
    settings, _ = arguments(command)
    flags.choose_sizes(settings, None, {})
    print(f'{device_name(device)}; torch {torch.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}')
    torch.backends.cudnn.benchmark = True
    if args.what == 'profile':
        return profile(args.repeat, device, settings)
    rows = []
    for what in BENCHES if args.what == 'all' else [args.what]:
        for row in BENCHES[what](args.repeat, device, settings, command):
            row['ratio'] = row['reference_ms'] / row['ours_ms']
            rows.append({**row, 'device': device_name(device)})
            print(f'{row.pop("what")}, {row.pop("size")}:', ', '.join(
                f'{name} {x:,.0f}' if x >= 1000 else f'{name} {x:.3g}' for name, x in row.items() if x == x))  # not NaN
            if args.csv:  # after every row: a later bench may fail
                write_table(args.csv, rows, None)


def alternate(repeat, device, *functions):
    """Median milliseconds of each function, called in turn; the first turn is a warm-up.

    On CUDA a turn is 10 calls, so that the host's time to start the first hardly counts.
    """
    calls, wait = (10, torch.cuda.synchronize) if device.type == 'cuda' else (1, int)
    times = [[] for _ in functions]
    for _ in range(repeat + 1):
        for function, seen in zip(functions, times):
            wait()
            began = time.perf_counter()
            for _ in range(calls):
                function()
            wait()
            seen.append(1e3 * (time.perf_counter() - began) / calls)
    return [statistics.median(seen[1:]) for seen in times]


def least_ms(n, device, side=8192, size=2**30):
    """The least time of a ResNet-50 step on n views of 32 px, at the matmul and copy rates that it measures."""
    a, x = torch.randn(side, side, device=device).bfloat16(), torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.zeros_like(x)
    matmul, copy = alternate(5, device, lambda: a @ a, lambda: y.copy_(x))  # a copy reads and writes
    return n * max(FLOP_PER_VIEW * matmul / (2 * side**3), BYTES_PER_VIEW * copy / (2 * size))


def peak_memory(device='cpu', reset=False):
    """The most bytes held at once since the last reset: on a GPU by torch, else by this process (Linux)."""
    if device == 'cuda':
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    return 1024 * int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])


def installed(package):
    if not importlib.util.find_spec(package):
        print(f'{package} is not installed: its rows are left out')
        return False
    return True


def textbook(z1, z2, temperature=0.5, tau_plus=0.1, beta=1.0):
    """HCL's objective as usually written: the whole matrix of exponentials, and a mask that selects from it."""
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    z, B = torch.cat([z1, z2]), len(z1)
    other = ~torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)
    neg = (z @ z.T / temperature).exp().masked_select(other).view(2 * B, -1)
    pos = ((z1 * z2).sum(1) / temperature).exp().repeat(2)
    N = 2 * B - 2
    weight = (beta * neg.log()).exp()
    R = (weight * neg).sum(1) / weight.mean(1)
    Ng = ((R - tau_plus * N * pos) / (1 - tau_plus)).clamp(min=N * math.exp(-1 / temperature))
    return -(pos / (pos + Ng)).log().mean()


def cross_entropy(z1, z2, temperature=0.5):
    """The standard objective as its fastest usual form: a masked matrix through F.cross_entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z1)))


def bench_loss(repeat, device, *_):
    """Forward and backward of the hard objective, against other code of it and of the standard objective."""
    def views(B):
        return [torch.randn(B, 128, device=device).requires_grad_() for _ in range(2)]

    def step(loss, z):
        return lambda: loss(*z).backward()

    z, B = views(LARGE_LOSS), LARGE_LOSS  # first, while the process holds no memory that it could use again
    for x in z:
        x.grad = torch.zeros_like(x)
    before = peak_memory(device.type, reset=True)
    elapsed, = alternate(1, device, step(contrastive_loss, z))
    yield dict(what='loss forward + backward, hard', size=f'B={B}', ours_ms=elapsed, reference_ms=math.nan,
               beyond_inputs_GB=(peak_memory(device.type) - before) / 1e9,
               one_matrix_of_the_textbook_GB=4 * (2 * B) ** 2 / 1e9)
    references = {'cross-entropy, standard': cross_entropy, 'textbook': textbook}
    if installed('lightly'):
        from lightly.loss import NTXentLoss
        references['lightly, standard'] = NTXentLoss()
    references['standard here'] = partial(contrastive_loss, tau_plus=0, beta=0)
    for B in LOSS_SIZES:
        z = views(B)
        *others, ours = alternate(repeat, device, *(step(loss, z) for loss in [*references.values(), contrastive_loss]))
        for name, other in zip(references, others):
            yield dict(what=f'loss forward + backward, hard against {name}', size=f'B={B}', reference_ms=other,
                       ours_ms=ours)


def endless(batches):
    return (views for epoch in itertools.count(1) for views, _ in batches.epoch(epoch))


def bench_augment(repeat, device, *_):
    """A batch of two views of 256 images of 96 px; also what the views look like, on which libraries differ."""
    threads, batch, size = torch.get_num_threads(), AUGMENT_SIZE, 32
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = F.interpolate(load_data('shapes').train[:4 * batch].float(), 96, mode='bicubic', antialias=True)
    images += 16 * torch.randn(images.shape, generator=seeded(0))  # without it, aliasing would not show
    images = images.round_().clamp_(0, 255).byte()
    batches = Batches(len(images), batch)
    pil, ours = (map(normalize, map(torch.cat, endless(views))) for views in (
        ReferenceViews(images, batches, size),
        DeviceViews(images, batches, size, device, compile=device.type == 'cuda')))
    makers = {'PIL, image by image': partial(next, pil), **dict(peers(images[:batch].repeat(2, 1, 1, 1), size, device)),
              'ours': partial(next, ours)}
    *_, ours = times = alternate(repeat, device, *makers.values())
    for (name, make), elapsed in zip(makers.items(), times):
        x = torch.cat([make() for _ in range(4)])  # (8 * batch, 3, 32, 32)
        yield dict(what=f'views on {device.type}, one CPU thread, against {name}', size=f'{2 * batch} views of 32 px',
                   reference_ms=elapsed, ours_ms=ours, reference_views_s=2e3 * batch / elapsed,
                   mean=x.mean().item(), spread=x.std().item(), neighbours=x.diff(dim=3).abs().mean().item())
    torch.set_num_threads(threads)


def peers(images, size, device):
    """A view of each image by the same recipe in other libraries: names and functions () -> (n, 3, size, size)."""
    from torchvision.transforms import v2
    kernel = blur_kernel_size(size)
    one = v2.Compose([v2.RandomResizedCrop(size, (0.08, 1.0), CROP_RATIO), v2.RandomHorizontalFlip(),
                      v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2),
                      v2.RandomApply([v2.GaussianBlur(kernel, BLUR_SIGMA)], 0.5),
                      v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    yield 'torchvision v2, image by image', lambda: torch.stack([one(x) for x in images])
    if not installed('kornia'):
        return
    import kornia.augmentation as K
    there = images.to(device)
    for mode, name in (('slice', 'exact crop'), ('resample', 'resampled')):
        batch = torch.nn.Sequential(K.RandomResizedCrop((size, size), (0.08, 1.0), CROP_RATIO, cropping_mode=mode),
                                    K.RandomHorizontalFlip(), K.ColorJitter(*JITTER, p=0.8), K.RandomGrayscale(p=0.2),
                                    K.RandomGaussianBlur((kernel, kernel), BLUR_SIGMA),
                                    K.Normalize(torch.tensor(MEAN), torch.tensor(STD))).to(device)
        yield f'kornia, {name}', lambda batch=batch: batch(there / 255)


def stepper(settings, device, published=False, **other):
    """main.py's step as a function of views, on a new network, with main.py's settings or as published."""
    torch.manual_seed(0)
    net, optimizer, scaler = build(settings, device)
    if published:
        net.to(memory_format=torch.contiguous_format)
        optimizer.param_groups[0]['fused'] = None  # torch's default
    loss, autocast = textbook if published else contrastive_loss, runtime.autocast(device, settings.precision)
    objective = dict(temperature=settings.temperature, tau_plus=settings.tau_plus, beta=settings.beta) | other

    def loss_of(*z, labels):
        return loss(*z, **objective)
    return lambda views: train_step(net, views, None, optimizer, loss_of, autocast, scaler, settings.joint_views,
                                    settings.micro_batch)[0]


def fixed_views(settings, device):
    """Views V x (B, 3, h, w) uint8, as DeviceViews yields them."""
    shape = settings.views, settings.batch_size, 3, settings.image_size, settings.image_size
    return [*torch.randint(256, shape, dtype=torch.uint8, device=device)]


def step_row(what, settings, device, reference, ours):
    """The row of two times of a step."""
    n, timed = settings.views * settings.batch_size, (device.type, settings.arch, settings.width, settings.stem,
                                                      settings.image_size, settings.precision)
    row = dict(what=f'{settings.arch}{what}', size=f'{n} views of {settings.image_size} px', reference_ms=reference,
               ours_ms=ours, views_s=1e3 * n / ours)
    if timed == ('cuda', 'resnet50', 1, 'cifar', 32, 'bf16'):
        row['roof'] = least_ms(n, device) / ours
    return row


def bench_step(repeat, device, settings, command):
    """Steps on one fixed batch of views."""
    views, references = fixed_views(settings, device), {}
    if settings.views == 2:  # the textbook form has no more
        eager = copy.copy(settings)
        eager.compile, eager.precision = False, 'fp32'
        references['published configuration'] = partial(stepper(eager, device, published=True),
                                                        [normalize(x).contiguous() for x in views])
    references['standard objective'] = partial(stepper(settings, device, tau_plus=0, beta=0), views)
    ours = partial(stepper(settings, device), views)
    for name, reference in references.items():
        yield step_row(f' step against the {name}', settings, device, *alternate(repeat, device, reference, ours))


def bench_epoch(repeat, device, settings, command):
    """Epochs of main.py in a process of its own, as it logs them, the first left out: it compiles and warms up."""
    step, cuda = partial(stepper(settings, device), fixed_views(settings, device)), device.type == 'cuda'
    before = alternate(repeat, device, step)
    torch.cuda.empty_cache()  # memory for the other process
    with TemporaryDirectory() as results:
        run = [sys.executable, HOME / 'main.py', *command, '--epochs', '5' if cuda else '2', '--results_dir', results]
        environment = os.environ if cuda else {**os.environ, 'CUDA_VISIBLE_DEVICES': ''}
        if subprocess.run(run, env=environment, stdout=subprocess.DEVNULL).returncode:
            raise runtime.UserError('main.py failed; its message is above')
        rate = pd.read_csv(Path(results, 'log.csv'))['images/s'][2:].median()  # row 0: the untrained encoder
    reference = statistics.median(before + alternate(repeat, device, step))
    yield step_row(', main.py\'s training loop against bare steps', settings, device, reference,
                   1e3 * settings.batch_size / rate)


def profile(repeat, device, settings):
    """Print torch.profiler's table of main.py's steps, the making of views included."""
    stream = endless(place(settings, load_data(settings.dataset_name, settings.root, settings.store_size), device))
    step = stepper(settings, device)
    for _ in range(3):  # compiles and warms up
        step(next(stream))
    with torch.profiler.profile() as profiler:
        for _ in range(repeat):
            with torch.profiler.record_function('views'):
                views = next(stream)
            with torch.profiler.record_function('train_step'):
                step(views)
        if device.type == 'cuda':
            torch.cuda.synchronize()
    print(profiler.key_averages().table(f'self_{device.type}_time_total', row_limit=25))


BENCHES = {'loss': bench_loss, 'augment': bench_augment, 'step': bench_step, 'epoch': bench_epoch}

if __name__ == '__main__':
    runtime.run(main)
