"""The network is the published one, and a checkpoint loads entirely or not at all."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from model import ARCHS, Model, load_model, read_checkpoint


@pytest.fixture(scope='module')
def small():
    torch.manual_seed(0)
    return Model(16, 'resnet18')


def saved(tmp_path, state, name='model.pth'):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def test_size_and_names_are_the_published_ones():
    state = Model().state_dict()
    assert sum(p.numel() for p in Model().parameters()) == 24_615_616
    assert state['f.0.weight'].shape == (64, 3, 3, 3)
    assert state['g.0.weight'].shape == (512, 2048) and 'g.0.bias' not in state
    assert state['g.3.weight'].shape == (128, 512) and state['g.3.bias'].shape == (128,)
    modules = {'.'.join(name.split('.')[:2]) for name in state}
    assert modules == {'f.0', 'f.1', 'f.3', 'f.4', 'f.5', 'f.6', 'g.0', 'g.1', 'g.3'}


def test_stride_is_8_and_rows_have_unit_length(small):
    x = torch.randn(4, 3, 32, 32)
    assert small.f[:-1](x).shape == (4, 512, 4, 4)
    feature, z = small(x)
    assert feature.shape == (4, 512) and z.shape == (4, 16)
    torch.testing.assert_close(torch.cat([feature.norm(dim=1), z.norm(dim=1)]), torch.ones(8))
    with torch.autocast('cpu', torch.bfloat16):
        assert {x.dtype for x in small(x)} == {torch.float32}


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
def test_checkpoints_of_wrappers_and_profilers_load(tmp_path, small, prefix):
    state = {prefix + name: value for name, value in small.state_dict().items()}
    state |= {f'{prefix}f.0.total_ops': torch.zeros(1), f'{prefix}total_params': torch.zeros(1)}
    loaded = load_model(saved(tmp_path, state)).eval()
    x = torch.randn(2, 3, 32, 32)
    small.eval()
    torch.testing.assert_close(loaded(x), small(x), rtol=0, atol=0)


def test_resnet50_saved_under_dataparallel_gives_the_same_features(tmp_path):
    torch.manual_seed(1)
    net = Model().eval()
    loaded = load_model(saved(tmp_path, nn.DataParallel(net).state_dict())).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('arch', ARCHS)
@pytest.mark.parametrize('stem, width, hidden_dim', [('cifar', 0.125, 0), ('imagenet', 0.25, 48)])
def test_architecture_and_widths_are_read_off_the_tensors(tmp_path, arch, stem, width, hidden_dim):
    torch.manual_seed(0)
    net = Model(24, arch, hidden_dim, stem, width).eval()
    loaded, x = load_model(saved(tmp_path, net.state_dict())).eval(), torch.randn(2, 3, 64, 64)
    assert loaded.features == width * (512 if arch in ('resnet18', 'resnet34') else 2048)
    assert loaded.g[0].out_features == (hidden_dim or 512 * width)
    assert net.f[:-1](x).shape[2:] == ((8, 8) if stem == 'cifar' else (2, 2))
    for found, expected in zip(loaded(x), net(x)):
        assert torch.equal(found, expected)


def test_an_encoder_without_head_loads_where_features_are_enough(tmp_path, small):
    """As leftthomas's linear.py saves it: f and a classifier fc."""
    state = {name: value for name, value in small.state_dict().items() if name.startswith('f.')}
    path = saved(tmp_path, state | {'fc.weight': torch.zeros(10, 512), 'fc.bias': torch.zeros(10)})
    loaded, x = load_model(path, head=False).eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.f(x), small.eval().f(x)) and loaded.g is None
    with pytest.raises(ValueError, match='g.0.weight is missing'):
        load_model(path)


@pytest.mark.parametrize('tensor', [
    torch.zeros(64).to_sparse(), torch.quantize_per_tensor(torch.zeros(64), 1, 0, torch.qint8),
    torch.zeros(64, device='meta'), torch.zeros(()).expand(64), torch.nested.nested_tensor([torch.zeros(64)]),
    torch.zeros(64, dtype=torch.int32), torch.full((64,), float('nan')), torch.zeros(())],
    ids=['sparse', 'quantised', 'meta', 'expanded', 'nested', 'integers', 'nan', 'scalar'])
