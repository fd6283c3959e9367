"""The objective as one graph, compiled by torch's own compiler, inductor."""

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
