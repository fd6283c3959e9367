"""The objective against the papers' equations on the whole matrix, its limits and its invariants."""

import ast
import importlib.util
import math
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from hardneg import losses
from hardneg.losses import contrastive_loss


def unit_views(B, D, V=2, dtype=torch.float64, seed=0, correlation=0.5):
    """V views (B, D) of unit rows; those of one sample are alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(B, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(V, B, D, generator=generator, dtype=torch.float64)
    return [F.normalize(correlation * base + (1 - correlation) * e, dim=1).to(dtype) for e in noise]


def oracle(*views, temperature, tau_plus, beta, labels=None, intra_view=True, normalize=True, negatives=None,
           meet=None):
    """The objective from the whole matrix of similarities, in float64: nothing shared with losses.py but equations.

    meet, (V B, K): which anchors meet which further negatives (default: all of them, or the first view's alone).
    """
    V, B = len(views), len(views[0])
    z, t = torch.cat(views).double(), torch.as_tensor(temperature, dtype=torch.float64)  # V x (B, D) -> (V B, D)
    columns = torch.cat([z, z[:0] if negatives is None else negatives.double()])
    z, columns = (F.normalize(x, dim=1) if normalize else x for x in (z, columns))
    view, sample = torch.arange(V).repeat_interleave(B), torch.arange(B).repeat(V)
    other_view, other_sample = view != view[:, None], sample != sample[:, None]
    neg = other_sample & (other_view | intra_view)
    if labels is not None:
        neg &= (labels[sample] != labels[sample, None]) | (labels[sample] < 0)
    if meet is None:
        meet = ((view == 0) | intra_view)[:, None].expand(-1, len(columns) - V * B)
    neg, s = torch.cat([neg, meet], 1), z @ columns.T / t
    some = neg.any(1)  # an anchor without negatives adds 0
    s_pos = s[:, :V * B][other_view & ~other_sample].view(V * B, V - 1)[some]
    s, neg, P = s[some], neg[some], s_pos.exp().mean(1)
    N = neg.sum(1).double()
    R = N * ((beta * s).masked_fill(~neg, -math.inf).softmax(1) * s.exp()).sum(1)
    corrected, floor = (R - tau_plus * N * P) / (1 - tau_plus), N * (-1 / t).exp()
    Ng = torch.where(corrected < floor, floor, corrected) if tau_plus else R
    return (Ng[:, None] * (-s_pos).exp()).log1p().sum() / (V * B * (V - 1))


def value_and_gradient(f, views, **setting):
    """The value, and its gradient at the views or, flat, at views, a tensor temperature and negatives."""
    inputs = [z.detach().clone().requires_grad_() for z in views]
    further = {name: setting[name].detach().clone().requires_grad_() for name in ('temperature', 'negatives')
               if isinstance(setting.get(name), torch.Tensor)}
    value = f(*inputs, **(setting | further))
    value.backward()
    gradient = torch.stack([z.grad for z in inputs])
    return value.detach(), (gradient if not further else torch.cat(
        [gradient.flatten(), *(x.grad.flatten().to(gradient.dtype) for x in further.values())]))


def random_case(seed, sizes=range(1, 7)):
    """Views and a setting for contrastive_loss and oracle, in float64."""
    draw = random.Random(seed)
    B, D, V = draw.choice(sizes), draw.randint(2, 12), draw.randint(2, 4)
    views, t = unit_views(B, D, V, seed=seed, correlation=draw.random()), draw.uniform(0.08, 1)
    setting = dict(temperature=draw.choice([t, torch.tensor([t], dtype=torch.float64)]),
                   tau_plus=draw.choice([0, 0.01, 0.1, 0.5, 0.9]), beta=draw.choice([0, 0.5, 1, 3]),
                   intra_view=draw.random() < 0.5, normalize=draw.random() < 0.7)
    if draw.random() < 0.3:
        setting |= dict(labels=torch.tensor([draw.randint(-1, 2) for _ in range(B)]), tau_plus=0)
    if draw.random() < 0.7:
        setting['negatives'], = unit_views(draw.randint(0, 12), D, 1, seed=seed + 1)
    return [draw.uniform(0.1, 3) * z for z in views], setting  # rows of any length


@pytest.mark.parametrize('part', range(4))
def test_value_and_gradient_are_the_equations(part, monkeypatch):
    for seed in range(500 * part, 500 * (part + 1)):
        views, setting = random_case(seed)
        true_value, true_gradient = value_and_gradient(oracle, views, **setting)
        monkeypatch.setitem(losses.KEPT, 'cpu', 0 if seed % 3 else 2**24)
        value, gradient = value_and_gradient(contrastive_loss, views, chunk_size=(None, 1, 2, 3)[seed % 4], **setting)
        assert abs(value - true_value) <= 1e-12 * max(1, abs(true_value)), seed
        assert (gradient - true_gradient).norm() <= 1e-12 * max(1, true_gradient.norm()), seed
        if seed % 10 == 0:
            eps = 1e-5 if setting['normalize'] else 1e-4  # longer rows make s, and so its rounding, larger
            rounded = [z.float() for z in views]
            if 'negatives' in setting:
                setting['negatives'] = setting['negatives'].float()
            value, gradient = value_and_gradient(contrastive_loss, rounded, chunk_size=3, **setting)
            true_value, true_gradient = value_and_gradient(oracle, [z.double() for z in rounded], **setting)
            assert value.dtype == torch.float32 and abs(value - true_value) <= eps * max(1e-3, abs(true_value)), seed
            assert (gradient - true_gradient).norm() <= eps * max(1e-2, true_gradient.norm()), seed


class Live(TorchDispatchMode):
    """The most bytes that tensors made within have held at once."""

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = {x.untyped_storage() for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)}
        old = {x.untyped_storage()._cdata for x in tree_flatten([args, kwargs])[0] if isinstance(x, torch.Tensor)}
        self.storages |= {x._cdata: (StorageWeakRef(x), x.nbytes()) for x in made if x._cdata not in old}
        self.storages = {key: found for key, found in self.storages.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.storages.values()))
        return out


def test_a_queue_takes_the_memory_of_a_copy_and_tiles():
    """512 anchors and 65,536 rows: the copy, which is scaled, is 33.6 MB, and the matrix would be 134 MB."""
    views, queue = unit_views(256, 128, dtype=torch.float32), torch.randn(65536, 128)
    with Live() as live:
        contrastive_loss(*[z.requires_grad_() for z in views], negatives=queue).backward()
    assert 33.5e6 < live.peak < 40e6


def test_without_negatives_an_anchor_adds_0():
    z1, z2 = (z.requires_grad_() for z in unit_views(1, 8))
    for setting in (dict(), dict(temperature=0.01), dict(beta=0, tau_plus=0), dict(intra_view=False),
                    dict(negatives=torch.empty(0, 8)), dict(tau_plus=0, labels=torch.tensor([3]))):
        loss = contrastive_loss(z1, z2, **setting)
        assert loss == 0 and all(g.eq(0).all() for g in torch.autograd.grad(loss, (z1, z2)))


def test_negatives_alone_may_get_a_gradient():
    views, (negatives,) = unit_views(5, 4), unit_views(7, 4, 1, seed=1)
    f = partial(contrastive_loss, *views, temperature=0.4)
    assert torch.autograd.gradcheck(lambda x: f(negatives=x), negatives.requires_grad_())
    assert torch.autograd.gradcheck(lambda t: contrastive_loss(*views, temperature=t, negatives=negatives.detach()),
                                    torch.tensor(0.4, dtype=torch.float64, requires_grad=True))
    assert contrastive_loss(*views, negatives=negatives.bfloat16()).dtype == torch.float64
    assert contrastive_loss(*(z.half() for z in views), negatives=negatives).dtype == torch.float64


def test_default_tiles_are_visited_once_each_for_any_number_of_views(monkeypatch):
    """Two views fill one tile of 12 rows, three take two: a tile has as many samples fewer as there are views more."""
    products, matmul = [], torch.Tensor.__matmul__
    monkeypatch.setitem(losses.SIDE, 'cpu', 12)
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: products.append((*a.shape, *b.shape)) or matmul(a, b))
    for V, sides in ((2, [(12, 12)]), (3, [(12, 12), (12, 6), (6, 6)])):
        products.clear()
        contrastive_loss(*unit_views(6, 5, V))
        assert [(shape[0], shape[-1]) for shape in products if len(shape) == 4] == sides


def test_tiles_beyond_the_budget_are_computed_again(monkeypatch):
    """Kept: 3 products for 3 tiles of a symmetric matrix. Not kept: 6, for sums and gradient."""
    products, matmul = [], torch.Tensor.__matmul__
    views = [z.requires_grad_() for z in unit_views(8, 5)]
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: products.append(a.ndim) or matmul(a, b))
    for budget, expected in ((3 * 8 * 8, 3), (3 * 8 * 8 - 1, 6)):
        products.clear()
        monkeypatch.setitem(losses.KEPT, 'cpu', budget)
        contrastive_loss(*views, chunk_size=4)
        assert products.count(2) == expected


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.1, 0.5, 1])
@pytest.mark.parametrize('beta', [0, 0.01, 0.5, 1, 4, 16])
@pytest.mark.parametrize('tau_plus', [0, 0.1])
def test_float32_is_finite_and_right_at_every_temperature(temperature, beta, tau_plus):
    """At t = 0.01, exp(s) reaches e^100 and exp((1 + beta) s) e^1700: float32 holds e^88."""
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta)
    for correlation in (0, 0.2, 0.35, 0.6, 0.9):  # from random rows to nearly equal views, where the loss is tiny
        views = unit_views(24, 64, dtype=torch.float32, correlation=correlation)
        value, gradient = value_and_gradient(contrastive_loss, views, **setting)
        true_value, true_gradient = value_and_gradient(contrastive_loss, [z.double() for z in views], **setting)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
        assert abs(value - true_value) <= max(1e-5 * true_value, 1e-6)
        assert (gradient - true_gradient).norm() <= max(1e-3 * true_gradient.norm(), 1e-5)
        if correlation < 0.5:
            assert abs(value - true_value) <= 1e-5 * true_value
    # and float64 itself is the oracle's, which is written without a maximum taken out
    views = unit_views(6, 16)
    assert abs(contrastive_loss(*views, **setting) - oracle(*views, **setting)) <= 1e-10


@pytest.mark.parametrize('tau_plus, beta, V', [(0, 0, 2), (0.1, 0, 2), (0.1, 1, 2), (0.1, 2.5, 3), (0.9, 1, 2)])
def test_gradcheck(tau_plus, beta, V):
    views = [z.requires_grad_() for z in unit_views(5, 4, V)]
    assert torch.autograd.gradcheck(
        lambda *z: contrastive_loss(*z, temperature=0.4, tau_plus=tau_plus, beta=beta, chunk_size=2), views)


def test_temperature_gets_its_gradient_with_frozen_views_and_where_the_floor_is_active():
    z = F.normalize(torch.eye(4, dtype=torch.float64) - 1 / 4, dim=1)
    for views, setting in ((unit_views(5, 4), {}), (unit_views(5, 4, 3), dict(intra_view=False, beta=0, tau_plus=0)),
                           ([z, z], dict(tau_plus=0.5))):  # the last at its floor
        t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t: contrastive_loss(*views, temperature=t, **setting), t)  # noqa: B023
    t = torch.nn.Parameter(torch.tensor([0.4]))
    contrastive_loss(*unit_views(5, 4), temperature=t).backward()
    assert t.grad.shape == (1,) and t.grad.dtype == torch.float32


def test_a_tensor_temperature_is_not_read(monkeypatch):
    """Reading it would make the host wait for the device."""
    t = torch.tensor(0.4, requires_grad=True)
    for name in ('item', '__float__', '__bool__', 'tolist'):
        monkeypatch.setattr(torch.Tensor, name, lambda x: pytest.fail('the host waited'))
    contrastive_loss(*unit_views(5, 4), temperature=t).backward()


def test_second_derivatives_are_refused():
    z1, z2 = [z.requires_grad_() for z in unit_views(5, 4)]
    with pytest.raises(RuntimeError, match='first derivative only'):
        torch.autograd.grad(contrastive_loss(z1, z2), z1, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.gradgradcheck(contrastive_loss, (z1, z2))


def test_unit_length_is_of_no_matter_but_to_raw_products():
    """At unit rows the gradient is that of raw products without its part along them; longer rows change its scale."""
    views = unit_views(7, 5, correlation=0.3)
    value, gradient = value_and_gradient(contrastive_loss, views)
    raw_value, raw = value_and_gradient(contrastive_loss, views, normalize=False)
    z = torch.stack(views)
    torch.testing.assert_close(value, raw_value, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, raw - (raw * z).sum(-1, keepdim=True) * z, rtol=1e-10, atol=1e-14)
    assert (raw * z).sum(-1).abs().max() > 1e-3
    longer_value, longer = value_and_gradient(contrastive_loss, [views[0], 3 * views[1]])
    torch.testing.assert_close(longer_value, value, rtol=1e-13, atol=0)
    torch.testing.assert_close(longer, gradient / torch.tensor([1., 3.]).view(2, 1, 1), rtol=1e-10, atol=1e-14)
    assert contrastive_loss(views[0], 3 * views[1], normalize=False) > 1.1 * value


def test_two_towers_without_correction_and_weights_are_clip():
    """CLIP's loss is the mean of the cross-entropies of rows and of columns of one matrix."""
    images, texts = unit_views(12, 8)
    t = torch.tensor(0.07, dtype=torch.float64)

    def clip(images, texts, temperature):
        logits = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / temperature
        return (F.cross_entropy(logits, torch.arange(12)) + F.cross_entropy(logits.T, torch.arange(12))) / 2

    for temperature in (t, 0.07):
        found = value_and_gradient(contrastive_loss, [images, texts], temperature=temperature, beta=0, tau_plus=0,
                                   intra_view=False)
        expected = value_and_gradient(clip, [images, texts], temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_positives_of_more_than_two_views_weigh_the_same_whatever_beta():
    """P is the plain mean. All negatives are at right angles to the anchors, so that R = N for any beta."""
    z = torch.eye(6, dtype=torch.float64)[:, :4]
    anchor, near, far = z[0], F.normalize(z[0] + 0.2 * z[1], dim=0), F.normalize(z[0] + 2 * z[1], dim=0)
    views = [torch.stack([v, z[3]]) for v in (anchor, near, far)]
    t, tau, N = 0.5, 0.2, 3

    def term(a, b, c):
        pos = torch.stack([a @ b, a @ c]).div(t).exp()
        Ng = ((N - tau * N * pos.mean()) / (1 - tau)).clamp(min=N * math.exp(-1 / t))
        return -(pos / (pos + Ng)).log().mean()

    alone = term(z[3], z[3], z[3])
    expected = (term(anchor, near, far) + term(near, anchor, far) + term(far, anchor, near) + 3 * alone) / 6
    for beta in (0, 1, 3):
        assert contrastive_loss(*views, temperature=t, tau_plus=tau, beta=beta).item() == pytest.approx(expected.item())


@pytest.mark.parametrize('backend', ['eager', *(pytest.param(name, marks=pytest.mark.slow)
                                              for name in ('aot_eager', 'inductor'))])
def test_it_compiles_whole(backend):
    for setting in (dict(), dict(beta=0.5, tau_plus=0, labels=torch.arange(6) % 4, chunk_size=4),
                    dict(temperature=torch.tensor(0.1, dtype=torch.float64), intra_view=False),
                    dict(negatives=unit_views(7, 5, 1, seed=1)[0])):
        torch._dynamo.reset()
        compiled = torch.compile(contrastive_loss, fullgraph=not losses.OLD, backend=backend)
        torch.testing.assert_close(value_and_gradient(compiled, unit_views(6, 5), **setting),
                                   value_and_gradient(contrastive_loss, unit_views(6, 5), **setting))


def test_without_correction_and_weights_it_is_nt_xent():
    """NT-Xent is the cross-entropy of each anchor's similarities, its own left out, with the other view as target."""
    for length, dtype in ((1, torch.float64), (0.1, torch.float64), (30, torch.float64), (30, torch.float32)):
        z1, z2 = (length * z for z in unit_views(16, 8, dtype=dtype))
        z = torch.cat([z1, z2]).double()
        logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)  # up to 3,000, whose exponential is infinite
        target = torch.cat([torch.arange(16, 32), torch.arange(16)])
        found = contrastive_loss(z1, z2, temperature=0.3, tau_plus=0, beta=0, normalize=length == 1)
        torch.testing.assert_close(found.double(), F.cross_entropy(logits, target), atol=0,
                                   rtol=1e-12 if dtype == torch.float64 else 1e-5)


def test_floor_acts_where_negatives_are_farther_than_chance_and_stops_their_gradient():
    """Positives at cosine 1, negatives at -1 / (B - 1): R < tau_plus N P, so Ng = N exp(-1/t) exactly."""
    B, t = 4, 0.5
    z = F.normalize(torch.eye(B, dtype=torch.float64) - 1 / B, dim=1)
    N = 2 * B - 2
    expected = math.log1p(N * math.exp(-1 / t) / math.exp(1 / t))
    value, gradient = value_and_gradient(contrastive_loss, [z, z], temperature=t, tau_plus=0.5, normalize=False)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    assert (gradient.sum(0) @ z.T).diagonal().lt(0).all()  # each view is still pulled towards its positive,
    torch.testing.assert_close(gradient[0], gradient[0].mul(z).sum(1, keepdim=True) * z)  # and nowhere else
    assert contrastive_loss(z, z, temperature=t, tau_plus=0.01).item() > expected  # the correction alone, no floor


def test_beta_moves_gradient_from_easy_to_hard_negatives():
    """Two samples at right angles but one, 60 degrees off: what a step down the gradient does to their cosines."""
    z = torch.eye(4, dtype=torch.float64)
    z[1, :2] = torch.tensor([0.5, math.sqrt(0.75)])  # the hard negative of z[0]; z[2] and z[3] are easy ones
    pushes, values = [], []
    for beta in (0, 0.5, 1, 2):
        value, gradient = value_and_gradient(contrastive_loss, [z, z], beta=beta, tau_plus=0, temperature=0.5)
        moved = F.normalize(z - 1e-3 * gradient.sum(0), dim=1)
        pushes.append((z @ z.T - moved @ moved.T)[0])
        values.append(value.item())
    hard, easy = [p[1].item() for p in pushes], [p[2].item() for p in pushes]
    assert hard == sorted(hard) and easy == sorted(easy, reverse=True) and values == sorted(values)
    assert 2 * hard[0] < hard[3] and easy[0] > 2 * easy[3] > 0


def test_negative_labels_are_unknown():
    """As if each sample with one had a class of its own."""
    views = unit_views(5, 4)
    expected = value_and_gradient(contrastive_loss, views, tau_plus=0, labels=torch.tensor([0, 0, 5, 6, 7]))
    found = value_and_gradient(contrastive_loss, views, tau_plus=0, labels=torch.tensor([0, 0, -1, -1, -4]))
    assert all(map(torch.equal, found, expected))


def test_labels_may_be_any_integer():
    views, top = unit_views(5, 4), 2**63 - 1
    expected = contrastive_loss(*views, tau_plus=0, labels=torch.tensor([0, 0, 5, 6, 5]))
    assert contrastive_loss(*views, tau_plus=0, labels=torch.tensor([top, top, 5, top - 1, 5])) == expected
    assert contrastive_loss(*views, tau_plus=0, labels=torch.tensor([1, 1, -top - 1, 0, -top - 1])) > expected
    assert contrastive_loss(*views, tau_plus=0, labels=torch.tensor([1, 1, 7, 2, 7], dtype=torch.uint8)) == expected


def test_labels_leave_out_false_negatives():
    views = unit_views(6, 8)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    nothing_left_out = contrastive_loss(*views, tau_plus=0, labels=torch.arange(6))
    assert nothing_left_out == contrastive_loss(*views, tau_plus=0)
    value, gradient = value_and_gradient(contrastive_loss, views, tau_plus=0, labels=labels)
    assert value < nothing_left_out
    one_class, gradient = value_and_gradient(contrastive_loss, views, tau_plus=0, labels=torch.zeros(6).long())
    assert one_class == 0 and gradient.eq(0).all()


def test_low_precision_inputs_are_computed_in_float32_under_autocast_too():
    views = unit_views(16, 32, dtype=torch.bfloat16)
    expected = contrastive_loss(*[z.float() for z in views])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value, gradient = value_and_gradient(contrastive_loss, views)
    assert value == expected and value.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    assert contrastive_loss(views[0], views[1].double()).dtype == torch.float64


def test_nan_in_gives_nan_out():
    for setting in (dict(), dict(temperature=torch.tensor(0.5)), dict(tau_plus=0, labels=torch.arange(4)),
                    dict(negatives=torch.ones(2, 8))):
        views = unit_views(4, 8)
        views[0][1, 2] = math.nan
        assert contrastive_loss(*views, **setting).isnan()


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(B=st.integers(1, 8), D=st.integers(1, 16), V=st.integers(1, 4), seed=st.integers(0, 10**6),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       kind=st.sampled_from(['random', 'random', 'identical', 'opposite', 'zero', 'long', 'strided', 'integer']),
       temperature=st.sampled_from([0.01, 0.1, 0.5, 0.5, 1, 10, 0, -1, math.nan, math.inf, '0.5', None]),
       tau_plus=st.sampled_from([0, 0, 0.1, 0.5, 0.99, 1, -0.1, torch.tensor(0.1)]),
       beta=st.sampled_from([0, 0.5, 1, 2, 16, -1, math.inf, torch.ones(1, requires_grad=True)]),
       labelled=st.booleans(), intra_view=st.booleans(), learnable=st.booleans())
def test_finite_and_right_or_valueerror(B, D, V, seed, dtype, kind, temperature, tau_plus, beta, labelled, intra_view,
                                        learnable):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(V, B, 2 * D, generator=generator)[:, :, ::2]
    if kind == 'long':
        z = z * 1e4
    if kind == 'identical':
        z = z[:1, :1].expand(V, B, D)
    if kind == 'opposite':
        z = z[:1, :1] * torch.tensor([1.0, -1.0])[torch.arange(V * B) % 2].view(V, B, 1)
    if kind == 'zero':
        z = torch.zeros(V, B, D)
    z = z.to(torch.int64 if kind == 'integer' else dtype)
    views = [x if kind == 'strided' else x.contiguous() for x in z]
    labels = torch.randint(2, (B,), generator=generator) if labelled else None

    def number(x, low, high):
        return isinstance(x, (int, float)) and low <= x < high

    wrong = {'views': V < 2 or kind == 'integer', 'temperature': not number(temperature, 1e-9, math.inf),
             'tau_plus': not number(tau_plus, 0, 1) or (labelled and tau_plus != 0),
             'beta': not number(beta, 0, math.inf)}
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta, labels=labels, intra_view=intra_view)
    if any(wrong.values()):
        with pytest.raises(ValueError) as error:
            contrastive_loss(*views, **setting)
        assert wrong[str(error.value).split()[0]]
        return
    if learnable:
        setting['temperature'] = torch.tensor(float(temperature))
    value, gradient = value_and_gradient(contrastive_loss, views, **setting)
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and value >= 0
    if seed % 4 == 0 and B < 6:
        rows = [x.double() if dtype == torch.float64 else x.float() for x in views]
        assert value.item() == pytest.approx(oracle(*rows, **setting).item(), rel=2e-5, abs=1e-5)


