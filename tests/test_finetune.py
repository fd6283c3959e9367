"""Few labels: which images a fraction takes, probes on it, and encoders that learn from it too."""

import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

import finetune
import linear
from hardneg import runs
from hardneg.evaluate import resized
from hardneg.files import crc, read_json, write_json, write_tensors
from hardneg.runtime import UsageError, UserError
from model import Model, load_model
from utils import load_data


def write_encoder(file):
    write_tensors(file, Model(arch='resnet18', width=0.25).state_dict())
    return file


# Probes


def test_a_fraction_is_drawn_anew_for_each_fraction_and_seed():
    labels = torch.arange(1000) % 10 // 4  # 400, 400 and 200
    labels[-1] = 3  # and one alone
    part = linear.stratified(labels, 0.1, 0)
    assert labels[part].bincount().tolist() == [40, 40, 20, 1]
    assert part.equal(linear.stratified(labels, 0.1, 0))
    assert not part.equal(linear.stratified(labels, 0.1, 1))
    larger = linear.stratified(labels, 0.2, 0)
    assert not set(part.tolist()) <= set(larger.tolist())


def test_a_probe_learns_from_its_fraction_alone_and_says_so(tree, tmp_path, monkeypatch):
    for epochs in 0, 1:
        write_encoder(tmp_path / f'model_{epochs}.pth')
    write_json(tmp_path / 'config.json', {name: kind() for name, kind in runs.CONFIG.items()})
    seen = []
    fit = linear.fit_logistic

    def watched(layer, features, labels):
        seen.append(labels.tolist())
        fit(layer, features, labels)

    monkeypatch.setattr(linear, 'fit_logistic', watched)
    words = ['--model_path', str(tmp_path / 'model_1.pth'), '--probe', 'logistic']
    words += ['--dataset_name', 'folder', '--root', str(tree)]
    for fraction in '0.2', '0.2', '1':
        linear.main([*words, '--label_fraction', fraction])
    few = [0, 0, 1, 1, 2, 2]
    every = [0] * 10 + [1] * 10 + [2] * 10
    assert seen == [few, few, few, every, every]  # model_0 is probed once with each fraction
    whole, part = sorted(tmp_path.glob('model_1_logistic_*.json'))
    assert part.name == f'{whole.stem}_0.2.json'
    assert read_json(part)['settings']['label_fraction'] == 0.2
    assert read_json(whole)['settings']['label_fraction'] == 1


# Fine-tuning


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return write_encoder(tmp_path_factory.mktemp('run') / 'model_3.pth')


@pytest.fixture(scope='module')
def shapes():
    data = load_data('shapes')
    return replace(data, test=data.test[:300], test_labels=data.test_labels[:300])


def tune(flags, *more):
    finetune.main([*flags.split(), *map(str, more)])


def tiny_data(tree):
    return '--dataset_name', 'folder', '--root', tree, '--image_size', 8


@pytest.mark.parametrize('scratch', [False, True])
def test_encoder_and_classifier_learn(checkpoint, shapes, tmp_path, capsys, monkeypatch, scratch):
    monkeypatch.setattr(linear, 'load', lambda *args, **options: replace(shapes))
    start, kind, encoder = f'--model_path {checkpoint}', 'finetune', crc(checkpoint)
    if scratch:
        start, kind, encoder = f'--model_path none --like {checkpoint}', 'scratch', None
    tune(
        f'{start} --results_dir {tmp_path} --dataset_name shapes --image_size 16 --test_size 16 '
        '--jitter 0 --crop_min 0.9 --label_fraction 0.2 --batch_size 32 --epochs 4 --lr 0.01 '
        '--encoder_lr 0.005 --precision fp32'
    )
    out = tmp_path / f'model_3_{kind}_shapes_0.2'
    rows, about = pd.read_csv(f'{out}.csv'), read_json(f'{out}.json')
    assert list(rows) == list(runs.PROBE)
    assert rows['epoch'].tolist() == [1, 2, 3, 4]
    first, five = rows['test_acc@1'].iloc[-1], rows['test_acc@5'].iloc[-1]
    said = capsys.readouterr().out
    assert f'on 600 labelled images: {first:.2f} % (@5 {five:.2f} %)' in said
    assert first > 20  # chance: 10; of a frozen encoder 15 at most
    assert five > first
    assert about['settings']['jitter'] == 0
    assert about['encoder'] == encoder
    assert about['classes'] == shapes.classes
    weights, before = torch.load(f'{out}.pth'), torch.load(checkpoint)
    assert not torch.equal(weights['f.5.0.conv1.weight'], before['f.5.0.conv1.weight'])
    net = load_model(f'{out}.pth', head=False).eval()
    with torch.no_grad():  # the file holds what was tested
        x = net.normalize(resized(shapes.test, 16))
        features = net.f(x).flatten(1)  # (n, F, 1, 1) -> (n, F)
    scores = features @ weights['fc.weight'].T + weights['fc.bias']
    right = (scores.argmax(1) == shapes.test_labels).double().mean().item()
    assert first == pytest.approx(100 * right)


