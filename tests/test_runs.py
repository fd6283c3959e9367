"""What makes a run the same run: settings and the content of data; and files written whole."""

import os
import random
import resource
import shutil
from argparse import Namespace
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from conftest import assert_same_outcome, outcome, stop_after
from PIL import Image

import linear
import main
import plot
import sweep
from hardneg import files, runs, runtime
from hardneg.files import read_checkpoint, read_json, write_json
from hardneg.runtime import UserError
from utils import load_data


@pytest.fixture(scope='module')
def begun(tiny, tmp_path_factory):
    """A run on the tree, stopped in its second and last epoch."""
    results = tmp_path_factory.mktemp('runs') / 'begun'
    with pytest.MonkeyPatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(SystemExit):
            main.main([*tiny, '--epochs', '2', '--results_dir', str(results)])
    return results


def copy_of(directory, place, **change):
    """A copy of a data set or run."""
    return shutil.copytree(directory, place, **change)


def change_a_pixel(path):
    image = Image.open(path)
    inverted = tuple(255 - level for level in image.getpixel((3, 5)))
    image.putpixel((3, 5), inverted)
    image.save(path)


# Settings


def test_a_setting_that_an_earlier_config_lacks_has_its_default(tiny, begun, tmp_path, capsys):
    """As if --crop_min, --schedule and --init had come after the run."""
    results = copy_of(begun, tmp_path / 'results')
    config = read_json(results / 'config.json')
    state = read_checkpoint(results / 'last.pth')
    for settings in (config['settings'], state['settings']):
        for name in ('crop_min', 'schedule', 'init'):
            del settings[name]
    write_json(results / 'config.json', config)
    torch.save(state, results / 'last.pth')
    flags = [*tiny, '--epochs', '2', '--results_dir', str(results)]
    with pytest.raises(UserError, match=r'other settings \(--crop_min 0.08 there, 0.5 here\): ch'):
        main.main([*flags, '--crop_min', '0.5'])
    main.main(flags)
    assert 'Continuing' in capsys.readouterr().out
    main.main([*tiny, '--epochs', '2', '--results_dir', str(tmp_path / 'whole')])
    assert_same_outcome(results, outcome(tmp_path / 'whole'))


def test_a_run_keeps_its_precision_whatever_the_machine_would_choose(
    tiny, begun, tmp_path, monkeypatch, capsys
):
    results = copy_of(begun, tmp_path / 'results')
    place = tiny.index('--precision')
    flags = [*tiny[:place], *tiny[place + 2 :], '--epochs', '2', '--results_dir', str(results)]
    monkeypatch.setattr(runtime, 'default_precision', lambda: 'bf16')
    with pytest.raises(UserError, match=r'--precision fp32 there, bf16 here\)'):
        main.main([*flags, '--precision', 'bf16'])
    main.main(flags)
    said = capsys.readouterr().out
    assert 'Precision: fp32' in said
    assert 'Continuing' in said
    main.main([*flags[:-1], str(tmp_path / 'new'), '--epochs', '1'])
    assert read_json(tmp_path / 'new' / 'config.json')['settings']['precision'] == 'bf16'


def test_a_sweep_keeps_the_precision_of_its_first_run(begun, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, 'default_precision', lambda: 'bf16')
    assert sweep.precision_of(main.parse([]), tmp_path) == 'bf16'
    assert sweep.precision_of(main.parse([]), begun.parent) == 'fp32'
    assert sweep.precision_of(main.parse(['--precision=fp16']), begun.parent) == 'fp16'
    assert sweep.with_precision(['--lr', '1'], 'bf16') == ['--lr', '1', '--precision', 'bf16']
    given = ['--precision=fp16']
    assert sweep.with_precision(given, 'bf16') == given


def test_an_edited_config_that_names_another_run_is_refused(tiny, begun, tmp_path):
    """The state in last.pth has its own settings."""
    results = copy_of(begun, tmp_path / 'results')
    config = read_json(results / 'config.json')
    config['settings']['lr'] = 0.5
    write_json(results / 'config.json', config)
    flags = [*tiny, '--epochs', '2', '--results_dir', str(results)]
    with pytest.raises(UserError, match='--lr 0.5 there, 0.001 here'):
        main.main(flags)
    with pytest.raises(UserError, match=r'last.pth holds a run .*--lr 0.001 there, 0.5 here'):
        main.main([*flags, '--lr', '0.5'])


