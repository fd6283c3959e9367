"""The objective against a double loop written from the papers' equations, its limits and its invariants."""

import ast
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import losses
from losses import contrastive_loss


def unit_views(B, D, V=2, dtype=torch.float64, seed=0, correlation=0.5):
    """V views (B, D) of unit rows; those of one sample are alike."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(B, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(V, B, D, generator=generator, dtype=torch.float64)
    return [F.normalize(correlation * base + (1 - correlation) * e, dim=1).to(dtype) for e in noise]


def oracle(*views, temperature, tau_plus, beta, labels=None):
    """The objective, anchor by anchor, in float64: nothing shared with losses.py but the equations."""
    V, (B, _), t = len(views), views[0].shape, temperature
    views = [z.double() for z in views]
    terms = []
    for v in range(V):
        for i in range(B):
            anchor = views[v][i]
            positives = [anchor @ views[u][i] / t for u in range(V) if u != v]
            negatives = [anchor @ views[u][j] / t for u in range(V) for j in range(B)
                         if j != i and (labels is None or labels[i] != labels[j])]
            N = len(negatives)
            if N == 0:
                terms += [0 * positives[0]] * (V - 1)
                continue
            s = torch.stack(negatives)
            weight = torch.softmax(beta * s, 0)  # N * sum(e^{(1+b)s}) / sum(e^{bs})
            log_R = math.log(N) + torch.logsumexp(s + weight.log(), 0)
            P = torch.stack(positives).exp().mean()
            Ng = torch.clamp((log_R.exp() - tau_plus * N * P) / (1 - tau_plus), min=N * math.exp(-1 / t))
            terms += [torch.log1p((Ng.log() - p).exp()) if Ng.log() - p < 600 else Ng.log() - p for p in positives]
    return torch.stack(terms).mean()


def value_and_gradient(f, views, **kwargs):
    views = [z.detach().clone().requires_grad_() for z in views]
    value = f(*views, **kwargs)
    value.backward()
    return value.detach(), torch.stack([z.grad for z in views])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(B=st.integers(2, 9), D=st.integers(2, 12), V=st.integers(2, 4), seed=st.integers(0, 10**6),
       temperature=st.floats(0.05, 1), tau_plus=st.sampled_from([0, 0.01, 0.1, 0.5, 0.9]), chunk=st.integers(1, 9),
       beta=st.sampled_from([0, 0.3, 0.5, 1, 2, 6, 16]), labelled=st.booleans())
def test_value_and_gradient_are_the_equations(B, D, V, seed, temperature, tau_plus, beta, labelled, chunk):
    views = unit_views(B, D, V, seed=seed)
    labels = torch.randint(3, (B,), generator=torch.Generator().manual_seed(seed)) if labelled else None
    setting = dict(temperature=temperature, tau_plus=0 if labelled else tau_plus, beta=beta, labels=labels)
    value, gradient = value_and_gradient(contrastive_loss, views, chunk_size=chunk, **setting)
    true_value, true_gradient = value_and_gradient(oracle, views, **setting)
    assert abs(value - true_value) <= 1e-10 * max(1, abs(true_value))
    assert (gradient - true_gradient).norm() <= 1e-10 * max(1, true_gradient.norm())

    value, gradient = value_and_gradient(contrastive_loss, [z.float() for z in views], chunk_size=chunk, **setting)
    assert value.dtype == torch.float32
    rounded = [z.float().double() for z in views]
    true_value, true_gradient = value_and_gradient(oracle, rounded, **setting)
    assert abs(value - true_value) <= 1e-5 * max(1e-3, abs(true_value))
    assert (gradient - true_gradient).norm() <= 1e-5 * max(1e-2, true_gradient.norm())


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


def test_gradcheck_with_labels():
    views = [z.requires_grad_() for z in unit_views(5, 4)]
    labels = torch.tensor([0, 1, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda *z: contrastive_loss(*z, tau_plus=0, labels=labels), views)


def test_without_correction_and_weights_it_is_nt_xent():
    """NT-Xent is the cross-entropy of each anchor's similarities, its own left out, with the other view as target."""
    z1, z2 = unit_views(16, 8)
    z = torch.cat([z1, z2])
    logits = (z @ z.T / 0.3).fill_diagonal_(-math.inf)
    target = torch.cat([torch.arange(16, 32), torch.arange(16)])
    torch.testing.assert_close(contrastive_loss(z1, z2, temperature=0.3, tau_plus=0, beta=0),
                               F.cross_entropy(logits, target), rtol=1e-12, atol=0)


def test_debiased_estimator_is_the_papers_with_beta_zero():
    z1, z2 = unit_views(16, 8)
    z, t, tau = torch.cat([z1, z2]), 0.5, 0.1
    other = ~torch.eye(16, dtype=torch.bool).repeat(2, 2)
    neg = (z @ z.T / t).exp()[other].view(32, 30)
    pos = ((z1 * z2).sum(1) / t).exp().repeat(2)
    Ng = ((neg.sum(1) - tau * 30 * pos) / (1 - tau)).clamp(min=30 * math.exp(-1 / t))
    torch.testing.assert_close(contrastive_loss(z1, z2, temperature=t, tau_plus=tau, beta=0),
                               -(pos / (pos + Ng)).log().mean(), rtol=1e-12, atol=0)


