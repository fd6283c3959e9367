"""Contrastive losses in one function: SimCLR's, debiased, hard-negative, and CLIP's with its hard-negative form.

    from losses import contrastive_loss                    # a file to copy into any project: it needs torch alone
    loss = contrastive_loss(z1, z2)                        # (B, D) each; hard negatives: tau_plus 0.1, beta 1
    loss = contrastive_loss(z1, z2, beta=0)                # debiased
    loss = contrastive_loss(z1, z2, beta=0, tau_plus=0)    # SimCLR's NT-Xent; with intra_view=False, CLIP's

HCL: Robinson, Chuang, Sra, Jegelka. Contrastive Learning with Hard Negative Samples. ICLR 2021, arXiv 2010.04592.
DCL: Chuang, Robinson, Lin, Torralba, Jegelka. Debiased Contrastive Learning. NeurIPS 2020, arXiv 2007.00224.
SimCLR: Chen, Kornblith, Norouzi, Hinton. ICML 2020, arXiv 2002.05709. CLIP: Radford et al. 2021, arXiv 2103.00020.
"""

import math

import torch
import torch.distributed as dist

SIDE = {'cpu': 2**8, 'cuda': 2**13}  # rows of a tile of similarities: 256 kB in float32 on a CPU, for a core's cache
KEPT = {'cpu': 2**24, 'cuda': 2**28}  # similarities kept at most: 64 MB in float32 on a CPU


def contrastive_loss(*views, temperature=0.5, tau_plus=0.1, beta=1.0, labels=None, intra_view=True, normalize=True,
                     chunk_size=None):
    """HCL's hard-negative objective, which contains those of DCL and SimCLR and, between two encoders, of CLIP.

    With s = z·z'/t for rows z of unit length, V - 1 positives and N = V (B - 1) negatives for each of V B anchors,

        R    = N sum_j exp((1 + beta) s_j) / sum_j exp(beta s_j)     over the anchor's negatives j
        P    = mean of exp(s_v), not weighted by beta                over the anchor's positives v
        Ng   = max((R - tau_plus N P) / (1 - tau_plus), N exp(-1/t))
        loss = mean of -log(exp(s_v) / (exp(s_v) + Ng))              over anchors and positives

    The gradient flows through both sums of R; an active floor has one in t alone.

    Args:
        views: V >= 2 floating-point tensors (B, D) on one device; row i of each is a view of sample i.
        temperature: t > 0, a number or a tensor of one element, which gets its gradient. A tensor's value is not
            checked, as reading it would wait for the device: out of range, the loss is NaN, infinite or wrong.
        tau_plus: the prior probability, in [0, 1), that a negative has the anchor's class. 0: no correction.
        beta: concentration >= 0 of the weights on hard negatives. 0: every negative weighs the same.
        labels: (B,) integers, optional. Negatives with the anchor's label are left out, the papers' unbiased oracle:
            N is counted for each anchor, one without negatives adds 0, tau_plus must be 0. Below 0: unknown.
        intra_view: False compares an anchor with other views alone, as CLIP does images with texts: N = (V-1)(B-1).
        normalize: False takes s of the rows as they are, of any length.
        chunk_size: samples along a tile of s (default: as many as fit a fixed size). It changes speed, not values.

    Returns a scalar: float64 if a view is float64, else float32, under autocast too. NaN in a view gives NaN.
    Raises ValueError, which names the argument and what it got; RuntimeError in backward with create_graph=True.

    Under an initialised torch.distributed group, each rank passes its own samples, equally many, and gets the loss of
    the whole batch. The gradient at its views is scaled so that DistributedDataParallel's mean over ranks is the whole
    batch's gradient. A tensor temperature gets the whole batch's gradient on every rank.
    """
    _check(views, temperature, tau_plus, beta, labels, chunk_size)
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in views) else torch.float32
    # An anchor's negatives are in its own tower, which holds all views, or in all other towers, of one view each.
    z = torch.stack([z.to(dtype) for z in views], 1 if intra_view else 0)  # V x (B, D) -> (B, V, D) or (V, B, D)
    z = z.unsqueeze(0 if intra_view else 2)  # -> (T towers, B, U views in each, D)
    learnable = isinstance(temperature, torch.Tensor)
    t = temperature.to(dtype).reshape(()) if learnable else z.new_full((), temperature)
    # Unit rows bound |s| by 1/t. Within this range, sums of exponentials need no maximum taken out.
    bounded = normalize and not learnable and (1 + beta) / temperature <= 0.7 * math.log(torch.finfo(dtype).max)
    norm = z.norm(dim=-1, keepdim=True).clamp(min=1e-12) if normalize else 1
    y = z / (norm * t.detach().sqrt())  # so that s = y·y'
    return _Loss.apply(y, t, tau_plus, beta, labels, chunk_size, bounded, torch.is_grad_enabled())


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


