"""Four ranks, compiled ranks, ranks that are killed, and the loss's memory on several ranks."""

import signal
import time

import pandas as pd
import psutil
import pytest
from conftest import Job, skip_if_not_compiled
from ranks import everything, gradients_of_a_step, memory_of_the_loss, on_ranks
from test_distributed import (  # noqa: F401
    one,
    test_a_group_makes_the_batch,
    test_features_are_identical_and_no_image_counts_twice,
    test_loss_and_gradient_are_those_of_the_whole_batch,
    test_main_under_a_launcher_takes_the_mean_of_the_ranks_gradients,
    test_parts_on_one_process_train_as_ranks,
    test_random_cases_are_the_equations_with_negatives_for_each_rank,
    test_ranks_may_hold_one_sample_each,
    test_running_statistics_become_their_mean_over_ranks_wherever_they_are_used,
)

TWO = ['--nproc_per_node=2']


@pytest.fixture(scope='module')
def ranks(tiny, tmp_path_factory):
    """Four of them, for the tests that two ranks pass in the fast suite."""
    out = tmp_path_factory.mktemp('ranks')
    return on_ranks(4, everything, out, [*tiny, '--results_dir', str(out / 'run')])


def test_memory_of_the_loss_is_that_of_rows_and_tiles(tmp_path):
    """One matrix of exponentials of this batch is 4.3 GB."""
    for world in (1, 4):
        out = tmp_path / str(world)
        out.mkdir()
        assert max(on_ranks(world, memory_of_the_loss, out, 16384)) < 300  # MB


def run_of(tiny, results, epochs):
    return [*tiny, '--epochs', str(epochs), '--results_dir', str(results)]


def test_compiled_ranks_train_as_eager_ones(tiny, tmp_path, run):
    """By PIL's views, as compiled ones round a few grey levels otherwise."""
    losses = []
    for compiled in ('True', 'False'):
        flags = [*run_of(tiny, tmp_path / compiled, 2), '--lr', '1e-5', '--augment', 'pil']
        job = run('main.py', [*flags, '--workers', '0', '--compile', compiled], torchrun=TWO)
        assert job.code == 0, job.err
        skip_if_not_compiled(job.out)
        assert 'Not compiled' not in job.out
        losses.append(pd.read_csv(tmp_path / compiled / 'log.csv')['train_loss'][1:].tolist())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]  # another order of sums


def test_the_gradient_of_compiled_ranks_is_that_of_eager_ones(tmp_path):
    for eager, compiled in on_ranks(2, gradients_of_a_step, tmp_path):
        assert (compiled - eager).norm() < 1e-10 * eager.norm()


def test_a_probe_under_torchrun_is_that_of_one_process(tiny, tmp_path, run):
    assert run('main.py', run_of(tiny, tmp_path, 1)).code == 0
    probe = ['--model_path', tmp_path / 'model_1.pth', '--epochs', '3', '--batch_size', '7']
    tables = []
    for torchrun in ([], ['--nproc_per_node=3']):
        job = run('linear.py', probe, torchrun=torchrun)
        assert job.code == 0
        assert sum('linear probe' in line for line in job.out.splitlines()) == 1
        tables.append(pd.read_csv(tmp_path / 'model_1_linear.csv'))
    pd.testing.assert_frame_equal(*tables, rtol=1e-4)


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--beta', '-1'], 'main.py: error: argument --beta'),
        (['--batch_size', '9'], 'does not divide evenly over 2 ranks'),
        (['--batch_size', '40'], 'is larger than the data set'),
        (['--results_dir', '/proc/r'], 'choose another directory'),
    ],
)
def test_errors_are_shown_once(tiny, tmp_path, run, flags, message):
    job = run('main.py', [*run_of(tiny, tmp_path / 'r', 3), *flags], torchrun=TWO)
    assert job.code != 0
    assert job.err.count(message) == 1
    assert 'Traceback' not in job.out


def kill_a_rank(job, results):
    while job.process.poll() is None and not (results / 'model_1.pth').exists():
        time.sleep(0.01)
    started = psutil.Process(job.process.pid).children()
    ranks = [process for process in started if 'main.py' in ' '.join(process.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    return time.monotonic()


def test_a_killed_rank_ends_the_run_and_the_same_command_continues(tiny, tmp_path, run):
    flags = run_of(tiny, tmp_path / 'r', 6)
    job = Job('main.py', flags, torchrun=TWO)
    killed = kill_a_rank(job, tmp_path / 'r')
    job.finish()
    assert job.code != 0
    assert time.monotonic() - killed < 45  # torchrun gives the others 30 seconds
    again = run('main.py', flags, torchrun=TWO)
    assert again.code == 0
    assert 'Continuing' in again.out
    assert list(pd.read_csv(tmp_path / 'r' / 'log.csv')['epoch']) == [0, 1, 2, 3, 4, 5, 6]


def test_torchrun_restarts_a_run_where_it_stopped(tiny, tmp_path):
    job = Job('main.py', run_of(tiny, tmp_path / 'r', 6), torchrun=[*TWO, '--max_restarts=1'])
    kill_a_rank(job, tmp_path / 'r')
    job.finish()
    assert job.code == 0, job.err
    assert 'Continuing' in job.out
    assert 'Finished' in job.out
    assert list(pd.read_csv(tmp_path / 'r' / 'log.csv')['epoch']) == [0, 1, 2, 3, 4, 5, 6]


def test_torchrun_trains_logs_and_saves_once_and_one_process_continues(tiny, tmp_path, run):
    results = tmp_path / 'r'
    flags = [*tiny, '--epochs', '6', '--results_dir', str(results)]
    job = Job('main.py', flags, torchrun=['--nproc_per_node=2'])
    while job.process.poll() is None and not (results / 'model_1.pth').exists():
        time.sleep(0.01)
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    assert job.code != 0
    assert job.out.count('saved in') == 1, job.err
    assert job.out.count('epoch 1/6:') == 1
    again = run('main.py', flags)
    assert again.code == 0
    assert 'Continuing' in again.out
    log = pd.read_csv(results / 'log.csv')
    assert list(log['epoch']) == [0, 1, 2, 3, 4, 5, 6]
    assert log['train_loss'][1:].notna().all()
