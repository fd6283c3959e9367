"""The probe: what it trains on, what its files say, and what it leaves alone."""

import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import linear
import main
import model
from hardneg import files
from hardneg.evaluate import Evaluator
from hardneg.files import read_checkpoint
from hardneg.runtime import UserError
from utils import Data, load_data

CPU = torch.device('cpu')
NO_AUTOCAST = torch.autocast('cpu', enabled=False)


@pytest.fixture(scope='module')
def finished(tiny, tmp_path_factory):
    """A finished run of 3 epochs."""
    results = tmp_path_factory.mktemp('runs') / 'finished'
    main.main([*tiny, '--epochs', '3', '--results_dir', str(results)])
    return results


@pytest.fixture
def copied(finished, tmp_path):
    """A directory with the config.json and the last encoder of that run alone."""
    for name in ('config.json', 'model_3.pth'):
        shutil.copy(finished / name, tmp_path / name)
    return tmp_path


def probe(results, *flags):
    checkpoint = str(results / 'model_3.pth')
    linear.main(['--model_path', checkpoint, '--precision', 'fp32', *flags])


def contents(directory):
    """The bytes of every file, by name, without locks."""
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.suffix != '.lock'}


@pytest.mark.parametrize('bn, name', [('eval', 'linear'), ('train', 'linear_bn_train')])
def test_a_probe_says_what_its_files_and_the_log_hold(finished, capsys, bn, name):
    probe(finished, '--epochs', '30', '--bn', bn, '--lr', '0.01')
    said = capsys.readouterr().out.splitlines()[-1]
    log = pd.read_csv(finished / 'log.csv')
    table = pd.read_csv(finished / f'model_3_{name}.csv')
    untrained = pd.read_csv(finished / f'model_0_{name}.csv')
    about = json.loads((finished / f'model_3_{name}.json').read_text())
    assert about['settings']['lr'] == 0.01
    assert about['settings']['bn'] == bn
    assert about['encoder'] == files.crc(finished / 'model_3.pth')
    assert list(table['epoch']) == list(range(1, 31))
    assert table['train_loss'][29] < 0.7 * table['train_loss'][0]
    assert said == (
        f'kNN {log["test_acc@1"][3]:.2f} %, linear probe {table["test_acc@1"][29]:.2f} % '
        f'(@5 100.00 %); untrained: kNN {log["test_acc@1"][0]:.2f} %, '
        f'linear probe {untrained["test_acc@1"][29]:.2f} %; files in {finished}'
    )
    if bn == 'eval':
        probe(finished, '--epochs', '30', '--lr', '0.01')
        assert capsys.readouterr().out.splitlines()[-1] == said


@pytest.mark.parametrize(
    'flags', [[], ['--cached'], ['--probe', 'logistic'], ['--bn', 'train']], ids=str
)
def test_a_probe_leaves_the_encoder_as_it_was(copied, monkeypatch, flags):
    """Its file and its tensors; with --bn train all but BatchNorm's statistics."""
    nets = []
    load_encoder = linear.load_encoder

    def load(*args, **options):
        nets.append(load_encoder(*args, **options))
        return nets[-1]

    monkeypatch.setattr(linear, 'load_encoder', load)
    before = (copied / 'model_3.pth').read_bytes()
    weights = read_checkpoint(copied / 'model_3.pth')
    probe(copied, '--epochs', '2', *flags)
    moved = set()
    for name, x in nets[0].state_dict().items():
        if not torch.equal(x, weights[name]):
            moved.add(name.rpartition('.')[2])
    statistics = {'running_mean', 'running_var', 'num_batches_tracked'}
    assert moved == (statistics if 'train' in flags else set())
    assert (copied / 'model_3.pth').read_bytes() == before


