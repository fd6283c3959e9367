"""What a GPU turns on: compilation, bf16, prefetching; on a GPU with TEST_CUDA=1, or the CPU."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outcome, outcome, skip_if_not_compiled, stop_after

import linear
import main
from hardneg.augment import uniforms
from hardneg.batches import Batches, DeviceViews, random_views, seeded
from hardneg.losses import contrastive_loss

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
IMAGES = torch.randint(256, (64, 3, 40, 48), dtype=torch.uint8, generator=seeded(0))
# The first steps of Adam multiply rounding errors, so the rate is low.
SLOWLY = ['--epochs', '2', '--lr', '1e-5', '--compile']


@pytest.mark.parametrize(
    'setting', [dict(), dict(temperature=0.02, beta=4.0), dict(tau_plus=0, beta=0)], ids=str
)
def test_loss_on_the_device_is_that_of_the_cpu_in_float64(setting):
    exact, there = [], []
    for v in range(2):
        z = F.normalize(torch.randn(96, 32, generator=seeded(v)), dim=1).double()
        exact.append(z.requires_grad_())
        there.append(z.detach().to(DEVICE, torch.float32).requires_grad_())
    with torch.autocast(DEVICE.type, torch.bfloat16):
        value = contrastive_loss(*there, **setting)
    expected = contrastive_loss(*exact, **setting)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for z, other in zip(exact, there):
        assert (other.grad.cpu() - z.grad).norm() <= 1e-5 * z.grad.norm()


def test_compiled_views_are_the_eager_ones():
    u = uniforms(64, seeded(1, device=DEVICE))
    compiled = torch.compile(random_views, dynamic=False)
    views = compiled(IMAGES.to(DEVICE), u, 32).cpu().int()
    eager = random_views(IMAGES, [x.cpu() for x in u], 32)
    difference = (views - eager).abs()
    assert (difference <= 1).float().mean() > 0.9999
    assert (difference == 0).float().mean() > 0.99


@pytest.mark.skipif(not CUDA, reason='prefetches to a GPU')
def test_images_in_host_memory_give_the_views_of_resident_ones():
    resident = DeviceViews(IMAGES.to(DEVICE), Batches(64, 16), 32, DEVICE)
    prefetched = DeviceViews(IMAGES, Batches(64, 16), 32, DEVICE)
    batches = zip(resident.epoch(1), prefetched.epoch(1), strict=True)
    for (views, index), (other_views, other_index) in batches:
        assert torch.equal(index, other_index)
        for x, y in zip(views, other_views):
            assert torch.equal(x, y)


@pytest.fixture(scope='module', autouse=True)
def exact_convolutions():
    """On a GPU --precision fp32 uses TF32 in convolutions, whose rounding depends on the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, 'allow_tf32', False)
        yield


@pytest.fixture(scope='module')
def eager(tiny, tmp_path_factory):
    """Losses of the eager network on compiled views.

    The views are compiled, as some of their grey levels are rounded otherwise than in eager ones.
    """
    results = tmp_path_factory.mktemp('eager')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, 'compile', lambda net, **how: None)
        main.main([*tiny, *SLOWLY, '--precision', 'fp32', '--results_dir', str(results)])
    return pd.read_csv(results / 'log.csv')['train_loss'][1:]


@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-4), ('bf16', 0.01)])
def test_compiled_training_resumes_and_is_close_to_eager(
    tiny, eager, tmp_path, precision, tolerance, monkeypatch, capsys
):
    flags = [*tiny, *SLOWLY, '--precision', precision, '--results_dir', str(tmp_path)]
    stop_after(6, monkeypatch)  # within the first epoch
    with pytest.raises(SystemExit):
        main.main(flags)
    said = capsys.readouterr().out
    skip_if_not_compiled(said)
    assert 'Stopped in epoch 1 after step' in said
    main.main(flags)
    losses = pd.read_csv(tmp_path / 'log.csv')['train_loss'][1:]
    assert losses.tolist() == pytest.approx(eager.tolist(), rel=tolerance)
    state = torch.load(tmp_path / 'model_2.pth', weights_only=True)
    assert {x.device.type for x in state.values()} == {'cpu'}
    assert not any('_orig_mod' in name for name in state)
    probe = ['--model_path', str(tmp_path / 'model_2.pth'), '--epochs', '2']
    linear.main([*probe, '--precision', precision])


@pytest.mark.skipif(CUDA, reason="the order of cuDNN's atomic sums is not fixed")
def test_compiled_training_repeats_its_bits(tiny, tmp_path):
    for name in 'ab':
        results = str(tmp_path / name)
        main.main([*tiny, '--epochs', '1', '--compile', '--results_dir', results])
    assert_same_outcome(tmp_path / 'a', outcome(tmp_path / 'b'))
