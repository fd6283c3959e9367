"""hardneg/neighbours.py against all cosines at once, and its rule against planted copies."""

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import connected_components

from hardneg import neighbours
from hardneg.runtime import UserError
from model import unit


def random_rows(n, dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return unit(torch.randn(n, dimension, generator=generator))


def with_copies(x, copies, distance=0.1):
    """x with rows added: each (row, count) in copies gets so many at about this distance."""
    rows = [x]
    for row, count in copies:
        noise = distance * random_rows(count, x.shape[1], seed=row + 1)
        rows.append(unit(x[row] + noise))
    return torch.cat(rows)


@pytest.fixture(autouse=True, params=[16, 2048], ids=['many tiles', 'one tile'])
def tile(request, monkeypatch):
    monkeypatch.setattr(neighbours, 'TILE', request.param)
    monkeypatch.setattr(neighbours, 'LINKS', 50)


def test_the_nearest_rows_are_those_of_all_cosines():
    x = random_rows(70, 6)
    cosine, index = neighbours.nearest(x, 5)
    whole = (x @ x.T).fill_diagonal_(-2)
    expected = whole.topk(5)
    torch.testing.assert_close(cosine, expected.values)
    torch.testing.assert_close(whole.gather(1, index), expected.values)


def test_the_top_pairs_are_those_of_the_highest_cosines():
    x = random_rows(60, 4)
    whole = (x @ x.T).triu(1)
    i, j, cosine = neighbours.top_pairs(x, 20)
    assert (i < j).all()
    assert len(set(zip(i.tolist(), j.tolist()))) == 20
    torch.testing.assert_close(cosine, whole.flatten().sort(descending=True).values[:20])
    torch.testing.assert_close(cosine, whole[i, j])


def test_rows_are_joined_by_all_pairs_of_at_least_the_cosine():
    x = random_rows(60, 4)
    linked = ((x @ x.T) >= 0.9).numpy()
    _, expected = connected_components(linked, directed=False)
    label = neighbours.joined_by_cosine(x, 0.9).numpy()
    np.testing.assert_array_equal(label[:, None] == label, expected[:, None] == expected)
    assert 1 < len(np.unique(label)) < len(x)


def test_there_may_be_no_pair_and_fewer_than_are_asked_for():
    x = torch.eye(5)
    assert [len(part) for part in neighbours.top_pairs(x, 100)] == [10, 10, 10]
    assert neighbours.groups(neighbours.joined_by_cosine(x, 0.5)) == []


def linked_by_the_rule(x, ratio):
    """The rule of near_duplicates() by all distances at once: (n, n) bool."""
    distance = (2 - 2 * x @ x.T).clamp(min=0).sqrt()
    others = distance.clone().fill_diagonal_(9)
    reach = others.sort(1).values[:, neighbours.NEAREST - 1]
    reach = reach.clamp(min=neighbours.FLOOR * reach.median())
    return distance <= ratio * torch.minimum(reach[:, None], reach)


@pytest.mark.parametrize('ratio', [0.3, 0.6, 0.9])
def test_near_duplicates_are_those_of_the_rule_by_all_distances(ratio):
    x = with_copies(random_rows(150, 8), [(0, 1), (1, 4), (2, 11), (3, 30), (4, 40)], 0.3)
    _, expected = connected_components(linked_by_the_rule(x, ratio).numpy(), directed=False)
    label = neighbours.near_duplicates(x, ratio).numpy()
    together = label[:, None] == label
    np.testing.assert_array_equal(together, expected[:, None] == expected)
    assert 1 < len(np.unique(label)) < len(x)


def test_the_rule_finds_pairs_groups_and_long_bursts_and_no_others():
    x = with_copies(random_rows(300, 128), [(0, 1), (1, 4), (2, 12), (3, 50)])
    found = neighbours.groups(neighbours.near_duplicates(x))
    assert sorted(map(len, found)) == [2, 5, 13, 51]
    for rows, first in zip(sorted(found, key=len), (0, 1, 2, 3)):
        assert rows[0] == first


def test_equal_images_are_found_even_where_most_have_copies():
    x = random_rows(20, 32).repeat_interleave(30, 0)
    found = neighbours.groups(neighbours.near_duplicates(x))
    assert [len(rows) for rows in found] == [30] * 20


@pytest.mark.parametrize('ratio', [0.01, 0.76])
def test_equal_images_are_found_at_any_ratio_and_at_a_cosine_of_one(ratio):
    x = random_rows(40, 129)
    x = torch.cat([x, x[:5]])
    assert (x[:5] * x[40:]).sum(1).min() < 1  # by rounding
    for label in neighbours.near_duplicates(x, ratio), neighbours.joined_by_cosine(x, 1):
        found = neighbours.groups(label)
        assert sorted(rows.tolist() for rows in found) == [[i, 40 + i] for i in range(5)]


def test_the_rule_needs_twelve_images():
    x = random_rows(12, 32)
    neighbours.near_duplicates(x)
    with pytest.raises(UserError, match='11 images: .* needs 12, .*--at_least'):
        neighbours.near_duplicates(x[:11])


def test_chains_of_likeness_join():
    angle = torch.arange(4) * 0.1
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x = torch.cat([x, -x[:1]])
    (group,) = neighbours.groups(neighbours.joined_by_cosine(x, 0.99))
    assert group.tolist() == [0, 1, 2, 3]


def test_two_bursts_of_one_scene_are_one_group():
    """The nearest of each photo are of its own burst."""
    x = with_copies(random_rows(300, 128), [(0, 20)], 0.01)
    second = unit(x[:1] + 0.2 * random_rows(1, 128, seed=9))
    x = torch.cat([x, with_copies(second, [(0, 20)], 0.01)])
    (rows,) = neighbours.groups(neighbours.near_duplicates(x))
    assert len(rows) == 42