def test_a_directory_in_which_no_step_was_taken_may_be_used_with_other_settings(
    tiny, tmp_path, monkeypatch
):
    """As after a first step for which memory was too small."""
    flags = [*tiny, '--epochs', '1', '--results_dir', str(tmp_path)]

    def full(*views, **options):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried')

    with monkeypatch.context() as patch:
        patch.setattr(main, 'contrastive_loss', full)
        with pytest.raises(SystemExit, match='memory is full'):
            main.main(flags)
    main.main([*flags, '--micro_batch', '4'])
    assert read_json(tmp_path / 'config.json')['settings']['micro_batch'] == 4
    with pytest.raises(UserError, match='--micro_batch 4 there, None here'):
        main.main(flags)


# Data


def test_a_folder_is_known_by_its_content_wherever_it_lies(tiny, tree, begun, tmp_path, capsys):
    """A pixel or another order makes another data set; a place, a size and times do not."""
    place = copy_of(tree, tmp_path / 'elsewhere', copy_function=shutil.copyfile)
    digest = read_json(begun / 'config.json')['data_digest']

    def digest_at(root, size=16):
        return load_data('folder', root, store_size=size).digest

    assert digest_at(tree) == digest_at(place, 24) == digest
    results = copy_of(begun, tmp_path / 'results')
    flags = [*tiny, '--root', str(place), '--epochs', '2', '--results_dir', str(results)]
    change_a_pixel(place / 'train/b/3.png')
    with pytest.raises(UserError, match='holds a run on other data .*choose another --results_dir'):
        main.main(flags)
    shutil.copyfile(tree / 'train/b/3.png', place / 'train/b/3.png')
    (place / 'train/a/9.png').rename(place / 'train/b/-.png')  # the next in order
    assert digest_at(place) != digest
    (place / 'train/b/-.png').rename(place / 'train/a/9.png')
    main.main(flags)
    assert 'Continuing' in capsys.readouterr().out
    main.main([*tiny, '--epochs', '2', '--results_dir', str(tmp_path / 'whole')])
    assert_same_outcome(results, outcome(tmp_path / 'whole'))


def swap(one, other):
    spare = one.with_suffix('.tmp')
    one.rename(spare)
    other.rename(one)
    spare.rename(other)


def rename_a_class(place):
    for directory in sorted(place.glob('t*/b')):
        directory.rename(f'{directory}b')


CHANGES = dict(
    times=lambda place: os.utime(place / 'train/a/0.png', ns=(0, 0)),
    pixel=lambda place: change_a_pixel(place / 'test/c/1.png'),
    label=lambda place: swap(place / 'train/a/4.png', place / 'train/c/0.png'),
    order=lambda place: swap(place / 'test/b/1.png', place / 'test/b/2.png'),
    part=lambda place: swap(place / 'train/c/7.png', place / 'test/c/0.png'),
    classes=rename_a_class,
)


def test_sets_of_one_name_and_size_never_mix(tree, tiny, tmp_path, capsys):
    """In runs, probes, tables and pictures. The first change is none."""
    root = copy_of(tree, tmp_path / 'first' / 'set')
    results = tmp_path / 'runs' / 'times'
    flags = [*tiny, '--epochs', '1', '--results_dir', str(results)]
    main.main([*flags, '--root', str(root)])
    probe = ['--model_path', str(results / 'model_1.pth'), '--cached', '--epochs', '1']
    digests = {}
    for change, act in CHANGES.items():
        place = copy_of(root, tmp_path / change / 'set')
        act(place)
        data = load_data('folder', place, store_size=16)
        assert (len(data.train), len(data.test)) == (30, 9)
        digests[change] = data.digest
        before = {path.name: path.read_bytes() for path in results.iterdir()}
        capsys.readouterr()
        linear.main([*probe, '--root', str(place)])
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.count('linear probe') == 2
        for name, content in before.items():
            assert (results / name).read_bytes() == content
        made = {path.name for path in results.iterdir()} - set(before)
        if change == 'times':
            assert said.count('kNN') == 2
            assert 'model_1_linear_cached.csv' in made
            main.main([*flags, '--root', str(place)])
            continue
        assert said.count('kNN') == 0  # the log tells of the run's own data
        assert f'model_1_linear_cached_set_{data.digest[:8]}.csv' in made
        with pytest.raises(UserError, match='holds a run on other data'):
            main.main([*flags, '--root', str(place)])
        # as if the run had been trained on the other set
        copied = copy_of(results, tmp_path / 'runs' / change)
        config = read_json(copied / 'config.json')
        config['settings']['root'] = str(place)
        config['data_digest'] = data.digest
        config['classes'] = data.classes
        write_json(copied / 'config.json', config)
    assert len(set(digests.values())) == len(CHANGES)

    table = sweep.make_table(tmp_path / 'runs')
    names = {f'set ({digest[:8]})' for digest in digests.values()}
    assert set(table['data']) == names
    assert len(table) == len(CHANGES)
    for _, row in table.iterrows():
        own = digests['times'][:8] in row['data']
        assert row['linear_cached_seeds'] == int(own)
    paths = sorted((tmp_path / 'runs').iterdir())
    figure = plot.curves(Namespace(paths=paths))
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {text.rpartition('data ')[2] for text in texts} == names
    plot.plt.close(figure)


