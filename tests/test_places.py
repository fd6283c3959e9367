"""A run is used from any working directory, and what it prints can be pasted."""

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import HOME, stop_after
from hypothesis import given, settings
from hypothesis import strategies as st

import embed
import linear
import main
import sweep
from hardneg import files, runs
from hardneg.folder import find_folder
from hardneg.runtime import UserError

# Names of directories that a shell or a path could take for something else
NAMES = "photos, my photos, a'b, $HOME, x;y, [z]*, ü, .hidden, data".split(', ')
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map('/'.join)


@given(begun=names, results=names, root=names | names.map('../{}'.format), later=names)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_directories_are_the_same_from_any_working_directory(
    tmp_path_factory, begun, results, root, later
):
    """The file holds them relative to itself, so that a tree that is moved as a whole stays one."""
    top = tmp_path_factory.getbasetemp() / 'places'
    moved = top.with_name('moved')
    for place in top, moved:
        shutil.rmtree(place, ignore_errors=True)
    for name in begun, later, f'{begun}/{results}':
        (top / name).mkdir(parents=True, exist_ok=True)
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    config['settings'] = dict(root=root, cache_dir=None, dataset_name='folder', results_dir='r')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(top / begun)
        runs.write_config(f'{results}/config.json', config)
        place = os.path.relpath(top / begun / results, top / later)
        right = os.path.abspath(root)
        patch.chdir(top / later)
        for directory in place, top / begun / results:
            found = runs.read_config(Path(directory, 'config.json'))['settings']
            assert os.path.abspath(found['root']) == right
            assert found['cache_dir'] is None
            assert runs.data_name(found) == os.path.basename(right)
        patch.chdir(top.parent)
        top.rename(moved)
        found = runs.read_config(moved / begun / results / 'config.json')['settings']
        assert os.path.abspath(found['root']) == right.replace(str(top), str(moved))


def test_an_absolute_directory_stays_so(tmp_path):
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    config['settings'] = dict(root='/data/a/../b', cache_dir=str(tmp_path))
    runs.write_config(tmp_path / 'config.json', config)
    assert json.loads((tmp_path / 'config.json').read_text()) == config
    assert runs.read_config(tmp_path / 'config.json') == config


def test_results_may_be_reached_by_a_link(tmp_path, monkeypatch):
    """As where results/ lies on another disk."""
    (tmp_path / 'project').mkdir()
    (tmp_path / 'disk/of/mine').mkdir(parents=True)
    (tmp_path / 'project/results').symlink_to(tmp_path / 'disk/of/mine')
    monkeypatch.chdir(tmp_path / 'project')
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    config['settings'] = dict(root='data')
    runs.write_config('results/config.json', config)
    for place in 'results', '../disk/of/mine', tmp_path / 'disk/of/mine':
        assert runs.read_config(Path(place, 'config.json'))['settings']['root'] == 'data'


