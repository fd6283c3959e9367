"""The example of two modalities: what its encoders see, and that they learn to find each other."""

import pytest
import torch

from two_towers import halves, retrieval


def test_halves_are_of_one_image_and_test_images_are_not_trained_on():
    (upper, lower), (test_upper, test_lower) = halves(0)
    assert upper.shape == lower.shape == (1347, 32)
    assert test_upper.shape == test_lower.shape == (450, 32)
    assert not torch.equal(upper, lower)
    train = {tuple(image) for image in torch.cat([upper, lower], 1).tolist()}
    test = {tuple(image) for image in torch.cat([test_upper, test_lower], 1).tolist()}
    assert len(train | test) == len(train) + len(test) > 1790


def test_another_seed_tests_on_other_images():
    assert not torch.equal(halves(0)[1][0], halves(1)[1][0])


def test_untrained_towers_retrieve_by_chance():
    assert retrieval(0, steps=0) < 0.02  # chance is 1 in 450


@pytest.mark.parametrize('objective', [dict(beta=0, tau_plus=0), dict(beta=1, tau_plus=0.01)])
def test_trained_towers_retrieve_far_above_chance(objective):
    assert retrieval(0, steps=60, **objective) > 0.08
