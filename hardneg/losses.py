"""Contrastive losses in one function: SimCLR's, debiased, hard-negative, and CLIP's.

    from hardneg import contrastive_loss  # or copy this file: from losses import contrastive_loss

    loss = contrastive_loss(z1, z2)  # (B, D) each; hard negatives with tau_plus 0.1, beta 1
    loss = contrastive_loss(z1, z2, beta=0)  # debiased
    loss = contrastive_loss(z1, z2, beta=0, tau_plus=0)  # SimCLR's NT-Xent
    loss = contrastive_loss(z1, z2, beta=0, tau_plus=0, intra_view=False)  # CLIP's

Read `textbook_loss` first: it is the objective as the papers write it. For two views
`contrastive_loss` has the same value and gradient. It computes the similarity matrix one tile at a
time and never holds all of it. The file needs torch and the standard library alone.

HCL: Robinson, Chuang, Sra, Jegelka. Contrastive Learning with Hard Negative Samples. ICLR 2021,
arXiv 2010.04592.
DCL: Chuang, Robinson, Lin, Torralba, Jegelka. Debiased Contrastive Learning. NeurIPS 2020,
arXiv 2007.00224.
SimCLR: Chen, Kornblith, Norouzi, Hinton. A Simple Framework for Contrastive Learning of Visual
Representations. ICML 2020, arXiv 2002.05709.
CLIP: Radford et al. Learning Transferable Visual Models From Natural Language Supervision.
ICML 2021, arXiv 2103.00020.

From "Contrastive learning with hard negatives". MIT License, (c) 2026 its authors.
Its tests pass on torch 2.6 to 2.14.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

# Rows along a tile of similarities. On a CPU, 256 kB in float32: a tile stays in a core's cache.
TILE_SIZE = {'cpu': 2**8, 'cuda': 2**12}
LOG2_E = math.log2(math.e)


def textbook_loss(z1, z2, temperature=0.5, tau_plus=0.1, beta=1.0):
    """HCL's objective (its section 3) as usually written, from the whole matrix of similarities.

    Ng is the estimator of DCL's equation 7, with HCL's weights on the negatives, and the loss has
    the form of DCL's equation 8. With beta=0 it is DCL's objective; with beta=0 and tau_plus=0,
    SimCLR's (its equation 1).

    Args:
        z1, z2: (B, D) embeddings, B >= 2. Row i of each is a view of image i.
        temperature: t > 0, a number. exp((1 + beta) / t) must be finite in the dtype of z1.
        tau_plus: the prior probability, in [0, 1), that a negative has the anchor's class.
        beta: concentration >= 0 of the weights on hard negatives.

    Returns the mean over the 2B anchors, a scalar. Memory grows with B^2.
    """
    B = len(z1)
    N = 2 * B - 2
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # 2 x (B, D) -> (2B, D)
    similarities = (z @ z.T / temperature).exp()
    same_image = torch.eye(B, dtype=torch.bool, device=z.device).repeat(2, 2)  # (B, B) -> (2B, 2B)
    neg = similarities[~same_image].view(2 * B, N)  # (2B N,) -> (2B, N)
    pos = similarities.diagonal(B).repeat(2)  # (B,) -> (2B,)

    weight = neg**beta
    R = N * (weight * neg).sum(1) / weight.sum(1)
    Ng = (R - tau_plus * N * pos) / (1 - tau_plus)
    Ng = Ng.clamp(min=N * math.exp(-1 / temperature))
    return -(pos / (pos + Ng)).log().mean()


def contrastive_loss(
    *views,
    negatives=None,
    temperature=0.5,
    tau_plus=0.1,
    beta=1.0,
    labels=None,
    intra_view=True,
    normalize=True,
    chunk_size=None,
    group=None,
):
    """HCL's objective, which contains DCL's and SimCLR's and, between two encoders, CLIP's.

    With s = z·z'/t for rows z of unit length, each of the V B anchors has V - 1 positives and
    N = V (B - 1) + K negatives, and

        R    = N sum_j exp((1 + beta) s_j) / sum_j exp(beta s_j)     over its negatives j
        P    = mean of exp(s_v), not weighted by beta                over its positives v
        Ng   = max((R - tau_plus N P) / (1 - tau_plus), N exp(-1/t))
        loss = mean of -log(exp(s_v) / (exp(s_v) + Ng))              over anchors and positives

    The gradient flows through both sums of R. Where the floor N exp(-1/t) is active, it flows
    through Ng to t alone. With tau_plus=0, Ng is R. An anchor without negatives adds 0.

    Args:
        views: V >= 2 floating-point tensors (B, D) on one device. Row i of each is a view of
            sample i.
        negatives: (K, D), optional: further negatives of every anchor, such as a queue. They get
            a gradient if they require one.
        temperature: t > 0, a number or a tensor of one element. A tensor gets a gradient, and its
            value is not checked.
        tau_plus: the prior probability, in [0, 1), that a negative has the anchor's class.
            0: no correction.
        beta: concentration >= 0 of the weights on hard negatives. 0: all weigh the same.
        labels: (B,) integers, optional. Views with the anchor's label are no negatives, which is
            the papers' unbiased oracle. N is counted for each anchor, and tau_plus must be 0.
            A label below 0 is unknown, as are those of `negatives`: no other sample shares it.
        intra_view: False compares an anchor with other views alone, as CLIP does images with
            texts. N is (V - 1) (B - 1), and K more for the anchors of the first view, which alone
            meet `negatives`.
        normalize: False takes s of the rows as they are, of any length. The floor is that of unit
            rows, so tau_plus should be 0 then.
        chunk_size: samples along a tile of s (default: TILE_SIZE). It changes speed, not values.
        group: a torch.distributed ProcessGroup. None: the default group, if initialised.
            False: this process alone.

    Returns a scalar: float64 if a view or a negative is float64, else float32, under autocast too.
    NaN in a view gives NaN.

    Raises ValueError that names the argument and what it got. A second derivative raises
    RuntimeError.

    Each rank of a group passes its own samples, equally many, and gets the loss of the whole
    batch. `negatives` meet the anchors of their rank alone. Gradients at views and negatives are
    scaled so that DistributedDataParallel's mean over ranks is the whole batch's gradient. A
    tensor temperature gets the whole batch's gradient on every rank. Unequal numbers of samples
    are a ValueError on every rank on a CPU. On a GPU the check would make the host wait, and
    compiled code has none: there the job hangs or crashes.
    """
    _check_rows(views, negatives)
    _check_numbers(temperature, tau_plus, beta, chunk_size, views[0].device)
    _check_labels(labels, tau_plus, views[0])
    _check_group(group, views[0])

    device = views[0].device
    dtype = _dtype(views, negatives)
    if beta < torch.finfo(dtype).tiny:
        beta = 0
    world, rank = _ranks(group)
    V = len(views)
    b, D = views[0].shape  # this rank's samples; from here on B is all ranks'
    B = world * b
    first = rank * b

    with torch.autocast(device.type, enabled=False):
        t = _temperature(temperature, dtype, device, group)
        z = [_scaled(view.to(dtype), t, normalize) for view in views]
        rows = torch.cat(z)  # V x (b, D) -> (V b, D)
        columns = None
        if world > 1:
            own = torch.stack(z, 1)  # V x (b, D) -> (b, V, D)
            whole = _Gather.apply(own, group)  # (b, V, D) -> (B, V, D)
            columns = whole.transpose(0, 1).flatten(0, 1)  # (B, V, D) -> (V, B, D) -> (V B, D)
        extra = rows.new_empty(0, D)
        if negatives is not None:
            extra = _scaled(negatives.to(dtype), t, normalize)

        classes = None
        of_same_class = 1
        if labels is not None:
            classes, of_same_class = _classes(labels, first, group)
        N = rows.new_zeros(V, b)
        if intra_view:
            N += V * (B - of_same_class) + len(extra)
        else:
            N += (V - 1) * (B - of_same_class)
            N[0] += len(extra)
        N = N.flatten()  # (V, b) -> (V b,)

        plan = _Plan(
            own_samples=b,
            samples=B,
            first=first,
            tile_size=chunk_size or TILE_SIZE.get(device.type, TILE_SIZE['cuda']),
            intra_view=intra_view,
            beta=beta,
            bounded=normalize and _is_bounded(temperature, beta, dtype),
            extra_needs_grad=extra.requires_grad,
        )
        log_R, _ = _LogR.apply(rows, columns, extra, classes, N, plan)
        s_pos = torch.cat([_positives(z, v) for v in range(V)])  # V x (b, V - 1) -> (V b, V - 1)
        terms = loss_terms(log_R, s_pos, N, t, tau_plus)
        loss = terms.sum() / (V * B * (V - 1))
        if world > 1:
            loss = _sum_over_ranks(loss, group)
    return loss


def loss_terms(log_R, s_pos, N, t, tau_plus):
    """-log(exp(s_v) / (exp(s_v) + Ng)) for each anchor and each of its positives v, in log space.

    Args:
        log_R: (A,) log(R / N) of each anchor.
        s_pos: (A, V - 1) its similarities s_v with its positives.
        N: (A,) the number of its negatives.
        t: the temperature, a scalar tensor.
        tau_plus: a number in [0, 1).

    Returns (A, V - 1).
    """
    log_Ng = log_R  # R and Ng are without their factor N, which may be 0, until the end
    if tau_plus > 0:
        log_P = s_pos.logsumexp(1) - math.log(s_pos.shape[1])
        log_share = math.log(tau_plus) + log_P - log_R  # of tau_plus P in R
        log_floor = -1 / t
        at_floor = 1 - log_share.exp() <= (1 - tau_plus) * (log_floor - log_R).exp()
        # At the floor log1p(-share) may be infinite, and its gradient would be NaN.
        share = log_share.masked_fill(at_floor, -math.inf).exp()
        log_corrected = log_R + torch.log1p(-share) - math.log1p(-tau_plus)
        log_Ng = torch.where(at_floor, log_floor, log_corrected)
    x = (N.log() + log_Ng)[:, None] - s_pos
    return torch.logaddexp(x, torch.zeros_like(x))  # log(1 + e^x), and e^x = Ng / exp(s_v)


def _dtype(views, negatives):
    """float64 if one of the tensors is, else float32."""
    for x in (*views, negatives):
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _temperature(temperature, dtype, device, group):
    """t as a scalar tensor."""
    if not torch.is_tensor(temperature):
        return torch.full((), temperature, dtype=dtype, device=device)
    t = temperature.to(dtype).reshape(1)  # () or (1,) or (1, 1) -> (1,)
    if _ranks(group)[0] > 1:
        # All ranks' t are equal. The gradient at their mean is the mean of all ranks' gradients.
        t = _Gather.apply(t, group)
    return t.mean()


def _scaled(x, t, normalize):
    """x, of unit rows if normalize, divided by sqrt(t): products of such rows are similarities."""
    square = t
    if normalize:
        square = t * x.square().sum(1, keepdim=True).clamp(min=1e-24)
    return x * square.rsqrt()


def _positives(z, v):
    """Similarities (b, V - 1) of view v with the other views of the same samples."""
    return torch.stack([(z[v] * z[u]).sum(1) for u in range(len(z)) if u != v], 1)


def _is_bounded(temperature, beta, dtype):
    """Whether exp((1 + beta) / t), the largest exponential of unit rows, is far from overflow."""
    if torch.is_tensor(temperature):
        # On a GPU the host would wait for the value, and compiled code has none.
        if temperature.device.type != 'cpu' or torch.compiler.is_compiling():
            return False
        temperature = float(temperature.detach())
    return 1 + beta <= 0.7 * math.log(torch.finfo(dtype).max) * temperature


class _Plan(NamedTuple):
    """How the tiles are computed. Rows (V b, D) and columns (V B, D) come view by view."""

    own_samples: int  # b, those of this rank
    samples: int  # B, those of all ranks
    first: int  # the place of this rank's first sample among them
    tile_size: int  # rows and columns of a tile, at most
    intra_view: bool
    beta: float
    bounded: bool  # False: the sums are relative to a maximum
    extra_needs_grad: bool


class _LogR(torch.autograd.Function):
    """log(R / N) of each anchor, which is log S - log W with the sums over its negatives j

        S = sum_j exp((1 + beta) s_j) and W = sum_j exp(beta s_j).

    Only the sums are kept for backward, which computes the tiles again. The result is one number
    and not the two logs, which may be thousands each and are coarse in float32 then.
    """

    @staticmethod
    def forward(rows, columns, extra, classes, N, plan):
        """As for _tiles, and N (V b,) -> log(R / N) (V b,) and S, W and their offsets (3, V b).

        The sums are of s less the anchor's offset: 0, or the largest s where s is not bounded.
        """
        sums = N.new_zeros(3, len(N))
        S, W, offset = sums
        if not plan.bounded:
            offset.fill_(-1e30)
        for i, j, s, also_transposed in _tiles(rows, columns, extra, classes, plan):
            if not plan.bounded:
                _raise_offset(sums[:, i], s.amax(1), plan.beta)
            u, w = _exponentials(s, offset[i, None], plan)
            _add_sums(S[i], W[i], u, w, 1)
            if also_transposed:
                if not plan.bounded:
                    _raise_offset(sums[:, j], s.amax(0), plan.beta)
                    u, w = _exponentials(s, offset[j], plan)
                _add_sums(S[j], W[j], u, w, 0)
        if plan.beta == 0:
            W.copy_(N)
        S.masked_fill_(N == 0, 1)  # any finite R will do where there are no negatives
        W.masked_fill_(N == 0, 1)
        return S.log() - W.log() + offset / LOG2_E, sums

    @staticmethod
    def setup_context(ctx, inputs, output):
        rows, columns, extra, classes, _, plan = inputs
        _, sums = output
        ctx.plan = plan
        ctx.save_for_backward(rows, columns, extra, classes, sums)
        ctx.mark_non_differentiable(sums)

    @staticmethod
    def backward(ctx, d_log_R, _):
        rows, columns, extra, classes, sums = ctx.saved_tensors
        S, W, offset = sums
        beta = ctx.plan.beta
        dS = (1 + beta) * d_log_R / S
        dW = -beta * d_log_R / W
        coefficients = torch.stack([dS, dW, offset])  # 3 x (V b,) -> (3, V b)
        gradients = _Gradient.apply(rows, columns, extra, classes, coefficients, ctx.plan)
        return *gradients, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradient of _LogR, as a Function of its own so that a second derivative is an error."""

    @staticmethod
    def forward(rows, columns, extra, classes, coefficients, plan):
        """As for _tiles, and (1 + beta) dL/dS, beta dL/dW and the offsets: coefficients (3, V b).

        Returns the gradients at rows, columns (None without them) and extra (None if not needed).
        """
        symmetric = columns is None
        d_rows = torch.zeros_like(rows)
        d_columns = None
        if not symmetric:
            d_columns = torch.zeros_like(columns)
        d_extra = None
        if plan.extra_needs_grad:
            d_extra = torch.zeros_like(extra)

        with torch.autocast(rows.device.type, enabled=False):
            for i, j, s, _ in _view_tiles(rows, columns, classes, plan):
                of_rows = coefficients[:, i, None]  # (3, m) -> (3, m, 1)
                if not symmetric:
                    ds = _tile_gradient(s, of_rows, plan)
                    d_rows[i].addmm_(ds, columns[j])
                    d_columns[j].addmm_(ds.T, rows[i])
                    continue
                of_columns = coefficients[:, None, j]  # (3, n) -> (3, 1, n)
                if plan.bounded:
                    # Both have offset 0, and so the same exponentials.
                    ds = _tile_gradient(s, of_rows + of_columns, plan)
                else:
                    ds = _tile_gradient(s, of_rows, plan) + _tile_gradient(s, of_columns, plan)
                d_rows[i].addmm_(ds, rows[j])
                if i != j:  # a tile on the diagonal is its own transpose
                    d_rows[j].addmm_(ds.T, rows[i])
            for i, j, s, _ in _extra_tiles(rows, extra, plan):
                ds = _tile_gradient(s, coefficients[:, i, None], plan)
                d_rows[i].addmm_(ds, extra[j])
                if d_extra is not None:
                    d_extra[j].addmm_(ds.T, rows[i])
        return d_rows, d_columns, d_extra

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError('contrastive_loss has a first derivative only, not a second one')


