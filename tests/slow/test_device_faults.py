"""The pretended device notices each fault that is put into the code."""

import inspect
import sys
import textwrap

import pytest
from test_cuda_path import train, waits_of  # noqa: F401

import main
from hardneg import augment, batches, evaluate, losses, runs, runtime

LATE = "whole['model'] = _on_host(self.net.state_dict()); self.writing ="
STEP = main.TrainingStep
FAULTS = [
    (STEP, '__call__', 'loss.detach()', 'loss.item()'),
    (main, 'main', '% look_every', '% 1'),
    (main, 'main', 'labels[index]', 'labels[index.cpu()]'),
    (
        main.TrainingStep,
        '__call__',
        'self.scaler.scale(loss).backward()',
        'loss.backward() if loss.isfinite() else 0',
    ),
    (STEP, '__call__', 'loss_of(z)', 'loss_of([x[x.isfinite().all(1)] for x in z])'),
    (main, 'main', 'data.train_labels.to(device)', 'data.train_labels'),
    (evaluate.Evaluator, '_blocks', '.to(self.device)', ''),
    (losses, '_classes', ', device=labels.device', ''),
    (augment, 'resize_weights', 'torch.arange(size, device=start.device)', 'torch.arange(size)'),
    (augment, 'gaussian_blur', 'r = ', 'if not sigma.any(): return x\n    r = '),
    (augment, 'luma', 'return ', 'torch.tensor(LUMA, device=x.device); return '),
    (batches, 'uniforms', 'device=generator.device', "device='cpu'"),
    (batches.DeviceViews, 'epoch', 'epoch, step, device=self.device', 'epoch, step'),
    (batches.DeviceViews, 'fetch', ', pin_memory=True', ''),
    (batches.DeviceViews, 'arrived', 'current.wait_stream(self.stream)', 'pass'),
    (
        batches.DeviceViews,
        'fetch',
        'pinned =',
        "pinned = self.kept = self.kept if hasattr(self, 'kept') else",
    ),
    (
        batches.DeviceViews,
        'arrived',
        'current.wait_stream(self.stream)',
        'self.stream.wait_stream(current)',
    ),
    (
        batches.DeviceViews,
        'arrived',
        'current.wait_stream(self.stream)',
        'current.wait_stream(current)',
    ),
    (batches.DeviceViews, 'arrived', 'x.record_stream(current)', 'pass'),
    (batches.DeviceViews, 'arrived', 'x.record_stream(current)', 'x.record_stream(self.stream)'),
    (runtime, 'autocast', 'device.type,', "'cpu',"),
    (runs.Saver, 'write', 'copied.synchronize()', 'pass'),
    (
        runs.Saver,
        'save',
        'torch.cuda.current_stream().record',
        "torch.cuda.Stream('cuda').record",
    ),
    (runs.Saver, 'save', 'self.writing =', LATE),
]
NOTICED = (
    'tensors on CUDA',
    'generator on',
    'a copy used',
    'used anew',
    'convolution.default: in',
    'not finite',
)


@pytest.mark.parametrize(
    'where, name, good, bad', FAULTS, ids=[f'{name}: {bad}' for _, name, _, bad in FAULTS]
)
def test_faults_are_noticed(waits_of, monkeypatch, tmp_path, where, name, good, bad):  # noqa: F811
    monkeypatch.setattr(where, name, faulty(getattr(where, name), good, bad))
    fits, flags = True, ['--oracle']
    if name in ('fetch', 'arrived', '_blocks'):
        fits, flags = False, []
    try:
        waits = [waits_of(lambda n=n: train(tmp_path, n, *flags), fits) for n in (16, 24)]
    except (RuntimeError, runtime.UserError) as error:
        assert any(text in str(error) for text in NOTICED)
    else:
        assert waits[0] != waits[1]


def faulty(function, good, bad):
    """The function with a piece of its source replaced."""
    module = sys.modules[function.__module__]
    source = textwrap.dedent(inspect.getsource(function))
    assert good in source
    # so that lines keep their numbers
    code = '\n' * (function.__code__.co_firstlineno - 1) + source.replace(good, bad, 1)
    names = {}
    exec(compile(code, module.__file__, 'exec'), vars(module), names)
    return names[function.__name__]
