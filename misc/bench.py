"""The project's timings, as ratios between two pieces of code in one run on one machine.

    python misc/bench.py loss       # the objective against its textbook form
    python misc/bench.py augment    # views in batches on the device against PIL's, one CPU thread each
    python misc/bench.py step       # a training step against the published configuration's
    python misc/bench.py epoch      # main.py's training loop against bare steps on one fixed batch

Reference and ours take turns (epoch: bare steps, main.py, bare steps); each row holds their medians.
--csv FILE keeps the rows.
"""

import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import pandas as pd
import PIL
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import flags
import main as train
import runtime
from augment import DeviceViews
from data import load_data
from losses import contrastive_loss
from model import ARCHS, Model
from runs import device_name, write_table
from utils import ReferenceViews

COLUMNS = ('what', 'size', 'device', 'reference_ms', 'ours_ms', 'ratio')
FLOP_PER_VIEW, BYTES_PER_VIEW = 7.8e9, 131e6  # ResNet-50 at 32 px, a training step; bytes in bf16, BatchNorm+ReLU fused


def main(argv=None):
    parser = flags.Parser(prog='bench.py', description=__doc__.partition('\n')[0])
    parser.add_argument('what', choices=('loss', 'augment', 'step', 'epoch'), help='what to time')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', choices=('cuda', 'cpu'),
                        help='where')
    parser.add_argument('--arch', choices=ARCHS, help='backbone of step and epoch (default: resnet50; 18 on a CPU)')
    parser.add_argument('--image_size', type=flags.integer(8, 512), help='pixels of views (default: 32; 16 on a CPU)')
    parser.add_argument('--batch_size', type=flags.integer(2, 65536), help='images (default: 256; 32 on a CPU)')
    parser.add_argument('--repeat', default=9, type=flags.images, help='timings of which the median is taken')
    parser.add_argument('--csv', help='file for the rows')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda, and there is no CUDA device')
    device, cuda = torch.device(args.device), args.device == 'cuda'
    args.arch = args.arch or ('resnet50' if cuda else 'resnet18')
    args.image_size, args.batch_size = args.image_size or (32 if cuda else 16), args.batch_size or (256 if cuda else 32)
    print(f'{device_name(device)}; torch {torch.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}')
    rows = []
    for what, size, reference, ours, views in BENCHES[args.what](args, device):
        ratio = reference / ours
        rows.append((what, size, device_name(device), reference, ours, ratio))
        rate = f', {1e3 * views / ours:.0f} views/s' if views else ''
        print(f'{what}, {size}: reference {reference:.3g} ms, ours {ours:.3g} ms, ratio {ratio:.2f}{rate}', flush=True)
    if args.csv:
        write_table(args.csv, rows, COLUMNS)


def alternate(repeat, device, *functions):
    """Median milliseconds of each function, called in turn; the first turn is a warm-up.

    On CUDA a turn is 10 calls, so that the host's time to start the first does not count.
    """
    times, calls = [[] for _ in functions], 10 if device.type == 'cuda' else 1
    for i in range(repeat + 1):
        for function, seen in zip(functions, times):
            if device.type == 'cuda':
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(calls):
                    function()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end) / calls
            else:
                start = time.perf_counter()
                function()
                elapsed = 1e3 * (time.perf_counter() - start)
            if i:
                seen.append(elapsed)
    return [statistics.median(seen) for seen in times]


def peak_memory(reset=False):
    """The most memory, in bytes, that this process has held at once since the last reset (Linux)."""
    if reset:
        Path('/proc/self/clear_refs').write_text('5')
    status = Path('/proc/self/status').read_text()
    return 1024 * int(status.partition('VmHWM:')[2].split()[0])


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


standard_loss = partial(contrastive_loss, tau_plus=0, beta=0)


def cross_entropy(z1, z2, temperature=0.5):
    """The standard objective as its fastest usual form: a masked matrix through F.cross_entropy."""
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    return F.cross_entropy(s, torch.arange(len(z), device=z.device).roll(len(z1)))


def bench_loss(args, device):
    """Forward and backward from rows of any length; in each row reference and ours are of the hard objective or not."""
    def views(B):
        return [torch.randn(B, 128, device=device).requires_grad_() for _ in range(2)]

    def step(loss, z):
        return lambda: loss(*z).backward()

    hard, references = contrastive_loss, {'cross-entropy, standard': cross_entropy, 'textbook': textbook}
    try:
        from lightly.loss import NTXentLoss
        references['lightly, standard'] = NTXentLoss()
    except ImportError:
        print('lightly is not installed: its row is left out')
    for B in (256, 1024, 2048):
        z = views(B)
        losses = [*references.values(), standard_loss, hard]
        *others, ours = alternate(args.repeat, device, *(step(loss, z) for loss in losses))
        for name, other in zip([*references, 'standard here'], others):
            yield f'loss forward + backward, hard against {name}', f'B={B}', other, ours, None
    z = views(16384)
    for x in z:
        x.grad = torch.zeros_like(x)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = peak_memory(reset=True), peak_memory
    elapsed, = alternate(1, device, step(hard, z))
    after = peak()
    print(f'loss, B=16384: {elapsed:.0f} ms, at most {(after - before) / 1e9:.2f} GB beyond inputs and gradients; '
          f'the textbook form is not run: one of its matrices is {4 * (2 * 16384) ** 2 / 1e9:.1f} GB')


