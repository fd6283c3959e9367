"""Compiled training: what cannot be compiled runs uncompiled, and one line says so."""

import logging
from functools import partial

import pytest
import torch
from conftest import assert_same_outcome, outcome

import main
from hardneg import runtime


@pytest.fixture
def dynamo():
    """torch.compile() as it was before, after the test."""
    logger = logging.getLogger('torch._dynamo.convert_frame')
    filters, suppress = list(logger.filters), torch._dynamo.config.suppress_errors
    torch._dynamo.reset()
    yield
    logger.filters[:] = filters
    torch._dynamo.config.suppress_errors = suppress
    torch._dynamo.reset()


def refuse(graph, inputs):
    """A backend for torch.compile() that finds no compiler."""
    raise RuntimeError('no\nC compiler')


def test_what_cannot_be_compiled_trains_eagerly_to_the_same_bits(
    tiny, tmp_path, monkeypatch, capsys, dynamo
):
    flags = [*tiny, '--epochs', '1']
    main.main([*flags, '--results_dir', str(tmp_path / 'eager')])
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend=refuse))
    capsys.readouterr()
    main.main([*flags, '--compile', '--results_dir', str(tmp_path / 'compiled')])
    said, err = capsys.readouterr()
    lines = [line for line in said.splitlines() if line.startswith('Not compiled')]
    assert len(lines) == 1
    assert 'which is slower' in lines[0]
    assert 'no C compiler' in lines[0]
    assert 'Traceback' not in err
    assert_same_outcome(tmp_path / 'compiled', outcome(tmp_path / 'eager'))


def test_running_out_of_memory_is_not_hidden(dynamo):
    def full(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError('CUDA out of memory')

        return run

    runtime.compiles_or_goes_on()
    function = torch.compile(lambda x: x + 1, backend=full)
    with pytest.raises(torch.OutOfMemoryError):
        function(torch.zeros(2))


@pytest.mark.parametrize('flags, compiled', [([], 0), (['--compile'], 1), (['--compile', 'no'], 0)])
def test_the_flag_compiles_views_and_network_once(tiny, tmp_path, monkeypatch, flags, compiled):
    calls = {'views': 0, 'network': 0}

    def views(function, **options):
        calls['views'] += 1
        return function

    def network(net, **options):
        calls['network'] += 1

    monkeypatch.setattr(torch, 'compile', views)
    monkeypatch.setattr(torch.nn.Module, 'compile', network)
    main.main([*tiny, '--epochs', '1', *flags, '--results_dir', str(tmp_path)])
    assert calls == {'views': compiled, 'network': compiled}