def _tiles(rows, columns, extra, classes, plan):
    """All tiles of similarities of the rows: with the columns, then with extra negatives."""
    yield from _view_tiles(rows, columns, classes, plan)
    yield from _extra_tiles(rows, extra, plan)


def _view_tiles(rows, columns, classes, plan):
    """Yield slices i and j, the tile of similarities of rows[i] and columns[j], and whether the
    transposed tile counts, too.

    Without columns the rows stand for them. The matrix is symmetric then: the tile at (j, i) is
    the transpose of that at (i, j), and only one of the two comes.

    The tiles are s * log2(e), since exp2 is several times faster than exp on some CPUs. They are
    -inf where a column is not a negative of a row. The caller may overwrite them.

    Args:
        rows: (V b, D), columns: (V B, D) or None, view by view.
        classes: (B,) integers, or None where each sample is a class of its own.
    """
    symmetric = columns is None
    if symmetric:
        columns = rows
    row_slices = _slices(len(rows), plan.own_samples, plan.tile_size)
    column_slices = _slices(len(columns), plan.samples, plan.tile_size)
    for i in row_slices:
        scaled = rows[i] * LOG2_E
        for j in column_slices:
            same_view = i.start // plan.own_samples == j.start // plan.samples
            if same_view and not plan.intra_view:
                continue
            if symmetric and j.start < i.start:
                continue
            s = scaled @ columns[j].T
            k = plan.first + i.start % plan.own_samples  # the tile's first samples
            m = j.start % plan.samples
            if classes is None:
                s.diagonal(k - m).fill_(-math.inf)  # empty where no sample is in both slices
            else:
                same_class = classes[k : k + s.shape[0], None] == classes[m : m + s.shape[1]]
                s.masked_fill_(same_class, -math.inf)
            yield i, j, s, symmetric and i != j


