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

    where the gradient flows through both sums of R and, where the floor is active, through Ng by t alone.

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
    Raises ValueError, naming the argument that does not fit and what it got, and in backward RuntimeError with
    create_graph=True, since there is no second derivative.

    Under an initialised torch.distributed group, each rank passes its own samples, equally many, and gets the loss of
    the whole batch. The gradient at its views is scaled so that DistributedDataParallel's mean over ranks is the whole
    batch's gradient. A tensor temperature gets the whole batch's gradient on every rank.
    """
    _check(views, temperature, tau_plus, beta, labels, chunk_size)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in views) else torch.float32
    # An anchor's negatives are in its own tower, which holds all views, or in all other towers, of one view each.
    x = torch.stack([x.to(dtype) for x in views], 1 if intra_view else 0)  # V x (B, D) -> (B, V, D) or (V, B, D)
    x = x.unsqueeze(0 if intra_view else 2)  # -> (towers T, B, views in each P, D)
    t = temperature.to(dtype).reshape(()) if isinstance(temperature, torch.Tensor) else float(temperature)
    # Unit rows bound |s| by 1/t. Within this range, sums of exponentials need no maximum taken out.
    bounded = normalize and isinstance(t, float) and (1 + beta) / t <= 0.7 * math.log(torch.finfo(dtype).max)
    with_grad = torch.is_grad_enabled() and (x.requires_grad or getattr(t, 'requires_grad', False))
    return _ContrastiveLoss.apply(x, t, tau_plus, beta, labels, normalize, chunk_size, bounded, with_grad)


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


class _ContrastiveLoss(torch.autograd.Function):
    """By tiles of s, anchors i by columns j. In one process s is symmetric, and tiles on and above its diagonal serve i
    and j. They are visited for maxima, if exponentials need any, for sums, and for the gradient."""

    @staticmethod
    def forward(ctx, x, t, tau_plus, beta, labels, normalize, chunk_size, bounded, with_grad):
        with torch.autocast(x.device.type, enabled=False):
            (T, b, P, D), (world, rank) = x.shape, _ranks()
            V, B, first = T * P, b * world, b * rank  # first: the place of this rank's samples in the whole batch
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12) if normalize else 1
            z = x / norm
            rows, samples = z.flatten(0, 2), z.transpose(0, 1).flatten(1, 2)  # (T, b, P, D) -> (Vb, D), (b, V, D)
            columns = _gather(z.transpose(0, 1), world).transpose(0, 1).flatten(0, 2)  # (VB, D)
            own = torch.eye(V, dtype=torch.bool, device=x.device).view(T, 1, P, V)
            s_pos = (z @ samples.mT / t).masked_fill_(own, -math.inf)  # (T, b, P, V), of anchors and positives
            N = rows.new_full((V * b,), max(P, V - P) * (B - 1))
            if labels is not None:
                labels = torch.where(labels < 0, -1 - torch.arange(first, first + b, device=x.device), labels).long()
                labels_all = _gather(labels, world)
                ends = torch.searchsorted(labels_all.sort().values, torch.stack([labels, labels + 1]))
                N = (max(P, V - P) * (B - ends.diff(dim=0)[0])).to(N.dtype).repeat_interleave(P).repeat(T)

            def tile(i, j):
                s = scaled[i] @ columns[j].T
                k, m, window = i.start // P % b, j.start // P % B, s.view(len(s) // P, P, -1, P)
                if labels is None:
                    window.diagonal(first + k - m, 0, 2).fill_(-math.inf)  # empty where i and j share no sample
                else:
                    same = labels[k:k + len(window), None] == labels_all[m:m + window.shape[2]]
                    window.masked_fill_(same[:, None, :, None], -math.inf)
                return s

            def visit():
                """Every tile, and the sides it serves: anchors and the dimension over which their sums run."""
                for n, (i, j) in enumerate(pairs):
                    if n == len(kept) and keep:
                        kept.append(tile(i, j))
                    yield i, j, kept[n] if keep else tile(i, j), ((i, 1), (j, 0))[:2 if world == 1 else 1]

            def exponentials(s, sides):
                """u = exp(s) and w = exp(beta s), relative to the maxima of each side unless s is bounded."""
                for x, served in [(s, sides)] if bounded else [(s - top[a].unsqueeze(d), [(a, d)]) for a, d in sides]:
                    u = x.exp()
                    yield u, u if beta == 1 else (beta * x).exp_() if beta else None, served

            step, scaled, kept = P * (chunk_size or max(1, SIDE.get(x.device.type, 2**8) // P)), rows / t, []
            blocks = [[slice(k, min(k + step, u + n)) for u in range(0, T * n, n) for k in range(u, u + n, step)]
                      for n in (b * P, B * P)]  # of anchors and of columns, none in two towers
            pairs = [(i, j) for n, i in enumerate(blocks[0]) for j in blocks[1][n if world == 1 else 0:]
                     if T == 1 or i.start // b != j.start // B]
            keep = sum((i.stop - i.start) * (j.stop - j.start) for i, j in pairs) <= KEPT.get(x.device.type, 2**24)
            top = torch.full_like(N, 0 if bounded else -1e30)  # finite without negatives too
            for a, d, s in ((*side, s) for _, _, s, sides in visit() for side in sides) if not bounded else ():
                top[a] = torch.maximum(top[a], s.amax(d))
            S, W = torch.zeros_like(N), N.clone() if beta == 0 else torch.zeros_like(N)
            for i, j, s, sides in visit():
                for u, w, served in exponentials(s, sides[:1] if i == j else sides):  # such a tile is whole
                    for a, d in served:
                        S[a].add_((u * w if beta else u).sum(d))
                        W[a].add_(w.sum(d) if beta else 0)
            total, dS, dW, d_pos, dt = _anchors(S, W, top, N, s_pos.flatten(0, 2), t, tau_plus, beta)
            sums, count = torch.stack([total, dt]), V * B * (V - 1)
            if with_grad:
                grad = torch.zeros_like(rows)
                grad_columns = grad if world == 1 else torch.zeros_like(columns)
                for i, j, s, sides in visit():
                    G = None
                    for u, w, served in exponentials(s, sides):  # dL/ds = w (u dS - dW)
                        g = sum(dS[a].unsqueeze(d) for a, d in served) * u
                        g = g.sub_(sum(dW[a].unsqueeze(d) for a, d in served)).mul_(w) if beta else g
                        G = g if G is None else G.add_(g)
                    grad[i].addmm_(G, columns[j])
                    if world > 1 or i != j:
                        grad_columns[j].addmm_(G.T, rows[i])
                if world > 1:  # the anchors of each rank act on the rows of all
                    dist.all_reduce(grad_columns)
                    grad += grad_columns.view(T, B, P, D)[:, first:first + b].flatten(0, 2)
                d_pos = d_pos.view_as(s_pos)  # it acts on the anchor, and on the positive
                grad = grad.view_as(z) + d_pos @ samples + (d_pos.mT @ z).sum(0).unflatten(1, (T, P)).transpose(0, 1)
                radial = (z * grad.div_(t * count)).sum(-1, keepdim=True)
                sums[1] -= radial.sum() * count / (2 * t)  # t dL/dt = -sum(s dL/ds) = -sum(z·dL/dz) / 2, for s = z·z'/t
            if world > 1:
                dist.all_reduce(sums)
            if with_grad:
                ctx.save_for_backward(((grad - radial * z) / norm if normalize else grad) * world, sums[1] / count)
            return sums[0] / count

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # compiled, torch refuses by itself
            raise RuntimeError('contrastive_loss has a first derivative only: no backward with create_graph=True')
        grad, dt = ctx.saved_tensors
        return grad_output * grad, grad_output * dt if ctx.needs_input_grad[1] else None, *[None] * 7


def _anchors(S, W, top, N, s_pos, t, tau_plus, beta):
    """S = sum(u w), W = sum(w), top and N (A,), s_pos (A, V) -> the sum of losses, dS, dW, d_pos and, of floors, dt."""
    S, W, log_N = *(y.clamp(min=torch.finfo(y.dtype).tiny) for y in (S, W)), N.clamp(min=1).log()
    log_R = log_N + top + S.log() - W.log()
    log_P = s_pos.logsumexp(1) - math.log(s_pos.shape[1] - 1)
    ratio = (tau_plus * (log_N + log_P - log_R).clamp(max=80).exp()).clamp_(max=1)  # tau_plus N P / R
    log_Ng = log_R + torch.log1p(-ratio) - math.log1p(-tau_plus)
    floor = log_N - 1 / t
    active = (log_Ng <= floor) & (tau_plus > 0)  # uncorrected, R is below it by rounding alone
    x = torch.where(active, floor, log_Ng)[:, None] - s_pos
    x = x.masked_fill(s_pos.isneginf() | (N == 0)[:, None], -math.inf)
    loss = torch.logaddexp(x, torch.zeros_like(x)).sum()  # log(1 + e^x) = -log(e^s_pos / (e^s_pos + Ng))
    p = x.sigmoid()  # dL/dx: pulls the positive up and pushes Ng down, through R and P
    d_log_Ng = p.sum(1)
    d_log_R = torch.where(active, 0, d_log_Ng / (1 - ratio))
    d_pos, dt = -p - (d_log_R * ratio)[:, None] * s_pos.softmax(1), torch.where(active, d_log_Ng, 0).sum() / t**2
    return loss, (1 + beta) * d_log_R / S, beta * d_log_R / W, d_pos, dt


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
