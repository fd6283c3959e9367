"""The project's timings, as ratios between two pieces of code in one run on one machine.

    python misc/bench.py loss       # the objective against its textbook form
    python misc/bench.py augment    # views in batches on the device against PIL's, torchvision's and kornia's
    python misc/bench.py step       # a training step against the published configuration's
    python misc/bench.py epoch      # main.py against bare steps on one fixed batch
    python misc/bench.py kernels    # eager operations, and kernels of the code generated for an H100
    python misc/bench.py gpu        # all but kernels, a profile and a training run on a GPU in 20 minutes: a report

Reference and ours take turns (epoch: bare steps, main.py, bare steps); each row holds their medians. A step is built
here as main.py builds it by default; main.py itself is timed as a process of its own, by what it logs. roof is the
share of the speed that the matmul rate and the copy bandwidth measured on the device allow. --csv FILE keeps the rows.
"""

import copy
import importlib.util
import io
import itertools
import json
import math
import os
import re
import runpy
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest import mock

import cv2
import pandas as pd
import PIL
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import augment
import data
import flags
import losses
import runtime
from augment import BLUR_SIGMA, CROP_RATIO, CROP_SCALE, JITTER, MEAN, STD, DeviceViews, blur_kernel_size
from data import load_data
from evaluate import encode
from losses import contrastive_loss
from model import ARCHS, Model
from runs import device_name, write, write_table
from utils import ReferenceViews

HOME = Path(__file__).parents[1]
FLOP_PER_VIEW, BYTES_PER_VIEW = 7.8e9, 131e6  # ResNet-50 at 32 px, a training step; bytes in bf16, BatchNorm+ReLU fused
LAUNCH = re.compile(r'^ +(\w+ = )?(\w+\.run\(|extern_kernels\.|torch\.ops\.)', re.M)  # in Inductor's code
aten = torch.ops.aten
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.detach, aten.lift_fresh,
             aten._unsafe_view}


def main(argv=None):
    cuda = torch.cuda.is_available()
    parser = flags.Parser(prog='bench.py', description=__doc__.partition('\n')[0])
    parser.add_argument('what', choices=[*BENCHES, 'gpu'], help='what to time or count')
    flags.add(parser, 'what is timed',
              ('--device', 'cuda' if cuda else 'cpu', ('cuda', 'cpu'), 'where'),
              ('--arch', None, ARCHS, 'backbone (default: resnet50; timed on a CPU resnet18)'),
              ('--image_size', None, flags.integer(8, 512), 'pixels of views (default: 32; timed on a CPU 16)'),
              ('--batch_size', None, flags.integer(2, 65536), 'images (default: 256; timed on a CPU 32)'),
              ('--repeat', 9, flags.count, 'timings of which the median is taken'),
              ('--csv', None, flags.path, 'file for the rows'))
    flags.add(parser, 'gpu',
              ('--results_dir', 'results/gpu', flags.path, 'of the report; parts whose CSV is there are kept'),
              ('--root', 'data', flags.path, 'directory of CIFAR-10; where it is not, drawn shapes are trained on'),
              ('--minutes', 20, flags.real(0, 10_000), 'in all; the training run at the end takes what is left'),
              ('--tiny', False, bool, 'everything as small as it gets: a test of this command, not of the device'))
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not cuda:
        parser.error('--device cuda, and there is no CUDA device')
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # main.py would choose another
    device, cuda = torch.device(args.device), args.device == 'cuda'
    arch, size, batch = ('resnet50', 32, 256) if cuda or args.what == 'kernels' else ('resnet18', 16, 32)
    args.arch, args.image_size, args.batch_size = args.arch or arch, args.image_size or size, args.batch_size or batch
    args.width = 1.0
    if args.tiny:
        args.arch, args.width, args.image_size, args.batch_size, args.repeat = 'resnet18', 0.125, 8, 128, 1
        torch.set_num_threads(1)
        os.environ['OMP_NUM_THREADS'] = '1'
    print(f'{device_name(device)}; torch {torch.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}')
    torch.backends.cudnn.benchmark = True
    if args.what == 'gpu':
        return report(args, device)
    rows = measure(args.what, args, device)
    if args.csv:
        write_table(args.csv, rows, None)


