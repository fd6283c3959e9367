"""Images without labels: measures that need none, and a run from training to a probe elsewhere."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import linear
import main
import plot
from hardneg.augment import apply, draw, normalize
from hardneg.batches import seeded
from hardneg.evaluate import Evaluator, label_free
from hardneg.runtime import UserError
from model import Model

rng = np.random.default_rng(0)


def evaluator(net):
    return Evaluator(net, torch.device('cpu'), torch.autocast('cpu', enabled=False))


def small_model():
    torch.manual_seed(0)
    return Model(8, 'resnet18', width=0.125)


def test_label_free_measures_are_those_of_the_papers():
    """Against loops over pairs, and singular values by numpy, of views that are drawn again."""
    net = small_model()
    images = torch.from_numpy(rng.integers(256, size=(30, 3, 16, 16), dtype=np.uint8))
    found = label_free(evaluator(net), images, 8, 0, {}, n=20)
    chosen = torch.randperm(30, generator=seeded(0))[:20].sort().values
    half = images[chosen[::2]]
    net.eval()
    embeddings = []
    with torch.no_grad():
        for view in range(2):
            x = apply(half, draw(10, 16, 16, seeded(view, 0)), 8)
            _, z = net(x)
            embeddings.append(z.double().numpy())
        features = net.f(normalize(images[chosen])).flatten(1).double().numpy()  # (20, F)
    z1, z2 = embeddings
    alignment = np.mean([((a - b) ** 2).sum() for a, b in zip(z1, z2)])
    assert found['alignment'] == pytest.approx(alignment, rel=1e-4)
    uniformities = []
    for z in embeddings:
        pairs = []
        for i in range(10):
            for j in range(i):
                pairs.append(np.exp(-2 * ((z[i] - z[j]) ** 2).sum()))
        uniformities.append(np.log(np.mean(pairs)))
    assert found['uniformity'] == pytest.approx(np.mean(uniformities), rel=1e-4)
    sigma = np.linalg.svd(features, compute_uv=False)
    p = sigma / sigma.sum()
    assert found['rankme'] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


def test_features_that_are_not_finite_have_no_rank():
    net = small_model()
    net.f[1].running_var.fill_(torch.nan)
    found = label_free(evaluator(net), torch.zeros(4, 3, 16, 16, dtype=torch.uint8), 8, 0, {})
    assert np.isnan(found['rankme'])


@pytest.fixture(scope='module')
def flags(tmp_path_factory):
    """The flags of a run on 24 images, of which one is damaged."""
    mine = tmp_path_factory.mktemp('mine')
    for i in range(24):
        image = Image.fromarray(rng.integers(256, size=(20, 20, 3), dtype=np.uint8))
        image.save(mine / f'{i}.png')
    (mine / '7.png').write_bytes(b'')
    text = (
        f'--dataset_name folder --root {mine} --image_size 8 --batch_size 8 --arch resnet18 '
        '--width 0.25 --epochs 2 --knn_every 1'
    )
    return text.split()


@pytest.fixture(scope='module')
def results(flags, tmp_path_factory):
    """The run's directory."""
    directory = tmp_path_factory.mktemp('results')
    main.main([*flags, '--skip_damaged', '--results_dir', str(directory)])
    return directory


def test_damaged_images_stop_a_run_that_does_not_skip_them(flags, tmp_path):
    with pytest.raises(UserError, match='--skip_damaged'):
        main.main([*flags, '--results_dir', str(tmp_path)])


def test_images_without_labels_train_and_are_watched_by_label_free_measures(results):
    log = pd.read_csv(results / 'log.csv')
    assert log['epoch'].tolist() == [0, 1, 2]
    assert log['test_acc@1'].isna().all()
    assert (log[['alignment', 'rankme']] > 0).all(axis=None)
    config = json.loads((results / 'config.json').read_text())
    assert config['classes'] == []
    assert config['images'] == dict(train=23, test=0, damaged=1, damaged_files=['7.png'])


@pytest.mark.parametrize('place', ['results', 'results/mine'])
def test_a_run_and_its_pictures_may_lie_below_the_images(tmp_path, monkeypatch, place, capsys):
    """Another picture does not make the images another set: the same command continues the run."""
    for i in range(9):
        image = Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8))
        image.save(tmp_path / f'{i}.png')
    monkeypatch.chdir(tmp_path)
    words = '--dataset_name folder --root . --image_size 8 --batch_size 8 --epochs 1'
    words = [*words.split(), '--arch', 'resnet18', '--width', '0.25', '--results_dir', place]
    main.main(words)
    plot.main(['curves', place])
    before = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    main.main(words)
    said = capsys.readouterr().out
    assert f'left out 1 with a run in it, such as {tmp_path / place}' in said
    assert f'{place} holds this run, finished' in said
    assert {path.name for path in tmp_path.iterdir()} == before


def test_an_objective_by_labels_needs_labels(flags, tmp_path):
    with pytest.raises(UserError, match='has no labels'):
        main.main([*flags, '--skip_damaged', '--oracle', '--results_dir', str(tmp_path)])


def plotted(words):
    """The figure that plot.py draws."""
    args = plot.make_parser().parse_args(words)
    args.paths = [Path(path) for path in args.paths]
    return plot.PICTURES[args.what](args)


def test_curves_of_images_without_labels_are_of_the_label_free_measures(results):
    panels = plotted(['curves', str(results)]).axes
    labels = [panel.get_ylabel().split(' ')[0] for panel in panels]
    assert labels == ['training', 'alignment', 'uniformity', 'RankMe']


def test_neighbours_of_images_without_labels_are_other_training_images(results, monkeypatch):
    monkeypatch.setattr(plot.runtime, 'start', lambda: torch.device('cpu'))
    panels = plotted(['neighbours', str(results / 'model_2.pth')]).axes
    query, *found = [panel.images[0].get_array() for panel in panels[:12] if panel.images]
    assert len(found) == 10
    assert not any((query == image).all() for image in found)


def test_their_encoder_is_probed_on_a_labelled_set(results, tree, capsys):
    path = ['--model_path', str(results / 'model_2.pth'), '--epochs', '1', '--batch_size', '8']
    with pytest.raises(UserError, match='has no labels: name a labelled data set with'):
        linear.main(path)
    linear.main([*path, '--dataset_name', 'folder', '--root', str(tree)])
    assert 'linear probe' in capsys.readouterr().out


def test_a_start_that_was_given_up_leaves_no_sizes_to_the_next_command(tmp_path, monkeypatch):
    for name, side in (('large', 80), ('small', 20)):
        (tmp_path / name).mkdir()
        for i in range(9):
            Image.new('RGB', (side, side)).save(tmp_path / name / f'{i}.png')
    words = '--dataset_name folder --arch resnet18 --width 0.25 --batch_size 8 --epochs 1'.split()
    words += ['--results_dir', str(tmp_path / 'r'), '--root']

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, 'learning_rate', killed)  # in the first step
        with pytest.raises(KeyboardInterrupt):
            main.main([*words, str(tmp_path / 'large')])
    assert (tmp_path / 'r' / 'model_0.pth').exists()
    args, _, _ = main.arguments([*words, str(tmp_path / 'small')])
    assert (args.image_size, args.stem) == (32, 'cifar')
    main.main([*words, str(tmp_path / 'large')])
    args, _, _ = main.arguments([*words, str(tmp_path / 'small')])
    assert (args.image_size, args.stem) == (80, 'imagenet')  # those of the run that is there
