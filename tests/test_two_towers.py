"""The example of two modalities: what its encoders see, and that they learn to find each other."""

import torch

from two_towers import halves, retrieval


def test_halves_are_of_one_image_and_test_images_are_not_trained_on():
    (upper, lower), (test_upper, test_lower) = halves(0)
    assert upper.shape == lower.shape == (1347, 32) and test_upper.shape == test_lower.shape == (450, 32)
    assert not torch.equal(upper, lower) and not torch.equal(test_upper, halves(1)[1][0])
    train = {tuple(image) for image in torch.cat([upper, lower], 1).tolist()}
    test = {tuple(image) for image in torch.cat([test_upper, test_lower], 1).tolist()}
    assert len(train | test) == len(train) + len(test) > 1790


def test_retrieval_of_trained_towers_is_far_above_chance():
    assert retrieval(0, steps=0) < 0.02  # chance is 1 in 450
    for objective in (dict(beta=0, tau_plus=0), dict(beta=1, tau_plus=0.01)):
        assert retrieval(0, steps=60, **objective) > 0.08
