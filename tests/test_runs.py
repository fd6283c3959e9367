"""What makes a run the same run: settings, also those that an earlier version did not have, and the content of data."""

import os
import random
import resource
import shutil
from argparse import Namespace
from contextlib import nullcontext

import pandas as pd
import pytest
import torch
from conftest import HOME, assert_same_outcome, outcome, stop_after
from PIL import Image

from hardneg import files
import linear
import main
import plot
from hardneg import runs
import sweep
from data import load_data
from hardneg.files import read_json, write_json
from hardneg.runtime import UserError

OLD = ['--dataset_name', 'shapes', '--arch', 'resnet18', '--width', '0.125', '--image_size', '8', '--test_size', '8',
       '--hidden_dim', '8', '--feature_dim', '4', '--batch_size', '1000', '--epochs', '1', '--k', '5']


@pytest.fixture
def old(tmp_path):
    """A run of an earlier version, without the later flags and the digest of its data, before its first step."""
    return shutil.copytree(HOME / 'tests' / 'old_run', tmp_path / 'old')


def test_a_run_of_an_earlier_version_ends_with_the_bits_of_a_new_one(old, tmp_path, monkeypatch, capsys):
    """From the same weights, as other machines may draw them otherwise in the last bit."""
    flags, build = [*OLD, '--precision', 'fp32', '--knn_every', '0', '--results_dir'], main.build
    before = torch.load(old / 'last.pth', weights_only=True)

    def build_old(*args):
        net, *rest = build(*args)
        for name, x in net.state_dict().items():
            torch.testing.assert_close(x, before['model'][name], rtol=0, atol=1e-6)
        net.load_state_dict(before['model'])
        return net, *rest

    with monkeypatch.context() as patch:
        patch.setattr(main, 'build', build_old)
        main.main([*flags, str(tmp_path / 'new')])
    with monkeypatch.context() as patch:
        stop_after(0, patch)  # after the first step
        with pytest.raises(SystemExit):
            main.main([*flags, str(old)])
    assert f'{old} was begun by an earlier version: its images are compared by number' in capsys.readouterr().out
    with pytest.raises(UserError, match=r'other settings \(--crop_min 0.08 there, 0.5 here\): choose another'):
        main.main([*flags, str(old), '--crop_min', '0.5'])
    main.main([*flags, str(old)])
    (tmp_path / 'new' / 'model_0.pth').unlink()
    (log, states), (new, new_states) = outcome(old), outcome(tmp_path / 'new')
    assert all(torch.equal(x, new_states[file][name]) for file in states for name, x in states[file].items())
    assert states.keys() == new_states.keys() and 'model_1.pth' in states
    pd.testing.assert_frame_equal(log[1:], new[1:], check_exact=True)
    assert log['test_acc@1'][0] == 31.5 and new.loc[0].drop(['epoch', 'encoder']).isna().all()  # its own measures stay


