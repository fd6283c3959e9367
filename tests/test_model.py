"""The network is the published one, and a checkpoint loads entirely or not at all."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from hardneg.augment import normalize
from hardneg.files import read_checkpoint
from hardneg.runtime import UserError
from model import ARCHS, WIDTHS, Model, load_model


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Model(16, 'resnet18').eval()


def saved(tmp_path, state, name='model.pth'):
    torch.save(state, tmp_path / name)
    return tmp_path / name


# The network


def test_sizes_and_names_are_the_published_ones():
    net = Model()
    assert sum(p.numel() for p in net.parameters()) == 24_615_616
    state = net.state_dict()
    assert state['f.0.weight'].shape == (64, 3, 3, 3)
    assert state['g.0.weight'].shape == (512, 2048)
    assert 'g.0.bias' not in state
    assert state['g.3.weight'].shape == (128, 512)
    assert state['g.3.bias'].shape == (128,)
    layers = {'.'.join(name.split('.')[:2]) for name in state}
    assert sorted(layers) == ['f.0', 'f.1', 'f.3', 'f.4', 'f.5', 'f.6', 'g.0', 'g.1', 'g.3']


def test_the_stride_is_8_and_rows_have_unit_length(small):
    x = torch.randn(4, 3, 32, 32)
    assert small.f[:-1](x).shape == (4, 512, 4, 4)
    feature, z = small(x)
    assert feature.shape == (4, 512)
    assert z.shape == (4, 16)
    for rows in feature, z:
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))


def test_features_and_embeddings_are_float32_under_autocast(small):
    with torch.autocast('cpu', torch.bfloat16):
        feature, z = small(torch.randn(4, 3, 32, 32))
    assert feature.dtype == z.dtype == torch.float32


def test_gradients_of_the_smallest_width_in_channels_last_are_those_of_float64():
    """torch 2.14's convolutions of stride 2 write beyond their memory at half of that width."""
    torch.manual_seed(0)
    block = Model(8, 'resnet18', width=min(WIDTHS)).f[4][0]  # 16 to 32 channels
    block = block.to(memory_format=torch.channels_last)
    exact = copy.deepcopy(block).double()
    x = torch.randn(2, 16, 58, 58).to(memory_format=torch.channels_last)
    found = []
    for net, image in ((block, x), (exact, x.double())):
        image.requires_grad_()
        y = net(image)
        y.mul(torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, image.grad, *(p.grad for p in net.parameters())])
    for mine, right in zip(*found):
        most = right.abs().max().item()
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=1e-3 * most)


# Checkpoints that load


@torch.no_grad()
@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_checkpoints_of_wrappers_and_profilers_load(tmp_path, small, prefix):
    state = {prefix + name: value for name, value in small.state_dict().items()}
    state[f'{prefix}f.0.total_ops'] = torch.zeros(1)
    state[f'{prefix}total_params'] = torch.zeros(1)
    loaded = load_model(saved(tmp_path, state)).eval()
    x = torch.randn(2, 3, 32, 32)
    for found, expected in zip(loaded(x), small(x)):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_a_resnet50_saved_under_dataparallel_gives_the_same_features(tmp_path):
    torch.manual_seed(1)
    net = Model().eval()
    loaded = load_model(saved(tmp_path, nn.DataParallel(net).state_dict())).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize(
    'stem, width, hidden_dim, pixels', [('cifar', 0.25, 0, 8), ('imagenet', 0.5, 48, 2)]
)
def test_architecture_and_sizes_are_read_off_the_tensors(
    tmp_path, arch, stem, width, hidden_dim, pixels
):
    torch.manual_seed(0)
    net = Model(24, arch, hidden_dim, stem, width).eval()
    loaded = load_model(saved(tmp_path, net.state_dict())).eval()
    features = 512 if arch in ('resnet18', 'resnet34') else 2048
    assert loaded.features == width * features
    assert loaded.g[0].out_features == (hidden_dim or 512 * width)
    assert loaded.backbone == dict(arch=arch, stem=stem, width=width)
    x = torch.randn(2, 3, 64, 64)
    assert net.f[:-1](x).shape[2:] == (pixels, pixels)
    for found, expected in zip(loaded(x), net(x)):
        assert torch.equal(found, expected)


@torch.no_grad()
def test_an_encoder_without_head_loads_where_features_are_enough(tmp_path, small):
    """As leftthomas's linear.py saves it: f and a classifier fc."""
    state = {name: x for name, x in small.state_dict().items() if name.startswith('f.')}
    state |= {'fc.weight': torch.zeros(10, 512), 'fc.bias': torch.zeros(10)}
    path = saved(tmp_path, state)
    loaded = load_model(path, head=False).eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.f(x), small.f(x))
    assert loaded.g is None
    with pytest.raises(ValueError, match=r'g\.0\.weight is missing'):
        load_model(path)


def test_the_state_of_a_run_loads(tmp_path, small):
    whole = {'model': small.state_dict(), 'optimizer': {}, 'epoch': 3}
    assert load_model(saved(tmp_path, whole)).g[3].out_features == 16


def test_torchs_old_format_loads(tmp_path, small):
    path = tmp_path / 'old.pth'
    torch.save(small.state_dict(), path, _use_new_zipfile_serialization=False)
    assert load_model(path).g[3].out_features == 16


