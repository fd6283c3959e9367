"""Few labels: which images a fraction takes, probes on it, and encoders that learn from them too."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import finetune
import linear
from hardneg import runs
from data import load_data
from hardneg.evaluate import resized
from hardneg.files import read_json, write_json, write_tensors
from model import Model, load_model
from hardneg.runtime import UserError


def test_fraction_takes_a_random_part_of_each_class():
    labels = torch.arange(1000) % 10 // 4  # 400, 400 and 200
    labels[-1] = 3  # and one alone
    part = linear.stratified(labels, 0.1, 0)
    assert labels[part].bincount().tolist() == [40, 40, 20, 1]
    assert part.equal(part.unique()) and part.equal(linear.stratified(labels, 0.1, 0))
    other, larger = ({*linear.stratified(labels, *key).tolist()} for key in ((0.1, 1), (0.2, 0)))
    assert {*part.tolist()} != other
    assert not {*part.tolist()} <= larger  # as if each were drawn alone
    assert linear.stratified(labels, 0.001, 0).numel() == 4


def test_probe_learns_from_its_fraction_alone_and_says_so(tree, tmp_path, monkeypatch):
    write_tensors(tmp_path / 'model_1.pth', Model(arch='resnet18', width=0.125).state_dict())
    write_tensors(tmp_path / 'model_0.pth', Model(arch='resnet18', width=0.125).state_dict())
    seen, real = [], linear.fit_logistic
    monkeypatch.setattr(linear, 'fit_logistic', lambda probe, x, y: seen.append(y.tolist()) or real(probe, x, y))
    words = ['--model_path', str(tmp_path / 'model_1.pth'), '--probe', 'logistic', '--dataset_name', 'folder', '--root',
             str(tree)]
    for fraction in '0.2', '0.2', '1':
        linear.main([*words, '--label_fraction', fraction])
    few, every = [0, 0, 1, 1, 2, 2], [0] * 10 + [1] * 10 + [2] * 10
    assert seen == [few, few, few, every, every]  # model_0 is probed once with each fraction
    whole, part = sorted(tmp_path.glob('model_1_logistic_*.json'))
    assert part.name == f'{whole.stem}_0.2.json'
    abouts = [read_json(path) for path in (part, whole)]
    assert [about['settings'].pop('label_fraction') for about in abouts] == [0.2, 1]
    earlier = whole.with_name(whole.name.replace('model_1', 'model_0'))
    write_json(earlier, abouts[1] | dict(encoder=read_json(earlier)['encoder']))  # as before there were fractions
    linear.main(words)
    assert seen[5:] == [every]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('run') / 'model_3.pth'
    write_tensors(file, Model(arch='resnet18', width=0.125).state_dict())
    return file


@pytest.fixture(scope='module')
def shapes():
    data = load_data('shapes')
    return replace(data, test=data.test[:300], test_labels=data.test_labels[:300])


def tiny_data(tree):
    return ['--dataset_name', 'folder', '--root', tree, '--image_size', 8]


def tune(*words):
    finetune.main([str(word) for word in words])


@pytest.mark.parametrize('scratch', [False, True])
def test_encoder_and_classifier_learn(checkpoint, shapes, tmp_path, capsys, monkeypatch, scratch):
    monkeypatch.setattr(linear, 'load_data', lambda *_: replace(shapes))
    start = ['--model_path', 'none', '--like', checkpoint] if scratch else ['--model_path', checkpoint]
    tune(*start, '--results_dir', tmp_path, '--dataset_name', 'shapes', '--image_size', 24, '--test_size', 24,
         '--jitter', 0, '--crop_min', 0.9, '--label_fraction', 0.2, '--batch_size', 32, '--epochs', 5, '--lr', 0.01,
         '--encoder_lr', 0.005)
    out = tmp_path / f'model_3_{"scratch" if scratch else "finetune"}_shapes_0.2'
    rows, about = pd.read_csv(f'{out}.csv'), read_json(f'{out}.json')
    assert list(rows) == list(runs.PROBE) and rows['epoch'].tolist() == [1, 2, 3, 4, 5]
    first, five = rows['test_acc@1'].iloc[-1], rows['test_acc@5'].iloc[-1]
    assert f'on 600 labelled images: {first:.2f} % (@5 {five:.2f} %)' in capsys.readouterr().out
    assert first > 20 and five > first  # chance: 10; of a frozen encoder 14 at most
    assert about['settings']['jitter'] == 0 and about['encoder'] == (None if scratch else runs.crc(checkpoint))
    weights, net = torch.load(f'{out}.pth'), load_model(f'{out}.pth', head=False).eval()
    assert not torch.equal(weights['f.5.0.conv1.weight'], torch.load(checkpoint)['f.5.0.conv1.weight'])
    with torch.no_grad():  # the file holds what was tested
        scores = net.f(resized(shapes.test, 24)).flatten(1) @ weights['fc.weight'].T + weights['fc.bias']
    assert first == pytest.approx(100 * (scores.argmax(1) == shapes.test_labels).float().mean().item())
    assert about['classes'] == shapes.classes


def test_without_pretraining_nothing_of_the_checkpoint_but_its_network_is_used(checkpoint, tree, tmp_path):
    torch.manual_seed(1)
    other = tmp_path / 'model_3.pth'
    write_tensors(other, Model(arch='resnet18', width=0.125).state_dict())
    for file in checkpoint, other:
        tune('--model_path', 'none', '--like', file, '--epochs', 1, *tiny_data(tree))
    one, two = (torch.load(next(file.parent.glob('*scratch*.pth'))) for file in (checkpoint, other))
    assert all(torch.equal(x, two[name]) for name, x in one.items())


def test_each_part_has_a_rate_of_its_own_that_falls(checkpoint, tree, tmp_path, monkeypatch):
    rates, real = [], finetune.one_epoch

    def watched(head, pairs, n, optimizer=None):
        rates.extend([[group['lr'] for group in optimizer.param_groups]] if optimizer else [])
        return real(head, pairs, n, optimizer)

    monkeypatch.setattr(finetune, 'one_epoch', watched)
    tune('--model_path', checkpoint, '--epochs', 2, '--lr', 0.1, '--encoder_lr', 1e-9, '--results_dir', tmp_path,
         *tiny_data(tree))
    assert rates == [[1e-9, 0.1], [pytest.approx(0.5e-9), pytest.approx(0.05)]]
    weights, before = torch.load(next(tmp_path.glob('*.pth'))), torch.load(checkpoint)
    torch.testing.assert_close(weights['f.0.weight'], before['f.0.weight'], rtol=0, atol=1e-7)


@pytest.mark.parametrize('words, message', [
    (['--model_path', 'none'], 'go together'),
    (['--like', 'model.pth'], 'go together'),
    (['--label_fraction', '0'], r'must be in \(0, 1\]'),
    (['--label_fraction', '1.5'], r'must be in \(0, 1\]'),
    (['--encoder_lr', '0'], 'must be a number from 1e-30'),
])
def test_wrong_flags_end_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit):
        finetune.main(words)
    error = capsys.readouterr().err
    assert error.count('\n') == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def test_rate_that_diverges_is_named(checkpoint, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, 'one_epoch', lambda *_: (math.nan, 0, 0))
    with pytest.raises(UserError, match=r'the loss is nan in epoch 1: --lr 7.0 or --encoder_lr 8.0 is too high'):
        tune('--model_path', checkpoint, '--lr', 7, '--encoder_lr', 8, '--results_dir', tmp_path, *tiny_data(tree))
    assert not [*tmp_path.glob('model*')]
