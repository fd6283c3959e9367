"""The timings: what they are made of, and the report from a GPU, as far as a CPU shows it."""

import ast
import math

import pandas as pd
import pytest
import torch
from conftest import HOME

import bench
from runtime import UserError


def test_nothing_in_misc_imports_a_script():
    scripts = {'main', 'linear', *(path.stem for path in (HOME / 'misc').glob('*.py'))}
    for path in (HOME / 'misc').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not scripts & set(names), path


@pytest.mark.parametrize('what, rows', [('loss', 4), ('augment', 3), ('step', 2)])
def test_rows_hold_two_times_and_their_ratio(what, rows, tmp_path, capsys):
    bench.main([what, '--tiny', '--csv', str(tmp_path / 'rows.csv')])
    table = pd.read_csv(tmp_path / 'rows.csv')
    assert len(table) >= rows and (table['ours_ms'] > 0).all()
    timed = table.dropna(subset='reference_ms')
    assert timed['ratio'].tolist() == pytest.approx((timed['reference_ms'] / timed['ours_ms']).tolist())
    if what == 'augment':  # the same recipe by other hands: alike in mean, spread and sharpness
        for column, tolerance in (('mean', 0.5), ('spread', 0.3), ('neighbours', 0.05)):
            assert table[column].max() - table[column].min() < tolerance
    assert f'{table["ratio"][0]:.3g}' in capsys.readouterr().out


def event(cat, name, ts, dur, correlation=None):
    return dict(cat=cat, name=name, ts=ts, dur=dur, args={} if correlation is None else dict(correlation=correlation))


def test_kernels_count_for_the_part_that_started_them():
    marks = [event('user_annotation', 'views', 0, 10), event('user_annotation', 'loss', 20, 10),
             event('user_annotation', 'Optimizer.step#Adam.step', 40, 10), event('user_annotation', 'other', 0, 99)]
    launches = [event('cuda_runtime', 'cudaLaunchKernel', ts, 1, i) for i, ts in enumerate((5, 15, 25, 45, 46))]
    kernels = [event('kernel', 'k', 100 + 1000 * i, 1000 * (i + 1), i) for i in range(5)]  # long after their launch
    found = bench.shares([*marks, *launches, *kernels], steps=2, ms=10)
    assert [(row['part'], row['ms'], row['kernels']) for row in found] == [
        ('views', 0.5, 0.5), ('network', 1.0, 0.5), ('loss', 1.5, 0.5), ('optimizer', 4.5, 1.0), ('waiting', 2.5, None)]
    assert math.fsum(row['share'] for row in found) == pytest.approx(1)


def test_launches_are_operations_but_views_and_allocations():
    x = torch.ones(4, 4)
    with bench.Launches() as launches:
        torch.empty(2), x.T, x.view(2, 8), x[0], x.detach()
        assert launches.count == 0
        x + 1, x @ x, x.add_(1)
    assert launches.count == 3


def test_report_keeps_what_is_done_and_goes_on_after_a_failure(tmp_path, monkeypatch, capsys):
    calls = []

    def part(name, fails=False):
        def run(args, device):
            """What it is."""
            calls.append(name)
            if fails and calls.count(name) == 1:
                raise RuntimeError('broken here')
            return [dict(what=name, ms=1.23456, note=None)]
        return run

    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # which the command changes
    monkeypatch.setattr(bench, 'PARTS', dict(a=part('a'), b=part('b', fails=True), c=part('c')))
    command = ['gpu', '--device', 'cpu', '--tiny', '--results_dir', str(tmp_path)]
    with pytest.raises(UserError, match='b failed'):
        bench.main(command)
    assert calls == ['a', 'b', 'c'] and 'broken here' in capsys.readouterr().err
    assert 'Failed: b.' in (tmp_path / 'report.md').read_text()
    bench.main(command)
    assert calls == ['a', 'b', 'c', 'b']
    assert '## b\n\nWhat it is.\n\n| what | ms | note |\n| --- | --- | --- |\n| b | 1.235 |  |' in (
        tmp_path / 'report.md').read_text()


@pytest.mark.slow
def test_the_whole_report_on_a_cpu(run, tmp_path):
    job = run('misc/bench.py', ['gpu', '--device', 'cpu', '--tiny', '--results_dir', tmp_path])
    assert job.code == 0, job.err
    for name in bench.PARTS:
        assert len(pd.read_csv(tmp_path / f'{name}.csv')), name
    assert 'passed' in pd.read_csv(tmp_path / 'tests.csv')['outcome'][0]
    parts = pd.read_csv(tmp_path / 'loop.csv').iloc[1:]
    assert parts['share'].sum() == pytest.approx(1) and (parts['ms'][:4] > 0).all()
    assert pd.read_csv(tmp_path / 'precision.csv')['holds'].all()
    assert 'differs from that of one rank by' in pd.read_csv(tmp_path / 'ranks.csv')['outcome'][0]
    assert (tmp_path / 'step.png').stat().st_size > 5000 and 'Failed: nothing' in (tmp_path / 'report.md').read_text()


@pytest.mark.slow
def test_one_graph_each_and_fewer_kernels_compiled(run, tmp_path):
    pytest.importorskip('triton')
    job = run('misc/bench.py', ['kernels', '--tiny', '--csv', tmp_path / 'rows.csv'])
    assert job.code == 0, job.err
    rows = pd.read_csv(tmp_path / 'rows.csv')
    assert (rows['graphs'].dropna() == 1).all() and rows['graphs'].count() == 3
    compiled = rows.dropna(subset='compiled_kernels')
    assert len(compiled) == 5 and (compiled['compiled_kernels'] > 0).all()
    assert compiled['compiled_kernels'].iloc[0] < 0.2 * compiled['eager_operations'].iloc[0]  # the views
