"""timm's models on two ranks, and compiled: they train as one process, and as uncompiled."""

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same_outcome, outcome, skip_if_not_compiled, stop_after
from ranks import on_ranks, update_of_main

import main

pytest.importorskip('timm')
# With BatchNorm, with LayerNorm, and a transformer
KINDS = 'timm/test_efficientnet', 'timm/test_convnext', 'timm/test_vit'


def flags_of(tiny, arch, results=None):
    words = [*tiny, '--width', '1', '--arch', arch, '--image_size', '32', '--test_size', '32']
    if results:
        words += ['--results_dir', str(results)]
    return words


@pytest.mark.parametrize('arch', KINDS)
def test_two_ranks_take_the_step_of_one(tiny, tmp_path, arch):
    flags = flags_of(tiny, arch, tmp_path / 'run')
    ranks = on_ranks(2, update_of_main, tmp_path, flags)
    ((m, update),) = ranks[0].items()
    assert torch.equal(ranks[1][m], update)
    alone = update_of_main(0, 1, flags_of(tiny, arch, tmp_path / 'one'))[m]
    assert F.cosine_similarity(update, alone, dim=0) > 0.999
    assert (update.norm() / alone.norm() - 1).abs() < 0.01


@pytest.mark.parametrize('arch', KINDS)
@pytest.mark.parametrize('flags', [[], ['--micro_batch', '4'], ['--precision', 'bf16']], ids=str)
def test_a_run_resumes_to_the_same_bits(tiny, tmp_path, monkeypatch, arch, flags):
    words = [*flags_of(tiny, arch), '--epochs', '1', *flags, '--results_dir']
    main.main([*words, str(tmp_path / 'whole')])
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(SystemExit):
            main.main([*words, str(tmp_path / 'stopped')])
    main.main([*words, str(tmp_path / 'stopped')])
    assert_same_outcome(tmp_path / 'stopped', outcome(tmp_path / 'whole'))


@pytest.mark.parametrize('arch', KINDS)
def test_compiled_training_computes_the_same(tiny, tmp_path, arch, capsys):
    losses = []
    for extra in [], ['--compile']:
        results = tmp_path / str(len(losses))
        main.main([*flags_of(tiny, arch, results), '--epochs', '2', *extra])
        losses.append(pd.read_csv(results / 'log.csv')['train_loss'][1:].to_numpy())
    said = capsys.readouterr().out
    skip_if_not_compiled(said)
    assert 'Not compiled' not in said
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
