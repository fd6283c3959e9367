"""Image folders: which files are found, with which labels, and what is said of the others."""

import hashlib
import os
import random
import unicodedata
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image
from tqdm import tqdm

from hardneg import flags
from hardneg.files import write_json
from hardneg.folder import Listing, find_folder, held_out
from hardneg.runs import CONFIG
from hardneg.runtime import UserError
from utils import load_data


@pytest.fixture
def root(tmp_path):
    """A folder of one image."""
    save(tmp_path / 'a.png')
    return tmp_path


def save(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path)


def make(root, *directories):
    """An image x.png in each of the directories."""
    for directory in directories:
        save(root / directory / 'x.png')


def make_run(directory):
    """A run of which a picture was drawn."""
    save(directory / 'curves.png')
    write_json(directory / 'config.json', {name: kind() for name, kind in CONFIG.items()})


def names(found):
    return [name for name, *_ in found.files]


# Files


# Suffixes that Pillow knows, of formats that are not read
NOT_READ = '.bufr .emf .eps .grib .h5 .hdf .mpeg .mpg .palm .pdf .ps .wmf'.split()


def a_directory(path):
    save(path / 'x.png')


def a_text(path):
    path.write_text('hello')


HIDDEN = "hidden or a system's"
NAME = 'not named as an image'
LEFT_OUT = [
    ('.DS_Store', a_text, HIDDEN),
    ('._a.png', a_text, HIDDEN),
    ('.hidden', a_directory, HIDDEN),
    ('.ipynb_checkpoints', a_directory, HIDDEN),
    ('@eaDir', a_directory, HIDDEN),
    ('__MACOSX', a_directory, HIDDEN),
    ('#recycle', a_directory, HIDDEN),
    ('$RECYCLE.BIN', a_directory, HIDDEN),
    ('lost+found', a_directory, HIDDEN),
    ('Thumbs.db', a_text, HIDDEN),
    ('desktop.ini', a_text, HIDDEN),
    ('notes.txt', a_text, NAME),
    ('weights.h5', a_text, NAME),
    ('clip.mpg', a_text, NAME),
    ('drawing.eps', a_text, NAME),
    ('page.ps', a_text, NAME),
    ('image', a_text, NAME),
    ('archive.tar.gz', a_text, NAME),
    ('loop', lambda path: path.symlink_to('.'), 'read before by another link'),
]


@pytest.mark.parametrize('name, put, why', LEFT_OUT)
def test_what_is_left_out_is_counted_with_an_example(root, name, put, why, capsys):
    put(root / name)
    assert names(find_folder(root)) == ['a.png']
    assert capsys.readouterr().out == f'{root}: left out 1 {why}, such as {root / name}\n'


RUNS = 'with a run in it'


@pytest.mark.parametrize('place', ['results', 'results/mine', 'deep/er/results', 'results/a/b'])
def test_directories_that_hold_a_run_are_left_out_with_all_below(root, place, capsys):
    make_run(root / place)
    save(root / place / 'pictures' / 'x.png')
    assert names(find_folder(root)) == ['a.png']
    told = f'left out 1 {RUNS}, such as {root / place}\n'
    assert told in capsys.readouterr().out


@pytest.mark.parametrize('place', ['results', 'results/mine', 'sweep/deep/er'])
@pytest.mark.parametrize('top', ['', 'train'])
def test_directories_of_runs_alone_are_no_classes(tmp_path, place, top, capsys):
    for name in 'ab':
        make(tmp_path / top, f'{name}/deep', name)
    make(tmp_path, 'unlabeled')
    before = find_folder(tmp_path, holdout=0.5)
    make_run(tmp_path / top / place)
    (tmp_path / top / place).with_name('table.md').write_text('hello')
    found = find_folder(tmp_path, holdout=0.5)
    assert found.classes == before.classes == ['a', 'b']
    assert found.files == before.files
    kind = Path(place).parts[0]
    assert f'1 {RUNS}, such as {tmp_path / top / kind}' in capsys.readouterr().out