def test_order_of_samples_and_views_changes_nothing():
    views = unit_views(10, 6, V=3)
    value = contrastive_loss(*views)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(contrastive_loss(*[z[order] for z in views]), value, rtol=1e-12, atol=0)
    torch.testing.assert_close(contrastive_loss(*reversed(views)), value, rtol=1e-12, atol=0)


def test_floor_acts_where_negatives_are_farther_than_chance_and_stops_their_gradient():
    """Positives at cosine 1, negatives at -1 / (B - 1): R < tau_plus N P, so Ng = N exp(-1/t) exactly."""
    B, t = 4, 0.5
    z = F.normalize(torch.eye(B, dtype=torch.float64) - 1 / B, dim=1)
    N = 2 * B - 2
    expected = math.log1p(N * math.exp(-1 / t) / math.exp(1 / t))
    value, gradient = value_and_gradient(contrastive_loss, [z, z], temperature=t, tau_plus=0.5)
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


def test_chunks_change_memory_only(monkeypatch):
    views = unit_views(33, 8)
    whole = value_and_gradient(contrastive_loss, views, chunk_size=33)
    for chunk_size in (1, 7, 32, 100):
        parts = value_and_gradient(contrastive_loss, views, chunk_size=chunk_size)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    monkeypatch.setitem(losses.TILE, 'cpu', 4 * 33 * 2)
    torch.testing.assert_close(value_and_gradient(contrastive_loss, views), whole, rtol=1e-12, atol=1e-14)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(B=st.integers(1, 12), D=st.integers(1, 16), V=st.integers(1, 4), seed=st.integers(0, 10**6),
       dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
       kind=st.sampled_from(['random', 'identical', 'opposite', 'zero', 'huge', 'strided']),
       temperature=st.sampled_from([0.01, 0.1, 0.5, 1, 10, 0, -1, math.nan, math.inf]),
       tau_plus=st.sampled_from([0, 0.1, 0.5, 0.99, 1, -0.1]), beta=st.sampled_from([0, 0.5, 1, 2, 16, -1, math.inf]),
       labelled=st.booleans())
def test_finite_or_valueerror(B, D, V, seed, dtype, kind, temperature, tau_plus, beta, labelled):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(V, B, 2 * D, generator=generator)[:, :, ::2]
    if kind == 'huge':
        z = z * 1e30
    z = F.normalize(z, dim=-1)
    if kind == 'identical':
        z = z[:1, :1].expand(V, B, D)
    if kind == 'opposite':
        z = z[:1, :1] * torch.tensor([1.0, -1.0])[torch.arange(V * B) % 2].view(V, B, 1)
    if kind == 'zero':
        z = torch.zeros(V, B, D)
    views = [x if kind == 'strided' else x.contiguous() for x in z.to(dtype)]
    labels = torch.randint(2, (B,), generator=generator) if labelled else None
    valid = (V >= 2 and B >= 2 and 0 < temperature < math.inf and 0 <= tau_plus < 1 and 0 <= beta < math.inf
             and not (labelled and tau_plus))
    setting = dict(temperature=temperature, tau_plus=tau_plus, beta=beta, labels=labels)
    if not valid:
        with pytest.raises(ValueError, match='views|temperature|tau_plus|beta'):
            contrastive_loss(*views, **setting)
        return
    value, gradient = value_and_gradient(contrastive_loss, views, **setting)
    assert torch.isfinite(value) and torch.isfinite(gradient).all() and value >= 0


@pytest.mark.parametrize('views, setting, message', [
    ([(4, 8)], {}, 'views: at least 2'),
    ([(4, 8), (5, 8)], {}, r'\(4, 8\) and, as view 2, \(5, 8\)'),
    ([(4,), (4,)], {}, r'\(B, D\)'),
    ([(1, 8), (1, 8)], {}, 'at least 2 samples are needed, got 1'),
    ([(4, 8)] * 2, dict(temperature=0), 'temperature must be positive, got 0'),
    ([(4, 8)] * 2, dict(tau_plus=1), r'tau_plus must be in \[0, 1\), got 1'),
    ([(4, 8)] * 2, dict(beta=-0.5), 'beta must be at least 0, got -0.5'),
    ([(4, 8)] * 2, dict(chunk_size=0), 'chunk_size must be at least 1, got 0'),
    ([(4, 8)] * 2, dict(tau_plus=0, labels=torch.zeros(3).long()), r'labels must be integers of shape \(4,\)'),
    ([(4, 8)] * 2, dict(tau_plus=0.1, labels=torch.zeros(4).long()), 'tau_plus must be 0 with labels'),
])
def test_wrong_arguments_are_named(views, setting, message):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(*[torch.randn(shape) for shape in views], **setting)


def test_losses_imports_torch_alone():
    tree = ast.parse((Path(losses.__file__)).read_text())
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split('.')[0] for module in modules} == {'math', 'torch'}
