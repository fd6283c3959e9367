"""Contrastive losses with hard negatives: SimCLR, debiased and hard-negative, in one function.

    from losses import contrastive_loss
    loss = contrastive_loss(z1, z2)                                   # hard negatives: tau_plus 0.1, beta 1
    loss = contrastive_loss(z1, z2, beta=0)                           # debiased
    loss = contrastive_loss(z1, z2, beta=0, tau_plus=0)               # SimCLR's NT-Xent

z1 and z2 are the (B, D) embeddings of two views of B samples, rows of unit length. This file needs
torch and nothing else: copy it into any project, of any modality.

HCL: Robinson, Chuang, Sra, Jegelka. Contrastive Learning with Hard Negative Samples. ICLR 2021, arXiv 2010.04592.
DCL: Chuang, Robinson, Lin, Torralba, Jegelka. Debiased Contrastive Learning. NeurIPS 2020, arXiv 2007.00224.
SimCLR: Chen, Kornblith, Norouzi, Hinton. A Simple Framework for Contrastive Learning of Visual
Representations. ICML 2020, arXiv 2002.05709.
"""

import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

TILE = {'cpu': 2**22, 'cuda': 2**26}  # similarities visited at a time: 16 MB a buffer in float32 on a CPU


def contrastive_loss(*views, temperature=0.5, tau_plus=0.1, beta=1.0, labels=None, chunk_size=None):
    """The hard-negative objective of HCL (eq. 4), which contains those of DCL (eq. 8) and SimCLR (eq. 1).

    With s = z·z'/t, M = V - 1 positives and N = V (B - 1) negatives for each of the V B anchors,

        R    = N sum_j exp((1 + beta) s_j) / sum_j exp(beta s_j)     over the anchor's negatives j
        P    = mean of exp(s_v)                                      over the anchor's positives v
        Ng   = max((R - tau_plus N P) / (1 - tau_plus), N exp(-1/t))
        loss = mean of -log(exp(s_v) / (exp(s_v) + Ng))              over anchors and positives

    The gradient flows through the weights and through both sums; where the floor is active, not through Ng.

    Args:
        views: V >= 2 tensors (B, D), floating point, rows of unit length; row i of each is a view of sample i.
        temperature: t > 0.
        tau_plus: the prior probability, in [0, 1), that a negative has the anchor's class. 0: no correction.
        beta: concentration >= 0 of the weights on hard negatives. 0: every negative weighs the same.
        labels: (B,) integers, optional. Negatives with the anchor's label are left out, the papers' unbiased
            oracle: N is then counted for each anchor, an anchor without negatives adds 0, tau_plus must be 0.
            A negative label is unknown, and like no other.
        chunk_size: samples whose rows of the similarity matrix are computed at a time (by default as many as
            fit a fixed tile). It changes memory, which grows with B * chunk_size and not with B**2, not values.

    Returns:
        A scalar: float64 if a view is float64, else float32, whatever the views' precision and any autocast.

    Raises:
        ValueError: naming the argument that is out of range and its value.

    Under an initialised torch.distributed group, each rank passes its own samples (equally many on every rank)
    and gets the loss of the whole batch, with that loss's gradient at its own views. DistributedDataParallel
    averages gradients over ranks where this needs their sum: call ``(world_size * loss).backward()``.
    Differentiable once.
    """
    if len(views) < 2:
        raise ValueError(f'views: at least 2 are needed, got {len(views)}')
    for v, z in enumerate(views):
        if z.ndim != 2 or z.shape != views[0].shape or not z.is_floating_point():
            raise ValueError(f'views: all must be floating point with one shape (B, D), '
                             f'got {tuple(views[0].shape)} and, as view {v + 1}, {tuple(z.shape)} {z.dtype}')
    world = dist.get_world_size() if _distributed() else 1
    batch = len(views[0])
    if batch * world < 2:
        raise ValueError(f'views: at least 2 samples are needed, got {batch}')
    if not 0 < temperature < math.inf:
        raise ValueError(f'temperature must be positive, got {temperature}')
    if not 0 <= tau_plus < 1:
        raise ValueError(f'tau_plus must be in [0, 1), got {tau_plus}')
    if not 0 <= beta < math.inf:
        raise ValueError(f'beta must be at least 0, got {beta}')
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
    if labels is not None and (labels.shape != (batch,) or labels.is_floating_point()):
        raise ValueError(f'labels must be integers of shape ({batch},), got {tuple(labels.shape)} {labels.dtype}')
    if labels is not None and tau_plus != 0:
        raise ValueError(f'tau_plus must be 0 with labels, which leave no false negatives, got {tau_plus}')
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in views) else torch.float32
    z = torch.stack([z.to(dtype) for z in views])  # V x (B, D) -> (V, B, D)
    chunk_size = chunk_size or max(1, TILE.get(z.device.type, 2**22) // (len(views) ** 2 * batch * world))
    with_grad = torch.is_grad_enabled() and z.requires_grad
    return _ContrastiveLoss.apply(z, labels, temperature, tau_plus, beta, chunk_size, with_grad)


class _ContrastiveLoss(torch.autograd.Function):
    """Value and gradient in one visit to each chunk of rows, so that no tile is kept or computed twice."""

    @staticmethod
    def forward(ctx, z, labels, t, tau_plus, beta, chunk_size, with_grad):
        with torch.autocast(z.device.type, enabled=False):
            V, b, D = z.shape
            world, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
            B, first = b * world, b * rank  # the whole batch, and the place of this rank's samples in it
            columns = _gather(z).view(V * B, D)
            if labels is not None:
                unknown = -1 - torch.arange(first, first + b, device=z.device)  # each sample is of its own class
                labels = torch.where(labels < 0, unknown, labels)
                labels_all = _gather(labels[None]).flatten()
            grad_z = torch.zeros_like(columns).view(V, B, D) if with_grad else None
            total, log_tau = z.new_zeros(()), math.log(tau_plus) if tau_plus > 0 else -math.inf
            own = torch.eye(V, dtype=torch.bool, device=z.device)[:, :, None]  # an anchor is not its own positive
            for i in range(0, b, chunk_size):
                rows = z[:, i:i + chunk_size].flatten(0, 1)  # (V, c, D) -> (Vc, D)
                c = len(rows) // V
                tile = (rows / t) @ columns.T  # (Vc, VB), s; exponentials and gradients take its place below
                same_image = tile.view(V, c, V, B).diagonal(first + i, 1, 3)  # (V, V, c), a window into the tile
                s_pos = same_image.masked_fill(own, -math.inf)
                same_image.fill_(-math.inf)
                N = tile.new_full((c,), V * (B - 1))
                if labels is not None:
                    same_label = labels[i:i + chunk_size, None] == labels_all  # (c, B)
                    tile.view(V, c, V, B).masked_fill_(same_label[:, None], -math.inf)
                    N = V * (~same_label).sum(1).to(z.dtype)
                empty = N == 0
                log_N = N.clamp(min=1).log()  # (c,)

                # Every exponent is relative to the row's largest s: none overflows, and both sums are at least 1.
                top = tile.amax(1, keepdim=True).clamp_(min=-1e30)  # (Vc, 1), finite without negatives too
                tile.sub_(top)
                w = (beta * tile).exp_() if beta not in (0, 1) else None  # exp(beta (s - max s))
                e = tile.exp_()  # exp(s - max s), 0 at what is left out
                if beta == 0:
                    W = N.repeat(V)
                else:
                    w = e if beta == 1 else w
                    W, e = w.sum(1), w * e  # e: exp((1 + beta) (s - max s))
                W, S = W.clamp(min=1), e.sum(1).clamp_(min=1)  # (Vc,)
                log_R = log_N + top.view(V, c) + (S.log() - W.log()).view(V, c)  # HCL eq. 4
                log_P = s_pos.logsumexp(1) - math.log(V - 1)
                ratio = (log_tau + log_N + log_P - log_R).exp().clamp_(max=1)  # tau_plus N P / R
                log_Ng = log_R + torch.log1p(-ratio) - math.log1p(-tau_plus)
                floor = log_N - 1 / t
                active = (log_Ng <= floor) if tau_plus > 0 else torch.zeros_like(log_Ng, dtype=torch.bool)
                x = torch.where(active, floor, log_Ng)[:, None] - s_pos  # (V, V, c)
                x = x.masked_fill_(own | empty, -math.inf)
                total += torch.logaddexp(x, torch.zeros_like(x)).sum()
                if not with_grad:
                    continue

                # d loss / d s: sigmoid(x) pulls the positive up, and pushes Ng down through R and P.
                p = x.sigmoid()  # (V, V, c)
                d_log_R = torch.where(active, 0, p.sum(1) / (1 - ratio))  # (V, c)
                d_pos = -p - (d_log_R * ratio)[:, None] * s_pos.softmax(1)
                d_log_R = d_log_R.view(V * c, 1)
                grad = e.mul_((1 + beta) * d_log_R / S[:, None])  # (Vc, VB)
                if beta != 0:
                    grad -= w.mul_(beta * d_log_R / W[:, None])
                grad.view(V, c, V, B).diagonal(first + i, 1, 3).copy_(d_pos)
                grad_z.view(V * B, D).addmm_(grad.T, rows)
                grad_z[:, first + i:first + i + c] += (grad @ columns).view(V, c, D)
            count = V * B * (V - 1)
            if world > 1:
                dist.all_reduce(total)
            if world > 1 and with_grad:
                dist.all_reduce(grad_z)  # each rank's anchors act on the views of all
            if with_grad:
                ctx.save_for_backward(grad_z[:, first:first + b] / (t * count))
            return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return grad_output * ctx.saved_tensors[0], None, None, None, None, None, None


def _distributed():
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(x):
    """(V, b, ...) on each rank -> (V, B, ...), the whole batch in rank order."""
    if not _distributed():
        return x
    V, *rest = x.shape
    whole = x.new_empty(dist.get_world_size() * V, *rest)
    dist.all_gather_into_tensor(whole, x.contiguous())
    return whole.unflatten(0, (-1, V)).transpose(0, 1).flatten(1, 2)  # (n V, b, ...) -> (V, n b, ...)
