"""Contrastive losses in one function: SimCLR's, debiased, hard-negative, and CLIP's with its hard-negative form.

    from hardneg.losses import contrastive_loss                    # a file to copy into any project: it needs torch alone
    loss = contrastive_loss(z1, z2)                        # (B, D) each; hard negatives: tau_plus 0.1, beta 1
    loss = contrastive_loss(z1, z2, beta=0)                # debiased
    loss = contrastive_loss(z1, z2, beta=0, tau_plus=0)    # SimCLR's NT-Xent; with intra_view=False, CLIP's

HCL: Robinson, Chuang, Sra, Jegelka. Contrastive Learning with Hard Negative Samples. ICLR 2021, arXiv 2010.04592.
DCL: Chuang, Robinson, Lin, Torralba, Jegelka. Debiased Contrastive Learning. NeurIPS 2020, arXiv 2007.00224.
SimCLR: Chen, Kornblith, Norouzi, Hinton. ICML 2020, arXiv 2002.05709. CLIP: Radford et al. 2021, arXiv 2103.00020.
From "Contrastive learning with hard negatives". MIT License, (c) 2026 its authors. Its tests pass on torch 2.4 to 2.14.
"""

import math

import torch
import torch.distributed as dist

__version__ = '1.0'
OLD = torch.__version__ < '2.6'  # compiled, an autograd.Function there gets gradients of 0 from torch.func.vjp
SIDE = {'cpu': 2**8, 'cuda': 2**13}  # rows of a tile of similarities: 256 kB in float32 on a CPU, for a core's cache
KEPT = {'cpu': 2**24, 'cuda': 2**28}  # similarities kept at most: 64 MB in float32 on a CPU


def contrastive_loss(*views, negatives=None, temperature=0.5, tau_plus=0.1, beta=1.0, labels=None, intra_view=True,
                     normalize=True, chunk_size=None, group=None):
    """HCL's hard-negative objective, which contains those of DCL and SimCLR and, between two encoders, of CLIP.

    With s = z·z'/t for rows z of unit length, V - 1 positives and N = V (B - 1) + K negatives for each of V B anchors,

        R    = N sum_j exp((1 + beta) s_j) / sum_j exp(beta s_j)     over the anchor's negatives j
        P    = mean of exp(s_v), not weighted by beta                over the anchor's positives v
        Ng   = max((R - tau_plus N P) / (1 - tau_plus), N exp(-1/t)), and R if tau_plus is 0
        loss = mean of -log(exp(s_v) / (exp(s_v) + Ng))              over anchors and positives

    The gradient flows through both sums of R; an active floor has one in t alone. An anchor without negatives adds 0.

    Args:
        views: V >= 2 floating-point tensors (B, D) on one device; row i of each is a view of sample i.
        negatives: (K, D), optional: further negatives of every anchor, like a queue; a gradient if they require one.
        temperature: t > 0: a number, or a tensor of one element, which gets a gradient and whose value is not checked.
        tau_plus: the prior probability, in [0, 1), that a negative has the anchor's class. 0: no correction.
        beta: concentration >= 0 of the weights on hard negatives. 0: every negative weighs the same.
        labels: (B,) integers, optional. Views with the anchor's label are no negatives, the papers' unbiased oracle: N
            is counted for each anchor, tau_plus must be 0. Below 0: unknown, as are those of `negatives`.
        intra_view: False compares an anchor with other views alone, as CLIP does images with texts: N = (V-1)(B-1),
            and + K for the anchors of the first view, which alone meet `negatives`.
        normalize: False takes s of the rows as they are, of any length.
        chunk_size: samples along a tile of s (default: as many as fit a fixed size). It changes speed, not values.
        group: a torch.distributed ProcessGroup; None: the default group, if initialised; False: this process alone.

    Returns a scalar: float64 if an input is float64, else float32, under autocast too. NaN in a view gives NaN.
    Raises ValueError, which names the argument and what it got; RuntimeError in backward with create_graph=True.

    Each rank of a group passes its own samples, equally many, and gets the loss of the whole batch; `negatives` meet
    the anchors of their rank alone. The gradients at views and negatives are scaled so that DistributedDataParallel's
    mean over ranks is the whole batch's gradient; a tensor temperature gets that on every rank. Unequal numbers of
    samples are a ValueError on every rank on a CPU. On a GPU the check would wait: there the job hangs or crashes.
    """
    _check(views, negatives, temperature, tau_plus, beta, labels, chunk_size, group)
    dtype = torch.float64 if torch.float64 in [x.dtype for x in (*views, negatives) if x is not None] else torch.float32
    # An anchor's negatives are in its own tower, which holds all views, or in all other towers, of one view each.
    z = torch.stack([z.to(dtype) for z in views], 1 if intra_view else 0)  # V x (B, D) -> (B, V, D) or (V, B, D)
    z = z.unsqueeze(0 if intra_view else 2)  # -> (T towers, B, U views in each, D)
    negatives = z.new_empty(0, z.shape[-1]) if negatives is None else negatives.to(dtype)
    learnable, beta = isinstance(temperature, torch.Tensor), beta if beta > torch.finfo(dtype).tiny else 0
    t = temperature.to(dtype).reshape(()) if learnable else z.new_full((), temperature)
    # Unit rows bound |s| by 1/t. Within this range, sums of exponentials need no maximum taken out.
    bounded = normalize and not learnable and (1 + beta) / temperature <= 0.7 * math.log(torch.finfo(dtype).max)
    y, further = (x / (t.detach().sqrt() * (x.norm(dim=-1, keepdim=True).clamp(min=1e-12) if normalize else 1))
                  for x in (z, negatives))  # so that s = y·y'
    return _Loss.apply(y, further, t, tau_plus, beta, labels, chunk_size, bounded, group, torch.is_grad_enabled())