def test_a_class_with_a_run_among_its_images_stays_one(tmp_path):
    make(tmp_path, 'a', 'a/x', 'b', 'b/x')
    make_run(tmp_path / 'b' / 'results')
    found = find_folder(tmp_path, holdout=0.5)
    assert found.classes == ['a', 'b']
    assert sorted(names(found)) == ['a/x.png', 'a/x/x.png', 'b/x.png', 'b/x/x.png']


@pytest.mark.parametrize(
    'content',
    ['{}', '[]', '', 'hello', '{"settings": {', '{"settings": {}}', '{"model_type": "vit"}', '\0'],
)
def test_another_programs_config_hides_no_photos(root, content, capsys):
    make(root, 'photos')
    (root / 'photos' / 'config.json').write_text(content)
    (root / 'config.json').symlink_to('nowhere')
    assert names(find_folder(root)) == ['a.png', 'photos/x.png']
    assert RUNS not in capsys.readouterr().out


def test_a_run_in_the_given_directory_itself_hides_nothing(tmp_path):
    """It is the user's choice to keep the two together."""
    make_run(tmp_path)
    save(tmp_path / 'a' / 'x.png')
    assert names(find_folder(tmp_path)) == ['a/x.png', 'curves.png']


def test_names_are_below_root_where_root_is_that_of_the_file_system(tmp_path):
    make(tmp_path, 'deep')
    with tqdm(disable=True) as bar:
        (file,) = Listing(Path('/')).images(tmp_path, bar)
    assert file[0] == f'{tmp_path}/deep/x.png'[1:]


@pytest.mark.parametrize('suffix', sorted(Image.registered_extensions()))
def test_a_file_counts_by_its_suffix_where_its_format_is_read(tmp_path, suffix, capsys):
    """Whatever opens it: these are JPEGs."""
    for name in f'a{suffix}', f'B{suffix.upper()}':
        Image.new('RGB', (8, 8)).save(tmp_path / name, format='JPEG')
    if suffix in NOT_READ:
        with pytest.raises(UserError, match='no image in it'):
            find_folder(tmp_path)
        assert f'left out 2 {NAME}, such as' in capsys.readouterr().out
        return
    found = find_folder(tmp_path)
    assert names(found) == [f'B{suffix.upper()}', f'a{suffix}']
    assert capsys.readouterr().out == ''
    assert len(load_data('folder', tmp_path, store_size=8).train) == 2


def test_a_damaged_mpo_is_a_damaged_image(tmp_path):
    two = dict(save_all=True, append_images=[Image.new('RGB', (8, 8))])
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.mpo', **two)
    (tmp_path / 'b.mpo').write_bytes(b'')
    with pytest.raises(UserError, match=r'1 images damaged .*\n.*b.mpo: empty, or not an image'):
        load_data('folder', tmp_path)


@pytest.mark.parametrize('seed', range(20))
def test_what_vanishes_while_it_is_listed_is_skipped(tmp_path, tmp_path_factory, seed, monkeypatch):
    """Files and directories, before or after they are looked at."""
    dice = random.Random(seed)
    places = ['.', 'a', 'a/b', 'a/b/c', 'd', 'd/e']
    for place in places:
        for i in range(3):
            save(tmp_path / place / f'{i}.png')
    paths = [str(path) for path in sorted(tmp_path.rglob('*'))]
    vanishing = dice.sample(paths, 5)
    elsewhere = tmp_path_factory.mktemp('elsewhere')

    def vanish_before(function):
        def call(path, *args, **kwargs):
            if str(path) in vanishing and dice.random() < 0.6:
                vanishing.remove(str(path))
                os.rename(path, elsewhere / str(len(vanishing)))
            return function(path, *args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ('scandir', 'stat', 'lstat'):
            patch.setattr(os, name, vanish_before(getattr(os, name)))
        found = names(find_folder(tmp_path))
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob('*.png')]
    assert set(left) <= set(found)
    assert len(vanishing) < 5


