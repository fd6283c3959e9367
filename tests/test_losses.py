"""The objective against the papers' equations on the whole matrix, its limits and invariants."""

import ast
import importlib.util
import json
import math
import random
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import golden
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from hardneg import losses
from hardneg.losses import contrastive_loss, textbook_loss


def unit_views(B, D, V=2, dtype=torch.float64, seed=0, correlation=0.5):
    """V views (B, D) of unit rows; those of one sample are alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(B, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(V, B, D, generator=generator, dtype=torch.float64)
    views = []
    for e in noise:
        z = F.normalize(correlation * base + (1 - correlation) * e, dim=1)
        views.append(z.to(dtype))
    return views


def oracle(
    *views,
    temperature,
    tau_plus,
    beta,
    labels=None,
    intra_view=True,
    normalize=True,
    negatives=None,
    meet=None,
):
    """The objective from the whole matrix of similarities, in float64.

    It is textbook_loss for any number of views and all options, with a mask of the negatives.
    meet (V B, K) says which anchors meet which further negatives. Default: all of them do or, in
    the two-tower form, those of the first view.
    """
    V, B = len(views), len(views[0])
    t = torch.as_tensor(temperature, dtype=torch.float64)
    z = torch.cat(views).double()  # V x (B, D) -> (V B, D)
    columns = z
    if negatives is not None:
        columns = torch.cat([z, negatives.double()])  # (V B, D), (K, D) -> (V B + K, D)
    if normalize:
        z = F.normalize(z, dim=1)
        columns = F.normalize(columns, dim=1)
    s = z @ columns.T / t

    view = torch.arange(V).repeat_interleave(B)  # (V,) -> (V B,)
    sample = torch.arange(B).repeat(V)  # (B,) -> (V B,)
    other_view = view != view[:, None]
    other_sample = sample != sample[:, None]
    neg = other_sample
    if not intra_view:
        neg = neg & other_view
    if labels is not None:
        unknown = labels[sample] < 0
        neg = neg & (unknown | (labels[sample] != labels[sample, None]))
    if meet is None:
        meets = (view == 0) | intra_view
        meet = meets[:, None].expand(-1, len(columns) - V * B)  # (V B,) -> (V B, K)
    neg = torch.cat([neg, meet], 1)  # (V B, V B), (V B, K) -> (V B, V B + K)

    s_pos = s[:, : V * B][other_view & ~other_sample].view(V * B, V - 1)
    some = neg.any(1)  # an anchor without negatives adds 0
    s, neg, s_pos = s[some], neg[some], s_pos[some]
    N = neg.sum(1).double()
    weight = (beta * s).masked_fill(~neg, -math.inf).softmax(1)
    R = N * (weight * s.exp()).sum(1)
    Ng = R
    if tau_plus > 0:
        P = s_pos.exp().mean(1)
        corrected = (R - tau_plus * N * P) / (1 - tau_plus)
        floor = N * (-1 / t).exp()
        Ng = torch.where(corrected < floor, floor, corrected)
    return (Ng[:, None] * (-s_pos).exp()).log1p().sum() / (V * B * (V - 1))


def value_and_gradient(f, views, **setting):
    """The value of f, and its gradient at the views (V, B, D).

    With a tensor temperature or negatives, the gradient is flat and includes theirs.
    """
    inputs = [z.detach().clone().requires_grad_() for z in views]
    others = {}
    for name in ('temperature', 'negatives'):
        if isinstance(setting.get(name), torch.Tensor):
            others[name] = setting[name].detach().clone().requires_grad_()
    value = f(*inputs, **{**setting, **others})
    value.backward()
    gradient = torch.stack([z.grad for z in inputs])  # V x (B, D) -> (V, B, D)
    if others:
        parts = [x.grad.flatten().to(gradient.dtype) for x in others.values()]
        gradient = torch.cat([gradient.flatten(), *parts])
    return value.detach(), gradient


def random_case(seed, sizes=range(1, 7)):
    """Views with rows of any length and a setting, for contrastive_loss and oracle, in float64."""
    draw = random.Random(seed)
    B, D, V = draw.choice(sizes), draw.randint(2, 12), draw.randint(2, 4)
    views = unit_views(B, D, V, seed=seed, correlation=draw.random())
    t = draw.uniform(0.08, 1)
    setting = dict(
        temperature=draw.choice([t, torch.tensor([t], dtype=torch.float64)]),
        tau_plus=draw.choice([0, 0.01, 0.1, 0.5, 0.9]),
        beta=draw.choice([0, 0.5, 1, 3]),
        intra_view=draw.random() < 0.5,
        normalize=draw.random() < 0.7,
    )
    if draw.random() < 0.3:
        setting['labels'] = torch.tensor([draw.randint(-1, 2) for _ in range(B)])
        setting['tau_plus'] = 0
    if draw.random() < 0.7:
        (setting['negatives'],) = unit_views(draw.randint(0, 12), D, 1, seed=seed + 1)
    return [draw.uniform(0.1, 3) * z for z in views], setting


@pytest.fixture
def products(monkeypatch):
    """The shapes (m, n) of all products a @ b of matrices since the start of the test."""
    shapes = []
    matmul = torch.Tensor.__matmul__

    def recorded(a, b):
        shapes.append((a.shape[0], b.shape[1]))
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, '__matmul__', recorded)
    return shapes


# The equations


@pytest.mark.parametrize('beta', [0, 0.5, 1, 3])
@pytest.mark.parametrize('tau_plus', [0, 0.1, 0.5])
@pytest.mark.parametrize('temperature', [0.1, 0.5])
def test_two_views_give_the_textbook_loss(temperature, tau_plus, beta):
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta)
    for correlation in (0, 0.5, 0.9):  # with 0.9 the floor is active
        views = [2 * z for z in unit_views(12, 6, correlation=correlation)]
        expected = value_and_gradient(textbook_loss, views, **setting)
        for f in (contrastive_loss, oracle):
            found = value_and_gradient(f, views, **setting)
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)


def test_the_textbook_loss_has_the_same_defaults():
    views = unit_views(12, 6)
    assert textbook_loss(*views).item() == pytest.approx(contrastive_loss(*views).item(), rel=1e-13)


@pytest.mark.parametrize('part', range(4))
def test_value_and_gradient_are_the_equations(part):
    for seed in range(150 * part, 150 * (part + 1)):
        views, setting = random_case(seed)
        true_value, true_gradient = value_and_gradient(oracle, views, **setting)
        setting['chunk_size'] = (None, 1, 2, 3)[seed % 4]
        value, gradient = value_and_gradient(contrastive_loss, views, **setting)
        assert abs(value - true_value) <= 1e-12 * max(1, abs(true_value)), seed
        assert (gradient - true_gradient).norm() <= 1e-12 * max(1, true_gradient.norm()), seed


def test_random_cases_in_float32_are_those_in_float64():
    for seed in range(0, 1600, 10):
        views, setting = random_case(seed)
        views = [z.float() for z in views]
        if 'negatives' in setting:
            setting['negatives'] = setting['negatives'].float()
        rows = [z.double() for z in views]
        true_value, true_gradient = value_and_gradient(oracle, rows, **setting)
        value, gradient = value_and_gradient(contrastive_loss, views, **setting)
        eps = 1e-5
        if not setting['normalize']:
            eps = 1e-4  # longer rows make s, and so its rounding, larger
        assert value.dtype == torch.float32
        assert abs(value - true_value) <= eps * max(1e-3, abs(true_value)), seed
        # Where tau_plus = 0.9 nearly cancels R, the gradient loses more digits than the value.
        assert (gradient - true_gradient).norm() <= 5 * eps * max(1e-2, true_gradient.norm()), seed


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.1, 0.5, 1])
@pytest.mark.parametrize('beta', [0, 0.01, 0.5, 1, 4, 16])
@pytest.mark.parametrize('tau_plus', [0, 0.1])
def test_float32_is_finite_and_right_at_every_temperature(temperature, beta, tau_plus):
    """At t = 0.01, exp(s) reaches e^100 and exp((1 + beta) s) e^1700: float32 holds e^88."""
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta)
    # From random rows to views that are nearly equal, where the loss is tiny.
    for correlation in (0, 0.2, 0.35, 0.6, 0.9):
        views = unit_views(24, 64, dtype=torch.float32, correlation=correlation)
        rows = [z.double() for z in views]
        value, gradient = value_and_gradient(contrastive_loss, views, **setting)
        true_value, true_gradient = value_and_gradient(contrastive_loss, rows, **setting)
        assert torch.isfinite(value) and torch.isfinite(gradient).all()
        assert abs(value - true_value) <= max(1e-5 * true_value, 1e-6)
        assert (gradient - true_gradient).norm() <= max(1e-3 * true_gradient.norm(), 1e-5)
        if correlation < 0.5:
            assert abs(value - true_value) <= 1e-5 * true_value


@pytest.mark.parametrize('temperature', [0.01, 0.05, 0.1, 0.5, 1])
@pytest.mark.parametrize('beta', [0, 0.01, 0.5, 1, 4, 16])
@pytest.mark.parametrize('tau_plus', [0, 0.1])
def test_float64_is_the_oracle_at_every_temperature(temperature, beta, tau_plus):
    """The oracle takes no maximum out."""
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta)
    views = unit_views(6, 16)
    assert abs(contrastive_loss(*views, **setting) - oracle(*views, **setting)) <= 1e-10


@pytest.mark.parametrize('temperature', [0.1, 0.05, 0.03, 0.025, 0.022, 0.02, 0.017, 0.01])
def test_sums_stay_in_range_where_all_negatives_are_nearest_or_farthest(temperature):
    """Cosines of 1 or of -1 alone: exp((1 + beta) s) is the largest that there is, or the least."""
    loss = partial(contrastive_loss, temperature=temperature, tau_plus=0)
    row = F.normalize(torch.arange(1.0, 9.0), dim=0)
    equal = row.repeat(4, 1)  # (8,) -> (4, 8)
    opposite = torch.stack([row, -row])
    for z, cosine in ((equal, 1), (opposite, -1)):
        N = 2 * len(z) - 2
        expected = math.log1p(N * math.exp((cosine - 1) / temperature))
        for beta in (0, 1, 2):
            value, gradient = value_and_gradient(loss, [z, z], beta=beta)
            assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-40)
            assert gradient.isfinite().all()


# Limits and invariants


def test_without_negatives_an_anchor_adds_0():
    z1, z2 = unit_views(1, 8)
    z1.requires_grad_()
    z2.requires_grad_()
    for setting in (
        dict(),
        dict(temperature=0.01),
        dict(beta=0, tau_plus=0),
        dict(intra_view=False),
        dict(negatives=torch.empty(0, 8)),
        dict(tau_plus=0, labels=torch.tensor([3])),
    ):
        loss = contrastive_loss(z1, z2, **setting)
        gradients = torch.autograd.grad(loss, (z1, z2))
        assert loss == 0
        assert all(g.eq(0).all() for g in gradients)


def test_without_correction_and_weights_it_is_nt_xent():
    """NT-Xent is the cross-entropy of an anchor's similarities, with the other view as target."""
    target = torch.cat([torch.arange(16, 32), torch.arange(16)])
    for length, dtype in (
        (1, torch.float64),
        (0.1, torch.float64),
        (30, torch.float64),
        (30, torch.float32),
    ):
        z1, z2 = (length * z for z in unit_views(16, 8, dtype=dtype))
        z = torch.cat([z1, z2]).double()  # 2 x (16, 8) -> (32, 8)
        # Similarities reach 3,000, and their exponentials are infinite.
        logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
        setting = dict(temperature=0.3, tau_plus=0, beta=0, normalize=length == 1)
        found = contrastive_loss(z1, z2, **setting).double()
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(found, F.cross_entropy(logits, target), atol=0, rtol=rtol)