def _check(views, temperature, tau_plus, beta, labels, chunk_size):
    def found(x):
        return f'{tuple(x.shape)} {x.dtype} on {x.device}' if isinstance(x, torch.Tensor) else repr(x)[:80]

    z = views[0] if views else None
    if len(views) < 2 or not all(isinstance(x, torch.Tensor) and x.ndim == 2 and x.is_floating_point()
                                 and x.shape == z.shape and x.device == z.device for x in views):
        raise ValueError('views must be 2 or more floating-point tensors (B, D) of one shape on one device, each an '
                         f'argument of its own, contrastive_loss(z1, z2); got {"; ".join(map(found, views))}')
    if len(z) * _ranks()[0] < 2:
        raise ValueError(f'views must hold at least 2 samples, got {len(z)}')
    for name, x, high, words in (('temperature', temperature, math.inf, f'positive (a tensor: on {z.device})'),
                                 ('tau_plus', tau_plus, 1, 'in [0, 1)'), ('beta', beta, math.inf, 'at least 0')):
        if isinstance(x, torch.Tensor):
            fits = name == 'temperature' and x.numel() == 1 and x.is_floating_point() and x.device == z.device
        else:
            fits = hasattr(x, '__float__') and 0 <= x < high and (x > 0 or name != 'temperature')
        if not fits:
            raise ValueError(f'{name} must be a number, {words}; got {found(x)}')
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f'chunk_size must be an integer of at least 1, got {found(chunk_size)}')
    if labels is not None and not (isinstance(labels, torch.Tensor) and labels.shape == z.shape[:1] and labels.device
                                   == z.device and not labels.is_floating_point() and not labels.is_complex()):
        raise ValueError(f'labels must be a tensor of ({len(z)},) integers on {z.device}, got {found(labels)}')
    if labels is not None and tau_plus != 0:
        raise ValueError(f'tau_plus must be 0 with labels, which leave no false negatives, got {tau_plus}')