def measure(what, args, device):
    """The rows of a bench, each printed as it comes, with ratio and roof."""
    rows, speed = [], {} if what == 'kernels' else ceilings(device)
    for row in BENCHES[what](args, device):
        kind, flop, moved = row.pop('work', (None, 0, 0))
        if 'ours_ms' in row:
            row['ratio'] = row['reference_ms'] / row['ours_ms']
        if kind:
            row['roof'] = 1e3 * max(flop / speed[kind], moved / speed['copy']) / row['ours_ms']
        rows.append({**row, 'device': 'H100, from its code' if what == 'kernels' else device_name(device)})
        print(f'{row["what"]}: ' + ', '.join(f'{name} {value:.3g}' if isinstance(value, float) else f'{name} {value}'
                                             for name, value in row.items() if name != 'what'), flush=True)
    return rows


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


def ceilings(device):
    """Measured rates of matmul in bf16 and float32 (FLOP/s) and bandwidth of a copy (bytes/s, read and written)."""
    n, size = (8192, 2**30) if device.type == 'cuda' else (512, 2**24)
    a = torch.randn(n, n, device=device)
    b, (x, y) = a.bfloat16(), (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    *matmuls, copy = alternate(5, device, lambda: b @ b, lambda: a @ a, lambda: y.copy_(x))
    bf16, fp32 = (2 * n**3 / (ms / 1e3) for ms in matmuls)
    print(f'measured here: matmul {bf16 / 1e12:.3g} TFLOP/s in bf16, {fp32 / 1e12:.3g} in float32; copy '
          f'{2 * size / copy / 1e9:.3g} TB/s')
    return dict(bf16=bf16, fp32=fp32, copy=2 * size / (copy / 1e3))


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
    if importlib.util.find_spec('lightly'):
        from lightly.loss import NTXentLoss
        references['lightly, standard'] = NTXentLoss()
    else:
        print('lightly is not installed: its row is left out')
    B = 64 if args.tiny else 16384  # first, while the process holds no memory that it could use again
    z = views(B)
    for x in z:
        x.grad = torch.zeros_like(x)
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    else:
        before, peak = peak_memory(reset=True), peak_memory
    elapsed, = alternate(1, device, step(hard, z))
    yield dict(what='loss forward + backward, hard', size=f'B={B}', ours_ms=elapsed, reference_ms=math.nan,
               work=('fp32', 12 * B**2 * 128, 0), beyond_inputs_GB=(peak() - before) / 1e9,
               one_matrix_of_the_textbook_GB=4 * (2 * B) ** 2 / 1e9)
    for B in (16,) if args.tiny else (256, 1024, 2048):
        z = views(B)
        losses = [*references.values(), standard_loss, hard]
        *others, ours = alternate(args.repeat, device, *(step(loss, z) for loss in losses))
        for name, other in zip([*references, 'standard here'], others):  # work: half of s, and the gradient's product
            yield dict(what=f'loss forward + backward, hard against {name}', size=f'B={B}', reference_ms=other,
                       ours_ms=ours, work=('fp32', 12 * B**2 * 128, 4 * 2 * B * 128 * 4))


def bench_augment(args, device):
    """A batch of two views of 256 images of 96 px; also what the views look like, on which libraries differ."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    batch, size = (32 if args.tiny else 256), 32
    images = F.interpolate(load_data('shapes').train[:4 * batch].float(), 96, mode='bicubic', antialias=True)
    images += 16 * torch.randn(images.shape, generator=augment.seeded(0))  # without it, aliasing would not show
    images = images.round_().clamp_(0, 255).byte()

    def consume(loader):
        stream = (views for epoch in itertools.count(1) for views, _ in loader.epoch(epoch))
        return lambda: torch.cat(next(stream))

    makers = {'PIL, image by image': consume(ReferenceViews(images, batch, size)),
              **dict(peers(images[:batch].repeat(2, 1, 1, 1), size, device)),
              'ours': consume(DeviceViews(images, batch, size, device=device, compile=device.type == 'cuda'))}
    repeat = min(args.repeat, 2) if device.type == 'cuda' else args.repeat  # there, each is called 10 times a turn
    *_, ours = times = alternate(repeat, device, *makers.values())
    work = 'fp32', 4 * batch * 3 * (96 * 96 * 32 + 96 * 32 * 32), 2 * batch * (3 * 96**2 + 4 * 3 * size**2)
    for (name, make), elapsed in zip(makers.items(), times):
        x = torch.cat([make() for _ in range(4)])  # (8 * batch, 3, 32, 32)
        yield dict(what=f'views on {device.type}, one CPU thread, against {name}', size=f'{2 * batch} views of 32 px',
                   reference_ms=elapsed, ours_ms=ours, work=work, reference_views_s=2e3 * batch / elapsed,
                   mean=x.mean().item(), spread=x.std().item(), neighbours=x.diff(dim=3).abs().mean().item())


def peers(images, size, device):
    """A view of each image by the same recipe in other libraries: names and functions () -> (n, 3, size, size)."""
    from torchvision.transforms import v2
    kernel = blur_kernel_size(size)
    one = v2.Compose([v2.RandomResizedCrop(size, CROP_SCALE, CROP_RATIO), v2.RandomHorizontalFlip(),
                      v2.RandomApply([v2.ColorJitter(*JITTER)], 0.8), v2.RandomGrayscale(0.2),
                      v2.RandomApply([v2.GaussianBlur(kernel, BLUR_SIGMA)], 0.5),
                      v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    yield 'torchvision v2, image by image', lambda: torch.stack([one(x) for x in images])
    if not importlib.util.find_spec('kornia'):
        return print('kornia is not installed: its rows are left out')
    import kornia.augmentation as K
    there = images.to(device)
    for mode, name in (('slice', 'exact crop'), ('resample', 'resampled')):
        batch = torch.nn.Sequential(K.RandomResizedCrop((size, size), CROP_SCALE, CROP_RATIO, cropping_mode=mode),
                                    K.RandomHorizontalFlip(), K.ColorJitter(*JITTER, p=0.8), K.RandomGrayscale(p=0.2),
                                    K.RandomGaussianBlur((kernel, kernel), BLUR_SIGMA),
                                    K.Normalize(torch.tensor(MEAN), torch.tensor(STD))).to(device)
        yield f'kornia, {name}', lambda batch=batch: batch(there / 255)


def training(args, device, objective=contrastive_loss, published=False, bf16=None, compiled=None):
    """One step on a network and optimizer of its own, as main.py makes them or in the published configuration."""
    torch.manual_seed(0)
    fast = device.type == 'cuda' and not published  # main.py's defaults on a GPU
    net = Model(arch=args.arch, width=args.width).to(device)
    if not published:
        net.to(memory_format=torch.channels_last)
    if fast if compiled is None else compiled:
        net.compile(dynamic=False)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3, weight_decay=1e-6, fused=not published)
    autocast = runtime.autocast(device, 'bf16' if (fast if bf16 is None else bf16) else 'fp32')

    def step(views):
        with autocast:
            z = [net(x)[1] for x in views]
        loss = objective(*z)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()
    return step


def fixed_views(args, device):
    """Two views (B, 3, h, w) in channels_last, as DeviceViews yields them."""
    shape = args.batch_size, 3, args.image_size, args.image_size
    return [torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2)]


def step_work(args, device):
    """What a step at the published sizes asks of the device, if that is what is timed."""
    n, published = 2 * args.batch_size, args.arch == 'resnet50' and args.image_size == 32 and device.type == 'cuda'
    return dict(work=('bf16', n * FLOP_PER_VIEW, n * BYTES_PER_VIEW)) if published else {}


def bench_step(args, device):
    """Steps on one fixed batch, without the views."""
    views, size = fixed_views(args, device), f'{2 * args.batch_size} views of {args.image_size} px'
    contiguous = [x.contiguous() for x in views]
    published = training(args, device, textbook, published=True)
    ours, standard = (training(args, device, objective) for objective in (contrastive_loss, standard_loss))
    for name, *both in (('published configuration', partial(published, contiguous), partial(ours, views)),
                        ('standard objective', partial(standard, views), partial(ours, views))):
        reference, elapsed = alternate(args.repeat, device, *both)
        yield dict(what=f'{args.arch} step against the {name}', size=size, reference_ms=reference, ours_ms=elapsed,
                   views_s=2e3 * args.batch_size / elapsed, **step_work(args, device))


def bench_epoch(args, device):
    """Epochs of main.py in a process of its own, as it logs them, the first left out: it compiles and warms up."""
    bare = partial(alternate, args.repeat, device, partial(training(args, device), fixed_views(args, device)))
    before = bare()
    with TemporaryDirectory() as results:
        log = run_main(args, results, *sizes(args), '--dataset_name', 'shapes', '--test_size', args.image_size,
                       '--epochs', 5 if device.type == 'cuda' else 2)
    rate = log['images/s'][2:].median()  # the row before the first is that of the untrained encoder
    yield dict(what=f'{args.arch}, main.py\'s training loop against bare steps', reference_ms=statistics.median(
        before + bare()), size=f'{2 * args.batch_size} views of {args.image_size} px', views_s=2 * rate,
        ours_ms=1e3 * args.batch_size / rate, **step_work(args, device))


def sizes(args):
    """main.py's flags for what is timed, with its defaults on the device where it would choose others."""
    fast = ('--compile', '--precision', 'bf16') if args.device == 'cuda' else ('--no-compile', '--precision', 'fp32')
    return ('--arch', args.arch, '--width', args.width, '--image_size', args.image_size, '--batch_size',
            args.batch_size, *fast)


def run_main(args, results, *command, seconds=None):
    """The log of main.py as a process of its own, which is asked to stop after so many seconds."""
    command = [sys.executable, str(HOME / 'main.py'), *map(str, command), '--results_dir', str(results)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, _ = process.communicate()
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise runtime.UserError(f'main.py ended with {process.returncode}: {(out.splitlines() or ["no output"])[-1]}')
    return pd.read_csv(Path(results, 'log.csv'))


class Launches(TorchDispatchMode):
    """Counts the operations that start a kernel or more."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == 'aten' and not func.is_view and func.overloadpacket not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def code_for_h100():
    """A backend of torch.compile() that writes code for an H100, runs none of it, and the list of what it wrote.

    Graphs are captured on the CPU, and moved to a device that is not there. What Inductor asks of it, this answers.
    """
    import torch._dynamo.device_interface as interfaces
    import triton
    from torch._dynamo.utils import detect_fake_mode
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    gpu, codes = torch.device('cuda', 0), []
    properties = SimpleNamespace(
        name='H100', major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=232448, L2_cache_size=50 * 2**20)
    answers = dict(get_device_properties=properties, current_device=0, device_count=1, get_device_capability=(9, 0),
                   _exchange_device=0, _maybe_exchange_device=0, get_rng_state=torch.zeros(16, dtype=torch.uint8),
                   set_rng_state=None, synchronize=None, is_bf16_supported=True)
    for name, answer in answers.items():
        def say(*args, answer=answer, **kwargs):
            return answer
        setattr(torch.cuda, name, say)
        if hasattr(interfaces.CudaInterface, name):
            setattr(interfaces.CudaInterface, name, staticmethod(say))
    interfaces.CudaInterface.is_available = staticmethod(lambda: True)
    target = SimpleNamespace(backend='cuda', arch=90, warp_size=32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0,
                                                     get_active_torch_device=lambda: gpu))
    torch._C._select_conv_backend = lambda *_, **__: torch._C._ConvBackend.Cudnn  # else it finds none for bf16
    config.fx_graph_cache = False

    def keep(graph):
        codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=None, __file__='')

    def move_and_compile(graph, inputs, **kwargs):
        there, fake = copy.deepcopy(graph), detect_fake_mode(inputs)
        for node in there.graph.nodes:
            if 'device' in node.kwargs:
                node.kwargs = {**node.kwargs, 'device': gpu}
        with fake:
            moved = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=gpu)
                     if isinstance(x, torch.Tensor) else x for x in inputs]
        FakeTensorProp(there, fake).propagate_dont_convert_inputs(*moved)
        compile_fx.compile_fx_inner(there, moved, **kwargs)

        def run(args):
            return graph(*args)
        run._boxed_call = True
        return run

    GraphLowering.compile_to_module = keep
    return partial(compile_fx.compile_fx, inner_compile=move_and_compile), codes


def bench_kernels(args, device):
    """Kernels of a view, the loss and the network, and graphs of a run. Nothing is computed but a few small steps."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    if not importlib.util.find_spec('triton'):
        raise runtime.UserError('triton is not installed: torch for CUDA brings it, and needs no GPU for this')
    print('Kernels are counted in code that Inductor writes for an H100, eager ones as operations; none is run.')
    backend, codes = code_for_h100()
    compiled = partial(torch.compile, dynamic=False, fullgraph=True, backend=backend)
    net, size = Model(arch=args.arch, width=args.width).to(memory_format=torch.channels_last), args.image_size
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def forward(x):
        with torch.autocast('cpu', torch.bfloat16):
            return net(x)[1]

    def counted(what, function, *inputs):
        """The forward pass, and the backward pass if there is one: operations, and kernels of one compiled graph."""
        codes.clear()
        with fake:
            with Launches() as eager:
                out = function(*inputs)
            ones = torch.ones_like(out)
            with Launches() as backward:
                if out.requires_grad:
                    out.backward(ones)
            out = compiled(function)(*inputs)
            if out.requires_grad:
                out.backward(ones)
        for code, name, mode in zip(codes, ('', ', backward'), (eager, backward)):
            yield dict(what=what + name, eager_operations=mode.count, compiled_kernels=len(LAUNCH.findall(code)))

    with fake:
        images = torch.randint(256, (48, 3, 96, 96), dtype=torch.uint8)  # what a CPU too makes at once
        with Launches() as drawing:
            u = augment.uniforms(len(images), torch.Generator())
        x = torch.randn(args.batch_size, 3, size, size).contiguous(memory_format=torch.channels_last)
        z = [torch.randn(args.batch_size, 128).requires_grad_() for _ in range(2)]
    yield dict(what='a view: random numbers', eager_operations=drawing.count)
    yield from counted('a view: all else', partial(augment.random_views, size=size), images, u)
    with mock.patch.dict(losses.SIDE, cpu=losses.SIDE['cuda']):  # the tiles of a GPU
        yield from counted('loss', contrastive_loss, *z)
    yield from counted(f'{args.arch}, a view', forward, x)
    yield from graphs_of_a_run()


def graphs_of_a_run():
    """Graphs of views, network and loss in two epochs with evaluations of a smaller last batch; a break is an error."""
    graphs, compile = Counter(), torch.compile

    def once(what):
        def backend(graph, inputs):
            graphs[what] += 1
            return graph
        return dict(dynamic=False, fullgraph=True, backend=backend)

    images, device = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8), torch.device('cpu')
    net, autocast = Model(arch='resnet18', width=0.125), runtime.autocast(device, 'fp32')
    net.compile(**once('network'))
    with mock.patch('torch.compile', lambda function, **_: compile(function, **once('views'))):
        batches = DeviceViews(images, 8, 8, compile=True)
    loss_of, optimizer = compile(contrastive_loss, **once('loss')), torch.optim.SGD(net.parameters(), 1e-3)
    for epoch in (1, 2):
        net.train()
        for views, _ in batches.epoch(epoch):
            optimizer.zero_grad()
            loss_of(*(net(x)[1] for x in views)).backward()
            optimizer.step()
        encode(net, images, torch.arange(len(images)), 0, autocast, device, batch_size=8)
    for what in ('views', 'network', 'loss'):
        yield dict(what=f'{what}, two epochs, evaluations and their last batch', graphs=graphs[what])


def cuda_tests(args, device):
    """The tests of what main.py turns on for a GPU, on the device."""
    command = ['-m', 'pytest', '-n', '0', '-m', 'slow', 'tests/test_device.py', *['-k', 'loss'] * args.tiny]
    environment = os.environ | ({'TEST_CUDA': '1'} if device.type == 'cuda' else {})
    done = subprocess.run([sys.executable, *command], cwd=HOME, env=environment, text=True, capture_output=True)
    if done.returncode:
        print(done.stdout)
    return [dict(what='tests/test_device.py', outcome=(done.stdout.strip() or done.stderr.strip()).splitlines()[-1])]


def loop(args, device):
    """The real loop at STL10's size: images per second, memory, and where the time of a step goes."""
    with ProcessPoolExecutor(1, get_context('spawn')) as pool:
        return pool.submit(profiled, args, 0 if args.tiny else 30).result()


def profiled(args, seconds):
    """Run main.py in this process, on as many random images as STL10 has, and look at its loop between its steps."""
    cuda, rows, steps = args.device == 'cuda', [], 2 if args.tiny else 20
    n, side = (3 * args.batch_size, 16) if args.tiny else (105_000, 96)
    images, epoch, loss = torch.randint(256, (n, 3, side, side), dtype=torch.uint8), DeviceViews.epoch, contrastive_loss
    data.load_data = lambda *_: data.Data(images, torch.full((n,), -1), images[:0], torch.zeros(0).long(), [])
    wait, profiler = torch.cuda.synchronize if cuda else int, torch.profiler.profile()

    def between_steps():
        """What happens before each step: nothing at first, then a clock, a profile, and a signal to end."""
        for _ in range(steps):  # compiles, and warms up
            yield
        wait()
        began, done = time.perf_counter(), 0
        while not done or time.perf_counter() - began < seconds:
            done += 1
            yield
        wait()
        elapsed = time.perf_counter() - began
        memory = torch.cuda.max_memory_allocated() / 1e9 if cuda else peak_memory() / 1e9
        rows.append(dict(part='a step', ms=1e3 * elapsed / done, images_s=args.batch_size * done / elapsed,
                         memory_GB=memory))
        profiler.start()
        began = time.perf_counter()
        for _ in range(steps):
            yield
        wait()
        elapsed = time.perf_counter() - began
        profiler.stop()
        os.kill(os.getpid(), signal.SIGTERM)  # main.py saves and ends
        with TemporaryDirectory() as directory:
            profiler.export_chrome_trace(f'{directory}/trace.json')
            events = json.loads(Path(directory, 'trace.json').read_text())['traceEvents']
        rows.extend(shares(events, steps, 1e3 * elapsed / steps))
        yield from itertools.repeat(None)

    def watched(self, *where):
        stream = epoch(self, *where)
        while True:
            next(course)
            with torch.profiler.record_function('views'):
                batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def marked(*views, **kwargs):
        with torch.profiler.record_function('loss'):
            return loss(*views, **kwargs)

    course, DeviceViews.epoch, losses.contrastive_loss = between_steps(), watched, marked
    with TemporaryDirectory() as results, open(os.devnull, 'w') as sys.stdout, open(os.devnull, 'w') as sys.stderr:
        sys.argv = ['main.py', *map(str, sizes(args)), '--epochs', '9999', '--results_dir', results]
        try:
            runpy.run_path(str(HOME / 'main.py'), run_name='__main__')
        except SystemExit as stop:
            if stop.code != 128 + signal.SIGTERM:
                raise RuntimeError(f'main.py: {stop.code}') from None
    return rows


def shares(events, steps, ms):
    """Where the time of a step, in ms, goes, by a trace's events: on a GPU that of kernels by who started them."""
    spans = []
    for event in events:
        name = event['name'].partition('#')[0] if event.get('cat') == 'user_annotation' else ''
        if name in PARTS_OF_A_STEP:
            spans.append((PARTS_OF_A_STEP[name], event['ts'], event['ts'] + event['dur']))
    started = {event['args']['correlation']: event['ts'] for event in events
               if event.get('cat') in ('cuda_runtime', 'cuda_driver') and 'correlation' in event['args']}
    times, kernels = Counter(), Counter()
    for event in events:
        if event.get('cat') in ('kernel', 'gpu_memcpy', 'gpu_memset'):
            at = started.get(event['args'].get('correlation'), 0)
            part = next((name for name, begin, end in spans if begin <= at < end), 'network')
            times[part] += event['dur'] / 1e3 / steps
            kernels[part] += 1 / steps
    if kernels:
        times['waiting'] = max(0, ms - sum(times.values()))  # the host's, while the profiler looks on
    else:
        for name, begin, end in spans:
            times[name] += (end - begin) / 1e3 / steps
        times['network'] = ms - sum(times.values())
    return [dict(part=part, ms=times[part], share=times[part] / ms, kernels=kernels[part] or None)
            for part in ('views', 'network', 'loss', 'optimizer', 'waiting')]


def precision(args, device):
    """50 steps, eager and compiled, in float32 and bf16: time, and how far the means of 10 losses are apart."""
    cuda, n, curves, rows = device.type == 'cuda', 3 if args.tiny else 50, {}, []
    batches = DeviceViews(load_data('shapes').train, args.batch_size, args.image_size, device=device)
    stream = [views for epoch in range(1, 9) for views, _ in batches.epoch(epoch)][:n]
    for name, bf16, compiled in (('float32, eager', False, False), ('bf16, eager', True, False),
                                 ('float32, compiled', False, True), ('bf16, compiled', True, True)):
        if compiled and not cuda:
            continue  # it takes minutes, and a test compiles on a CPU
        step = training(args, device, bf16=bf16, compiled=compiled)
        curves[name] = torch.stack([step(views) for views in stream]).cpu()
        elapsed, = alternate(args.repeat, device, partial(step, stream[0]))
        apart = (curves[name] - curves['float32, eager']).unfold(0, min(n, 10), 1).mean(1).abs().max().item()
        rows.append(dict(what=f'{args.arch}, {name}', ms=elapsed, last_loss=curves[name][-1].item(),
                         distance=apart, within=0.1, holds=apart < 0.1))
    return rows


def two_ranks(args, device):
    """The objective on two ranks that share the device, against one; or why not."""
    with TemporaryDirectory() as directory, ProcessPoolExecutor(2, get_context('spawn')) as pool:
        jobs = [pool.submit(half_of_the_loss, rank, args.device, f'{directory}/meet') for rank in range(2)]
        try:
            outcome = f'the loss differs from that of one rank by {max(job.result(timeout=120) for job in jobs):.2g}'
        except Exception as error:  # NCCL's, of several kinds; the report holds it
            outcome = ' '.join(str(error).split())[-200:]
    return [dict(what='2 ranks on one device', outcome=outcome)]


def half_of_the_loss(rank, device, file):
    import torch.distributed as dist
    dist.init_process_group('nccl' if device == 'cuda' else 'gloo', init_method=f'file://{file}', rank=rank,
                            world_size=2, timeout=timedelta(seconds=60))
    views = [torch.randn(64, 128, generator=augment.seeded(v)).to(device) for v in range(2)]
    halves = contrastive_loss(*(x.chunk(2)[rank] for x in views)).item()
    dist.destroy_process_group()
    return abs(halves - contrastive_loss(*views).item())


def train(args, device):
    """ResNet-18 on CIFAR-10, or on drawn shapes, until the time is over; the same command goes on with it."""
    there = Path(args.root, 'cifar-10-batches-py').is_dir()
    command = ('--dataset_name', 'cifar10', '--root', args.root) if there else ('--dataset_name', 'shapes')
    command = *command, *sizes(args), '--arch', 'resnet18', '--batch_size', 512, '--epochs', 1 if args.tiny else 500
    left = None if args.tiny else max(60, args.ends - time.monotonic())
    log = run_main(args, Path(args.results_dir, 'run'), *command, '--knn_every', 5, '--test_size', args.image_size,
                   seconds=left)
    known = log.dropna(subset='test_acc@1')
    return [dict(what=f'ResNet-18 on {command[1]}', epochs=len(log) - 1, minutes=log['seconds'].sum() / 60,
                 images_s=log['images/s'].median(), kNN_percent=known['test_acc@1'].iloc[-1],
                 at_epoch=known['epoch'].iloc[-1])]


def report(args, device):
    """Run the parts whose CSV is not there, and write report.md and step.png from all that are."""
    out, failed, args.ends = Path(args.results_dir), [], time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if (out / f'{name}.csv').exists():
            print(f'{name}: done before, {out}/{name}.csv')
            continue
        print(f'== {name}, {(args.ends - time.monotonic()) / 60:.1f} minutes left', flush=True)
        try:
            rows = part(args, device)
            write_table(out / f'{name}.csv', rows, None)
            print(*rows, sep='\n')
        except Exception:  # a part that fails must not keep the others from their time on the GPU
            traceback.print_exc()
            failed.append(name)
        torch.compiler.reset()  # its count of recompilations goes by part
        torch.cuda.empty_cache()  # for parts that are processes of their own
    text = [f'# Measured on {device_name(device)}', f'torch {torch.__version__}, CUDA {torch.version.cuda}. '
            f'{args.arch}, {2 * args.batch_size} views of {args.image_size} px a step, but where a row says otherwise.']
    for name, part in PARTS.items():
        if (out / f'{name}.csv').exists():
            about = (BENCHES.get(name, part).__doc__ or '').partition('\n')[0]
            text += [f'## {name}', about, table(pd.read_csv(out / f'{name}.csv'))]
        if name == 'loop' and (out / 'loop.csv').exists():
            picture(pd.read_csv(out / 'loop.csv'), device, out / 'step.png')
            text.append('![where the time of a step goes](step.png)')
    write(out / 'report.md', '\n\n'.join([*text, f'Failed: {", ".join(failed) or "nothing"}.\n']).encode())
    print(out / 'report.md')
    if failed:
        raise runtime.UserError(f'{", ".join(failed)} failed, see above; the same command runs them again')


def table(rows):
    """Markdown."""
    cells = [['' if pd.isna(x) else f'{x:.4g}' if isinstance(x, float) else str(x) for x in row] for row in rows.values]
    return '\n'.join(f'| {" | ".join(row)} |' for row in [list(rows), ['---'] * len(rows.columns), *cells])


def picture(rows, device, file):
    """A bar of where the time of a step goes, in ms."""
    import matplotlib
    matplotlib.use('agg')
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 1.8), layout='constrained')
    parts, left = rows[1:], 0
    for part, ms in zip(parts['part'], parts['ms']):
        axes.barh(0, ms, left=left, label=f'{part} {ms:.1f} ms')
        left += ms
    axes.set(yticks=[], xlabel=f'ms of a step under the profiler; {device_name(device)}', xlim=(0, left))
    figure.legend(loc='outside upper center', ncols=5)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=160)
    plt.close(figure)
    write(file, buffer.getbuffer())


BENCHES = {'loss': bench_loss, 'augment': bench_augment, 'step': bench_step, 'epoch': bench_epoch,
           'kernels': bench_kernels}
PARTS_OF_A_STEP = {'views': 'views', 'loss': 'loss', 'Optimizer.step': 'optimizer'}
PARTS = {'tests': cuda_tests, **{what: partial(measure, what) for what in ('loss', 'augment', 'step', 'epoch')},
         'loop': loop, 'precision': precision, 'ranks': two_ranks, 'train': train}

if __name__ == '__main__':
    runtime.run(main)