def _extra_tiles(rows, extra, plan):
    """Yield the same for the rows that meet extra negatives. No tile counts transposed."""
    anchors = len(rows)
    if not plan.intra_view:
        anchors = plan.own_samples
    for i in _slices(anchors, plan.own_samples, plan.tile_size):
        scaled = rows[i] * LOG2_E
        for j in _slices(len(extra), len(extra), plan.tile_size):
            s = scaled @ extra[j].T
            yield i, j, s, False


def _slices(length, part, tile_size):
    """Slices of at most `tile_size` that cover `length`, none across two parts of length `part`."""
    slices = []
    for start in range(0, length, max(part, 1)):
        for k in range(start, start + part, tile_size):
            slices.append(slice(k, min(k + tile_size, start + part)))
    return slices


def _raise_offset(sums, highest, beta):
    """Make `highest` (n,) the offset of sums (3, n) wherever it is above the present one."""
    S, W, offset = sums
    raised = torch.maximum(offset, highest)
    drop = offset - raised
    S.mul_(((1 + beta) * drop).exp2())
    W.mul_((beta * drop).exp2())
    offset.copy_(raised)


def _exponentials(s, offset, plan):
    """exp(s) and, None for beta 0, exp(beta s) of a tile, which may be overwritten."""
    if not plan.bounded:
        s = s - offset
    w = None
    if plan.beta not in (0, 1):
        w = (plan.beta * s).exp2_()
    u = s.exp2_()
    if plan.beta == 1:
        w = u
    return u, w