@pytest.mark.parametrize('temperature', [0.07, torch.tensor(0.07, dtype=torch.float64)], ids=str)
def test_two_towers_without_correction_and_weights_are_clip(temperature):
    """CLIP's loss is the mean of the cross-entropies of rows and of columns of one matrix."""

    def clip(images, texts, temperature):
        logits = F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T / temperature
        target = torch.arange(12)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    two_towers = partial(contrastive_loss, beta=0, tau_plus=0, intra_view=False)
    views = unit_views(12, 8)
    found = value_and_gradient(two_towers, views, temperature=temperature)
    expected = value_and_gradient(clip, views, temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_positives_of_more_than_two_views_weigh_the_same_whatever_beta():
    """P is the plain mean. All negatives are at right angles to the anchors: R = N for any beta."""
    z = torch.eye(6, dtype=torch.float64)[:, :4]
    anchor = z[0]
    near = F.normalize(z[0] + 0.2 * z[1], dim=0)
    far = F.normalize(z[0] + 2 * z[1], dim=0)
    views = [torch.stack([v, z[3]]) for v in (anchor, near, far)]
    t, tau_plus, N = 0.5, 0.2, 3

    def term(a, b, c):
        pos = torch.stack([a @ b, a @ c]).div(t).exp()
        Ng = (N - tau_plus * N * pos.mean()) / (1 - tau_plus)
        Ng = Ng.clamp(min=N * math.exp(-1 / t))
        return -(pos / (pos + Ng)).log().mean()

    moving = term(anchor, near, far) + term(near, anchor, far) + term(far, anchor, near)
    resting = term(z[3], z[3], z[3])
    expected = (moving + 3 * resting) / 6
    for beta in (0, 1, 3):
        found = contrastive_loss(*views, temperature=t, tau_plus=tau_plus, beta=beta)
        assert found.item() == pytest.approx(expected.item())


def test_floor_acts_where_negatives_are_farther_than_chance_and_stops_their_gradient():
    """Positives at cosine 1, negatives at -1 / (B - 1): R < tau_plus N P, so Ng = N exp(-1/t)."""
    B, t = 4, 0.5
    N = 2 * B - 2
    z = F.normalize(torch.eye(B, dtype=torch.float64) - 1 / B, dim=1)
    expected = math.log1p(N * math.exp(-1 / t) / math.exp(1 / t))
    loss = partial(contrastive_loss, temperature=t, normalize=False)
    value, gradient = value_and_gradient(loss, [z, z], tau_plus=0.5)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    # Each view is still pulled towards its positive, and nowhere else.
    assert (gradient.sum(0) @ z.T).diagonal().lt(0).all()
    along_z = gradient[0].mul(z).sum(1, keepdim=True) * z
    torch.testing.assert_close(gradient[0], along_z)
    # A smaller tau_plus corrects, but does not reach the floor.
    assert loss(z, z, tau_plus=0.01).item() > expected


def test_beta_moves_gradient_from_easy_to_hard_negatives():
    """Samples at right angles but one, 60 degrees off: what a step downhill does to cosines."""
    z = torch.eye(4, dtype=torch.float64)
    z[1, :2] = torch.tensor([0.5, math.sqrt(0.75)])  # the hard negative of z[0]
    values, hard, easy = [], [], []
    for beta in (0, 0.5, 1, 2):
        loss = partial(contrastive_loss, beta=beta, tau_plus=0, temperature=0.5)
        value, gradient = value_and_gradient(loss, [z, z])
        moved = F.normalize(z - 1e-3 * gradient.sum(0), dim=1)
        push = (z @ z.T - moved @ moved.T)[0]
        values.append(value.item())
        hard.append(push[1].item())
        easy.append(push[2].item())
    assert values == sorted(values)
    assert hard == sorted(hard)
    assert easy == sorted(easy, reverse=True)
    assert 2 * hard[0] < hard[3]
    assert easy[0] > 2 * easy[3] > 0


@pytest.mark.parametrize('beta', [1e-320, 1e-40])
def test_a_beta_that_float32_does_not_hold_is_0(beta):
    z1, z2 = unit_views(8, 4, dtype=torch.float32)
    for setting in (dict(), dict(tau_plus=0), dict(tau_plus=0, labels=torch.arange(8) // 2)):
        found = contrastive_loss(z1, z2, beta=beta, **setting)
        assert found == contrastive_loss(z1, z2, beta=0, **setting)


def test_unit_length_is_of_no_matter_but_to_raw_products():
    """The gradient at unit rows is that of raw products without its part along the rows."""
    views = unit_views(7, 5, correlation=0.3)
    value, gradient = value_and_gradient(contrastive_loss, views)
    raw_value, raw = value_and_gradient(contrastive_loss, views, normalize=False)
    z = torch.stack(views)
    along_z = (raw * z).sum(-1, keepdim=True)
    torch.testing.assert_close(value, raw_value, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, raw - along_z * z, rtol=1e-10, atol=1e-14)
    assert along_z.abs().max() > 1e-3


def test_longer_rows_change_the_scale_of_the_gradient_alone():
    z1, z2 = unit_views(7, 5, correlation=0.3)
    value, gradient = value_and_gradient(contrastive_loss, [z1, z2])
    longer_value, longer = value_and_gradient(contrastive_loss, [z1, 3 * z2])
    torch.testing.assert_close(longer_value, value, rtol=1e-13, atol=0)
    gradient[1] /= 3
    torch.testing.assert_close(longer, gradient, rtol=1e-10, atol=1e-14)
    assert contrastive_loss(z1, 3 * z2, normalize=False) > 1.1 * value


def test_nan_in_gives_nan_out():
    for setting in (
        dict(),
        dict(temperature=torch.tensor(0.5)),
        dict(temperature=0.01),
        dict(tau_plus=0, labels=torch.arange(4)),
        dict(negatives=torch.ones(2, 8)),
    ):
        views = unit_views(4, 8)
        views[0][1, 2] = math.nan
        assert contrastive_loss(*views, **setting).isnan()


# Labels


def test_negative_labels_are_unknown():
    """As if each sample with one had a class of its own."""
    views = unit_views(5, 4)
    loss = partial(contrastive_loss, tau_plus=0)
    expected = value_and_gradient(loss, views, labels=torch.tensor([0, 0, 5, 6, 7]))
    found = value_and_gradient(loss, views, labels=torch.tensor([0, 0, -1, -1, -4]))
    assert all(map(torch.equal, found, expected))


def test_labels_may_be_any_integer():
    top = 2**63 - 1
    loss = partial(contrastive_loss, *unit_views(5, 4), tau_plus=0)
    expected = loss(labels=torch.tensor([0, 0, 5, 6, 5]))
    assert loss(labels=torch.tensor([top, top, 5, top - 1, 5])) == expected
    assert loss(labels=torch.tensor([1, 1, -top - 1, 0, -top - 1])) > expected
    assert loss(labels=torch.tensor([1, 1, 7, 2, 7], dtype=torch.uint8)) == expected


def test_labels_leave_out_false_negatives():
    views = unit_views(6, 8)
    loss = partial(contrastive_loss, tau_plus=0)
    nothing_left_out = loss(*views, labels=torch.arange(6))
    assert nothing_left_out == loss(*views)
    assert loss(*views, labels=torch.tensor([0, 0, 1, 1, 2, 2])) < nothing_left_out
    one_class, gradient = value_and_gradient(loss, views, labels=torch.zeros(6).long())
    assert one_class == 0
    assert gradient.eq(0).all()


# Precision


def test_low_precision_inputs_are_computed_in_float32_under_autocast_too():
    views = unit_views(16, 32, dtype=torch.bfloat16)
    expected, true_gradient = value_and_gradient(contrastive_loss, views)
    assert expected == contrastive_loss(*[z.float() for z in views])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value, gradient = value_and_gradient(contrastive_loss, views)  # backward is inside, too
    assert value == expected and value.dtype == torch.float32
    assert torch.equal(gradient, true_gradient) and gradient.dtype == torch.bfloat16


def test_one_float64_input_makes_the_loss_float64():
    z1, z2 = unit_views(5, 4)
    (negatives,) = unit_views(7, 4, 1, seed=1)
    assert contrastive_loss(z1.bfloat16(), z2).dtype == torch.float64
    assert contrastive_loss(z1, z2, negatives=negatives.bfloat16()).dtype == torch.float64
    assert contrastive_loss(z1.half(), z2.half(), negatives=negatives).dtype == torch.float64
    assert contrastive_loss(z1.half(), z2.bfloat16()).dtype == torch.float32


# Gradients


@pytest.mark.parametrize(
    'tau_plus, beta, V', [(0, 0, 2), (0.1, 0, 2), (0.1, 1, 2), (0.1, 2.5, 3), (0.9, 1, 2)]
)
def test_gradcheck(tau_plus, beta, V):
    views = [z.requires_grad_() for z in unit_views(5, 4, V)]
    setting = dict(temperature=0.4, tau_plus=tau_plus, beta=beta, chunk_size=2)
    assert torch.autograd.gradcheck(lambda *z: contrastive_loss(*z, **setting), views)


def test_negatives_alone_may_get_a_gradient():
    loss = partial(contrastive_loss, *unit_views(5, 4), temperature=0.4)
    (negatives,) = unit_views(7, 4, 1, seed=1)
    negatives.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(negatives=x), negatives)


FLOORED = F.normalize(torch.eye(4, dtype=torch.float64) - 1 / 4, dim=1)


@pytest.mark.parametrize(
    'views, setting',
    [
        (unit_views(5, 4), {}),
        (unit_views(5, 4), dict(negatives=unit_views(7, 4, 1, seed=1)[0])),
        (unit_views(5, 4, 3), dict(intra_view=False, beta=0, tau_plus=0)),
        ([FLOORED, FLOORED], dict(tau_plus=0.5)),
    ],
    ids=['plain', 'negatives', 'two towers', 'floor'],
)
def test_temperature_gets_its_gradient_with_frozen_views(views, setting):
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = partial(contrastive_loss, *views, **setting)
    assert torch.autograd.gradcheck(lambda t: loss(temperature=t), t)


def test_a_temperature_has_a_gradient_of_its_own_shape_and_dtype():
    t = torch.nn.Parameter(torch.tensor([0.4]))
    contrastive_loss(*unit_views(5, 4), temperature=t).backward()
    assert t.grad.shape == (1,)
    assert t.grad.dtype == torch.float32


@pytest.mark.parametrize('temperature', [0.5, 0.01])
def test_a_tensor_temperature_gives_what_the_number_gives(temperature):
    views = unit_views(5, 4)
    t = torch.tensor(temperature, dtype=torch.float64)
    found = contrastive_loss(*views, temperature=t)
    assert found.item() == pytest.approx(contrastive_loss(*views, temperature=temperature).item())


def test_a_tensor_temperature_is_read_on_a_cpu_alone(monkeypatch):
    """Elsewhere the host would wait for the device. Tensors on the device meta have no values."""
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())  # not for meta
    t = torch.ones((), device='meta', requires_grad=True)
    z1, z2 = torch.ones(2, 5, 4, device='meta', requires_grad=True)
    loss = contrastive_loss(z1, z2, temperature=t)
    loss.backward()
    assert t.grad.shape == ()
    assert not losses._is_bounded(t, 1, torch.float32)
    assert losses._is_bounded(torch.tensor(0.5), 1, torch.float32)


# torch's transforms

SETTINGS = {
    'plain': dict(),
    'labels': dict(beta=0.5, tau_plus=0, labels=torch.arange(6) % 4, chunk_size=4),
    'temperature': dict(temperature=torch.tensor(0.1, dtype=torch.float64), intra_view=False),
    'negatives': dict(negatives=unit_views(7, 5, 1, seed=1)[0]),
    'maximum': dict(temperature=0.001),
}
each_setting = pytest.mark.parametrize('setting', SETTINGS.values(), ids=SETTINGS)


@each_setting
def test_it_works_inside_activation_checkpoints(setting):
    checkpointed = partial(checkpoint, contrastive_loss, use_reentrant=False)
    views = unit_views(6, 5)
    found = value_and_gradient(checkpointed, views, **setting)
    expected = value_and_gradient(contrastive_loss, views, **setting)
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        assert checkpointed(*views, **setting) == expected[0]


@each_setting
def test_it_works_with_saved_tensors_on_the_cpu(setting):
    views = unit_views(6, 5)
    expected = value_and_gradient(contrastive_loss, views, **setting)
    with torch.autograd.graph.save_on_cpu():
        found = value_and_gradient(contrastive_loss, views, **setting)
        with torch.no_grad():
            assert contrastive_loss(*views, **setting) == expected[0]
    assert all(map(torch.equal, found, expected))


@each_setting
def test_it_has_a_functional_gradient(setting):
    views = unit_views(6, 5)
    names = [name for name in ('temperature', 'negatives') if torch.is_tensor(setting.get(name))]
    inputs = [*views, *(setting[name] for name in names)]

    def loss(z1, z2, *others):
        return contrastive_loss(z1, z2, **{**setting, **dict(zip(names, others))})

    gradients = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
    found = torch.cat([g.flatten() for g in gradients])
    _, expected = value_and_gradient(contrastive_loss, views, **setting)
    torch.testing.assert_close(found, expected.flatten(), rtol=1e-12, atol=1e-14)


def test_vmap_is_refused_by_torch():
    with pytest.raises(RuntimeError, match='does not have vmap support'):
        torch.vmap(contrastive_loss)(torch.randn(3, 4, 5), torch.randn(3, 4, 5))


@each_setting
def test_second_derivatives_are_refused(setting):
    """At any of the inputs, the first derivative taken at any: silence would be a wrong result."""
    setting = dict(setting)
    inputs = [z.requires_grad_() for z in unit_views(6, 5)]
    for name in ('temperature', 'negatives'):
        if torch.is_tensor(setting.get(name)):
            setting[name] = setting[name].clone().requires_grad_()
            inputs.append(setting[name])
    for x in inputs:
        for y in inputs:
            loss = contrastive_loss(inputs[0], inputs[1], **setting)
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            with pytest.raises(RuntimeError, match='first derivative only'):
                torch.autograd.grad(gradient.sum(), y)


def test_second_functional_derivatives_are_refused():
    z1, z2 = unit_views(6, 5)
    first = torch.func.grad(lambda z: contrastive_loss(z, z2))
    with pytest.raises(RuntimeError, match='first derivative only'):
        torch.func.grad(lambda z: first(z).sum())(z1)


# Tiles and memory


class Live(TorchDispatchMode):
    """The most bytes that tensors made within have held at once."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {x.untyped_storage()._cdata for x in tensors([args, kwargs])}
        for x in tensors(out):
            storage = x.untyped_storage()
            if storage._cdata not in old:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        live = {key: found for key, found in self.storages.items() if not found[0].expired()}
        self.storages = live
        self.peak = max(self.peak, sum(nbytes for _, nbytes in live.values()))
        return out


def tensors(tree):
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


def test_a_queue_takes_the_memory_of_a_copy_and_tiles():
    """512 anchors, 65,536 rows: the scaled copy takes 33.6 MB, and the matrix would take 134 MB."""
    z1, z2 = unit_views(256, 128, dtype=torch.float32)
    queue = torch.randn(65536, 128)
    with Live() as live:
        contrastive_loss(z1.requires_grad_(), z2.requires_grad_(), negatives=queue).backward()
    assert 33.5e6 < live.peak < 40e6


def test_memory_does_not_grow_with_the_square_of_the_batch():
    peaks = []
    for B in (512, 1024, 2048):
        z1, z2 = unit_views(B, 16, dtype=torch.float32)
        with Live() as live:
            contrastive_loss(z1.requires_grad_(), z2.requires_grad_()).backward()
        peaks.append(live.peak)
    assert peaks[2] - peaks[1] == pytest.approx(2 * (peaks[1] - peaks[0]), rel=0.1)
    assert peaks[2] < 0.1 * 4 * 4096**2


def test_each_pair_is_visited_once_for_any_number_of_views(monkeypatch, products):
    """In tiles of at most 4 x 4, none across two views; of two that mirror each other, one."""
    monkeypatch.setitem(losses.TILE_SIZE, 'cpu', 4)
    parts = {2: [4, 2, 4, 2], 3: [4, 2, 4, 2, 4, 2]}  # 6 samples of each view
    for V, sides in parts.items():
        products.clear()
        contrastive_loss(*unit_views(6, 5, V))
        expected = [(m, n) for k, m in enumerate(sides) for n in sides[k:]]
        assert products == expected


def test_towers_do_not_compare_views_with_themselves(monkeypatch, products):
    monkeypatch.setitem(losses.TILE_SIZE, 'cpu', 4)
    contrastive_loss(*unit_views(6, 5), intra_view=False)
    assert products == [(4, 4), (4, 2), (2, 4), (2, 2)]


def test_backward_computes_the_tiles_again(products):
    views = [z.requires_grad_() for z in unit_views(8, 5)]
    loss = contrastive_loss(*views, chunk_size=4)
    assert products == [(4, 4)] * 10
    loss.backward()
    assert products == [(4, 4)] * 20


@pytest.mark.parametrize('device, tiles', [('cpu', 21), ('meta', 3)])
def test_small_tiles_are_for_a_cpu_alone(monkeypatch, products, device, tiles):
    """Of 2 x 600 rows: three parts of a view, at most 256 rows each, or one."""
    monkeypatch.setattr(torch, 'autocast', lambda *_, **__: nullcontext())  # not for meta
    contrastive_loss(*torch.zeros(2, 600, 4, device=device))
    assert len(products) == tiles


# Arguments


@settings(max_examples=700, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 8),
    D=st.integers(1, 16),
    V=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    kind=st.sampled_from(
        ['random', 'random', 'identical', 'opposite', 'zero', 'long', 'strided', 'integer']
    ),
    temperature=st.sampled_from(
        [0.01, 0.1, 0.5, 0.5, 1, 10, 0, -1, math.nan, math.inf, '0.5', None]
    ),
    tau_plus=st.sampled_from([0, 0, 0.1, 0.5, 0.99, 1, -0.1, torch.tensor(0.1)]),
    beta=st.sampled_from([0, 0.5, 1, 2, 16, -1, math.inf, torch.ones(1, requires_grad=True)]),
    labelled=st.booleans(),
    intra_view=st.booleans(),
    learnable=st.booleans(),
)
def test_finite_and_right_or_valueerror(
    B,
    D,
    V,
    seed,
    dtype,
    kind,
    temperature,
    tau_plus,
    beta,
    labelled,
    intra_view,
    learnable,
):
    generator = torch.Generator().manual_seed(seed)
    views = drawn_views(generator, (V, B, D), dtype, kind)
    labels = None
    if labelled:
        labels = torch.randint(2, (B,), generator=generator)
    setting = dict(
        temperature=temperature,
        tau_plus=tau_plus,
        beta=beta,
        labels=labels,
        intra_view=intra_view,
    )
    wrong = {
        'views': V < 2 or kind == 'integer',
        'temperature': not within(temperature, 1e-9, math.inf),
        'tau_plus': not within(tau_plus, 0, 1) or (labelled and tau_plus != 0),
        'beta': not within(beta, 0, math.inf),
    }
    if any(wrong.values()):
        with pytest.raises(ValueError) as error:
            contrastive_loss(*views, **setting)
        named = str(error.value).split()[0]
        assert wrong[named]
        return
    if learnable:
        setting['temperature'] = torch.tensor(float(temperature))
    value, gradient = value_and_gradient(contrastive_loss, views, **setting)
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and value >= 0
    if seed % 4 == 0 and B < 6:
        rows = [x.double() if dtype == torch.float64 else x.float() for x in views]
        expected = oracle(*rows, **setting).item()
        assert value.item() == pytest.approx(expected, rel=2e-5, abs=1e-5)


def within(x, low, high):
    return isinstance(x, (int, float)) and low <= x < high


def drawn_views(generator, shape, dtype, kind):
    V, B, D = shape
    z = torch.randn(V, B, 2 * D, generator=generator)[:, :, ::2]
    if kind == 'long':
        z = z * 1e4
    if kind == 'identical':
        z = z[:1, :1].expand(V, B, D)
    if kind == 'opposite':
        signs = torch.tensor([1.0, -1.0])[torch.arange(V * B) % 2]
        z = z[:1, :1] * signs.view(V, B, 1)
    if kind == 'zero':
        z = torch.zeros(V, B, D)
    if kind == 'integer':
        dtype = torch.int64
    views = [x.to(dtype) for x in z]
    if kind != 'strided':
        views = [x.contiguous() for x in views]
    return views


Z = torch.zeros(4, 8)
META = Z.to('meta')
LABELS = torch.zeros(4).long()


@pytest.mark.parametrize(
    'views, message',
    [
        ([Z], r'views must be 2 or more .* got \(4, 8\) torch.float32 on cpu$'),
        ([], 'views must be 2 or more'),
        ([torch.zeros(2, 4, 8)], r'each an argument, got \(2, 4, 8\)'),
        ([[Z, Z]], 'each an argument'),
        ([Z, torch.zeros(5, 8)], r'of one shape on one device.*\(4, 8\) .*; \(5, 8\)'),
        ([Z, META], 'on one device.* on cpu; .* on meta'),
        ([Z, Z.long()], 'floating-point.*torch.int64'),
        ([Z, Z.numpy()], 'tensors'),
        ([Z[0], Z[0]], r'\(B, D\)'),
        ([Z[:0], Z[:0]], r'views must be .* got \(0, 8\)'),
    ],
)
def test_wrong_views_are_named(views, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*views)


@pytest.mark.parametrize(
    'setting, message',
    [
        (
            dict(negatives=[1.0]),
            r'negatives must be a floating-point tensor \(K, 8\) on cpu, got \[1.0\]$',
        ),
        (dict(negatives=Z.long()), 'negatives must be a floating-point tensor .*int64'),
        (dict(negatives=Z[:, :7]), r'negatives must be .* got \(4, 7\)'),
        (dict(negatives=Z[0]), r'negatives must be .* got \(8,\)'),
        (dict(negatives=META), 'negatives must be .* on cpu, .* on meta'),
        (dict(temperature=0), 'temperature must be a positive number .* got 0$'),
        (dict(temperature=torch.ones(2)), r'temperature must be .* got \(2,\)'),
        (dict(temperature=torch.tensor(1)), 'temperature must be .*int64'),
        (dict(temperature=META[0, :1]), 'temperature must be .* on cpu.* on meta'),
        (dict(tau_plus=1), r'tau_plus must be a number in \[0, 1\), got 1$'),
        (dict(tau_plus=torch.tensor(0.1, requires_grad=True)), 'tau_plus must be a number'),
        (dict(beta=-0.5), 'beta must be a number of at least 0, got -0.5'),
        (dict(beta=torch.tensor(1.0, requires_grad=True)), 'beta must be a number'),
        (dict(chunk_size=0), 'chunk_size must be an integer > 0, got 0'),
        (dict(chunk_size=2.5), 'chunk_size must be an integer > 0, got 2.5'),
        (
            dict(tau_plus=0, labels=LABELS[:3]),
            r'labels must be a tensor of \(4,\) integers on cpu, got',
        ),
        (dict(tau_plus=0, labels=[0, 1, 2, 3]), r'labels must be a tensor .* got \[0, 1, 2, 3\]'),
        (dict(tau_plus=0, labels=torch.zeros(4)), 'labels must be a tensor .*float32'),
        (dict(tau_plus=0, labels=LABELS.cfloat()), 'labels must be a tensor .*complex64'),
        (dict(tau_plus=0, labels=LABELS.to('meta')), 'labels must be .* on cpu, .* on meta'),
        (dict(labels=LABELS), 'tau_plus must be 0 with labels'),
        (
            dict(group=True),
            'group must be None, False or a ProcessGroup that holds this process, got True',
        ),
        (dict(group=[0, 1]), r'group must be .* got \[0, 1\]'),
        (dict(group=-100), 'group must be .* got -100'),  # new_group's for ranks that it leaves out
    ],
)
def test_wrong_options_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(Z, Z, **setting)


# A file to copy


def test_losses_imports_torch_and_the_standard_library_alone():
    tree = ast.parse(Path(losses.__file__).read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
    packages = {module.split('.')[0] for module in modules}
    assert packages <= {'torch', *sys.stdlib_module_names}


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


SNIPPETS = {  # training steps of other projects
    'plain': """
for x1, x2 in loader:
    loss = contrastive_loss(net(x1), net(x2), temperature=0.5, tau_plus=0.1, beta=1.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
    'ddp': """
net = DistributedDataParallel(net)
for x1, x2 in loader:
    z1, z2 = net(torch.cat([x1, x2])).chunk(2)
    loss = contrastive_loss(z1, z2)  # the negatives are those of all ranks
    optimizer.zero_grad()
    loss.backward()  # DDP's mean over ranks is the whole batch's gradient
    optimizer.step()
""",
    'lightning': """
class HardNegatives(LightningModule):
    def training_step(self, batch, batch_idx):
        x1, x2 = batch
        loss = contrastive_loss(self.net(x1), self.net(x2))
        self.log('train_loss', loss)
        return loss
""",
    'clip': """
log_t = torch.nn.Parameter(torch.tensor(0.07).log())
optimizer = torch.optim.AdamW([*image_encoder.parameters(), *text_encoder.parameters(), log_t])
z1 = image_encoder(images)
z2 = text_encoder(texts)
t = log_t.exp().clamp(min=0.01)
loss = contrastive_loss(z1, z2, intra_view=False, temperature=t, beta=0.5, tau_plus=0)
loss.backward()
""",
    'graph': """
edges1 = dropout_edge(data.edge_index, p=0.2)[0]
edges2 = dropout_edge(data.edge_index, p=0.4)[0]
z1 = encoder(data.x, edges1)  # (nodes, D), a view of each node
z2 = encoder(data.x, edges2)
loss = contrastive_loss(z1, z2, temperature=0.5, tau_plus=0.1, beta=1.0)
loss.backward()
optimizer.step()
""",
}


class Recorder(torch.nn.Module):
    """LightningModule's interface, as far as a training step uses it."""

    def log(self, name, value):
        self.logged = {name: value.item()}


def around(name, tmp_path):
    """What the snippet finds in its user's code, and the weight that it trains."""
    torch.manual_seed(0)
    net = torch.nn.Linear(6, 4)
    names = dict(
        torch=torch,
        contrastive_loss=contrastive_loss,
        net=net,
        LightningModule=Recorder,
        loader=[torch.randn(2, 8, 6)],
        optimizer=torch.optim.SGD(net.parameters(), 0.1),
    )
    if name == 'ddp':
        names['DistributedDataParallel'] = torch.nn.parallel.DistributedDataParallel
        store = f'file://{tmp_path}/store'
        torch.distributed.init_process_group('gloo', init_method=store, rank=0, world_size=1)
    if name == 'clip':
        names['image_encoder'] = net
        names['text_encoder'] = torch.nn.Linear(3, 4)
        names['images'] = torch.randn(8, 6)
        names['texts'] = torch.randn(8, 3)
    if name == 'graph':
        pytest.importorskip('torch_geometric')
        from torch_geometric.data import Data
        from torch_geometric.nn import GCNConv
        from torch_geometric.utils import dropout_edge

        encoder = GCNConv(6, 4)
        edges = torch.randint(8, (2, 30))
        names['encoder'] = encoder
        names['dropout_edge'] = dropout_edge
        names['optimizer'] = torch.optim.SGD(encoder.parameters(), 0.1)
        names['data'] = Data(x=torch.randn(8, 6), edge_index=edges)
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


@pytest.mark.parametrize('case', json.loads(Path(__file__).with_name('golden.json').read_text()))
def test_the_value_is_that_of_the_authors_formulas(case):
    """In float64, to the last digits: golden.py computed the losses without this project's code."""
    options = dict(case)
    sizes = options.pop('B'), options.pop('D')
    expected = options.pop('loss')
    views = [torch.from_numpy(z) for z in golden.embeddings(*sizes)]
    assert contrastive_loss(*views, **options).item() == pytest.approx(expected, rel=1e-14, abs=0)