def test_links_to_files_and_directories_are_followed(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    make(elsewhere, 'deep')
    (root / 'link').symlink_to(elsewhere)
    (root / 'link again').symlink_to(elsewhere)  # read once
    (root / 'b.png').symlink_to('a.png')
    assert names(find_folder(root)) == ['a.png', 'b.png', 'link/deep/x.png']


def test_loops_of_links_in_a_class_end(tmp_path):
    make(tmp_path, 'train/a', 'train/b', 'test/a', 'test/b')
    (tmp_path / 'train' / 'a' / 'up').symlink_to(tmp_path / 'train')
    (tmp_path / 'train' / 'a' / 'top').symlink_to(tmp_path)
    found = find_folder(tmp_path)
    assert names(found)[:2] == ['train/a/x.png', 'train/b/x.png']
    assert len(found.files) == 4


def test_unreadable_directories_are_named_with_the_reason(root, monkeypatch):
    make(root, 'closed')
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UserError, match=r"1 problems:\n.*Permission denied: '.*closed'"):
        find_folder(root)


def test_a_folder_without_images_says_what_was_looked_for(tmp_path):
    a_text(tmp_path / 'notes.txt')
    with pytest.raises(UserError, match=r'no image in it or below it \(looked for .jpg, .png'):
        find_folder(tmp_path)


# Layouts


def test_files_have_the_class_of_their_directory_and_unlabeled_ones_none(tmp_path):
    make(tmp_path, 'train/b', 'train/a/deep', 'test/a', 'test/b', 'unlabeled/any/where')
    found = find_folder(tmp_path)
    assert found.classes == ['a', 'b']
    assert list(zip(names(found), found.parts.tolist(), found.labels.tolist())) == [
        ('train/a/deep/x.png', 0, 0),
        ('train/b/x.png', 0, 1),
        ('unlabeled/any/where/x.png', 1, -1),
        ('test/a/x.png', 2, 0),
        ('test/b/x.png', 2, 1),
    ]


def test_val_is_the_test_split_if_there_is_no_test(tmp_path, capsys):
    make(tmp_path, 'train/a', 'train/b', 'val/a', 'val/b')
    assert names(find_folder(tmp_path))[2:] == ['val/a/x.png', 'val/b/x.png']
    assert capsys.readouterr().out == ''
    make(tmp_path, 'test/a', 'test/b')
    assert names(find_folder(tmp_path))[2:] == ['test/a/x.png', 'test/b/x.png']
    assert f'not read beside train: {tmp_path}/val (known' in capsys.readouterr().out


@pytest.mark.parametrize(
    'directories',
    [
        ['.'],
        ['a', 'b/c'],
        ['train'],
        ['train/one'],
        ['train/a/b', 'test/a'],
        ['train', 'unlabeled'],
        ['unlabeled/x'],
    ],
)
def test_without_two_classes_all_images_train_without_labels(tmp_path, directories):
    make(tmp_path, *directories)
    found = find_folder(tmp_path)
    assert set(found.parts.tolist()) == {1}
    assert set(found.labels.tolist()) == {-1}
    assert found.classes == []
    for_training = [Path(name, 'x.png') for name in directories if 'test' not in name]
    assert [Path(name) for name in names(found)] == for_training
    with pytest.raises(UserError, match=r'has no labels: name a labelled data set with'):
        find_folder(tmp_path, unlabeled=False)


def test_classes_match_in_any_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD'))
    make(tmp_path, f'train/{nfc}', 'train/a', f'test/{nfd}', 'test/a')
    found = find_folder(tmp_path)
    assert found.classes == ['a', nfc]
    assert names(found) == [
        'train/a/x.png',
        f'train/{nfc}/x.png',
        'test/a/x.png',
        f'test/{nfd}/x.png',
    ]
    assert found.labels.tolist() == [0, 1, 0, 1]


