"""The timings: the pieces of code that they compare compute the same, and what a GPU compiles is compiled once."""

import ast
from collections import Counter

import pandas as pd
import pytest
import torch
from conftest import HOME

import bench
from hardneg import flags
import main
from hardneg.batches import seeded
from hardneg.losses import contrastive_loss

SIZES = ['--arch', 'resnet18', '--width', '0.125', '--image_size', '8', '--batch_size', '8']


def test_rooms_import_no_script():
    scripts = {'main', 'linear', *(path.stem for path in (HOME / 'misc').glob('*.py'))}
    for path in HOME.glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & set(names) or path.name in ('main.py', 'linear.py'), path


@pytest.mark.parametrize('reference, setting', [
    (bench.textbook, dict()), (bench.textbook, dict(temperature=0.1, tau_plus=0.05, beta=2.0)),
    (bench.textbook, dict(temperature=0.2, tau_plus=0.8, beta=0.5)),  # the floor acts
    (bench.cross_entropy, dict()), (bench.cross_entropy, dict(temperature=0.1))])
def test_references_of_the_loss_compute_what_it_computes(reference, setting):
    z = [torch.randn(12, 8, generator=seeded(v), dtype=torch.float64).requires_grad_() for v in range(2)]
    standard = dict(tau_plus=0, beta=0) if reference is bench.cross_entropy else {}
    value, expected = reference(*z, **setting), contrastive_loss(*z, **setting, **standard)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


def test_the_published_step_computes_what_main_py_computes():
    settings, _ = main.arguments(['--lr', '1e-5', *SIZES])
    flags.choose_sizes(settings, None, {})
    device = torch.device('cpu')
    torch.manual_seed(0)
    views = bench.fixed_views(settings, device)
    ours, published = (bench.stepper(settings, device, published=published) for published in (False, True))
    losses = [[step(views).item() for _ in range(3)] for step in (ours, published)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][2] < losses[0][0]
    standard = bench.stepper(settings, device, tau_plus=0, beta=0)(views).item()
    assert abs(standard - losses[0][0]) > 0.01


def test_functions_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    now, calls = [0.0], []

    def function(name, *durations):
        ends = iter(durations)

        def call():
            calls.append(name)
            now[0] += next(ends)
        return call

    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])
    medians = bench.alternate(3, torch.device('cpu'), function('a', 90, 1, 7, 2), function('b', 80, 30, 10, 20))
    assert ''.join(calls) == 'abababab' and medians == [2000, 20_000]


@pytest.mark.parametrize('copy, expected', [(0.01, 7.8), (0.1, 26.2)])
def test_roof_is_that_of_the_slower_of_matmul_and_copy(copy, expected, monkeypatch):
    monkeypatch.setattr(bench, 'alternate', lambda *_: [1.0, copy])  # ms: for 2 GFLOP, and for 1 MB read and written
    assert bench.least_ms(2, torch.device('cpu'), side=1000, size=500_000) == pytest.approx(expected)


def test_all_keeps_the_rows_of_every_bench(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'LOSS_SIZES', (16,))
    monkeypatch.setattr(bench, 'LARGE_LOSS', 64)
    monkeypatch.setattr(bench, 'AUGMENT_SIZE', 32)
    threads = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    bench.main(['all', '--device', 'cpu', '--repeat', '1', '--csv', str(tmp_path / 'rows.csv'), *tiny])
    assert threads == [1, 2]  # one for the views alone
    rows, printed = pd.read_csv(tmp_path / 'rows.csv'), capsys.readouterr().out
    for part, count in (('loss', 4), ('views', 3), ('step', 2), ('main.py', 1)):
        assert rows['what'].str.contains(part).sum() >= count, part
    assert (rows['ours_ms'] > 0).all() and rows['ratio'].isna().sum() == 1  # the loss that nothing else can compute
    assert rows['ratio'].dropna().tolist() == pytest.approx((rows['reference_ms'] / rows['ours_ms']).dropna().tolist())
    for what, ratio in zip(rows['what'][1:], rows['ratio'][1:]):
        assert f'{what}, ' in printed and f'ratio {ratio:.3g}' in printed
    views = rows.dropna(subset='mean')  # the same recipe by other hands: alike in mean, spread and sharpness
    for column, tolerance in (('mean', 0.5), ('spread', 0.3), ('neighbours', 0.05)):
        assert views[column].max() - views[column].min() < tolerance


def test_profile_shows_views_loss_and_optimizer_of_each_step(capsys):
    bench.main(['profile', '--device', 'cpu', '--repeat', '2', *SIZES])
    table = {line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if line[:1] == ' '}
    for name in ('views', 'train_step', '_Loss', 'Optimizer.step#Adam.step'):
        assert table[name] == '2', name


def test_flags_that_main_py_does_not_know_are_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(['step', '--device', 'cpu', '--batchsize', '8'])
    assert capsys.readouterr().err == 'main.py: error: unrecognized arguments: --batchsize 8\n'


def test_views_network_and_loss_are_one_graph_each(tiny, tmp_path, monkeypatch):
    """In a run of two epochs with evaluations, whose batches have other sizes. A break in a graph is an error."""
    graphs, compile = Counter(), torch.compile

    def count_graphs(function, **options):
        def backend(graph, inputs):
            graphs[getattr(function, '__name__', 'network')] += 1
            return graph
        return compile(function, **options, fullgraph=True, backend=backend)

    monkeypatch.setattr(torch, 'compile', count_graphs)
    monkeypatch.setattr(main, 'contrastive_loss', count_graphs(contrastive_loss, dynamic=False))
    torch.compiler.reset()
    main.main([*tiny, '--compile', '--epochs', '2', '--knn_every', '1', '--results_dir', str(tmp_path)])
    torch.compiler.reset()
    assert graphs == {'random_views': 1, 'network': 1, 'contrastive_loss': 1}
