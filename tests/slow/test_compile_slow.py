"""Compiled training: what cannot be compiled runs uncompiled, and one line says so."""

import logging
from functools import partial

import pytest
import torch
from conftest import assert_same_outcome, outcome
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd

import main
from hardneg import runtime
from model import ARCHS, BasicBlock, Embeddings


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


@pytest.mark.parametrize(
    'flags, compiled',
    [
        ('', []),
        ('--compile no', []),
        ('--compile', ['Embeddings', 'contrastive', 'random_views']),
        ('--compile --views 3', ['Model', 'random_views']),
        ('--compile --anneal down', ['Embeddings', 'random_views']),
    ],
)
def test_the_flag_compiles_views_network_and_loss_once(
    tiny, tmp_path, monkeypatch, flags, compiled
):
    calls = []

    def function(function, **options):
        calls.append(function.__name__)
        return function

    def network(net, **options):
        calls.append(type(net).__name__)

    monkeypatch.setattr(torch, 'compile', function)
    monkeypatch.setattr(torch.nn.Module, 'compile', network)
    main.main([*tiny, '--epochs', '1', *flags.split(), '--results_dir', str(tmp_path)])
    assert sorted(calls) == compiled


@pytest.mark.parametrize(
    'device, views, batch_size, compiled',
    [
        ('cuda', 2, 4096, True),
        ('cuda', 2, 4097, False),
        ('cuda', 16, 256, False),
        ('cpu', 2, 256, True),
        ('cpu', 2, 257, False),
    ],
)
def test_a_loss_of_many_tiles_is_not_compiled(monkeypatch, device, views, batch_size, compiled):
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda net, **options: None)
    args = main.parse(['--views', str(views), '--batch_size', str(batch_size)])
    net = torch.nn.Identity()
    objective = main.compiled(args, main.contrastive, net, net, torch.device(device))
    assert (objective is not main.contrastive) == compiled


def casts_of_a_step(flags):
    """How many casts to bfloat16 the compiled forward passes of a step have."""
    casts = []

    def forward(graph, inputs):
        nodes = graph.graph.find_nodes(op='call_function', target=torch.ops.aten._to_copy.default)
        here = sum(node.kwargs['dtype'] == torch.bfloat16 for node in nodes)

        def call(*args):
            casts.append(here)
            return graph(*args)

        return make_boxed_func(call)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    args = main.parse(['--arch', 'resnet18', '--width', '0.25', '--hidden_dim', '8', *flags])
    args.stem = 'cifar'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, 'compile', partial(torch.compile, backend=backend))
        patch.setitem(ARCHS, 'resnet18', (BasicBlock, (1, 1, 1, 1)))
        net = main.build_network(args)
        embed = Embeddings(net, args.joint_views)
        main.compiled(args, main.contrastive, net, embed, torch.device('cpu'))
    with torch.autocast('cpu', torch.bfloat16):
        embed(*torch.randint(256, (args.views, 4, 3, 8, 8), dtype=torch.uint8))
    torch.compiler.reset()
    return sum(casts)


def test_a_compiled_step_of_two_views_casts_each_weight_once(dynamo):
    """A ResNet with four blocks has 12 that bf16 needs, and its head two and a bias."""
    two = casts_of_a_step([])
    three = casts_of_a_step(['--views', '3'])  # each in a graph of its own
    assert two == 2 * three / 3 - 15


def first_step(compiled):
    """The loss of a step in float64, and its gradient as one vector.

    In float32 a rounding moves activations across the zero of ReLU, and the gradient by 0.2 %.
    """
    args = main.parse(['--arch', 'resnet18', '--width', '0.25'])
    args.stem = 'cifar'
    torch.manual_seed(0)
    net = main.build_network(args).double()
    embed = Embeddings(net)
    objective = main.contrastive
    if compiled:
        objective = main.compiled(args, objective, net, embed, torch.device('cpu'))
    z = embed(*torch.randn(2, 8, 3, 8, 8, dtype=torch.float64))
    loss = objective(z, labels=None, settings=args)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])


def test_a_compiled_step_has_the_loss_and_the_gradient_of_an_eager_one(monkeypatch, dynamo):
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))
    monkeypatch.setitem(ARCHS, 'resnet18', (BasicBlock, (1, 1, 1, 1)))
    torch._dynamo.utils.counters.clear()
    loss, gradient = first_step(compiled=True)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2  # network and loss
    expected, expected_gradient = first_step(compiled=False)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert (gradient - expected_gradient).norm() < 1e-10 * expected_gradient.norm()