def bench_augment(args, device):
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    images = load_data('shapes').train  # (N, 3, 96, 96)
    batch = 256

    def consume(loader, batches):
        epochs = iter(range(1, 10**9))
        stream = (item for epoch in epochs for item in loader.epoch(epoch))
        return lambda: list(islice(stream, batches))

    reference = consume(ReferenceViews(images, batch, 32), 1)
    ours = consume(DeviceViews(images, batch, 32, device=device, compile=device.type == 'cuda'), 1)
    yield (f'views of 96 px images on {device.type} against PIL, one CPU thread', f'{2 * batch} views of 32 px',
           *alternate(args.repeat, device, reference, ours), 2 * batch)


def training(args, device, objective=contrastive_loss, published=False):
    """One step on a network and optimizer of its own, as main.py makes them or in the published configuration."""
    torch.manual_seed(0)
    settings, _ = train.arguments(['--arch', args.arch, *fast(device)])
    autocast = runtime.autocast(device, 'fp32' if published else settings.precision)
    if published:
        net = Model(arch=args.arch).to(device)
        optimizer = torch.optim.Adam(net.parameters(), settings.lr, weight_decay=settings.weight_decay)
    else:
        net, optimizer = train.build(settings, device)

    def step(views):
        return train.train_step(net, views, None, optimizer, lambda *z, labels: objective(*z), autocast)
    return step


def fast(device):
    """main.py's default flags on the device, also where it would choose another."""
    return ('--compile', '--precision', 'bf16') if device.type == 'cuda' else ('--no-compile', '--precision', 'fp32')


def fixed_views(args, device):
    """Two views (B, 3, h, w) in channels_last, as DeviceViews yields them."""
    shape = args.batch_size, 3, args.image_size, args.image_size
    return [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]


def bench_step(args, device):
    torch.backends.cudnn.benchmark = True
    views, n = fixed_views(args, device), 2 * args.batch_size
    contiguous = [x.contiguous() for x in views]
    published = training(args, device, textbook, published=True)
    ours, standard = (training(args, device, objective) for objective in (contrastive_loss, standard_loss))
    reference_ms, ours_ms = alternate(args.repeat, device, partial(published, contiguous),
                                      partial(ours, views))
    yield (f'{args.arch} step against the published configuration', f'{n} views of {args.image_size} px', reference_ms,
           ours_ms, n)
    yield (f'{args.arch} step, hard against standard', f'{n} views of {args.image_size} px',
           *alternate(args.repeat, device, partial(standard, views), partial(ours, views)), n)
    if device.type == 'cuda' and args.arch == 'resnet50' and args.image_size == 32:
        rate, bandwidth = ceilings(device)
        arithmetic, memory = 1e3 * n * FLOP_PER_VIEW / rate, 1e3 * n * BYTES_PER_VIEW / bandwidth
        print(f'measured here: {rate / 1e12:.0f} TFLOP/s bf16 matmul, {bandwidth / 1e12:.2f} TB/s copy; floors of the '
              f'step: arithmetic {arithmetic:.1f} ms, memory {memory:.1f} ms; ours is at '
              f'{100 * max(arithmetic, memory) / ours_ms:.0f} % of the higher one')


def ceilings(device):
    """Measured bf16 matmul rate (FLOP/s) and copy bandwidth (bytes/s, read and written)."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    x, y = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    matmul, copy = alternate(20, device, lambda: a @ a, lambda: y.copy_(x))
    return 2 * 8192**3 / (matmul / 1e3), 2 * 2**30 / (copy / 1e3)


def bench_epoch(args, device):
    """Epochs of main.py in a process of its own, as it logs them, the first left out: it compiles and warms up."""
    torch.backends.cudnn.benchmark = True
    n, epochs = 2 * args.batch_size, 5 if device.type == 'cuda' else 2
    step, views = training(args, device), fixed_views(args, device)
    bare = partial(alternate, args.repeat, device, partial(step, views))
    before = bare()
    with TemporaryDirectory() as results:
        command = ('--dataset_name', 'shapes', '--arch', args.arch, '--image_size', args.image_size, '--test_size',
                   args.image_size, '--batch_size', args.batch_size, '--epochs', epochs, '--results_dir', results)
        environment = os.environ | ({} if device.type == 'cuda' else {'CUDA_VISIBLE_DEVICES': ''})
        done = subprocess.run([sys.executable, train.__file__, *map(str, command), *fast(device)], env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise SystemExit(f'main.py ended with {done.returncode}: {(done.stdout.splitlines() or ["no output"])[-1]}')
        rate = pd.read_csv(Path(results, 'log.csv'))['images/s'][1:].median()
    yield (f'{args.arch}, main.py\'s training loop against bare steps', f'{n} views of {args.image_size} px',
           statistics.median(before + bare()), 1e3 * args.batch_size / rate, n)


BENCHES = {'loss': bench_loss, 'augment': bench_augment, 'step': bench_step, 'epoch': bench_epoch}

if __name__ == '__main__':
    runtime.run(main)
