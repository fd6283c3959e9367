"""The recipes of misc/recipes.md run as they stand; those of other packages where these are installed."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from conftest import HOME

from model import Model

PAGE = (HOME / 'misc' / 'recipes.md').read_text()
RECIPES = dict(re.findall(r'## ([^\n]*)\n(?:[^`#][^\n]*\n)*```python\n(.*?)```', PAGE, re.S))
ALONE = ['A plain loop', 'A batch larger than memory', 'A queue of keys, as in MoCo',
         'Mined hard negatives of retrieval', 'CLIP with hard negatives and a learnable temperature',
         'Known classes: supervised contrastive learning with hard negatives']


@pytest.mark.parametrize('title', ALONE)
def test_recipe_gives_a_finite_loss(title):
    names = {}
    torch.manual_seed(0)
    exec(RECIPES[title], names)
    assert names['loss'].isfinite() and names['loss'] > 0


def test_batch_larger_than_memory_has_the_gradient_of_one_graph():
    torch.manual_seed(0)
    names = {}
    exec(RECIPES['A batch larger than memory'], names)
    weight = names['encoder'].weight
    found, weight.grad = weight.grad, None
    names['contrastive_loss'](*(names['encoder'](view) for view in names['x'])).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('title, package', [('Lightning', 'lightning'), ('accelerate', 'accelerate')])
def test_recipe_of_another_package_runs_in_a_process_of_its_own(title, package, tmp_path):
    if not importlib.util.find_spec(package):
        pytest.skip(f'{package} is not installed')
    (tmp_path / 'losses.py').write_bytes((HOME / 'losses.py').read_bytes())
    done = subprocess.run([sys.executable, '-c', RECIPES[title]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_loss_module_for_sentence_transformers():
    names = {}
    exec(RECIPES['sentence-transformers'], names)
    model = torch.nn.Module()
    model.forward = lambda x: {'sentence_embedding': x}
    a, b, mined = torch.randn(3, 6, 8)
    loss = names['HardNegatives'](model, beta=0.5)
    objective = dict(temperature=0.05, tau_plus=0, intra_view=False, beta=0.5)
    expected = names['contrastive_loss'](a, b, negatives=mined, **objective)
    assert loss([a, b, mined]) == expected != loss([a, b])


def test_backbone_as_onnx(tmp_path, monkeypatch):
    pytest.importorskip('onnx')
    (tmp_path / 'results').mkdir()
    torch.save(Model(8, 'resnet18', 8, width=0.125).state_dict(), tmp_path / 'results' / 'model_400.pth')
    monkeypatch.chdir(tmp_path)
    exec(RECIPES['ONNX of the backbone'], {})
    import onnx
    graph = onnx.load('encoder.onnx').graph
    assert [value.name for value in (*graph.input, *graph.output)] == ['x', 'features']