class _Loss(torch.autograd.Function):
    """The mean of the objective. Its gradient is computed with its value, so that no similarities outlive the call."""

    @staticmethod
    def forward(ctx, y, t, tau_plus, beta, labels, chunk_size, bounded, with_grad):
        with torch.autocast(y.device.type, enabled=False):
            (T, b, U, D), (world, rank) = y.shape, _ranks()
            V, B, first = T * U, b * world, b * rank  # first: the place of this rank's samples in the whole batch
            labels, same = (None, 1) if labels is None else _classes(labels, first, world)
            N = (y.new_zeros(T, b, U) + max(U, T - 1) * (B - same)).flatten()  # -> (A,)
            rows, columns = y.flatten(0, 2), _gather(y.transpose(0, 1), world).transpose(0, 1).flatten(0, 2)  # (V B, D)
            side = U * (chunk_size or max(1, SIDE.get(y.device.type, 2**8) // U))
            tiles = _Tiles(rows, columns, T, side, (U, b, B, first, labels))
            S, W, offset = _sums(tiles, N, beta, bounded)

            def loss(S, W, y, t):
                s_pos = [(y * y.roll(k, 0 if T > 1 else 2)).sum(-1).flatten() for k in range(1, V)]  # (A,) each
                return objective(S, W, torch.stack(s_pos, 1), N, t, tau_plus, offset)

            (total, pullback), count = torch.func.vjp(loss, S, W, y, t), V * B * (V - 1)
            dt = torch.zeros_like(t)
            if with_grad := with_grad and any(ctx.needs_input_grad):
                dS, dW, dy, dt = pullback(torch.full_like(total, world / count))
                dy = dy.reshape(rows.shape)
                d_columns = dy if world == 1 else torch.zeros_like(columns)
                _add_gradient(tiles, dy, d_columns, (1 + beta) * dS, beta * dW, offset, beta)
                if world > 1:  # the anchors of each rank act on the rows of all
                    dist.all_reduce(d_columns)
                    dy += d_columns.view(T, B, U, D)[:, first:first + b].flatten(0, 2)
                dt = (dt - (rows * dy).sum() / (2 * t)) / world  # rows are proportional to t^(-1/2)
            results = torch.stack([total / count, dt])
            if world > 1:
                dist.all_reduce(results)
            if with_grad:
                ctx.save_for_backward(dy.view_as(y), results[1])
            return results[0]

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled, torch refuses by itself
            raise RuntimeError('contrastive_loss has a first derivative only: no backward with create_graph=True')
        return *[grad_output * x for x in ctx.saved_tensors], *[None] * 6


def _classes(labels, first, world):
    """This rank's labels (b,) -> all ranks', in which each unknown one is its own, and how many have each: (b, 1)."""
    own = torch.where(labels < 0, -1 - torch.arange(first, first + len(labels), device=labels.device), labels).long()
    labels = _gather(own, world)
    ordered = labels.sort().values
    return labels, (torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own))[:, None]


class _Tiles:
    """Similarities s = rows @ columns.T of anchors (A, D) with (C, D), of which a tile is computed at a time."""

    def __init__(self, rows, columns, T, side, views):
        self.rows, self.columns, self.views, self.kept = rows, columns, views, {}
        self.mirrored = len(rows) == len(columns)  # s is symmetric: half of the tiles do
        slices = [[(u, slice(k, min(k + side, u * n + n))) for u in range(T) for k in range(u * n, u * n + n, side)]
                  for n in (len(rows) // T, len(columns) // T)]  # none across two of T towers
        self.tiles = [(i, j) for k, (u, i) in enumerate(slices[0]) for v, j in slices[1][k if self.mirrored else 0:]
                      if T == 1 or u != v]
        numbers = sum((i.stop - i.start) * (j.stop - j.start) for i, j in self.tiles)
        self.few = numbers <= KEPT.get(rows.device.type, 2**24)

    def __iter__(self):
        """Yield each tile's slices and s, and its sides: anchors, and the dimension over which their sums run."""
        for n, (i, j) in enumerate(self.tiles):
            s = self.kept[n] if n in self.kept else self.similarities(i, j)
            if self.few:
                self.kept[n] = s
            yield i, j, s, ((i, 1), (j, 0))[:1 + (self.mirrored and i != j)]

    def similarities(self, i, j):
        """A tile of s, -inf between views of one sample or, with labels, of one label."""
        s = self.rows[i] @ self.columns[j].T
        U, b, B, first, labels = self.views
        k, m = first + i.start // U % b, j.start // U % B  # the first samples of rows and of columns
        by_sample = s.view(len(s) // U, U, -1, U)  # (rows, columns) -> (samples, views, samples, views)
        if labels is None:
            by_sample.diagonal(k - m, 0, 2).fill_(-math.inf)  # empty where rows and columns share no sample
        else:
            same = labels[k:k + by_sample.shape[0], None] == labels[m:m + by_sample.shape[2]]
            by_sample.masked_fill_(same[:, None, :, None], -math.inf)
        return s


def _exponentials(s, sides, offset, beta):
    """Yield u = exp(s), w = exp(beta s) and the sides that they serve: all, or one with its own offset."""
    for x, served in [(s, sides)] if offset is None else [(s - offset[a].unsqueeze(d), [(a, d)]) for a, d in sides]:
        u = x.exp()
        yield u, u if beta == 1 else (beta * x).exp_() if beta else None, served


def _sums(tiles, N, beta, bounded):
    """The objective's S, W and offset. Without negatives S and W are 1, as the loss is 0 whatever they are."""
    offset = None
    if not bounded:
        offset = torch.full_like(N, -1e30)
        for _, _, s, sides in tiles:
            for a, d in sides:
                offset[a] = torch.maximum(offset[a], s.amax(d))
    S, W = torch.zeros_like(N), torch.zeros_like(N) if beta else N
    for _, _, s, sides in tiles:
        for u, w, served in _exponentials(s, sides, offset, beta):
            uw = u * w if beta else u
            for a, d in served:
                S[a].add_(uw.sum(d))
                if beta:
                    W[a].add_(w.sum(d))
    return S.masked_fill(N == 0, 1), W.masked_fill(N == 0, 1), offset


def _add_gradient(tiles, d_rows, d_columns, dS, dW, offset, beta):
    """Add dL/drows and dL/dcolumns, given (1 + beta) dL/dS and beta dL/dW."""
    for i, j, s, sides in tiles:
        ds = None  # dL/ds = w (u dS + dW)
        for u, w, served in _exponentials(s, sides, offset, beta):
            g = u * sum(dS[a].unsqueeze(d) for a, d in served)
            if beta:
                for a, d in served:
                    g.add_(dW[a].unsqueeze(d))
                g.mul_(w)
            ds = g if ds is None else ds.add_(g)
        whole = tiles.mirrored and i == j
        d_rows[i].addmm_(ds + ds.T if whole else ds, tiles.columns[j])
        if not whole:
            d_columns[j].addmm_(ds.T, tiles.rows[i])


def _ranks():
    """The world size and this process's rank: 1 and 0 without an initialised group."""
    return (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)


def _gather(x, world):
    """(b, ...) on each rank -> (B, ...), the whole batch in rank order."""
    if world == 1:
        return x
    whole = x.new_empty(world * len(x), *x.shape[1:])
    getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)(whole, x.contiguous())  # renamed in torch 2.14
    return whole
