"""Timings: what is compared computes the same, and the step that is timed is main.py's own."""

import math
from collections import Counter

import pandas as pd
import pytest
import torch

import bench
import main
from hardneg import runtime
from hardneg.batches import seeded
from hardneg.losses import contrastive_loss, textbook_loss
from utils import load

SIZES = (
    '--dataset_name shapes --arch resnet18 --width 0.25 --image_size 8 --batch_size 8 '
    '--precision fp32'
).split()


# The loss


@pytest.mark.parametrize(
    'objective',
    [
        dict(),
        dict(temperature=0.1, tau_plus=0.05, beta=2.0),
        dict(temperature=0.2, tau_plus=0.8, beta=0.5),  # the floor acts
    ],
)
def test_the_textbook_form_computes_what_the_loss_computes(objective):
    assert_same_value_and_gradient(textbook_loss, contrastive_loss, objective, objective)


@pytest.mark.parametrize('temperature', [0.5, 0.1])
def test_cross_entropy_computes_what_the_standard_objective_computes(temperature):
    ours = dict(temperature=temperature, tau_plus=0, beta=0)
    own = dict(temperature=temperature)
    assert_same_value_and_gradient(bench.cross_entropy, contrastive_loss, own, ours)


def assert_same_value_and_gradient(reference, loss, settings_of_reference, settings):
    z = [torch.randn(12, 8, generator=seeded(v), dtype=torch.float64) for v in range(2)]
    for x in z:
        x.requires_grad_()
    value, expected = reference(*z, **settings_of_reference), loss(*z, **settings)
    torch.testing.assert_close(value, expected)
    gradients, right = torch.autograd.grad(value, z), torch.autograd.grad(expected, z)
    torch.testing.assert_close(gradients, right)


# The step


@pytest.mark.parametrize(
    'flags',
    [
        '',
        '--micro_batch 10',
        '--joint_views --views 3',
        '--micro_batch 10 --joint_views',
        '--optimizer sgd --lr 0.1 --beta 0.5 --tau_plus 0.05 --temperature 0.2 --seed 3',
    ],
)
def test_the_step_is_the_first_step_of_main(tiny, tmp_path, flags):
    """A run of one step has the same loss and the same weights, bit for bit."""
    words = [*tiny, '--batch_size', '30', '--epochs', '1', *flags.split()]
    words += ['--results_dir', str(tmp_path)]
    main.main(words)
    args, _, found = main.arguments(words)
    data = load(args, found=found)
    views, _ = next(main.training_views(args, data, torch.device('cpu')).epoch(1))
    net, step = bench.training_step(args, torch.device('cpu'))
    loss = step(views)
    assert loss.item() == pd.read_csv(tmp_path / 'log.csv')['train_loss'][1]
    trained = torch.load(tmp_path / 'model_1.pth')
    state = net.state_dict()
    assert trained.keys() == state.keys()
    for name, x in trained.items():
        assert torch.equal(state[name], x), name


def test_the_published_step_computes_what_main_computes():
    args, _, _ = main.arguments(['--lr', '1e-5', *SIZES])
    device = torch.device('cpu')
    torch.manual_seed(0)
    views = bench.fixed_views(args, device)
    _, step = bench.training_step(args, device)
    published = bench.published_step(args, device)
    ours = [step(views).item() for _ in range(3)]
    theirs = [published([bench.normalize(x) for x in views]).item() for _ in range(3)]
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[2] < ours[0]


def test_each_timed_step_sets_its_own_rounding_of_convolutions():
    args, _, _ = main.arguments(SIZES)
    device = torch.device('cpu')
    views = bench.fixed_views(args, device)
    _, step = bench.training_step(args, device)
    published = bench.published_step(args, device)
    published([bench.normalize(x) for x in views])
    assert torch.backends.cudnn.allow_tf32  # torch's default
    step(views)
    assert not torch.backends.cudnn.allow_tf32  # --precision fp32


def test_the_oracle_is_timed_with_labels(monkeypatch):
    given = []

    def loss(*z, **objective):
        given.append(objective)
        return contrastive_loss(*z, **objective)

    monkeypatch.setattr(main, 'contrastive_loss', loss)
    args, _, _ = main.arguments([*SIZES, '--oracle'])
    _, step = bench.training_step(args, torch.device('cpu'))
    step(bench.fixed_views(args, torch.device('cpu')))
    assert given[0]['labels'].shape == (8,)
    assert given[0]['tau_plus'] == 0