Z = torch.zeros(4, 8)


@pytest.mark.parametrize('views, setting, message', [
    ([Z], {}, r'views must be 2 or more .* got \(4, 8\) torch.float32 on cpu$'),
    ([], {}, 'views must be 2 or more'),
    ([torch.zeros(2, 4, 8)], {}, r'each an argument, got \(2, 4, 8\)'),
    ([[Z, Z]], {}, 'each an argument'),
    ([Z, torch.zeros(5, 8)], {}, r'of one shape on one device.*\(4, 8\) .*; \(5, 8\)'),
    ([Z, Z.to('meta')], {}, 'on one device.* on cpu; .* on meta'),
    ([Z, Z.long()], {}, 'floating-point.*torch.int64'),
    ([Z, Z.numpy()], {}, 'tensors'),
    ([Z[0], Z[0]], {}, r'\(B, D\)'),
    ([Z[:0], Z[:0]], {}, r'views must be .* got \(0, 8\)'),
    ([Z, Z], dict(negatives=[1.0]), r'negatives must be a floating-point tensor \(K, 8\) on cpu, got \[1.0\]$'),
    ([Z, Z], dict(negatives=Z.long()), 'negatives must be a floating-point tensor .*int64'),
    ([Z, Z], dict(negatives=Z[:, :7]), r'negatives must be .* got \(4, 7\)'),
    ([Z, Z], dict(negatives=Z[0]), r'negatives must be .* got \(8,\)'),
    ([Z, Z], dict(negatives=Z.to('meta')), 'negatives must be .* on cpu, .* on meta'),
    ([Z, Z], dict(temperature=0), 'temperature must be a positive number .* got 0$'),
    ([Z, Z], dict(temperature=torch.ones(2)), r'temperature must be .* got \(2,\)'),
    ([Z, Z], dict(temperature=torch.tensor(1)), 'temperature must be .*int64'),
    ([Z, Z], dict(temperature=torch.tensor(1., device='meta')), 'temperature must be .* on cpu.* on meta'),
    ([Z, Z], dict(tau_plus=1), r'tau_plus must be a number in \[0, 1\), got 1$'),
    ([Z, Z], dict(tau_plus=torch.tensor(0.1, requires_grad=True)), 'tau_plus must be a number'),
    ([Z, Z], dict(beta=-0.5), 'beta must be a number of at least 0, got -0.5'),
    ([Z, Z], dict(beta=torch.tensor(1., requires_grad=True)), 'beta must be a number'),
    ([Z, Z], dict(chunk_size=0), 'chunk_size must be an integer > 0, got 0'),
    ([Z, Z], dict(chunk_size=2.5), 'chunk_size must be an integer > 0, got 2.5'),
    ([Z, Z], dict(tau_plus=0, labels=torch.zeros(3).long()), r'labels must be a tensor of \(4,\) integers on cpu, got'),
    ([Z, Z], dict(tau_plus=0, labels=[0, 1, 2, 3]), r'labels must be a tensor .* got \[0, 1, 2, 3\]'),
    ([Z, Z], dict(tau_plus=0, labels=torch.zeros(4)), 'labels must be a tensor .*float32'),
    ([Z, Z], dict(tau_plus=0, labels=torch.zeros(4, dtype=torch.complex64)), 'labels must be a tensor .*complex64'),
    ([Z, Z], dict(tau_plus=0, labels=torch.zeros(4, device='meta').long()), 'labels must be .* on cpu, .* on meta'),
    ([Z, Z], dict(labels=torch.zeros(4).long()), 'tau_plus must be 0 with labels'),
    ([Z, Z], dict(group=True), 'group must be None, False or a ProcessGroup that holds this process, got True'),
    ([Z, Z], dict(group=[0, 1]), r'group must be .* got \[0, 1\]'),
    ([Z, Z], dict(group=-100), 'group must be .* got -100'),  # new_group's for ranks that it leaves out
])
def test_wrong_arguments_are_named(views, setting, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*views, **setting)


