"""Encoders for other programs, and weights of other programs: what comes out is the same."""

import pytest
import torch
import torchvision

import export
import linear
import main
from hardneg.augment import normalize
from hardneg.files import crc, read_json, write_tensors
from hardneg.runtime import UsageError, UserError
from model import IMAGENET, Model, load_model

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=GENERATOR)


@torch.no_grad()
def trained(net):
    """The network in eval mode, with statistics of BatchNorm as if it were trained."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8, generator=generator)
    net.train()
    for _ in range(10):
        net(normalize(images))
    return net.eval()


def for_imagenet(images):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in IMAGENET)  # (3,) -> (3, 1, 1)
    return (images / 255 - mean) / std


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    """torchvision's ResNet-18 with random weights, and its file.

    The file counts no batches, as the oldest there.
    """
    torch.manual_seed(0)
    net = trained(torchvision.models.resnet18())
    file = tmp_path_factory.mktemp('theirs') / 'resnet18.pth'
    state = net.state_dict()
    torch.save({name: x for name, x in state.items() if 'num_batches' not in name}, file)
    return net, file


@pytest.fixture(scope='module')
def nets(tmp_path_factory):
    """Networks for small images, as published, and for large ones, and their files, by stem."""
    directory = tmp_path_factory.mktemp('nets')
    found = {}
    for net in Model(), Model(arch='resnet18', stem='imagenet'):
        stem = net.backbone['stem']
        write_tensors(directory / f'{stem}.pth', trained(net).state_dict())
        found[stem] = net, directory / f'{stem}.pth'
    return found


# For other programs


@torch.no_grad()
@pytest.mark.parametrize('stem', ['cifar', 'imagenet'])
def test_torchvisions_model_gives_the_features_of_the_encoder(nets, tmp_path, capsys, stem):
    net, file = nets[stem]
    export.main(['torchvision', str(file), '--out', str(tmp_path / 'out.pth')])
    names = dict(torch=torch, torchvision=torchvision)
    exec(capsys.readouterr().out, names)  # the lines that it prints build and load the model
    found = names['model'].eval()(normalize(IMAGES))
    expected = net.f(normalize(IMAGES)).flatten(1)  # (2, F, 1, 1) -> (2, F)
    assert (expected[0] - expected[1]).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_file_for_imagenets_inputs_is_read_back_as_the_encoder(nets, tmp_path, capsys):
    net, file = nets['imagenet']
    out = tmp_path / 'out.pth'
    export.main(['torchvision', str(file), '--out', str(out), '--fold'])
    assert str(IMAGENET[0]) in capsys.readouterr().out
    state = load_model(out, head=False).f.state_dict()
    for name, x in net.f.state_dict().items():
        torch.testing.assert_close(state[name], x, rtol=1e-5, atol=1e-5)
    assert (torch.load(out)['bn1.running_mean'] - net.f[1].running_mean).abs().max() > 1e-3


def test_a_file_for_hcl_loads_into_data_parallel(nets, tmp_path):
    net, file = nets['cifar']
    out = tmp_path / 'out.pth'
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
    message = 'cannot build this network, of arch resnet18, not resnet50; width 0.25, not 1'
    with pytest.raises(UserError, match=message):
        export.main(['hcl', str(file), '--out', str(out)])
    assert not out.exists()


# From other programs


def network_of(file, *words):
    """The network that main.py would train from --init, in eval mode."""
    args, init, _ = main.arguments(['--init', str(file), '--arch', 'resnet18', *words])
    return main.build_network(args, init).eval()


@torch.no_grad()
def test_torchvisions_weights_give_the_same_for_an_image_but_at_its_borders(theirs):
    their, file = theirs
    net = network_of(file, '--stem', 'imagenet')
    ours = net.f[:2](normalize(IMAGES))  # (2, 64, 16, 16)
    expected = their.bn1(their.conv1(for_imagenet(IMAGES)))
    inner = slice(2, -2)  # a kernel of 7 and a stride of 2 reach the padding from two places
    torch.testing.assert_close(
        ours[..., inner, inner], expected[..., inner, inner], rtol=1e-4, atol=1e-4
    )
    assert (ours - expected).abs().max() > 1e-3


def test_all_but_the_first_layers_weights_are_torchvisions(theirs):
    their, file = theirs
    state = their.state_dict()
    stages = {'0': 'conv1', '1': 'bn1', '3': 'layer1', '4': 'layer2', '5': 'layer3', '6': 'layer4'}
    for name, x in network_of(file, '--stem', 'imagenet').f.state_dict().items():
        their_name = stages[name[0]] + name[1:]
        counted = name.endswith('num_batches_tracked')  # which the file lacks
        if their_name not in ('conv1.weight', 'bn1.running_mean') and not counted:
            assert torch.equal(x, state[their_name]), name


@pytest.mark.parametrize(
    'words, message',
    [
        (['--stem', 'cifar'], 'holds another network: give --stem imagenet$'),
        (['--stem', 'imagenet', '--width', '0.5'], 'holds another network: give --width 1.0$'),
    ],
)
def test_weights_of_another_network_name_the_flags_to_give(theirs, words, message):
    with pytest.raises(UsageError, match=message):
        network_of(theirs[1], *words)


def test_a_file_without_an_encoder_is_refused(theirs, tmp_path):
    state = theirs[0].state_dict()
    del state['layer3.0.bn2.bias']
    torch.save(state, tmp_path / 'cut.pth')
    with pytest.raises(
        UserError, match=r'cut\.pth: not a resnet18: Missing key.*f\.5\.0\.bn2\.bias'
    ):
        network_of(tmp_path / 'cut.pth', '--stem', 'imagenet')
    with pytest.raises(UserError, match='no such file'):
        network_of(tmp_path / 'missing.pth')


def test_a_run_starts_from_the_encoder_of_another_and_is_known_by_it(tiny, tmp_path, capsys):
    results, file = tmp_path / 'results', tmp_path / 'start.pth'
    torch.manual_seed(3)
    write_tensors(file, Model(arch='resnet18', width=0.25).state_dict())
    words = [*tiny, '--epochs', '1', '--results_dir', str(results), '--init', str(file)]
    main.main(words)
    assert '\nbefore training: ' in f'\n{capsys.readouterr().out}'
    given, began = torch.load(file), torch.load(results / 'model_0.pth')
    for name, x in given.items():
        assert torch.equal(x, began[name]) or name.startswith('g')
    assert not torch.equal(given['g.0.weight'], began['g.0.weight'])  # the head is new
    settings = read_json(results / 'config.json')['settings']
    assert settings['init'] == f'start.pth, CRC {crc(file):08x}'
    linear.main(['--model_path', str(results / 'model_1.pth'), '--cached', '--epochs', '1'])
    assert '; before training: ' in capsys.readouterr().out
    main.main(words)
    assert 'holds this run, finished' in capsys.readouterr().out
    write_tensors(file, Model(arch='resnet18', width=0.25).state_dict())
    message = r'other settings \(--init start\.pth, CRC \w{8} there, start\.pth, CRC '
    with pytest.raises(UserError, match=message):
        main.main(words)


def test_a_run_without_init_begins_untrained(tiny, tmp_path, capsys):
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path)])
    assert 'untrained: ' in capsys.readouterr().out
