"""Evaluation: features, kNN votes, and what goes through the network at once."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hardneg import augment, batches, evaluate
from hardneg.augment import MEAN, STD, standardize
from hardneg.evaluate import Evaluator
from model import Model

BAD = math.inf, -math.inf, math.nan
CPU = torch.device('cpu')
NO_AUTOCAST = torch.autocast('cpu', enabled=False)


def evaluator(net):
    return Evaluator(net, CPU, NO_AUTOCAST)


def standardized(images):
    """Images in grey levels, normalised by the published mean and deviation."""
    mean = torch.tensor(MEAN).view(3, 1, 1)  # (3,) -> (3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return (images / 255 - mean) / std


@pytest.mark.parametrize('temperature', [0.5, 0.005])  # exp(1 / 0.005) is infinite in float32
def test_knn_is_the_weighted_vote(temperature):
    generator = torch.Generator().manual_seed(0)
    memory, queries = (torch.randn(n, 8, generator=generator) for n in (60, 30))
    memory_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (60, 30))
    hits = np.zeros(2)
    for query, label in zip(queries, labels):
        similarity = F.cosine_similarity(query[None], memory)
        votes = np.zeros(7)
        for j in similarity.argsort(descending=True)[:30]:
            votes[memory_labels[j]] += math.exp(similarity[j] / temperature)
        ranked = list(np.argsort(-votes))
        hits += [ranked[0] == label, label.item() in ranked[:5]]
    found = evaluate.knn(memory, queries, memory_labels, labels, k=30, temperature=temperature)
    assert found == pytest.approx(list(100 * hits / 30))


@pytest.mark.parametrize('value, finite', [(3e38, True), *[(x, False) for x in BAD]])
def test_one_number_that_is_not_finite_is_noticed(value, finite):
    x = torch.randn(4, 5)
    x[2, 3] = value
    assert evaluate.all_finite(x) == finite


def test_knn_holds_no_second_copy_of_its_memory():
    """Its rows become of unit length in place."""
    memory = torch.randn(20, 8)
    queries = torch.randn(5, 8)
    expected = F.normalize(memory, dim=1)
    place = memory.data_ptr()
    evaluate.knn(memory, queries, torch.arange(20) % 3, torch.arange(5) % 3, 5, 0.5)
    assert memory.data_ptr() == place
    torch.testing.assert_close(memory, expected)


def test_a_class_without_a_vote_is_no_hit_at_5():
    """Ten classes of separated features; with 5 neighbours only a query's own class gets votes."""
    memory = torch.eye(10).repeat_interleave(5, 0)  # (10, 10) -> (50, 10)
    memory_labels = torch.arange(10).repeat_interleave(5)
    queries = torch.eye(10)
    own = torch.arange(10)
    assert evaluate.knn(memory, queries, memory_labels, own, 5, 0.5) == [100, 100]
    assert evaluate.knn(memory, queries, memory_labels, (own + 1) % 10, 5, 0.5) == [0, 0]


def test_features_are_f_in_eval_mode_at_the_size_asked_for(monkeypatch):
    torch.manual_seed(0)
    net = Model(16, 'resnet18', width=0.25)
    images = torch.randint(256, (10, 3, 24, 24), dtype=torch.uint8)
    index = torch.tensor([7, 3, 3])
    before = {name: x.clone() for name, x in net.state_dict().items()}
    monkeypatch.setattr(evaluate, 'BLOCK', 2)
    features = evaluator(net).features(images, index, 0)
    for name, x in net.state_dict().items():
        assert torch.equal(x, before[name])
    expected = net.eval().f(standardized(images[index])).flatten(1)  # (3, F, 1, 1) -> (3, F)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(evaluator(net).features(images, index, 16), expected)


def test_images_are_resized_with_antialiasing_as_pil_does():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8, generator=generator)
    theirs = []
    for image in images:
        array = image.permute(1, 2, 0).numpy()  # (3, H, W) -> (H, W, 3)
        small = Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR)
        theirs.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))  # -> (3, 16, 16)
    difference = standardize(evaluate.resized(images, 16)) - standardized(torch.stack(theirs))
    level = 1 / 255 / torch.tensor(STD).view(3, 1, 1)  # one grey level, normalised
    assert (difference.abs() <= 1.001 * level).all()


@pytest.mark.parametrize('free, pixels', [(80e9, 2**23), (12e9, 2_000_000), (1e6, evaluate.PIXELS)])
def test_a_gpu_encodes_as_many_pixels_as_its_free_memory_holds(monkeypatch, free, pixels):
    """With 3 kB for each, in half of the memory; a CPU always as many as its cache likes."""
    monkeypatch.setattr('torch.cuda.mem_get_info', lambda device: (free, 80e9))
    gpu = Evaluator(None, torch.device('cuda', 0), NO_AUTOCAST)
    assert gpu._pixels() == pixels
    assert evaluator(None)._pixels() == evaluate.PIXELS


def test_a_block_goes_through_the_network_in_slices_of_so_many_pixels(monkeypatch):
    torch.manual_seed(0)
    net = Model(8, 'resnet18', width=0.25)
    images = torch.randint(256, (10, 3, 24, 24), dtype=torch.uint8)
    index = torch.arange(10)
    seen = []
    net.f.register_forward_pre_hook(lambda f, x: seen.append(len(x[0])))
    monkeypatch.setattr(evaluate, 'BLOCK', 8)

    def encoded():
        return [
            evaluator(net).features(images, index, 0),
            evaluator(net).features(images, index, 12),
            evaluator(net).embeddings(images, index, 12, view=1, recipe={}),
        ]

    whole = encoded()
    assert seen == [8, 2] * 3
    seen.clear()
    monkeypatch.setattr(evaluate, 'PIXELS', 3 * 24**2)
    for x, y in zip(encoded(), whole):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert seen == [3, 3, 2, 2] + [8, 2] * 2


def test_views_for_the_embeddings_are_made_of_few_images_at_a_time(monkeypatch):
    net = Model(8, 'resnet18', width=0.25)
    images = torch.randint(256, (10, 3, 16, 16), dtype=torch.uint8)
    seen = []

    def spy(images, *args):
        seen.append(len(images))
        return augment.transform(images, *args)

    monkeypatch.setattr(batches, 'transform', spy)
    found = []
    for few in 4, 48:
        monkeypatch.setattr(batches, 'CPU_IMAGES', few)
        found.append(evaluator(net).embeddings(images, torch.arange(10), 8, view=1, recipe={}))
    assert seen == [4, 4, 2, 10]
    assert torch.equal(*found)
