"""The objective as one graph, compiled by torch's own compiler, inductor; more random cases."""

import pytest
import test_losses
import torch
from test_losses import each_setting, unit_views, value_and_gradient

from hardneg.losses import contrastive_loss


@each_setting
def test_inductor_gives_the_value_and_the_gradient(setting):
    torch._dynamo.reset()
    compiled = torch.compile(contrastive_loss, fullgraph=True)
    views = unit_views(6, 5)
    found = value_and_gradient(compiled, views, **setting)
    expected = value_and_gradient(contrastive_loss, views, **setting)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('part', range(4, 11))  # the fast suite has the parts before
def test_more_random_cases_are_the_equations(part):
    test_losses.test_value_and_gradient_are_the_equations(part)