def test_a_stopped_probe_leaves_the_finished_one(copied, monkeypatch):
    probe(copied, '--epochs', '1')
    before = contents(copied)
    write = files.write

    def end_in_epoch_2(path, data):
        if data.count(b'\n') == 3:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(files, 'write', end_in_epoch_2)
    with pytest.raises(KeyboardInterrupt):
        probe(copied, '--epochs', '3')
    partial = copied / 'model_3_linear.partial.csv'
    assert pd.read_csv(partial)['epoch'].tolist() == [1]
    partial.unlink()
    assert contents(copied) == before


def test_probes_of_two_checkpoints_share_the_lock_of_the_untrained_one_alone(copied, monkeypatch):
    locked = []
    monkeypatch.setattr(linear, 'lock', lambda place, name, wait: locked.append(name))
    for epoch in 0, 2:
        shutil.copy(copied / 'model_3.pth', copied / f'model_{epoch}.pth')
    for epoch in 2, 3:
        linear.main(['--model_path', str(copied / f'model_{epoch}.pth'), '--epochs', '1'])
    names = [f'.model_{epoch}_linear.lock' for epoch in (2, 0, 3, 0)]
    assert locked == names


def test_another_programs_model_0_is_not_called_untrained(copied, tree, capsys):
    shutil.copy(copied / 'model_3.pth', copied / 'model_0.pth')
    (copied / 'config.json').unlink()
    data = ['--dataset_name', 'folder', '--root', str(tree), '--image_size', '8']
    probe(copied, '--epochs', '1', *data)
    assert 'untrained' not in capsys.readouterr().out
    assert not list(copied.glob('model_0_*'))


def test_a_checkpoint_alone_is_probed_on_stl10(finished, tmp_path, capsys):
    shutil.copy(finished / 'model_3.pth', tmp_path)
    with pytest.raises(UserError, match=r'STL10 is not in .*stl10_binary'):
        probe(tmp_path, '--root', '/proc/nowhere')
    assert 'the data set is stl10, as published' in capsys.readouterr().out


def test_a_path_that_is_no_checkpoint_is_named(tmp_path, finished):
    wrong = {
        tmp_path / 'none.pth': 'no such file',
        finished / 'log.csv': 'log.csv: ',
        finished: 'a directory; in .* there is model_0.pth, ',
        '.': 'a directory',
    }
    for path, message in wrong.items():
        with pytest.raises(UserError, match=message):
            linear.main(['--model_path', str(path)])


@pytest.mark.parametrize('bn, times', [('eval', 1), ('train', 2)])
def test_test_features_are_computed_again_only_if_statistics_drift(copied, monkeypatch, bn, times):
    """Once; or after every tenth epoch and the last. The last batch has one image."""
    found = []
    features = Evaluator.features

    def spy(self, *args):
        found.append(features(self, *args))
        return found[-1]

    monkeypatch.setattr(Evaluator, 'features', spy)
    probe(copied, '--epochs', '12', '--bn', bn, '--batch_size', '29')
    assert len(found) == times
    table = pd.read_csv(next(copied.glob('model_3_*.csv')))
    tested = table.index[table['test_acc@1'].notna()].tolist()
    if bn == 'eval':
        assert tested == list(range(12))
    else:
        assert tested == [9, 11]
        assert not torch.equal(found[0], found[-1])


@pytest.mark.parametrize('blur', ['published', 'none'])
def test_the_probes_views_are_blurred_as_the_encoders(copied, monkeypatch, blur):
    config = files.read_json(copied / 'config.json')
    config['settings']['blur'] = blur
    files.write_json(copied / 'config.json', config)
    recipes = []
    views = linear.DeviceViews

    def spy(images, batches, size, device, recipe):
        recipes.append(recipe)
        return views(images, batches, size, device, recipe)

    monkeypatch.setattr(linear, 'DeviceViews', spy)
    probe(copied, '--epochs', '1')
    assert [recipe['blur'] for recipe in recipes] == [blur == 'published']