def _add_sums(S, W, u, w, dim):
    """Add a tile's exponentials to the sums of the anchors along its other dimension."""
    if w is None:
        S.add_(u.sum(dim))
    else:
        S.add_((u * w).sum(dim))
        W.add_(w.sum(dim))


def _tile_gradient(s, coefficients, plan):
    """dL/ds = w (u dS + dW) of a tile, with u = exp(s) and w = exp(beta s).

    coefficients are those of _Gradient.
    """
    dS, dW, offset = coefficients
    u, w = _exponentials(s, offset, plan)
    ds = u * dS
    if w is not None:
        ds += dW
        ds *= w
    return ds


def _classes(labels, first, group):
    """Classes (B,) of all ranks' samples, and the sizes (b,) of the classes of this rank's samples.

    A sample whose label is below 0 gets a class below 0, its own.
    """
    places = torch.arange(first, first + len(labels), device=labels.device)
    own = torch.where(labels < 0, -1 - places, labels).long()
    classes = _gather(own, group)
    ordered = classes.sort().values
    below = torch.searchsorted(ordered, own)
    up_to = torch.searchsorted(ordered, own, right=True)
    return classes, up_to - below


def _ranks(group):
    """The world size and this process's rank: 1 and 0 without an initialised group."""
    if group is False or not dist.is_available() or not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def _gather(x, group):
    """(b, ...) on each rank -> (B, ...), the whole batch in rank order, without a gradient."""
    world, _ = _ranks(group)
    if world == 1:
        return x
    whole = x.new_empty(world * len(x), *x.shape[1:])
    # The first is the newer name of the second.
    gather = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)
    gather(whole, x.contiguous(), group=group)
    return whole