def test_losses_imports_torch_and_the_standard_library_alone():
    tree = ast.parse((Path(losses.__file__)).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split('.')[0] for module in modules} <= {'torch', *sys.stdlib_module_names}


def test_it_needs_no_torch_distributed(monkeypatch):
    """Builds without it have torch.distributed with little more than is_available."""
    monkeypatch.setenv('WORLD_SIZE', '')
    for name in set(vars(torch.distributed)) - {'is_available'}:
        if not name.startswith('__'):
            monkeypatch.delattr(torch.distributed, name)
    monkeypatch.setattr(torch.distributed, 'is_available', lambda: False)
    spec = importlib.util.spec_from_file_location('copied', losses.__file__)
    copied = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copied)
    z1, z2 = unit_views(4, 8)
    assert copied.contrastive_loss(z1, z2) == copied.contrastive_loss(z1, z2, group=False) > 0
    with pytest.raises(ValueError, match='group must be'):
        copied.contrastive_loss(z1, z2, group=object())


def test_small_tiles_are_for_a_cpu_alone(monkeypatch):
    """Of 600 rows: 6 tiles of at most 256 x 256, which serve both sides, or one."""
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())  # it does not know the device meta
    matmul = torch.Tensor.__matmul__
    for device, tiles in (('cpu', 6), ('meta', 1)):
        products = []
        monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: products.append(a) or matmul(a, b))  # noqa: B023
        contrastive_loss(*torch.zeros(2, 300, 4, device=device))
        assert len(products) == tiles


