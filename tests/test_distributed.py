"""Two processes compute what one would: the objective, its gradients, features and whole runs."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import BATCH, everything, on_ranks, random_views
from test_losses import oracle, random_case

from hardneg.losses import contrastive_loss


@pytest.fixture(scope='module')
def one(tiny, tmp_path_factory):
    results = tmp_path_factory.mktemp('one') / 'run'
    return everything(0, 1, [*tiny, '--results_dir', str(results)])


@pytest.fixture(scope='module')
def ranks(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp('ranks')
    return on_ranks(2, everything, out, [*tiny, '--results_dir', str(out / 'run')])


# The loss


def test_ranks_may_hold_one_sample_each(ranks):
    expected = contrastive_loss(*random_views(2, len(ranks), seed=0))
    for rank in ranks:
        torch.testing.assert_close(rank['one each'], expected)


@pytest.mark.parametrize('V', [2, 3])
def test_loss_and_gradient_are_those_of_the_whole_batch(one, ranks, V):
    """The mean over ranks, which DistributedDataParallel takes, is the gradient."""
    for i, (loss, by_t, gradient) in enumerate(one['losses'][V - 2]):
        parts = [rank['losses'][V - 2][i] for rank in ranks]
        for value, value_by_t, _ in parts:
            torch.testing.assert_close(value, loss, rtol=1e-11, atol=1e-13)
            torch.testing.assert_close(value_by_t, by_t, rtol=1e-11, atol=1e-13)
        whole = torch.cat([part for _, _, part in parts], 1)  # n x (V, b, D) -> (V, B, D)
        torch.testing.assert_close(whole / len(ranks), gradient, rtol=0, atol=1e-11)


def test_random_cases_are_the_equations_with_negatives_for_each_rank(ranks):
    world = len(ranks)
    for seed, parts in enumerate(zip(*(rank['cases'] for rank in ranks))):
        views, setting = random_case(seed, sizes=(world, 2 * world, 3 * world))
        views = [z.requires_grad_() for z in views]
        t = torch.as_tensor(setting['temperature'], dtype=torch.float64).requires_grad_()
        setting['temperature'] = t
        if 'negatives' in setting:
            setting['negatives'].requires_grad_()
            setting['meet'] = meetings(world, views, setting)
        expected = oracle(*views, **setting)
        expected.backward()
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        for rank, (value, by_views, by_negatives, by_t) in enumerate(parts):
            close(value, expected.detach())
            close(by_t, t.grad)
            own = torch.stack([z.grad.chunk(world)[rank] for z in views])
            close(by_views / world, own)
            if by_negatives is not None:
                close(by_negatives / world, setting['negatives'].grad[rank::world])


def meetings(world, views, setting):
    """Which anchors (V B,) meet which negatives (K,): those of their own rank."""
    rank_of_anchor = torch.arange(world).repeat_interleave(len(views[0]) // world)  # (B,)
    rank_of_negative = torch.arange(len(setting['negatives'])) % world
    same = rank_of_anchor[:, None] == rank_of_negative  # (B, K)
    meet = []
    for v in range(len(views)):
        meet.append(same & (setting['intra_view'] or v == 0))
    return torch.cat(meet)


def test_a_group_makes_the_batch(ranks):
    views = random_views(2, BATCH, seed=0)
    parts = views.chunk(len(ranks), 1)
    numbers = [BATCH // len(ranks) - rank % 2 for rank in range(len(ranks))]
    for rank, found in enumerate(ranks):
        values, (outside, unequal) = found['groups']
        pair = torch.cat(parts[rank // 2 * 2 :][:2], 1)
        expected = [contrastive_loss(*z) for z in (parts[rank], pair, views)]
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0)
        assert outside.startswith(
            'group must be None, False or a ProcessGroup that holds this process, got '
        )
        assert unequal == f'views must hold equally many samples on every rank, got {numbers}'


# Training


def test_parts_on_one_process_train_as_ranks(one, ranks):
    for rank in ranks:
        for part, weights in rank['parts'].items():
            torch.testing.assert_close(weights, one['parts'][part], rtol=0, atol=1e-9)


def test_main_under_a_launcher_takes_the_mean_of_the_ranks_gradients(one, ranks):
    """The step is that of one process whose parts are the ranks', on every rank."""
    ((m, update),) = ranks[0]['main'].items()
    for rank in ranks:
        assert torch.equal(rank['main'][m], update)
    alone = one['main'][m]
    assert F.cosine_similarity(update, alone, dim=0) > 0.999
    assert (update.norm() / alone.norm() - 1).abs() < 0.01
    other = one['main'][18 - m]  # the parts matter
    assert F.cosine_similarity(update, other, dim=0) < 0.99


def test_features_are_identical_and_no_image_counts_twice(one, ranks):
    for rank in ranks:
        assert torch.equal(rank['features'], one['features'])
        assert torch.equal(rank['gathered'], torch.arange(7))


def test_no_rank_takes_a_collective_for_a_barrier(one, ranks):
    """No feature is lost where sums over ranks return before the slow ranks have come."""
    torch.testing.assert_close(ranks[0]['embedded'], one['embedded'], rtol=0, atol=1e-6)


def test_running_statistics_become_their_mean_over_ranks_wherever_they_are_used(ranks):
    own = []  # of every step, all ranks'
    for rank in ranks:
        own.append([x for name, x in rank['statistics'] if name == 'own'])
    for a, b, *_ in zip(*own):
        assert (a - b).norm() > 1e-3
    monitored = {('monitor', 3), ('monitor', 9)}
    saved = {('last.pth', 2), ('last.pth', 3), ('model_1.pth', 3), ('last.pth', 5)}
    for number, rank in enumerate(ranks):
        used, steps = Counter(), 0
        for name, x in rank['statistics']:
            if name == 'own':
                steps += 1
                continue
            monitors_untrained_or_stopped = name == 'monitor' and steps in (0, 5)
            if steps == 0 or monitors_untrained_or_stopped:
                continue
            mean = torch.stack([steps_of_rank[steps - 1] for steps_of_rank in own]).mean(0)
            torch.testing.assert_close(x, mean, msg=f'{name} after {steps} steps')
            used[name, steps] += 1
        if number == 0:
            assert set(used) == monitored | saved
        else:
            assert set(used) == monitored