class _Gather(torch.autograd.Function):
    """_gather with a gradient, the sum of all ranks'."""

    @staticmethod
    def forward(x, group):
        return _gather(x, group)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, group = inputs
        ctx.group = group
        ctx.samples = len(x)

    @staticmethod
    def backward(ctx, d_whole):
        d_whole = d_whole.clone()
        dist.all_reduce(d_whole, group=ctx.group)
        _, rank = _ranks(ctx.group)
        first = rank * ctx.samples
        return d_whole[first : first + ctx.samples], None


def _sum_over_ranks(loss, group):
    """The sum of all ranks' losses. Its gradient is this rank's times the number of ranks."""
    world, _ = _ranks(group)
    whole = loss.detach().clone()
    dist.all_reduce(whole, group=group)
    own = world * loss
    return whole + (own - own.detach())  # adds 0, and the gradient


def _check_rows(views, negatives):
    words = 'views must be 2 or more floating-point tensors (B, D) of one shape on one device'
    _need(_are_views(views), f'{words}, each an argument', *views)
    if negatives is not None:
        D = views[0].shape[1]
        device = views[0].device
        fits = _is_real(negatives, device) and negatives.ndim == 2 and negatives.shape[1] == D
        words = f'negatives must be a floating-point tensor (K, {D}) on {device}'
        _need(fits, words, negatives)


