"""The recipes of docs/recipes.md run as they stand; those of other packages where these are."""

import importlib.util
import re
import subprocess
import sys

import pytest
import torch
from conftest import HOME

from model import Model

PAGE = (HOME / 'docs' / 'recipes.md').read_text()
# The Python below each heading, after any lines of text
RECIPES = dict(re.findall(r'## ([^\n]*)\n(?:[^`#][^\n]*\n|\n)*```python\n(.*?)```', PAGE, re.S))
ALONE = (
    'A plain loop',
    'A batch larger than memory',
    'A queue of keys and a momentum encoder, after MoCo',
    'Mined hard negatives of retrieval',
    'CLIP with a learnable temperature',
    'Known classes: no false negatives',
)


def run(title):
    """The names that a recipe leaves."""
    names = {}
    torch.manual_seed(0)
    exec(RECIPES[title], names)
    return names


@pytest.mark.parametrize('title', ALONE)
def test_a_recipe_gives_a_finite_loss(title):
    loss = run(title)['loss']
    assert loss.isfinite()
    assert loss > 0


def test_a_batch_larger_than_memory_has_the_gradient_of_one_graph():
    names = run('A batch larger than memory')
    weight = names['encoder'].weight
    found, weight.grad = weight.grad, None
    z1, z2 = (names['encoder'](view) for view in names['x'])
    names['contrastive_loss'](z1, z2).backward()
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    'title, package', [('Lightning', 'lightning'), ('accelerate', 'accelerate')]
)
def test_a_recipe_of_another_package_runs_in_a_process_of_its_own(title, package, tmp_path):
    if not importlib.util.find_spec(package):
        pytest.skip(f'{package} is not installed')
    command = [sys.executable, '-c', RECIPES[title]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_for_sentence_transformers_takes_mined_negatives():
    names = run('sentence-transformers')
    model = torch.nn.Module()
    model.forward = lambda x: {'sentence_embedding': x}
    a, b, mined = torch.randn(3, 6, 8)
    loss = names['HardNegatives'](model, beta=0.5)
    objective = dict(temperature=0.05, tau_plus=0, intra_view=False, beta=0.5)
    expected = names['contrastive_loss'](a, b, negatives=mined, **objective)
    assert loss([a, b, mined]) == expected
    assert loss([a, b]) != expected


def test_the_backbone_as_onnx(tmp_path, monkeypatch):
    onnx = pytest.importorskip('onnx')
    (tmp_path / 'results').mkdir()
    state = Model(8, 'resnet18', 8, width=0.25).state_dict()
    torch.save(state, tmp_path / 'results' / 'model_400.pth')
    monkeypatch.chdir(tmp_path)
    run('ONNX of the backbone')
    graph = onnx.load('encoder.onnx').graph
    assert [value.name for value in (*graph.input, *graph.output)] == ['x', 'features']