def test_the_kept_results_find_their_data_in_the_clone(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    kept = [*(HOME / 'results').glob('*/**/*.json')]
    assert len(kept) > 100
    for file in kept:
        kinds = runs.CONFIG if file.name == 'config.json' else runs.ABOUT
        root = os.path.abspath(runs.read_config(file, kinds)['settings']['root'])
        assert Path(root).is_relative_to(HOME / 'data')


def test_a_folder_has_one_name_from_any_working_directory(tree, monkeypatch):
    """By which its decoded images are known."""
    for place, root in (
        (tree, '.'),
        (tree / 'train', '..'),
        (tree / 'test/a', f'../../../{tree.name}'),
    ):
        monkeypatch.chdir(place)
        assert find_folder(root).root == tree


# Runs


@pytest.fixture(scope='module')
def project(tiny, tree, tmp_path_factory):
    """A directory with photos and a run of two epochs on them, stopped in the second."""
    place = tmp_path_factory.mktemp('a project')
    shutil.copytree(tree, place / 'the photos')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        stop_after(9, patch)
        with pytest.raises(SystemExit):
            main.main([*flags_of(tiny), '--root', 'the photos', '--results_dir', 'my results/run'])
    return place


def flags_of(tiny):
    place = tiny.index('--root')
    return [*tiny[:place], *tiny[place + 2 :], '--epochs', '2']


def copied(project, place):
    return shutil.copytree(project, place)


def test_a_run_is_continued_and_probed_from_other_directories(
    tiny, project, tmp_path, monkeypatch, capsys
):
    place = copied(project, tmp_path / 'copy')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    results = '../copy/my results/run'
    main.main([*flags_of(tiny), '--root', '../copy/the photos', '--results_dir', results])
    said = capsys.readouterr().out
    assert 'Continuing' in said
    assert 'Looking for' not in said
    config = json.loads(Path(results, 'config.json').read_text())
    assert config['settings']['root'] == '../../the photos'

    monkeypatch.chdir(place / 'the photos')
    checkpoint = ['--model_path', '../my results/run/model_2.pth', '--cached', '--epochs', '1']
    linear.main(checkpoint)
    said = capsys.readouterr().out
    assert 'Looking for' not in said
    assert said.count('kNN') == 2
    probe = place / 'my results/run/model_2_linear_cached.json'
    assert json.loads(probe.read_text())['settings']['root'] == '../../the photos'

    # From here, the probe of the untrained encoder has other words for the same place.
    time = probe.with_name('model_0_linear_cached.pth').stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    linear.main(['--model_path', 'copy/my results/run/model_2.pth', *checkpoint[2:]])
    assert probe.with_name('model_0_linear_cached.pth').stat().st_mtime_ns == time
    table = sweep.make_table(tmp_path / 'copy')
    assert table['data'].tolist() == ['the photos']


def test_a_script_says_where_it_looks_for_other_data_than_the_runs(
    tiny, project, tmp_path, monkeypatch, capsys
):
    place = copied(project, tmp_path / 'copy')
    moved = (place / 'the photos').rename(tmp_path / 'moved')
    monkeypatch.chdir(place)
    told = f'Looking for folder in {moved}; the data of the run were in {place}/the photos\n'
    main.main([*flags_of(tiny), '--root', '../moved', '--results_dir', 'my results/run'])
    assert told in capsys.readouterr().out
    checkpoint = ['--model_path', 'my results/run/model_2.pth', '--cached', '--epochs', '1']
    linear.main([*checkpoint, '--root', '../moved'])
    assert told in capsys.readouterr().out
    with pytest.raises(UserError, match='the photos is not a directory'):
        linear.main(checkpoint)
    assert 'Looking for' not in capsys.readouterr().out


# What is to be pasted


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('labelled', [False, True])
def test_the_command_after_a_run_is_one_to_paste(tmp_path, monkeypatch, name, labelled):
    """A shell reads from it the script, the encoder and the directory of the images."""
    place = tmp_path / name
    place.mkdir()
    monkeypatch.chdir(place)
    words = ['--results_dir', f'{name}/run', '--root', name, '--epochs', '3']
    args, _, _ = main.arguments([*words, '--arch', 'resnet18'])

    class Data:
        classes = ['a', 'b'] * labelled

    python, script, *rest = shlex.split(main.next_command(args, Data))
    assert python == 'python'
    assert Path(script).samefile(HOME / ('linear.py' if labelled else 'misc/embed.py'))
    arguments = linear.arguments if labelled else embed.arguments
    parsed = arguments([*rest, '--precision', 'fp32'])
    assert parsed.model_path == f'{name}/run/model_3.pth'
    assert labelled or parsed.root == name


def test_a_root_that_is_told_is_one_to_paste(tree, tmp_path):
    root = tmp_path / "the author's photos"
    shutil.copytree(tree / 'train', root / 'train')
    with pytest.raises(UserError, match='to train without labels, ') as error:
        find_folder(root)
    _, _, words = str(error.value).partition('to train without labels, ')
    assert shlex.split(words) == ['--root', str(root / 'train')]


def test_a_probes_command_is_one_to_paste(project, tmp_path, monkeypatch):
    place = copied(project, tmp_path / "it's a copy")
    monkeypatch.chdir(tmp_path)
    words = ['--model_path', f'{place}/my results/run/model_1.pth', '--cached', '--epochs', '1']
    monkeypatch.setattr('sys.argv', ['linear.py', *words])
    linear.main(words)
    about = files.read_json(place / 'my results/run/model_1_linear_cached.json')
    assert shlex.split(about['command'])[1:] == words


def test_a_sweep_knows_its_probes_from_any_directory(project, tmp_path, monkeypatch):
    place = copied(project, tmp_path / "it's a copy")
    config = place / 'my results/run/config.json'
    content = files.read_json(config)
    content['settings']['epochs'] = 1
    files.write_json(config, content)
    monkeypatch.setattr(sweep.Sweep, 'call', lambda self, script, words: script)
    probe = ['--cached', '--epochs', '1']
    monkeypatch.chdir(place / 'my results')
    words = ['linear.py', '--model_path', 'run/model_1.pth', *probe]
    monkeypatch.setattr('sys.argv', words)
    linear.main(words[1:])
    for directory, words, said in (
        (place, probe, 'probed before'),
        (place, [*probe, '--lr', '1'], 'linear.py'),
        (place / 'my results', probe, 'probed before'),
    ):
        monkeypatch.chdir(directory)
        results = Path(os.path.relpath(place / 'my results/run'))
        assert sweep.Sweep(words, 1).train_and_probe(results, []) == f'{results}: {said}'