def test_files_and_directories_beside_the_classes_are_told(tmp_path, capsys):
    make(tmp_path, 'train/a', 'train/b', 'test/a', 'test/b', 'train', 'testing')
    a_directory(tmp_path / 'train' / '.git')
    assert len(find_folder(tmp_path).files) == 4
    said = capsys.readouterr().out
    assert f'not read beside train: {tmp_path}/testing (known: train, test or val' in said
    assert f'1 outside the classes, such as {tmp_path}/train/x.png' in said
    make(tmp_path, '.', 'test')
    a_text(tmp_path / 'test' / 'notes.txt')
    assert len(find_folder(tmp_path).files) == 4
    said = capsys.readouterr().out
    told = f'not read beside train: {tmp_path}/testing, 1 images, such as {tmp_path}/x.png (known'
    assert told in said
    assert f'2 outside the classes, such as {tmp_path}/train/x.png' in said
    assert f'1 {NAME}, such as {tmp_path}/test/notes.txt' in said
    assert f'1 {HIDDEN}, such as {tmp_path}/train/.git' in said


def test_directories_that_may_be_meant_as_splits_or_classes_are_told(tmp_path, capsys):
    make(tmp_path, 'Train/a', 'Test/a')
    assert find_folder(tmp_path).classes == []
    said = capsys.readouterr().out
    assert 'its directories (Test, Train, …) are not taken as classes. --holdout 0.1' in said
    assert 'Test, Train read as any other directory; known are train, test, val' in said


def test_a_test_directory_beside_training_images_without_classes_is_told(tmp_path, capsys):
    make(tmp_path, 'train', 'test/a')
    assert names(find_folder(tmp_path)) == ['train/x.png']
    told = f'{tmp_path}/test is not read, as {tmp_path}/train has no classes\n'
    assert capsys.readouterr().out == told


def test_wrong_folders_are_explained(tmp_path):
    with pytest.raises(UserError, match=r'nowhere is not a directory.*shapes needs no files'):
        find_folder(tmp_path / 'nowhere')
    make(tmp_path, 'test/a')
    with pytest.raises(UserError, match=r'train is not a directory: a folder data set is'):
        find_folder(tmp_path)
    make(tmp_path, 'test/b', 'train/a', 'train/b')
    (tmp_path / 'test' / 'extra').mkdir()
    with pytest.raises(UserError, match=r"only in .*train: none; only in .*test: \['extra'\]"):
        find_folder(tmp_path)
    save(tmp_path / 'test' / 'y.png')
    told = f'outside the classes: 1 images, such as {tmp_path}/test/y.png'
    with pytest.raises(UserError, match=told):
        find_folder(tmp_path)
    (tmp_path / 'train' / 'extra').mkdir()
    problems = '2 problems:\n.*train/extra: no image in it\n.*test/extra: no image in it'
    with pytest.raises(UserError, match=problems):
        find_folder(tmp_path)
    (tmp_path / 'test').rename(tmp_path / 'other')
    with pytest.raises(UserError, match=r'train has classes, and .*test is not.*--holdout 0.1 '):
        find_folder(tmp_path)


# Held-out images


def test_held_out_images_are_those_of_the_lowest_hashes_of_their_names():
    files = [(f'é{i}.png', 0) for i in range(2000)]
    hashes = []
    for name, _ in files:
        hashes.append(int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256)
    for holdout in (0.1, 0.3):
        found = held_out(files, holdout)
        assert found == [2 if x < holdout else 0 for x in hashes]
        assert abs(found.count(2) / 2000 - holdout) < 0.03
    assert held_out(files, 1e-9) == [2 if x == min(hashes) else 0 for x in hashes]
    assert held_out(files, 0.9999999) == [0 if x == max(hashes) else 2 for x in hashes]


def test_held_out_images_do_not_depend_on_other_images_nor_on_the_unicode_form():
    files = [(f'é{i}.png', 0) for i in range(2000)]
    some = [(unicodedata.normalize('NFD', name), 0) for name, _ in files[500:]]
    assert held_out(some, 0.1) == held_out(files, 0.1)[500:]