def test_views_network_and_loss_are_one_graph_each(tiny, tmp_path, monkeypatch):
    """In a run of two epochs with the monitor, whose batches have other sizes.

    A break in a graph is an error.
    """
    graphs, compile = Counter(), torch.compile

    def count_graphs(function, **options):
        name = getattr(function, '__name__', 'other')

        def backend(graph, inputs):
            graphs[name] += 1
            return graph

        return compile(function, **options, fullgraph=True, backend=backend)

    monkeypatch.setattr(torch, 'compile', count_graphs)
    monkeypatch.setattr(runtime, 'compiles_or_goes_on', lambda: None)
    torch.compiler.reset()
    flags = ['--compile', '--epochs', '2', '--knn_every', '1', '--results_dir', str(tmp_path)]
    main.main([*tiny, *flags])
    torch.compiler.reset()
    assert graphs == {'random_views': 1, '_call_impl': 1, 'contrastive': 1}


# The timings


def test_functions_take_turns_and_the_first_turn_does_not_count(monkeypatch):
    now = [0.0]
    calls = []

    def function(name, *durations):
        ends = iter(durations)

        def call():
            calls.append(name)
            now[0] += next(ends)

        return call

    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])
    a, b = function('a', 90, 1, 7, 2), function('b', 80, 30, 10, 20)
    medians = bench.alternate(3, torch.device('cpu'), a, b)
    assert ''.join(calls) == 'abababab'
    assert medians == [2000, 20_000]


def test_what_lies_in_the_directory_of_results_gives_no_settings(tmp_path, monkeypatch):
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'config.json').write_text('{}')  # an error, if it was read
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(bench, 'timings', lambda *args: seen.append(args[3].image_size) or [])
    bench.main(['step', '--device', 'cpu'])
    assert seen == [16]


@pytest.mark.parametrize('copy, expected', [(0.01, 7.8), (0.1, 26.2)])
def test_the_roof_is_that_of_the_slower_of_matmul_and_copy(copy, expected, monkeypatch):
    # In 1 ms 2 GFLOP; in 0.01 or 0.1 ms 1 MB, read and written
    monkeypatch.setattr(bench, 'alternate', lambda *_: [1.0, copy])
    least = bench.least_ms(2, torch.device('cpu'), side=1000, size=500_000)
    assert least == pytest.approx(expected)


def test_views_of_other_libraries_look_alike(monkeypatch):
    """The same recipe by other hands agrees in mean, spread and sharpness."""
    monkeypatch.setattr(bench, 'AUGMENT_SIZE', 32)
    rows = pd.DataFrame(bench.bench_augment(1, torch.device('cpu')))
    assert len(rows) >= 3
    for column, tolerance in (('mean', 0.5), ('spread', 0.3), ('neighbours', 0.05)):
        assert rows[column].max() - rows[column].min() < tolerance


def test_a_row_in_words_has_no_number_that_it_lacks():
    row = dict(what='loss', size='B=4', reference_ms=math.nan, ours_ms=1234.5, ratio=0.12345)
    assert bench.described(row) == 'loss, B=4, ours_ms 1,234, ratio 0.123'


def test_the_profile_shows_views_step_and_optimizer(capsys):
    bench.main(['profile', '--device', 'cpu', '--repeat', '2', *SIZES])
    calls = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(' '):
            name = line.strip().partition('  ')[0]
            calls[name] = line.split()[-1]
    for name in 'views', 'training step', 'Optimizer.step#Adam.step':
        assert calls[name] == '2', name


def test_flags_that_main_does_not_know_are_an_error(capsys):
    with pytest.raises(SystemExit):
        bench.main(['step', '--device', 'cpu', '--batchsize', '8'])
    expected = 'unrecognized arguments: --batchsize 8. Did you mean --batch_size?'
    assert capsys.readouterr().err == f'main.py: error: {expected}\n'


def test_training_beside_lightlys_is_timed_in_both_precisions(capsys):
    pytest.importorskip('lightly')
    small = '--arch resnet18 --width 0.25 --image_size 8 --batch_size 8 --repeat 1 --device cpu'
    bench.main(['training', *small.split()])
    said = capsys.readouterr().out
    for precision in ('fp32', 'bf16'):
        assert f"training in fp32 beside lightly's in {precision}" in said