def _are_views(views):
    for z in views:
        if not torch.is_tensor(z) or not _is_real(z, views[0].device):
            return False
        if z.ndim != 2 or len(z) == 0 or z.shape != views[0].shape:
            return False
    return len(views) >= 2


def _check_numbers(temperature, tau_plus, beta, chunk_size, device):
    if _is_number(temperature):
        fits = 1e-300 <= temperature < math.inf
    else:
        fits = _is_real(temperature, device) and temperature.numel() == 1
    words = f'a positive number or a floating-point tensor of one element on {device}'
    _need(fits, f'temperature must be {words}', temperature)
    fits = _is_number(tau_plus) and 0 <= tau_plus < 1
    _need(fits, 'tau_plus must be a number in [0, 1)', tau_plus)
    fits = _is_number(beta) and 0 <= beta < math.inf
    _need(fits, 'beta must be a number of at least 0', beta)
    if chunk_size is not None:
        fits = isinstance(chunk_size, int) and chunk_size > 0
        _need(fits, 'chunk_size must be an integer > 0', chunk_size)


def _check_labels(labels, tau_plus, z):
    if labels is not None:
        fits = torch.is_tensor(labels) and labels.shape == z.shape[:1] and labels.device == z.device
        fits = fits and not labels.is_floating_point() and not labels.is_complex()
        _need(fits, f'labels must be a tensor of ({len(z)},) integers on {z.device}', labels)
        words = 'tau_plus must be 0 with labels, which leave no false negatives'
        _need(tau_plus == 0, words, tau_plus)


def _check_group(group, z):
    if group is not None and group is not False:
        fits = dist.is_available() and isinstance(group, dist.ProcessGroup)
        _need(fits, 'group must be None, False or a ProcessGroup that holds this process', group)
    world, _ = _ranks(group)
    # On a GPU the host would wait for the numbers, and compiled code has none.
    if world > 1 and z.device.type == 'cpu' and not torch.compiler.is_compiling():
        numbers = _gather(torch.tensor([len(z)]), group).tolist()
        words = 'views must hold equally many samples on every rank'
        _need(min(numbers) == max(numbers), words, numbers)


def _is_real(x, device):
    """Whether x is a floating-point tensor on the device."""
    return torch.is_tensor(x) and x.is_floating_point() and x.device == device


def _is_number(x):
    return not torch.is_tensor(x) and hasattr(x, '__float__')


def _need(fits, words, *got):
    if not fits:
        got = '; '.join(_described(x) for x in got)
        raise ValueError(f'{words}, got {got}')


def _described(x):
    if torch.is_tensor(x):
        return f'{tuple(x.shape)} {x.dtype} on {x.device}'
    return repr(x)[:80]