SNIPPETS = {  # training steps of other projects
    'plain': '''
for x1, x2 in loader:
    loss = contrastive_loss(net(x1), net(x2), temperature=0.5, tau_plus=0.1, beta=1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
''',
    'ddp': '''
net = DistributedDataParallel(net)
for x1, x2 in loader:
    loss = contrastive_loss(*net(torch.cat([x1, x2])).chunk(2))  # the negatives are those of all ranks
    optimizer.zero_grad()
    loss.backward()  # DDP's mean over ranks is the whole batch's gradient
    optimizer.step()
''',
    'lightning': '''
class HardNegatives(LightningModule):
    def training_step(self, batch, batch_idx):
        x1, x2 = batch
        loss = contrastive_loss(self.net(x1), self.net(x2))
        self.log('train_loss', loss)
        return loss
''',
    'clip': '''
log_t = torch.nn.Parameter(torch.tensor(0.07).log())
optimizer = torch.optim.AdamW([*image_encoder.parameters(), *text_encoder.parameters(), log_t])
z1, z2, t = image_encoder(images), text_encoder(texts), log_t.exp().clamp(min=0.01)
loss = contrastive_loss(z1, z2, intra_view=False, temperature=t, beta=0.5, tau_plus=0)  # CLIP's: beta=0
loss.backward()
''',
    'graph': '''
edges1, edges2 = dropout_edge(data.edge_index, p=0.2)[0], dropout_edge(data.edge_index, p=0.4)[0]
z1, z2 = encoder(data.x, edges1), encoder(data.x, edges2)  # (nodes, D), two views of each node
loss = contrastive_loss(z1, z2, temperature=0.5, tau_plus=0.1, beta=1.0)
loss.backward()
optimizer.step()
''',
}