@pytest.mark.parametrize('name', ['f.1.weight', 'f.0.weight'])
def test_tensors_that_are_not_plain_finite_weights_are_named(tmp_path, small, tensor, name):
    path = saved(tmp_path, {**small.state_dict(), name: tensor})
    with pytest.raises(ValueError, match=r'model\.pth: .*(f\.[01]\.weight|damaged)') as error:
        load_model(path)
    assert '\n' not in str(error.value)


def test_state_of_a_run_and_the_old_format_load(tmp_path, small):
    whole = {'model': small.state_dict(), 'optimizer': {}, 'epoch': 3}
    assert load_model(saved(tmp_path, whole)).g[3].out_features == 16
    torch.save(small.state_dict(), tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert load_model(tmp_path / 'old.pth').g[3].out_features == 16


@pytest.mark.parametrize('change, message', [
    (lambda s: s.pop('f.4.1.conv2.weight'), 'not a resnet18: Missing key.*f.4.1.conv2.weight'),
    (lambda s: s.pop('f.0.weight'), 'f.0.weight is missing'),
    (lambda s: s.update({'f.1.weight': torch.zeros(63)}), 'not a resnet18: size mismatch for f.1.weight'),
    (lambda s: s.update(extra=torch.zeros(1)), 'not a resnet18: Unexpected key.*extra'),
    (lambda s: s.update({'f.6.2.conv1.weight': torch.zeros(1)}), r'have \(2, 2, 2, 3\) blocks, which is none of'),
    (lambda s: s.clear(), 'f.0.weight is missing'),
])
def test_what_does_not_fit_is_named(tmp_path, small, change, message):
    state = dict(small.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        load_model(saved(tmp_path, state))


def test_damaged_and_foreign_files_are_named(tmp_path, small):
    whole = saved(tmp_path, small.state_dict()).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # torch.load itself would not notice
    for name, content in (('truncated', whole[:-1000]), ('flipped', flipped), ('empty', b''), ('text', b'not a model')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}: (damaged|not a checkpoint)'):
            load_model(tmp_path / name)
    with pytest.raises(ValueError, match='nowhere: no such file'):
        load_model(tmp_path / 'nowhere')
    for other in ({'epoch': 3}, [1, 2], {0: torch.zeros(1)}):
        with pytest.raises(ValueError, match='no model weights'):
            load_model(saved(tmp_path, other))


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.mark.parametrize('new_format', [True, False])
def test_pickled_objects_are_refused_and_not_run(tmp_path, new_format):
    torch.save({'f.0.weight': Payload(tmp_path / 'ran')}, tmp_path / 'evil.pth',
               _use_new_zipfile_serialization=new_format)
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps(Payload(tmp_path / 'ran')))
    for name in ('evil.pth', 'plain.pth'):
        with pytest.raises(ValueError, match=name):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / 'ran').exists()
    torch.load(io.BytesIO((tmp_path / 'evil.pth').read_bytes()), weights_only=False)  # the payload does work
    assert (tmp_path / 'ran').exists()


def test_batches_are_counted_as_torch_counts_them():
    """Once a forward in training, by one kernel; the statistics and the output are torch's own."""
    torch.manual_seed(0)
    net, plain = Model(16, 'resnet18', width=0.125), Model(16, 'resnet18', width=0.125)
    plain.load_state_dict(net.state_dict())
    for module in plain.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.__class__ = type(module).__base__
    for train in (True, True, False):
        x = torch.randn(4, 3, 8, 8)
        assert all(map(torch.equal, net.train(train)(x), plain.train(train)(x)))
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())
    assert {value.item() for name, value in state.items() if 'num_batches' in name} == {2}


def test_gradients_of_few_channels_in_channels_last_are_those_of_float64():
    """Of the smallest width: torch 2.14's own convolutions of stride 2 write beyond their memory there."""
    block = Model(8, 'resnet18', width=0.125).f[4][0].to(memory_format=torch.channels_last)  # 8 to 16 channels
    exact, x = copy.deepcopy(block).double(), torch.randn(2, 8, 58, 58).to(memory_format=torch.channels_last)
    found = []
    for net, image in ((block, x), (exact, x.double())):
        y = net(image.requires_grad_())
        y.mul(torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        found.append([y, image.grad, *(p.grad for p in net.parameters())])
    for mine, right in zip(*found):
        torch.testing.assert_close(mine.double(), right, rtol=1e-3, atol=1e-3 * right.abs().max().item())