def test_a_directory_in_which_no_step_was_taken_may_be_used_with_other_settings(old, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(0, patch)
        with pytest.raises(SystemExit):
            main.main([*OLD, '--results_dir', str(old), '--beta', '0.5', '--knn_every', '0'])
    settings, state = read_json(old / 'config.json')['settings'], torch.load(old / 'last.pth', weights_only=True)
    assert settings['beta'] == 0.5 and (state['epoch'], state['step']) == (0, 1)
    with pytest.raises(UserError, match=r'--beta 0.5 there, 1.0 here'):
        main.main([*OLD, '--results_dir', str(old)])


@pytest.fixture(scope='module')
def begun(tiny, tmp_path_factory):
    """A run on the tree, stopped in its second and last epoch."""
    results = tmp_path_factory.mktemp('runs') / 'begun'
    with pytest.MonkeyPatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(SystemExit):
            main.main([*tiny, '--epochs', '2', '--results_dir', str(results)])
    return results


def change_a_pixel(path):
    image = Image.open(path)
    image.putpixel((3, 5), tuple(255 - level for level in image.getpixel((3, 5))))
    image.save(path)


def moved(tiny, place):
    return [str(place) if before == '--root' else word for before, word in zip(['', *tiny], tiny)]


def test_a_folder_is_known_by_its_content_wherever_it_lies(tiny, tree, begun, tmp_path, capsys):
    """One pixel of one image makes another data set; another place, decoding anew and other times do not."""
    place, results = tmp_path / 'elsewhere', shutil.copytree(begun, tmp_path / 'results')
    shutil.copytree(tree, place, copy_function=shutil.copyfile)
    digest = read_json(begun / 'config.json')['data_digest']
    assert load_data('folder', tree, 16).digest == load_data('folder', place, 24).digest == digest
    flags, image = [*moved(tiny, place), '--epochs', '2', '--results_dir', str(results)], place / 'train/b/3.png'
    change_a_pixel(image)
    with pytest.raises(UserError, match='holds a run on other data .*choose another --results_dir'):
        main.main(flags)
    shutil.copyfile(tree / 'train' / 'b' / '3.png', image)
    (place / 'train/a/9.png').rename(place / 'train/b/-.png')  # the next in order
    assert load_data('folder', place, 16).digest != digest
    (place / 'train/b/-.png').rename(place / 'train/a/9.png')
    shutil.rmtree(place / '.decoded')
    main.main(flags)
    assert 'Continuing' in capsys.readouterr().out
    main.main([*tiny, '--epochs', '2', '--results_dir', str(begun)])
    assert_same_outcome(results, outcome(begun))
    assert read_json(results / 'config.json')['data_digest'] == digest


def swap(one, other):
    one.rename(one.with_suffix('.tmp'))
    other.rename(one)
    one.with_suffix('.tmp').rename(other)


CHANGES = dict(nothing=lambda place, dice: os.utime(place / 'train/a/0.png', ns=(0, 0)),
               pixel=lambda place, dice: change_a_pixel(dice.choice(sorted(place.rglob('*.png')))),
               label=lambda place, dice: swap(place / f'train/a/{dice.randrange(10)}.png', place / 'train/c/0.png'),
               order=lambda place, dice: swap(place / f'test/b/{dice.randrange(2)}.png', place / 'test/b/2.png'),
               part=lambda place, dice: swap(place / f'train/c/{dice.randrange(10)}.png', place / 'test/c/0.png'),
               classes=lambda place, dice: [path.rename(f'{path}b') for path in sorted(place.glob('t*/b'))])


def test_sets_of_one_name_and_size_never_mix_in_runs_probes_tables_and_pictures(tree, tiny, tmp_path, capsys):
    results, dice, root = tmp_path / 'runs' / 'nothing', random.Random(0), tmp_path / 'first' / 'set'
    shutil.copytree(tree, root, ignore=shutil.ignore_patterns('.decoded'))
    main.main([*moved(tiny, root), '--epochs', '1', '--results_dir', str(results)])
    probe = ['--model_path', str(results / 'model_1.pth'), '--augment', 'none', '--epochs', '1', '--root']
    digests = {}
    for change, act in CHANGES.items():
        place = tmp_path / change / 'set'
        shutil.copytree(root, place, ignore=shutil.ignore_patterns('.decoded'))
        act(place, dice)
        data = load_data('folder', place, 16)
        assert (len(data.train), len(data.test)) == (30, 9)
        digests[change] = data.digest
        before = {path.name: path.read_bytes() for path in results.iterdir()}
        capsys.readouterr()
        linear.main([*probe, str(place)])
        said, made = capsys.readouterr().out.splitlines()[-1], {path.name for path in results.iterdir()} - {*before}
        ends = '' if change == 'nothing' else f'_set_{data.digest[:8]}'
        assert {f'model_1_linear{ends}_cached.{suffix}' for suffix in ('csv', 'json', 'pth')} <= made
        assert said.count('kNN') == 2 * (change == 'nothing') and said.count('linear probe') == 2
        assert all((results / name).read_bytes() == content for name, content in before.items())
        if change == 'nothing':
            main.main([*moved(tiny, place), '--epochs', '1', '--results_dir', str(results)])
            continue
        with pytest.raises(UserError, match='holds a run on other data'):
            main.main([*moved(tiny, place), '--epochs', '1', '--results_dir', str(results)])
        copied = shutil.copytree(results, tmp_path / 'runs' / change)  # as if it had been trained on the other set
        config = read_json(copied / 'config.json')
        config['settings']['root'] = str(place)
        write_json(copied / 'config.json', config | dict(data_digest=data.digest, classes=data.classes))
    assert len({*digests.values()}) == len(CHANGES) and digests['nothing'] == load_data('folder', root, 16).digest
    table = sweep.make_table(tmp_path / 'runs')
    assert sorted(table['data']) == sorted(f'set ({digest[:8]})' for digest in digests.values())
    assert table['linear_cached_seeds'].tolist() == [int(digests['nothing'][:8] in name) for name in table['data']]
    assert table['seeds'].tolist() == [1] * len(CHANGES)
    figure = plot.curves(Namespace(paths=sorted((tmp_path / 'runs').iterdir())))
    assert {text.get_text().rpartition('data ')[2] for text in figure.legends[0].get_texts()} == {*table['data']}
    plot.plt.close(figure)


def test_the_untrained_encoder_is_probed_again_if_flags_or_data_changed_and_only_then(tree, tiny, begun, tmp_path):
    """In the directory of an older run, without a digest: any data of its classes and numbers count as its own."""
    results, place, made = shutil.copytree(begun, tmp_path / 'results'), tmp_path / 'elsewhere', []
    shutil.copytree(tree, place)
    shutil.copy(results / 'model_1.pth', results / 'model_3.pth')
    config = read_json(results / 'config.json')
    config.pop('data_digest')
    files.write_json(results / 'config.json', config)
    for checkpoint, epochs, change in ((1, 1, 0), (3, 1, 0), (3, 1, 1), (1, 1, 0), (1, 2, 0), (3, 2, 0), (3, 2, 1)):
        if change:
            change_a_pixel(place / 'train/b/3.png')
        linear.main(['--model_path', str(results / f'model_{checkpoint}.pth'), '--augment', 'none', '--epochs',
                     str(epochs), '--root', str(place)])
        made.append((results / 'model_0_linear_cached.pth').stat().st_mtime_ns)
        about = read_json(results / 'model_0_linear_cached.json')
        assert about['data_digest'] == load_data('folder', place, 16).digest
    assert made[0] == made[1] < made[2] == made[3] < made[4] == made[5] < made[6]


@pytest.mark.parametrize('full', [None, 'write', 'fsync', 'replace'])
def test_a_file_is_on_the_disk_before_it_takes_the_others_place(tmp_path, monkeypatch, full):
    path, new, done, fsync, replace = tmp_path / 'f', b'new' * 1000, [], os.fsync, os.replace
    path.write_bytes(b'old')

    def step(name, function, size):
        def spy(*args):
            done.append(name)
            assert path.read_bytes() == b'old' and size(*args) == len(new)
            if name == full:
                raise OSError(28, 'No space left on device')
            function(*args)
        monkeypatch.setattr(os, name, spy)

    step('fsync', fsync, lambda file: os.fstat(file).st_size)  # nothing is kept in a buffer
    step('replace', replace, lambda part, _: os.stat(part).st_size)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full == 'write':  # a limit on the size of files stands for a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match='cannot write .*f .(No space left on device|File too large).; what was sav'
                           ) if full else nullcontext():
            files.write(path, new)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert done == {'write': [], 'fsync': ['fsync']}.get(full, ['fsync', 'replace'])
    assert path.read_bytes() == (b'old' if full else new) and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize('seed', range(50))
def test_data_have_one_name_if_and_only_if_their_content_is_one(seed):
    draw = random.Random(seed)
    sets = [dict(data_digest=f'{i}' * 64, classes=draw.choice(['ab', 'abc']), images=draw.choice([30, 40]))
            for i in range(4)]
    found = [dict(draw.choice(sets), data=draw.choice(['images', 'images', 'other']), identity={}) for _ in range(6)]
    runs.name_data(found)
    for a in found:
        assert a['identity'] == {'data': a['data']}
        assert all((a['data'] == b['data']) == (a['data_digest'] == b['data_digest']) for b in found)
