"""One training step: the network and its optimizer, a whole batch or its parts, compiled, and the memory it takes."""

from contextlib import nullcontext
from pathlib import Path

import torch

import runtime
from batches import random_views
from files import crc
from model import Model, load_model
from runtime import ranks


def train_step(net, views, labels, optimizer, loss_of, autocast, scaler, joint=False, micro_batch=None):
    """One step on V views (b, 3, h, w) of this rank's images.

    Returns the loss of the whole batch, and 1 if fp16 overflowed and no step was taken, else 0.
    """
    optimizer.zero_grad()
    if micro_batch:
        loss = backward_in_parts(net, views, labels, loss_of, autocast, scaler, joint, micro_batch)
    else:
        with autocast:
            z = net(torch.cat(views))[1].chunk(len(views)) if joint else [net(x)[1] for x in views]  # V x (b, D)
        loss = loss_of(*z, labels=labels)
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return loss.detach(), optimizer.skipped


def backward_in_parts(net, views, labels, loss_of, autocast, scaler, joint, micro_batch):
    """The gradient of the whole batch's loss, of which only micro_batch images go through the network at once.

    A first pass, without a graph, gives z, and the loss its gradient at z. A second pass, with one, hands that on, part
    by part (GradCache: Gao et al. 2021, arXiv 2101.06983). BatchNorm's batch is the part.
    """
    V, bare = len(views), getattr(net, 'module', net)  # the latter without DDP
    parts = [x for part in zip(*(x.split(micro_batch) for x in views))  # K V x (m, 3, h, w), or K x (V m, 3, h, w)
             for x in ([torch.cat(part)] if joint else part)]
    buffers = list(bare.buffers())
    before = [x.clone() for x in buffers]
    with torch.no_grad(), autocast:
        z = [x for part in parts for x in bare(part)[1].split(micro_batch)]  # K V x (m, D)
    with torch.no_grad():
        torch._foreach_copy_(buffers, before)  # the second pass moves BatchNorm's statistics
    z = [torch.cat(z[v::V]).requires_grad_() for v in range(V)]  # V x (b, D)
    loss = loss_of(*z, labels=labels)
    scaler.scale(loss).backward()
    gradients = [g for part in zip(*(x.grad.split(micro_batch) for x in z))
                 for g in ([torch.cat(part)] if joint else part)]  # as parts
    with autocast:  # a new one: casts kept from the first pass would have no graph
        for i, (x, g) in enumerate(zip(parts, gradients), 1):
            with nullcontext() if i == len(parts) or net is bare else net.no_sync():  # DDP reduces once
                net(x)[1].backward(g)
    return loss


def starting_weights(parser, args):
    """The Model in --init, or None. The setting becomes the file's name and CRC, by which the run knows it."""
    if not args.init:
        return None
    path = Path(args.init)
    net = load_model(path, head=False)
    args.stem = args.stem or net.backbone['stem']
    differ = ' '.join(f'--{name} {value}' for name, value in net.backbone.items() if getattr(args, name) != value)
    if differ:
        parser.error(f'--init {path} holds another network: give {differ}')
    args.init = f'{path.name}, CRC {crc(path):08x}'
    return net


def network(args):
    return Model(args.feature_dim, args.arch, args.hidden_dim, args.stem, args.width)


def build(args, device, init=None):
    """The network on its device, ready to train, its optimizer, and the scaler of its gradients in fp16.

    Args:
        init: a Model whose f it starts from; the head is new.
    """
    net = network(args)
    if init:
        net.f.load_state_dict(init.f.state_dict())
    if args.micro_batch:  # K parts move BatchNorm's running statistics as far as one batch does
        parts = args.batch_size // ranks().world // args.micro_batch
        for module in net.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.momentum = 1 - (1 - module.momentum) ** (1 / parts)
    if args.sync_bn:
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net)
    net.to(device, memory_format=torch.channels_last)
    if args.optimizer == 'sgd':
        optimizer = torch.optim.SGD(net.parameters(), args.lr, 0.9, weight_decay=args.weight_decay, fused=True)
        for p in net.parameters():  # if fp16 skips the first step, torch leaves them uninitialised
            optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
    else:
        optimizer = torch.optim.Adam(net.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    optimizer.skipped = 0

    def count(optimizer, *_):  # GradScaler leaves it to fused optimizers to skip a step, and tells them here
        optimizer.skipped = getattr(optimizer, 'found_inf', 0)

    optimizer.register_step_pre_hook(count)
    return net, optimizer, torch.amp.GradScaler(device.type, enabled=args.precision == 'fp16')


def compiled(net, batches, autocast, args):
    """torch.compile(net), tried on a batch; if that fails on a rank, a line says so and all go on eagerly."""
    run, buffers, failure = torch.compile(net, dynamic=False), [x.clone() for x in net.buffers()], ''
    try:
        views, _ = next(batches.epoch(1))
        x = views[0][:args.micro_batch] if not args.joint_views else torch.cat([x[:args.micro_batch] for x in views])
        for grad in ([False] if args.micro_batch else []) + [True]:
            with autocast, torch.set_grad_enabled(grad):
                z = run(x)[1]
        z.sum().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a driver, Triton, a C compiler: of any kind
        failure = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
    net.zero_grad()
    with torch.no_grad():
        torch._foreach_copy_(list(net.buffers()), buffers)
    if runtime.sum_ranks(torch.tensor(float(bool(failure)), device=batches.device)).item():
        runtime.say(f'Not compiled, which is slower: {failure or "it failed on another rank"}. On Debian, apt install '
                    'build-essential python3-dev brings what is often missing')
        batches.random_views = random_views
        return net
    if ranks().world > 1:
        torch.compiler.reset()  # DDP compiles anew, in pieces whose gradients it reduces while the next are computed
    return run


def check_memory(args, device):
    """Say before the first step on CUDA if it needs more memory than is free, and which --micro_batch fits."""
    if device.type != 'cuda':
        return
    images, views = args.batch_size // ranks().world, args.views
    free, each = 0.9 * torch.cuda.mem_get_info(device)[0], kept_bytes(args)

    def kept(micro_batch):
        return (micro_batch or images) * (views if args.joint_views or not micro_batch else 1) * each

    if kept(args.micro_batch) > free:
        fitting = [n for n in range(2, images) if images % n == 0 and kept(n) < free]
        runtime.say(f'A step keeps {kept(args.micro_batch) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: ' + (
            f'--micro_batch {fitting[-1]} fits' if fitting else 'lower --image_size, or choose a smaller --arch'))


def kept_bytes(args, n=8):
    """What the network keeps of each view for the backward pass, in bytes, counted on tensors without memory."""
    with torch.device('meta'):
        dtype = torch.float32 if args.precision == 'fp32' else torch.float16
        net, x = network(args).to(dtype), torch.empty(n, 3, args.image_size, args.image_size, dtype=dtype)
    kept = {}

    def pack(x):
        kept[id(x.untyped_storage())] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        net(x)
    weights = {id(p.untyped_storage()) for p in net.parameters()}
    return sum(storage.nbytes() for name, storage in kept.items() if name not in weights) / n