class Recorder(torch.nn.Module):
    """LightningModule's interface, as far as a training step uses it."""

    def log(self, name, value):
        self.logged = {name: value.item()}


def around(name, tmp_path):
    """What the snippet finds in its user's code, and the parameters that it trains."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 4)
    names = dict(torch=torch, contrastive_loss=contrastive_loss, net=net, LightningModule=Recorder,
                 loader=[torch.randn(2, 8, 6)], optimizer=torch.optim.SGD(net.parameters(), 0.1))
    if name == 'ddp':
        names['DistributedDataParallel'] = torch.nn.parallel.DistributedDataParallel
        torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    if name == 'clip':
        names |= dict(image_encoder=net, text_encoder=torch.nn.Linear(3, 4), images=torch.randn(8, 6),
                      texts=torch.randn(8, 3))
    if name == 'graph':
        pytest.importorskip('torch_geometric')
        from torch_geometric.data import Data
        from torch_geometric.nn import GCNConv
        from torch_geometric.utils import dropout_edge
        encoder = GCNConv(6, 4)
        names |= dict(encoder=encoder, dropout_edge=dropout_edge, optimizer=torch.optim.SGD(encoder.parameters(), 0.1),
                      data=Data(x=torch.randn(8, 6), edge_index=torch.randint(8, (2, 30))))
        net = encoder.lin
    return names, net.weight


@pytest.mark.parametrize('name', SNIPPETS)
def test_snippets_train(name, tmp_path):
    names, weight = around(name, tmp_path)
    before = weight.detach().clone()
    try:
        exec(SNIPPETS[name], names)
        if name == 'lightning':
            module = names['HardNegatives']()
            module.net = names['net']
            loss = module.training_step(names['loader'][0], 0)
            loss.backward()
            assert module.logged == {'train_loss': loss.item()}
        assert weight.grad.norm() > 0
        assert name in ('clip', 'lightning') or not torch.equal(weight, before)
        if name == 'clip':
            assert names['log_t'].grad.abs() > 0
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize('beta', [1e-320, 1e-40])
def test_a_beta_that_float32_does_not_hold_is_0(beta):
    z = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    for kwargs in dict(), dict(tau_plus=0), dict(tau_plus=0, labels=torch.arange(8) // 2):
        assert contrastive_loss(*z, beta=beta, **kwargs) == contrastive_loss(*z, beta=0, **kwargs)