def objective(S, W, s_pos, N, t, tau_plus, offset=None):
    """The sum of -log(exp(s_v) / (exp(s_v) + Ng)) over A anchors and their positives v, in log space.

    S = sum_j exp((1 + beta) s_j) and W = sum_j exp(beta s_j) run over an anchor's N negatives j, all (A,); s_pos is
    (A, V - 1). With an offset (A,), S and W are the sums for s_j - offset.
    """
    log_R = S.log() - W.log()  # here R and Ng are without their factor N
    if offset is not None:
        log_R = log_R + offset
    log_Ng = log_R
    if tau_plus:
        log_P = s_pos.logsumexp(1) - math.log(s_pos.shape[1])
        log_share = math.log(tau_plus) + log_P - log_R  # of tau_plus P in R
        at_floor = 1 - log_share.exp() <= (1 - tau_plus) * (-1 / t - log_R).exp()
        share = log_share.masked_fill(at_floor, -math.inf).exp()  # finite, so that its gradient is, too
        log_Ng = torch.where(at_floor, -1 / t, log_R + torch.log1p(-share) - math.log1p(-tau_plus))
    x = (N.log() + log_Ng)[:, None] - s_pos
    return torch.logaddexp(x, torch.zeros_like(x)).sum()  # log(1 + e^x) = -log(exp(s_v) / (exp(s_v) + Ng))


def _check(views, negatives, temperature, tau_plus, beta, labels, chunk_size, group):
    def need(fits, words, *got):
        if not fits:
            got = (f'{tuple(x.shape)} {x.dtype} on {x.device}' if torch.is_tensor(x) else repr(x)[:80] for x in got)
            raise ValueError(f'{words}, got {"; ".join(got)}')

    def real(x):
        return torch.is_tensor(x) and x.is_floating_point() and x.device == views[0].device

    def number(x, low, high):
        return not torch.is_tensor(x) and hasattr(x, '__float__') and low <= x < high

    need(len(views) > 1 and all(real(x) and x.ndim == 2 and x.shape == views[0].shape and len(x) for x in views),
         'views must be 2 or more floating-point tensors (B, D) of one shape on one device, each an argument', *views)
    (B, D), device = views[0].shape, views[0].device
    need(negatives is None or real(negatives) and negatives.ndim == 2 and negatives.shape[1] == D,
         f'negatives must be a floating-point tensor (K, {D}) on {device}', negatives)
    need(number(temperature, 1e-300, math.inf) or real(temperature) and temperature.numel() == 1,
         f'temperature must be a positive number or a floating-point tensor of one element on {device}', temperature)
    need(number(tau_plus, 0, 1), 'tau_plus must be a number in [0, 1)', tau_plus)
    need(number(beta, 0, math.inf), 'beta must be a number of at least 0', beta)
    need(chunk_size is None or isinstance(chunk_size, int) and chunk_size > 0, 'chunk_size must be an integer > 0',
         chunk_size)
    need(labels is None or torch.is_tensor(labels) and labels.shape == (B,) and labels.device == device
         and not labels.is_floating_point() and not labels.is_complex(),
         f'labels must be a tensor of ({B},) integers on {device}', labels)
    need(labels is None or tau_plus == 0, 'tau_plus must be 0 with labels, which leave no false negatives', tau_plus)
    need(group is None or group is False or dist.is_available() and isinstance(group, dist.ProcessGroup),
         'group must be None, False or a ProcessGroup that holds this process', group)
    if device.type == 'cpu' and _ranks(group)[0] > 1 and not torch.compiler.is_compiling():  # elsewhere it would wait
        numbers = _gather(torch.tensor([B]), group).tolist()
        need(min(numbers) == max(numbers), 'views must hold equally many samples on every rank', numbers)


