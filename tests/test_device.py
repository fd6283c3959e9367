"""What main.py turns on for a GPU: compilation, bf16, prefetching. On a GPU with TEST_CUDA=1, else on the CPU."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outcome, outcome, skip_if_not_compiled

import linear
import main
from hardneg import runtime
from hardneg.augment import uniforms
from hardneg.batches import Batches, DeviceViews, random_views, seeded
from hardneg.losses import contrastive_loss

CUDA = torch.cuda.is_available()
DEVICE = torch.device('cuda' if CUDA else 'cpu')
IMAGES = torch.randint(256, (64, 3, 40, 48), dtype=torch.uint8, generator=seeded(0))
SLOWLY = ['--epochs', '2', '--lr', '1e-5']  # Adam's first steps multiply rounding: see test_main.py
pytestmark = pytest.mark.slow


@pytest.mark.parametrize('setting', [dict(), dict(temperature=0.02, beta=4.0), dict(tau_plus=0, beta=0)], ids=str)
def test_loss_on_the_device_is_that_of_the_cpu_in_float64(setting):
    views = [F.normalize(torch.randn(96, 32, generator=seeded(v)), dim=1).double().requires_grad_() for v in range(2)]
    there = [z.detach().to(DEVICE, torch.float32).requires_grad_() for z in views]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        values = contrastive_loss(*views, **setting), contrastive_loss(*there, **setting)
    for value in values:
        value.backward()
    assert values[1].item() == pytest.approx(values[0].item(), rel=1e-5)
    for z, other in zip(views, there):
        assert (other.grad.cpu() - z.grad).norm() <= 1e-5 * z.grad.norm()


def test_compiled_views_are_the_eager_ones():
    u = uniforms(64, seeded(1, device=DEVICE))
    views = torch.compile(random_views, dynamic=False)(IMAGES.to(DEVICE), u, 32).cpu().int()
    difference = (views - random_views(IMAGES, [x.cpu() for x in u], 32)).abs()
    assert (difference <= 1).float().mean() > 0.9999 and (difference == 0).float().mean() > 0.99


@pytest.mark.skipif(not CUDA, reason='prefetches to a GPU')
def test_images_in_host_memory_give_the_views_of_resident_ones():
    batches = [DeviceViews(IMAGES, Batches(64, 16), 32, DEVICE, resident) for resident in (True, False)]
    for (views, index), (others, same) in zip(*(b.epoch(1) for b in batches), strict=True):
        assert torch.equal(index, same) and all(map(torch.equal, views, others))


@pytest.fixture(scope='module', autouse=True)
def exact_convolutions():
    """On a GPU --precision fp32 has TF32 in them, whose rounding depends on the kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.backends.cudnn, 'allow_tf32', False)
        yield


@pytest.fixture(scope='module')
def eager(tiny, tmp_path_factory):
    """Losses of the eager network on compiled views, which round a few grey levels otherwise than eager ones."""
    results = tmp_path_factory.mktemp('eager')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, 'compiled', lambda net, *_: net)
        main.main([*tiny, *SLOWLY, '--compile', '--precision', 'fp32', '--results_dir', str(results)])
    return pd.read_csv(results / 'log.csv')['train_loss'][1:]


@pytest.mark.parametrize('precision, tolerance', [('fp32', 1e-4), ('bf16', 0.01)])
def test_compiled_training_resumes_and_is_close_to_eager(tiny, eager, tmp_path, precision, tolerance, monkeypatch,
                                                         capsys):
    flags = [*tiny, *SLOWLY, '--compile', '--precision', precision, '--results_dir', str(tmp_path)]
    stops = iter([True])

    def stop(self, due=False):
        if next(stops, False):
            raise runtime.Stopped(15)

    monkeypatch.setattr(runtime.Signals, 'check', stop)
    with pytest.raises(SystemExit):
        main.main(flags)
    skip_if_not_compiled(capsys.readouterr().out)
    main.main(flags)
    losses = pd.read_csv(tmp_path / 'log.csv')['train_loss'][1:]
    assert losses.tolist() == pytest.approx(eager.tolist(), rel=tolerance)
    state = torch.load(tmp_path / 'model_2.pth', weights_only=True)
    assert {x.device.type for x in state.values()} == {'cpu'} and not any('_orig_mod' in name for name in state)
    linear.main(['--model_path', str(tmp_path / 'model_2.pth'), '--epochs', '2', '--precision', precision])


@pytest.mark.skipif(CUDA, reason='cuDNN\'s atomic sums have no fixed order')
def test_compiled_training_repeats_its_bits(tiny, tmp_path):
    for name in 'ab':
        main.main([*tiny, '--epochs', '1', '--compile', '--results_dir', str(tmp_path / name)])
    assert_same_outcome(tmp_path / 'a', outcome(tmp_path / 'b'))