@pytest.mark.parametrize(
    'flags, name',
    [
        (['--cached', '--epochs', '200', '--lr', '0.01'], 'linear_cached'),
        (['--probe', 'logistic'], 'logistic'),
    ],
)
def test_a_probe_classifies_again_from_its_file(copied, tree, flags, name):
    probe(copied, *flags)
    row = pd.read_csv(copied / f'model_3_{name}.csv').iloc[-1]
    found = read_checkpoint(copied / f'model_3_{name}.pth')
    data = load_data('folder', tree, store_size=16)
    evaluator = Evaluator(model.load_model(copied / 'model_3.pth', head=False), CPU, NO_AUTOCAST)
    assert found['classes'] == data.classes
    outputs = {}
    for images in (data.train, data.test):
        features = evaluator.features(images, torch.arange(len(images)), 0)
        outputs[len(images)] = features @ found['weight'].T + found['bias']

    def accuracy(labels):
        return 100 * (outputs[len(labels)].argmax(1) == labels).float().mean().item()

    assert row['test_acc@1'] == pytest.approx(accuracy(data.test_labels))
    assert row['train_acc@1'] > 90
    if name == 'logistic':  # the linear probe's training accuracies are those of each batch
        assert row['train_acc@1'] == pytest.approx(accuracy(data.train_labels))
        loss = F.cross_entropy(outputs[len(data.train)], data.train_labels).item()
        assert row['train_loss'] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize('flags', [[], ['--bn', 'train'], ['--cached']], ids=' '.join)
def test_rows_of_a_probe_are_those_of_what_entered_its_loss(copied, monkeypatch, flags):
    """Of batches of 13, 13 and 4 images and of all test images, counted by hand."""
    images = torch.randint(256, (50, 3, 16, 16)).byte()
    labels = torch.arange(50) * 3 % 8
    data = Data(images[:30], labels[:30], images[30:], labels[30:], list('abcdefgh'), 'digest')
    monkeypatch.setattr(linear, 'load', lambda args, unlabeled: data)
    passes = []  # of each call of one_epoch(), what entered its loss
    cross_entropy, one_epoch = F.cross_entropy, linear.one_epoch

    def spy_loss(output, target):
        passes[-1].append((output.detach(), target))
        return cross_entropy(output, target)

    def spy_epoch(layer, pairs, n, optimizer=None):
        passes.append([])
        before = layer.weight.clone()
        done = one_epoch(layer, pairs, n, optimizer)
        assert torch.equal(layer.weight, before) == (optimizer is None)
        if optimizer:
            assert optimizer.defaults['lr'] == 0.1
            assert optimizer.defaults['weight_decay'] == 0.3
        return done

    monkeypatch.setattr(F, 'cross_entropy', spy_loss)
    monkeypatch.setattr(linear, 'one_epoch', spy_epoch)
    sgd = ['--epochs', '3', '--batch_size', '13', '--lr', '.1', '--weight_decay', '.3']
    probe(copied, *sgd, *flags)

    measured = []
    for entered in passes:
        output = torch.cat([output for output, _ in entered])
        target = torch.cat([target for _, target in entered])
        own = output.gather(1, target[:, None])
        rank = (output > own).sum(1)  # how many classes come before the image's own
        loss = -output.log_softmax(1).gather(1, target[:, None]).mean()
        top1, top5 = (100 * (rank < k).double().mean() for k in (1, 5))
        measured.append([loss.item(), top1.item(), top5.item()])
        sizes = [len(target) for _, target in entered]
        assert sizes in ([13, 13, 4], [20])
    if 'train' in flags:  # tested after the last epoch alone
        measured[1:1] = measured[3:3] = [[math.nan] * 3]
    table = pd.read_csv(next(copied.glob('model_3_*.csv')))
    assert table['epoch'].tolist() == [1, 2, 3]
    train = table[['train_loss', 'train_acc@1', 'train_acc@5']]
    test = table[['test_loss', 'test_acc@1', 'test_acc@5']]
    np.testing.assert_allclose(train, measured[0::2], rtol=1e-5)
    np.testing.assert_allclose(test, measured[1::2], rtol=1e-5)