@pytest.mark.parametrize('place', ['train/', ''])
def test_of_each_class_a_part_is_held_out(tmp_path, place):
    counts = {'a': 2, 'b': 3, 'c': 100}
    for name, count in counts.items():
        for i in range(count):
            save(tmp_path / place / name / f'{i}.png')
    found = find_folder(tmp_path, holdout=0.2)
    assert found.classes == ['a', 'b', 'c']
    assert found.parts.tolist() == sorted(found.parts.tolist())
    parts = {}
    for (name, *_), part, label in zip(found.files, found.parts.tolist(), found.labels.tolist()):
        assert name.startswith(f'{place}{"abc"[label]}/')
        parts.setdefault(label, []).append(part)
    assert sorted(parts[0]) == [0, 2]  # one at least, and not all
    assert set(parts[1]) == {0, 2}
    assert len(parts[1]) == 3
    assert 10 < parts[2].count(2) < 30


def test_images_without_labels_are_not_held_out(tmp_path):
    make(tmp_path, 'a', 'b', 'unlabeled')
    save(tmp_path / 'a' / 'y.png')
    save(tmp_path / 'b' / 'y.png')
    found = find_folder(tmp_path, holdout=0.5)
    assert found.classes == ['a', 'b']
    assert names(found)[2] == 'unlabeled/x.png'
    assert found.parts.tolist() == [0, 0, 1, 2, 2]


def test_wrong_folders_for_holdout_are_explained(tmp_path):
    make(tmp_path, 'a')
    with pytest.raises(UserError, match='--holdout needs two directories of images or more'):
        find_folder(tmp_path, holdout=0.1)
    make(tmp_path, 'b')
    with pytest.raises(UserError, match='a: 1 image in it; --holdout needs two, .*\n.*b: 1 image'):
        find_folder(tmp_path, holdout=0.1)
    make(tmp_path, 'val/a')
    with pytest.raises(UserError, match='val has test images: --holdout is for a folder without'):
        find_folder(tmp_path, holdout=0.1)


# Sizes that follow from the images


@pytest.mark.parametrize(
    'side, views, kept, stem',
    [(64, 32, 0, 'cifar'), (65, 65, 74, 'imagenet'), (300, 224, 256, 'imagenet')],
)
def test_sizes_that_were_not_given_are_of_the_median_short_side(tmp_path, side, views, kept, stem):
    sizes = [(side, 2 * side), (3 * side, side), (9, 9), (side + 9, 8 * side), (8, 4 * side)]
    for i, size in enumerate(sizes):
        Image.new('L', size).save(tmp_path / f'{i}.png')
    (tmp_path / 'damaged.png').write_bytes(b'')
    found = find_folder(tmp_path)

    def chosen(before=None, **given):
        args = Namespace(image_size=None, store_size=None, test_size=None, stem=None, views=2)
        vars(args).update(given)
        flags.choose_sizes(args, found, before or {})
        return args.image_size, args.store_size, args.test_size, args.stem

    assert chosen() == (views, kept, 0, stem)
    assert chosen(stem='cifar') == (views, kept, 0, 'cifar')
    run = dict(image_size=40, store_size=50)
    assert chosen(before=run, test_size=5) == (40, 50, 5, 'cifar')


def test_on_another_data_set_an_encoder_keeps_its_sizes_and_nothing_else():
    run = dict(
        dataset_name='folder',
        root='mine',
        store_size=64,
        image_size=24,
        test_size=48,
        skip_damaged=True,
    )

    def filled(dataset_name):
        args = Namespace(**dict.fromkeys(flags.DATA))
        args.dataset_name = dataset_name
        flags.fill_data_flags(args, run)
        return vars(args)

    sizes = dict(image_size=24, test_size=48, store_size=64)
    assert filled('cifar10') == {**flags.DATA, 'dataset_name': 'cifar10', **sizes}
    assert filled(None) == {**flags.DATA, **run}