class _Loss(torch.autograd.Function):
    """The mean of the objective. Its gradient is computed with its value, so that no similarities outlive the call."""

    @staticmethod
    def forward(ctx, y, further, t, tau_plus, beta, labels, chunk_size, bounded, group, with_grad):
        if OLD and torch.compiler.is_compiling():
            raise RuntimeError('contrastive_loss is compiled by torch 2.6 or newer')  # torch runs it uncompiled
        with torch.autocast(y.device.type, enabled=False):
            (T, b, U, D), (world, rank) = y.shape, _ranks(group)
            V, B, first = T * U, b * world, b * rank  # first: the place of this rank's samples in the whole batch
            labels, same = (None, 1) if labels is None else _classes(labels, first, group)
            N = (y.new_zeros(T, b, U) + max(U, T - 1) * (B - same)).flatten()  # -> (A,)
            N[:b * U] += len(further)
            rows, columns = y.flatten(0, 2), _gather(y.transpose(0, 1), group).transpose(0, 1).flatten(0, 2)  # (V B, D)
            side = U * (chunk_size or max(1, SIDE.get(y.device.type, SIDE['cuda']) // U))
            blocks = _Block(rows, columns, T, side, (U, b, B, first, labels)), _Block(rows[:b * U], further, 1, side)
            S, W, offset = _sums(blocks, N, beta, bounded)

            def loss(S, W, y, t):
                s_pos = [(y * y.roll(k, 0 if T > 1 else 2)).sum(-1).flatten() for k in range(1, V)]  # (A,) each
                return objective(S, W, torch.stack(s_pos, 1), N, t, tau_plus, offset)

            (total, pullback), dt, count = torch.func.vjp(loss, S, W, y, t), torch.zeros_like(t), V * B * (V - 1)
            if with_grad := with_grad and any(ctx.needs_input_grad):
                dS, dW, dy, dt = pullback(torch.full_like(total, world / count))
                dy = dy.reshape(rows.shape)
                d_columns = dy if world == 1 else torch.zeros_like(columns)
                d_further = torch.zeros_like(further) if any(ctx.needs_input_grad[1:3]) else None  # needed for dt, too
                for block, d in zip(blocks, (d_columns, d_further)):
                    _add_gradient(block, dy, d, (1 + beta) * dS, beta * dW, offset, beta)
                if world > 1:  # the anchors of each rank act on the rows of all
                    dist.all_reduce(d_columns, group=group)
                    dy += d_columns.view(T, B, U, D)[:, first:first + b].flatten(0, 2)
                y_dy = (rows * dy).sum() + (0 if d_further is None else (further * d_further).sum())
                dt = (dt - y_dy / (2 * t)) / world  # rows and further are proportional to t^(-1/2)
            results = torch.stack([total / count, dt])
            if world > 1:
                dist.all_reduce(results, group=group)
            if with_grad:
                ctx.save_for_backward(dy.view_as(y), d_further, results[1])
            return results[0]

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled, torch refuses by itself
            raise RuntimeError('contrastive_loss has a first derivative only: no backward with create_graph=True')
        return *[x if x is None else grad_output * x for x in ctx.saved_tensors], *[None] * 7


def _classes(labels, first, group):
    """This rank's labels (b,) -> all ranks', in which each unknown one is its own, and how many have each: (b, 1)."""
    own = torch.where(labels < 0, -1 - torch.arange(first, first + len(labels), device=labels.device), labels).long()
    labels = _gather(own, group)
    ordered = labels.sort().values
    return labels, (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own))[:, None]


class _Block:
    """Similarities s = rows @ columns.T of anchors (A, D) with (C, D), of which a tile is computed at a time."""

    def __init__(self, rows, columns, T, side, views=None):
        self.rows, self.columns, self.views, self.kept = rows, columns, views, {}
        self.mirrored = views is not None and len(rows) == len(columns)  # s is symmetric: half of the tiles do
        slices = [[(u, slice(k, min(k + side, u * n + n))) for u in range(T) for k in range(u * n, u * n + n, side)]
                  for n in (len(rows) // T, len(columns) // T)]  # none across two of T towers
        self.tiles = [(i, j) for k, (u, i) in enumerate(slices[0]) for v, j in slices[1][k if self.mirrored else 0:]
                      if T == 1 or u != v]
        numbers = sum((i.stop - i.start) * (j.stop - j.start) for i, j in self.tiles)
        self.few = numbers <= KEPT.get(rows.device.type, KEPT['cuda'])

    def similarities(self, i, j):
        """A tile of s, -inf between views of one sample or, with labels, of one label."""
        s = self.rows[i] @ self.columns[j].T
        if self.views is not None:
            U, b, B, first, labels = self.views
            k, m = first + i.start // U % b, j.start // U % B  # the first samples of rows and of columns
            by_sample = s.view(len(s) // U, U, -1, U)  # (rows, columns) -> (samples, views, samples, views)
            if labels is None:
                by_sample.diagonal(k - m, 0, 2).fill_(-math.inf)  # empty where rows and columns share no sample
            else:
                same = labels[k:k + by_sample.shape[0], None] == labels[m:m + by_sample.shape[2]]
                by_sample.masked_fill_(same[:, None, :, None], -math.inf)
        return s


def _visit(*blocks):
    """Yield each tile's slices and s, and its sides: anchors, and the dimension over which their sums run."""
    for block in blocks:
        for n, (i, j) in enumerate(block.tiles):
            s = block.kept[n] if n in block.kept else block.similarities(i, j)
            if block.few:
                block.kept[n] = s
            yield i, j, s, ((i, 1), (j, 0))[:1 + (block.mirrored and i != j)]


def _exponentials(s, sides, offset, beta):
    """Yield u = exp(s), w = exp(beta s) and the sides that they serve: all, or one with its own offset."""
    for x, served in [(s, sides)] if offset is None else [(s - offset[a].unsqueeze(d), [(a, d)]) for a, d in sides]:
        u = x.exp()
        yield u, u if beta == 1 else (beta * x).exp_() if beta else None, served


def _sums(blocks, N, beta, bounded):
    """The objective's S, W and offset. Without negatives S and W are 1, as the loss is 0 whatever they are."""
    offset = None
    if not bounded:
        offset = torch.full_like(N, -1e30)
        for _, _, s, sides in _visit(*blocks):
            for a, d in sides:
                offset[a] = torch.maximum(offset[a], s.amax(d))
    S, W = torch.zeros_like(N), torch.zeros_like(N) if beta else N
    for _, _, s, sides in _visit(*blocks):
        for u, w, served in _exponentials(s, sides, offset, beta):
            uw = u * w if beta else u
            for a, d in served:
                S[a].add_(uw.sum(d))
                if beta:
                    W[a].add_(w.sum(d))
    return S.masked_fill(N == 0, 1), W.masked_fill(N == 0, 1), offset


def _add_gradient(block, d_rows, d_columns, dS, dW, offset, beta):
    """Add dL/drows and, if it is not None, dL/dcolumns, given (1 + beta) dL/dS and beta dL/dW."""
    for i, j, s, sides in _visit(block):
        ds = None  # dL/ds = w (u dS + dW)
        for u, w, served in _exponentials(s, sides, offset, beta):
            g = u * sum(dS[a].unsqueeze(d) for a, d in served)
            if beta:
                for a, d in served:
                    g.add_(dW[a].unsqueeze(d))
                g.mul_(w)
            ds = g if ds is None else ds.add_(g)
        whole = block.mirrored and i == j
        d_rows[i].addmm_(ds + ds.T if whole else ds, block.columns[j])
        if d_columns is not None and not whole:
            d_columns[j].addmm_(ds.T, block.rows[i])


def _ranks(group):
    """The world size and this process's rank: 1 and 0 without an initialised group."""
    alone = group is False or not (dist.is_available() and dist.is_initialized())
    return (1, 0) if alone else (dist.get_world_size(group), dist.get_rank(group))


def _gather(x, group):
    """(b, ...) on each rank -> (B, ...), the whole batch in rank order."""
    if _ranks(group)[0] == 1:
        return x
    whole = x.new_empty(_ranks(group)[0] * len(x), *x.shape[1:])
    getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)(whole, x.contiguous(), group=group)  # new, old name
    return whole