def test_the_untrained_encoder_is_probed_again_only_if_flags_or_data_changed(tree, begun, tmp_path):
    results = copy_of(begun, tmp_path / 'results')
    shutil.copy(results / 'model_1.pth', results / 'model_3.pth')

    def probed(checkpoint, epochs):
        path = str(results / f'model_{checkpoint}.pth')
        linear.main(['--model_path', path, '--cached', '--epochs', str(epochs)])
        return (results / 'model_0_linear_cached.pth').stat().st_mtime_ns

    made = [probed(1, 1), probed(3, 1), probed(1, 2), probed(3, 2)]
    assert made[0] == made[1] < made[2] == made[3]
    about = read_json(results / 'model_0_linear_cached.json')
    write_json(results / 'model_0_linear_cached.json', {**about, 'data_digest': 'another'})
    assert probed(1, 2) > made[3]


@pytest.mark.parametrize('seed', range(50))
def test_data_have_one_name_if_and_only_if_their_content_is_one(seed):
    dice = random.Random(seed)
    found = []
    for _ in range(6):
        digest = dice.choice('0123') * 64
        found.append(dict(data_digest=digest, data=dice.choice(['images', 'other']), identity={}))
    runs.name_data(found)
    for a in found:
        assert a['identity'] == {'data': a['data']}
        for b in found:
            assert (a['data'] == b['data']) == (a['data_digest'] == b['data_digest'])


# Files


@pytest.mark.parametrize('full', [None, 'write', 'fsync', 'replace'])
def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch, full):
    path = tmp_path / 'f'
    path.write_bytes(b'old')
    new = b'new' * 1000
    done = []
    fsync, replace = os.fsync, os.replace

    def step(name, part_size):
        done.append(name)
        assert path.read_bytes() == b'old'
        assert part_size == len(new)  # nothing is kept in a buffer
        if name == full:
            raise OSError(28, 'No space left on device')

    def spy_fsync(descriptor):
        step('fsync', os.fstat(descriptor).st_size)
        fsync(descriptor)

    def spy_replace(part, target):
        step('replace', os.stat(part).st_size)
        replace(part, target)

    monkeypatch.setattr(os, 'fsync', spy_fsync)
    monkeypatch.setattr(os, 'replace', spy_replace)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = nullcontext()
    if full:
        reason = '(No space left on device|File too large)'
        expected = pytest.raises(UserError, match=f'cannot write .*f .{reason}.; what was saved')
    if full == 'write':  # a limit on the size of files stands for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with expected:
            files.write(path, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    steps = {'write': [], 'fsync': ['fsync']}
    assert done == steps.get(full, ['fsync', 'replace'])
    assert path.read_bytes() == (b'old' if full else new)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_a_write_that_ctrl_c_ended(tmp_path):
    def save(file):
        file.write(b'half')
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_by(tmp_path / 'f', save)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'error', [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_checkpoint_that_memory_does_not_hold_is_not_called_damaged(tmp_path, monkeypatch, error):
    files.write_tensors(tmp_path / 'f', {'x': torch.zeros(3)})

    def full(*args, **options):
        raise error

    monkeypatch.setattr(torch, 'load', full)
    with pytest.raises(type(error)):
        files.read_checkpoint(tmp_path / 'f')


def test_a_column_that_an_earlier_log_lacks_is_empty(begun, tmp_path):
    results = copy_of(begun, tmp_path / 'results')
    log = pd.read_csv(results / 'log.csv')
    log.drop(columns=['rankme', 'seconds']).to_csv(results / 'log.csv', index=False)
    found = runs.read_run(results)['log']
    assert list(found) == list(runs.LOG)
    assert found[['rankme', 'seconds']].isna().all(axis=None)
    assert found['train_loss'].equals(log['train_loss'])


def test_a_row_with_a_column_that_the_table_has_not_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match='no such column: grad_norm'):
        files.write_table(tmp_path / 'log.csv', [{'epoch': 1, 'grad_norm': 2.0}], runs.LOG)
