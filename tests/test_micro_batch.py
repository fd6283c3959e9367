"""A batch in parts: its gradient is the whole batch's, its memory a part's."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import main
from hardneg.losses import contrastive_loss
from hardneg.micro_batch import MicroBatches, kept_bytes, set_momentum
from model import Embeddings, Model

NO_AUTOCAST = torch.autocast('cpu', enabled=False)
NO_SCALER = torch.amp.GradScaler('cpu', enabled=False)


def network():
    torch.manual_seed(0)
    return Model(feature_dim=8, arch='resnet18', hidden_dim=16, width=0.25)


def in_one_graph(net, views, loss_of, joint, m):
    """The loss of views whose BatchNorm batches are parts of m images, by autograd alone."""
    z = [[] for _ in views]
    for part in zip(*(x.split(m) for x in views)):
        if joint:
            embeddings = net(torch.cat(part))[1].chunk(len(views))
        else:
            embeddings = [net(x)[1] for x in part]
        for own, embedding in zip(z, embeddings):
            own.append(embedding)
    loss = loss_of([torch.cat(own) for own in z])
    loss.backward()
    return loss.item()


LABELS = torch.arange(12) % 4


@pytest.mark.parametrize(
    'V, joint, objective',
    [
        (2, False, dict()),
        (3, False, dict(beta=0, tau_plus=0)),
        (2, True, dict(beta=2.0)),
        (3, True, dict(tau_plus=0, labels=LABELS)),
        (2, False, dict(tau_plus=0, beta=0, labels=LABELS)),
    ],
    ids=['two views', 'three views', 'joint', 'three joint views and labels', 'labels'],
)
def test_a_batch_in_parts_has_the_gradient_of_one_graph(V, joint, objective):
    """In float64. BatchNorm's statistics are those of the second pass alone."""
    net = network().double()
    whole = copy.deepcopy(net)
    views = list(torch.randn(V, 12, 3, 8, 8).double())

    def loss_of(z):
        return contrastive_loss(*z, **objective)

    parts = MicroBatches(Embeddings(net, joint), 4, NO_AUTOCAST)
    loss = parts.backward(views, loss_of, NO_SCALER)
    expected = in_one_graph(whole, views, loss_of, joint, 4)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    for (name, p), q in zip(net.named_parameters(), whole.parameters()):
        assert (p.grad - q.grad).norm() <= 1e-12 * q.grad.norm() + 1e-15, name
    for (name, x), y in zip(net.named_buffers(), whole.buffers()):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14, msg=name)


def test_parts_move_the_running_statistics_as_far_as_one_batch_does():
    """Three parts of the same mean."""
    x = torch.randn(4, 5)
    one, parts = torch.nn.BatchNorm1d(5), torch.nn.BatchNorm1d(5)
    one(x)
    set_momentum(parts, 3)
    for _ in range(3):
        parts(x)
    torch.testing.assert_close(parts.running_mean, one.running_mean)
    torch.testing.assert_close(parts.running_var, one.running_var)


@pytest.mark.parametrize('flags, parts', [([], 1), (['--micro_batch', '64'], 4)])
def test_main_sets_the_momentum_of_its_parts(flags, parts):
    args, _, _ = main.arguments(['--arch', 'resnet18', '--width', '0.25', *flags])
    net = main.build_network(args)
    assert net.f[1].momentum == pytest.approx(1 - 0.9 ** (1 / parts))
    assert net.g[1].momentum == net.f[1].momentum


class Kept:
    """Within `with`, counts the bytes of tensors that are kept for the backward pass, at most.

    Weights and views do not count.
    """

    def __init__(self, net, views):
        self.live = Counter()
        self.peak = 0
        self.own = {x.untyped_storage().data_ptr() for x in (*net.parameters(), *views)}

    def __enter__(self):
        hooks = torch.autograd.graph.saved_tensors_hooks
        self.hooks = hooks(lambda x: KeptTensor(self, x), lambda kept: kept.x)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


class KeptTensor:
    def __init__(self, kept, x):
        self.kept = kept
        self.x = x
        storage = x.untyped_storage()
        self.key = storage.data_ptr(), storage.nbytes()
        if storage.data_ptr() not in kept.own:
            kept.live[self.key] += 1
            kept.peak = max(kept.peak, sum(nbytes for _, nbytes in kept.live))

    def __del__(self):
        self.kept.live[self.key] -= 1
        if self.kept.live[self.key] <= 0:
            del self.kept.live[self.key]


def byte_views(B):
    return list(torch.randint(256, (2, B, 3, 16, 16), dtype=torch.uint8))


def similarity_loss(z):
    """A loss that keeps little."""
    z1, z2 = z
    return F.cross_entropy(z1 @ z2.T, torch.arange(len(z1)))


def peak_of_a_step(B, micro_batch=None):
    net, views = network(), byte_views(B)
    with Kept(net, views) as kept:
        if micro_batch:
            parts = MicroBatches(Embeddings(net), micro_batch, NO_AUTOCAST)
            parts.backward(views, similarity_loss, NO_SCALER)
        else:
            similarity_loss([net(x)[1] for x in views]).backward()
    return kept.peak


def test_a_step_in_parts_keeps_what_a_step_of_one_part_keeps():
    """And z, its gradient, and the byte views."""
    parts = peak_of_a_step(64, micro_batch=8)
    embeddings_and_gradients = 2 * 2 * 64 * 8 * 4
    views = 2 * 64 * 3 * 16 * 16
    assert parts <= peak_of_a_step(8) + embeddings_and_gradients + views
    assert parts < peak_of_a_step(64) / 3


def test_what_a_view_keeps_is_counted_without_memory():
    counted = kept_bytes(network, 16, torch.float32)
    assert counted == pytest.approx(peak_of_a_step(8) / 16, rel=0.02)