# Checkpoints that do not


@pytest.mark.parametrize(
    'tensor',
    [
        torch.zeros(64).to_sparse(),
        torch.quantize_per_tensor(torch.zeros(64), 1, 0, torch.qint8),
        torch.zeros(64, device='meta'),
        torch.zeros(()).expand(64),
        torch.nested.nested_tensor([torch.zeros(64)]),
        torch.zeros(64, dtype=torch.int32),
        torch.full((64,), float('nan')),
        torch.zeros(()),
    ],
    ids='sparse quantised meta expanded nested integers nan scalar'.split(),
)
@pytest.mark.parametrize('name', ['f.1.weight', 'f.0.weight'])
def test_tensors_that_are_not_plain_finite_weights_are_named(tmp_path, small, tensor, name):
    path = saved(tmp_path, {**small.state_dict(), name: tensor})
    with pytest.raises(ValueError, match=r'model\.pth: .*(f\.[01]\.weight|damaged)') as error:
        load_model(path)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'change, message',
    [
        (lambda s: s.pop('f.4.1.conv2.weight'), r'a resnet18: Missing key.*f\.4\.1\.conv2\.weight'),
        (lambda s: s.pop('f.0.weight'), r'f\.0\.weight is missing'),
        (
            lambda s: s.update({'f.1.weight': torch.zeros(63)}),
            r'not a resnet18: size mismatch for f\.1\.weight',
        ),
        (
            lambda s: s.update({'f.0.bias': torch.zeros(1)}),
            r'not a resnet18: Unexpected key.*f\.0\.bias',
        ),
        (
            lambda s: s.update({'g.0.bias': torch.zeros(1)}),
            r'not a resnet18: Unexpected key.*g\.0\.bias',
        ),
        (
            lambda s: s.update({'f.6.2.conv1.weight': torch.zeros(1)}),
            r'have \(2, 2, 2, 3\) blocks, which is none of',
        ),
        (
            lambda s: s.clear(),
            r'no model weights of a ResNet in it: no name ends in f\.3\.0\.conv1',
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, small, change, message):
    state = dict(small.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_model(saved(tmp_path, state))


def test_damaged_files_are_named(tmp_path, small):
    whole = saved(tmp_path, small.state_dict()).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch.load itself would not notice
    contents = dict(truncated=whole[:-1000], flipped=flipped, empty=b'', text=b'not a model')
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}: (damaged|not a checkpoint)'):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match='nowhere: no such file'):
        load_model(tmp_path / 'nowhere')


@pytest.mark.parametrize('other', [{'epoch': 3}, [1, 2], {0: torch.zeros(1)}], ids=str)
def test_files_of_something_else_are_named(tmp_path, other):
    with pytest.raises(ValueError, match='no model weights'):
        load_model(saved(tmp_path, other))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('form', ['zip', 'old', 'plain pickle'])
def test_pickled_objects_are_refused_and_not_run(tmp_path, form):
    file, ran = tmp_path / 'evil.pth', tmp_path / 'ran'
    if form == 'plain pickle':
        file.write_bytes(pickle.dumps(Payload(ran)))
    else:
        content = {'f.0.weight': Payload(ran)}
        torch.save(content, file, _use_new_zipfile_serialization=form == 'zip')
    with pytest.raises(ValueError, match=r'evil\.pth'):
        read_checkpoint(file)
    assert not ran.exists()
    if form != 'plain pickle':  # the payload does work
        torch.load(io.BytesIO(file.read_bytes()), weights_only=False)
        assert ran.exists()


def test_statistics_of_averaged_weights_are_measured_by_update_bn():
    """torch.optim.swa_utils.update_bn() gives BatchNorm the mean of the batches' statistics."""
    torch.manual_seed(0)
    net = Model(8, 'resnet18', 8, width=0.25)
    batches = torch.randint(256, (3, 4, 3, 8, 8), dtype=torch.uint8)
    torch.optim.swa_utils.update_bn(batches, net)
    means = [net.f[0](normalize(x)).mean((0, 2, 3)) for x in batches]
    torch.testing.assert_close(net.f[1].running_mean, torch.stack(means).mean(0))
    assert net.f[1].momentum == 0.1


@pytest.mark.parametrize('shape', [(2, 8, 8, 3), (2, 4, 8, 8), (3, 8, 8)])
def test_images_of_another_shape_are_refused(small, shape):
    with pytest.raises(ValueError, match='images must be'):
        small(torch.zeros(shape, dtype=torch.uint8))


def test_one_of_two_encoders_is_never_taken_silently(tmp_path):
    states = []
    for seed in range(2):
        torch.manual_seed(seed)
        states.append(Model(8, 'resnet18', 8, width=0.25).state_dict())
    path = saved(tmp_path, {'model': states[0], 'model_ema': states[1]})
    with pytest.raises(UserError, match=r'holds 2 encoders: .*--prefix model\. or .*model_ema\.'):
        load_model(path)
    found = load_model(path, prefix='model_ema')
    assert torch.equal(found.f[0].weight, states[1]['f.0.weight'])
    both = {**states[0], **{f'module.{name}': x for name, x in states[1].items()}}
    with pytest.raises(UserError, match='twice, with and without a wrapper'):
        load_model(saved(tmp_path, both))