def test_epochs_and_seeds_see_other_views_of_an_image(copied, monkeypatch):
    seen = []
    features_of_views = linear.features_of_views

    def spy(net, batches, *args):
        kept = list(batches)
        order = torch.cat([index for _, index in kept])
        views = torch.cat([x for (x,), _ in kept])
        seen.append((order, views[order.argsort()]))
        return features_of_views(net, kept, *args)

    monkeypatch.setattr(linear, 'features_of_views', spy)
    for seed in '01':
        probe(copied, '--epochs', '2', '--seed', seed)
    for i in range(len(seen)):
        for j in range(i):
            assert not torch.equal(seen[i][0], seen[j][0])
            changed = (seen[i][1] != seen[j][1]).flatten(1).any(1)
            assert changed.float().mean() > 0.9


@pytest.mark.parametrize('classes', [2, 3])
def test_the_logistic_probe_is_scikit_learns(classes):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator) * 3 + 1
    labels = torch.arange(60) % classes
    layer = torch.nn.Linear(5, classes)
    linear.fit_logistic(layer, features, labels)
    theirs = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    expected = theirs.fit(features, labels).predict_proba(features)
    found = layer(features).softmax(1)
    torch.testing.assert_close(found, torch.tensor(expected).float(), rtol=1e-3, atol=1e-4)


def test_another_data_set_is_probed_at_the_encoders_sizes(copied, monkeypatch):
    """It takes the run's sizes, but not the place of the run's data."""
    given = []

    def load(args, unlabeled):
        given.append((args.dataset_name, args.root, args.store_size, args.image_size))
        raise UserError('enough')

    monkeypatch.setattr(linear, 'load', load)
    for flags in (['--dataset_name', 'stl10'], []):
        with pytest.raises(UserError, match='enough'):
            probe(copied, *flags)
    own_root = files.read_json(copied / 'config.json')['settings']['root']
    assert given == [('stl10', 'data', 16, 8), ('folder', own_root, 16, 8)]


def test_where_the_untrained_encoder_overflows_the_probe_of_the_other_is_told(
    finished, tmp_path, monkeypatch, capsys
):
    results = shutil.copytree(finished, tmp_path / 'run')
    for path in results.glob('model_0_*'):
        path.unlink()
    weights = files.read_checkpoint(results / 'model_0.pth')
    weights['f.1.weight'] *= 1e38  # finite, but not what they make of an image
    files.write_tensors(results / 'model_0.pth', weights)
    probe(results, '--cached', '--epochs', '1')
    said = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r'linear probe \d+\.\d+ % .*; untrained: .*linear probe nan %; files', said)
    assert not list(results.glob('model_0_*.csv'))


@pytest.mark.parametrize('kind', ['--cached', '--probe=logistic'])
def test_features_that_overflow_are_told(copied, monkeypatch, kind):
    encode = linear.Evaluator.features

    def overflow(self, *args):
        features = encode(self, *args)
        features[2] = torch.inf
        return features

    monkeypatch.setattr(linear.Evaluator, 'features', overflow)
    with pytest.raises(UserError, match='features are not finite with --precision fp32'):
        probe(copied, kind)


@pytest.mark.parametrize('fraction', [0.3, 1e-9])
def test_a_part_of_the_labels_is_of_every_class(fraction):
    labels = torch.arange(100) % 4 % 3  # 50 images of class 0, 25 of 1 and of 2
    chosen = linear.stratified(labels, fraction, seed=0)
    counts = labels[chosen].bincount().tolist()
    assert counts == [max(1, round(fraction * n)) for n in (50, 25, 25)]
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert not torch.equal(chosen, linear.stratified(labels, fraction, seed=1))
