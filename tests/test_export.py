"""Encoders for other programs, and weights from other programs: what comes out is the same."""

import pytest
import torch
import torchvision

import export
import linear
import main
from hardneg import runs
from hardneg.augment import normalize
from hardneg.files import write_tensors
from model import IMAGENET, Model, load_model
from hardneg.runtime import UserError
from step import build

IMAGES = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def trained(net):
    """The network in eval mode, with statistics of BatchNorm as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    for name, x in net.state_dict().items():
        if name.endswith(('running_mean', 'running_var')):
            x.copy_(torch.rand(x.shape, generator=generator) + 0.5)
    return net.eval()


def for_imagenet(images):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)
    return (images / 255 - mean) / std


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """torchvision's ResNet-18 with random weights, and its file, which counts no batches, as the oldest there."""
    torch.manual_seed(0)
    net, file = trained(torchvision.models.resnet18()), tmp_path_factory.mktemp('theirs') / 'resnet18.pth'
    torch.save({name: x for name, x in net.state_dict().items() if 'num_batches' not in name}, file)
    return net, file


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A network for small images, as published, and one for large ones; and the file of each."""
    directory = tmp_path_factory.mktemp('nets')
    nets = dict(cifar=Model(), imagenet=Model(arch='resnet18', stem='imagenet'))
    for stem, net in nets.items():
        write_tensors(directory / f'{stem}.pth', trained(net).state_dict())
    return {stem: (net, directory / f'{stem}.pth') for stem, net in nets.items()}


@torch.no_grad()
@pytest.mark.parametrize('stem', ['cifar', 'imagenet'])
def test_torchvisions_model_gives_the_features_of_the_encoder(files, tmp_path, capsys, stem):
    net, file = files[stem]
    export.main(['torchvision', str(file), '--out', str(tmp_path / 'out.pth')])
    names = dict(torch=torch, torchvision=torchvision)
    exec(capsys.readouterr().out, names)  # the lines that it prints build and load the model
    features = net.f(normalize(IMAGES)).flatten(1)
    torch.testing.assert_close(names['model'].eval()(normalize(IMAGES)), features, rtol=1e-5, atol=1e-5)


def test_file_for_imagenets_inputs_is_read_back_as_the_encoder(files, tmp_path, capsys):
    (net, file), out = files['imagenet'], tmp_path / 'out.pth'
    export.main(['torchvision', str(file), '--out', str(out), '--fold'])
    assert str(IMAGENET[0]) in capsys.readouterr().out
    state = load_model(out, head=False).f.state_dict()
    for name, x in net.f.state_dict().items():
        torch.testing.assert_close(state[name], x, rtol=1e-5, atol=1e-5)
    assert (torch.load(out)['bn1.running_mean'] - net.f[1].running_mean).abs().max() > 1e-3


def test_file_for_hcl_loads_into_data_parallel(files, tmp_path):
    (net, file), out = files['cifar'], tmp_path / 'out.pth'
    export.main(['hcl', str(file), '--out', str(out)])
    with torch.device('meta'):
        parallel = torch.nn.DataParallel(Model())
    parallel.load_state_dict(torch.load(out), assign=True)
    assert torch.equal(parallel.module.g[3].weight, net.g[3].weight)


def test_what_others_cannot_build_is_refused(tmp_path):
    file, out = tmp_path / 'model.pth', tmp_path / 'out.pth'
    write_tensors(file, Model(arch='resnet18', width=0.25, feature_dim=64).state_dict())
    with pytest.raises(UserError, match=r'have width 1 alone, and this is width 0\.25$'):
        export.main(['torchvision', str(file), '--out', str(out)])
    with pytest.raises(UserError, match='cannot build this network, of arch resnet18, not resnet50; width 0.25, not 1'):
        export.main(['hcl', str(file), '--out', str(out)])
    assert not out.exists()


def network_of(file, *words):
    """The network that main.py would train from --init, ready for its test images."""
    args, parser = main.arguments(['--init', str(file), '--arch', 'resnet18', *words])
    net, _, _ = build(args, torch.device('cpu'), main.starting_weights(parser, args))
    return net.eval()


@torch.no_grad()
def test_torchvisions_weights_give_the_same_for_the_same_image_but_at_its_borders(theirs):
    their, file = theirs
    net = network_of(file, '--stem', 'imagenet')
    ours, expected = net.f[:2](normalize(IMAGES)), their.bn1(their.conv1(for_imagenet(IMAGES)))  # (2, 64, 16, 16)
    inner = (..., slice(2, -2), slice(2, -2))  # a kernel of 7 and a stride of 2 reach the padding from two places
    torch.testing.assert_close(ours[inner], expected[inner], rtol=1e-4, atol=1e-4)
    assert (ours - expected).abs().max() > 1e-3
    state = their.state_dict()
    for name, x in net.f.state_dict(prefix='f.').items():  # all else is as it was
        part, rest = name[2], name[3:]
        name = {'0': 'conv1', '1': 'bn1'}.get(part, f'layer{int(part) - 2}') + rest
        assert name in ('conv1.weight', 'bn1.running_mean') or torch.equal(x, state[name]), name


@pytest.mark.parametrize('words, message', [
    (['--stem', 'cifar'], 'holds another network: give --stem imagenet\n'),
    (['--stem', 'imagenet', '--width', '0.5'], 'holds another network: give --width 1.0\n'),
])
def test_weights_of_another_network_name_the_flags_to_give(theirs, capsys, words, message):
    with pytest.raises(SystemExit):
        network_of(theirs[1], *words)
    assert capsys.readouterr().err.endswith(message)


def test_file_without_an_encoder_is_refused(theirs, tmp_path):
    torch.save({name: x for name, x in theirs[0].state_dict().items() if name != 'layer3.0.bn2.bias'},
               tmp_path / 'cut.pth')
    with pytest.raises(UserError, match=r'cut\.pth: not a resnet18: Missing key.*f\.5\.0\.bn2\.bias'):
        network_of(tmp_path / 'cut.pth', '--stem', 'imagenet')
    with pytest.raises(UserError, match='no such file'):
        network_of(tmp_path / 'missing.pth')


def test_run_starts_from_the_encoder_of_another_and_is_known_by_it(tiny, tmp_path, capsys):
    first, second, file = tmp_path / 'first', tmp_path / 'second', tmp_path / 'start.pth'
    torch.manual_seed(3)
    write_tensors(file, Model(arch='resnet18', width=0.25).state_dict())
    words = [*tiny, '--epochs', '1', '--results_dir', str(first), '--init', str(file)]
    main.main(words)
    assert '\nbefore training: ' in f'\n{capsys.readouterr().out}'
    given, began = torch.load(file), torch.load(first / 'model_0.pth')
    assert all(torch.equal(x, began[name]) for name, x in given.items() if name[0] == 'f')
    assert not torch.equal(given['g.0.weight'], began['g.0.weight'])  # the head is new
    settings = runs.read_json(first / 'config.json')['settings']
    assert settings['init'] == f'start.pth, CRC {runs.crc(file):08x}'
    linear.main(['--model_path', str(first / 'model_1.pth'), '--augment', 'none', '--epochs', '1'])
    assert '; before training: ' in capsys.readouterr().out
    main.main(words)
    assert 'holds this run, finished' in capsys.readouterr().out
    write_tensors(file, Model(arch='resnet18', width=0.25).state_dict())
    with pytest.raises(UserError, match=r'other settings \(--init start\.pth, CRC \w{8} there, start\.pth, CRC '):
        main.main(words)
    main.main([*tiny, '--epochs', '1', '--results_dir', str(second)])
    assert 'untrained: ' in capsys.readouterr().out