def test_without_pretraining_nothing_of_the_checkpoint_but_its_network_is_used(
    checkpoint, tree, tmp_path
):
    torch.manual_seed(1)
    other = write_encoder(tmp_path / 'model_3.pth')
    found = []
    for file in checkpoint, other:
        tune(f'--model_path none --like {file} --epochs 1', *tiny_data(tree))
        (out,) = file.parent.glob('*scratch*.pth')
        found.append(torch.load(out))
    for name, x in found[0].items():
        assert torch.equal(x, found[1][name]), name


def test_each_part_has_a_rate_of_its_own_that_falls(checkpoint, tree, tmp_path, monkeypatch):
    rates = []
    one_epoch = finetune.one_epoch

    def watched(layer, pairs, n, optimizer=None):
        if optimizer:
            rates.append([group['lr'] for group in optimizer.param_groups])
        return one_epoch(layer, pairs, n, optimizer)

    monkeypatch.setattr(finetune, 'one_epoch', watched)
    flags = f'--model_path {checkpoint} --epochs 2 --lr 0.1 --encoder_lr 1e-9'
    tune(flags, '--results_dir', tmp_path, *tiny_data(tree))
    assert rates == [[1e-9, 0.1], [pytest.approx(0.5e-9), pytest.approx(0.05)]]
    (out,) = tmp_path.glob('*.pth')
    found, before = torch.load(out)['f.0.weight'], torch.load(checkpoint)['f.0.weight']
    torch.testing.assert_close(found, before, rtol=0, atol=1e-7)


def test_random_weights_learn_at_the_classifiers_rate():
    like = finetune.arguments(['--model_path', 'none', '--like', 'a.pth', '--lr', '0.5'])
    assert like.encoder_lr == 0.5
    assert finetune.arguments(['--lr', '0.5']).encoder_lr == 1e-4


@pytest.mark.parametrize(
    'words, message',
    [
        ('--model_path none', 'go together'),
        ('--like model.pth', 'go together'),
        ('--label_fraction 0', 'must be in (0, 1]'),
        ('--label_fraction 1.5', 'must be in (0, 1]'),
        ('--encoder_lr 0', 'must be a number from 1e-30'),
    ],
)
def test_wrong_flags_end_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        finetune.main(words.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count('\n') == 1
    assert message in error


def test_views_that_the_stem_cannot_learn_from_are_refused(tree, tmp_path):
    torch.save(Model(arch='resnet18', width=0.25, stem='imagenet').state_dict(), tmp_path / 'a.pth')
    flags = f'--model_path {tmp_path / "a.pth"} --results_dir {tmp_path}'
    with pytest.raises(UsageError, match='needs views of more than 16 px, not 8'):
        tune(flags, *tiny_data(tree))


def test_a_rate_that_diverges_is_named(checkpoint, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, 'one_epoch', lambda *_: (math.nan, 0, 0))
    message = r'the loss is nan in epoch 1: --lr 7.0 or --encoder_lr 8.0 is too high'
    flags = f'--model_path {checkpoint} --lr 7 --encoder_lr 8 --results_dir {tmp_path}'
    with pytest.raises(UserError, match=message):
        tune(flags, *tiny_data(tree))
    assert not list(tmp_path.glob('model*'))
