"""Sixty kinds of file and directory as people keep them, each with its pixels or its line, and the cache."""

import hashlib
import json
import os
import random
import shutil
import socket
import unicodedata
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import pil_to_tensor

from hardneg import decoding
from hardneg import flags
from hardneg import folder
import linear
import main
import plot
from hardneg.augment import apply, draw, normalize
from hardneg.batches import seeded
from data import Joined, load_data
from hardneg.evaluate import encode, label_free
from hardneg.folder import find_folder
from model import Model
from hardneg.runtime import UserError

RNG = np.random.default_rng(0)
RGB = np.kron(RNG.integers(256, size=(8, 10, 3)), np.ones((4, 4, 1))).astype(np.uint8)  # 32 x 40, in squares
WIDE = (RGB[..., 0].astype(np.uint16) << 8) + 7  # 16 bits
DEFAULTS = {flag[2:]: default for flag, default, *_ in flags.DATA}
WIDE[0, 0] = 65535


@pytest.fixture(autouse=True)
def not_the_users_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path_factory.mktemp('user')))


@pytest.fixture
def root(tmp_path):
    """Images without labels: one, black."""
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    return tmp_path


def convert(mode):
    return Image.fromarray(RGB).convert(mode)


def oriented(i):
    exif = Image.Exif()
    exif[0x112] = i
    return dict(exif=exif)


def reference(image, size):
    """The largest central square of a PIL image, resized, (3, size, size)."""
    (w, h), side = image.size, min(image.size)
    box = (w - side) / 2, (h - side) / 2, (w + side) / 2, (h + side) / 2
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box))


SAVED = {  # file name -> image, arguments of save()
    '1.png': (convert('1'), {}), 'L.png': (convert('L'), {}), 'LA.png': (convert('LA'), {}),
    'P.png': (convert('P'), {}), 'RGB.png': (convert('RGB'), {}), 'RGBA.png': (convert('RGBA'), {}),
    'L.jpg': (convert('L'), {}), 'RGB.jpeg': (convert('RGB'), {}), 'CMYK.jpe': (convert('CMYK'), {}),
    'progressive.jfif': (convert('RGB'), dict(format='JPEG', progressive=True)),
    'RGB.tif': (convert('RGB'), {}), 'CMYK.tiff': (convert('CMYK'), {}), 'lzw.tif': (convert('RGB'), {}),
    'RGB.bmp': (convert('RGB'), {}), 'P.gif': (convert('P'), {}), 'RGB.ppm': (convert('RGB'), {}),
    'L.pgm': (convert('L'), {}), '1.pbm': (convert('1'), {}), 'RGB.tga': (convert('RGB'), {}),
    'RGB.pcx': (convert('RGB'), {}), 'RGB.dds': (convert('RGB'), {}), 'RGB.sgi': (convert('RGB'), {}),
    '1.xbm': (convert('1'), {}), 'RGB.jp2': (convert('RGB'), {}),
    'RGB.webp': (convert('RGB'), {}), 'RGBA.webp': (convert('RGBA'), dict(lossless=True)), '1.msp': (convert('1'), {}),
    'UPPER.PNG': (convert('RGB'), dict(format='PNG')), 'a png.jpg': (convert('RGB'), dict(format='PNG')),
    'ペンギン.png': (convert('RGB'), {}), os.fsdecode(b'latin-\xe9.png'): (convert('RGB'), {}),
    'animated.gif': (convert('P'), dict(save_all=True, append_images=[Image.new('P', (40, 32))])),
    'one.png': (Image.new('RGB', (1, 1), (9, 8, 7)), {}), 'flat.png': (Image.new('RGB', (600, 2), (9, 8, 7)), {}),
}


@pytest.mark.parametrize('name', SAVED)
def test_pixels_are_torchvisions(root, name):
    image, how = SAVED[name]
    image.save(root / name, **how)
    data = load_data('folder', root, store_size=24)
    mine = data.train[1 - (name < 'a.png')].int()
    assert len(data.train) == 2 and (mine - reference(pil_loader(root / name), 24).int()).abs().max() <= 1


TURNED = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.transpose(1, 0, 2),
          6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90}


@pytest.mark.parametrize('suffix', ['png', 'tif', 'webp'])
@pytest.mark.parametrize('orientation', TURNED)
def test_exif_orientation_is_applied(root, orientation, suffix):
    Image.fromarray(RGB).save(root / f'b.{suffix}', **oriented(orientation), **dict(lossless=True) if suffix == 'webp'
                              else {})
    expected = reference(Image.fromarray(np.ascontiguousarray(TURNED[orientation](RGB))), 32)
    assert torch.equal(load_data('folder', root, store_size=32).train[1], expected)


def test_damaged_exif_is_no_damaged_image(root):
    Image.fromarray(RGB).save(root / 'b.png', exif=b'Exif\0\0MM\0\x2anonsense')
    assert torch.equal(load_data('folder', root, store_size=32).train[1], reference(Image.fromarray(RGB), 32))


def test_transparency_is_laid_on_white(root):
    half = np.dstack([RGB, np.full(RGB.shape[:2], 51, np.uint8)])  # a fifth
    Image.fromarray(half).save(root / 'half.png')
    expected = Image.fromarray((255 - 0.2 * (255 - RGB.astype(float))).round().astype(np.uint8))
    found = load_data('folder', root, store_size=32).train[1].int()
    assert (found - reference(expected, 32).int()).abs().max() <= 1


@pytest.mark.parametrize('name', ['wide.png', 'wide.tif', 'wide.jp2', 'wide.pgm', 'big endian.tif'])
def test_sixteen_bits_are_scaled_to_eight(root, name, capsys):
    if name == 'wide.pgm':
        (root / name).write_bytes(b'P5 40 32 65535\n' + WIDE.astype('>u2').tobytes())
    elif name == 'big endian.tif':
        Image.frombytes('I;16B', (40, 32), WIDE.astype('>u2').tobytes()).save(root / name)
    else:
        Image.fromarray(WIDE).save(root / name)
    expected = reference(Image.fromarray((WIDE >> 8).astype(np.uint8)).convert('RGB'), 24)
    assert torch.equal(load_data('folder', root, store_size=24).train[1], expected)
    assert 'come out dark' not in capsys.readouterr().out


def test_less_than_fourteen_bits_in_sixteen_are_reported_when_they_are_decoded(root, capsys):
    for name, brightest in (('scan', 2**14 - 1), ('photo', 2**14)):
        Image.fromarray(np.minimum(WIDE, brightest).astype(np.uint16)).save(root / f'{name}.png')
    for told in (1, 0):  # later starts take them from the cache
        load_data('folder', root, store_size=24)
        out = capsys.readouterr().out
        assert told == out.count('1 images of 16 bits come out dark, as they use less than 14 of them: scale them '
                                 'first, such as scan.png')


@pytest.mark.parametrize('side, views, kept, stem', [(64, 32, 0, 'cifar'), (65, 65, 74, 'imagenet'),
                                                     (300, 224, 256, 'imagenet')])
def test_sizes_that_were_not_given_are_of_the_median_short_side(tmp_path, side, views, kept, stem):
    for i, (width, height) in enumerate([
            (side, 2 * side), (3 * side, side), (9, 9), (side + 9, 8 * side), (8, 4 * side)]):
        Image.new('L', (width, height)).save(tmp_path / f'{i}.png')
    found = folder.find_folder(tmp_path)
    for given, before, expected in [({}, {}, (views, kept, 0, stem)),
                                    ({'stem': 'cifar'}, {}, (views, kept, 0, 'cifar')),
                                    ({'test_size': 5}, {'image_size': 40, 'store_size': 50}, (40, 50, 5, 'cifar'))]:
        args = Namespace(**{**dict(image_size=None, store_size=None, test_size=None, stem=None, views=2), **given})
        flags.choose_sizes(args, found, before)
        assert (args.image_size, args.store_size, args.test_size, args.stem) == expected


def test_held_out_images_are_those_of_the_lowest_hashes_of_their_names():
    """A name decides for itself: other files, a larger part and another Unicode form move no image."""
    names = [f'é{i}.png' for i in range(2000)]
    hashes = [int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256 for name in names]
    for holdout in (0.1, 0.3, 1e-9):
        least = max(holdout, 1.0001 * min(hashes))  # one image at least
        found = folder.held_out([(name, 0) for name in names], holdout)
        assert found == [2 * (x < least) for x in hashes] and abs(found.count(2) / 2000 - holdout) < 0.03
    others = [(unicodedata.normalize('NFD', name), 0) for name in names[500:]]
    assert folder.held_out(others, 0.1) == [2 * (x < 0.1) for x in hashes[500:]]


def test_a_folders_held_out_images_are_its_test_images(tree):
    found = folder.find_folder(tree / 'train', holdout=0.3)
    assert found.classes == ['a', 'b', 'c'] and len(found.files) == 30
    for (name, *_), part, label in zip(found.files, found.parts.tolist(), found.labels.tolist()):
        own = [file for file in found.files if file[0][0] == name[0]]
        assert 'abc'[label] == name[0] and part == folder.held_out(own, 0.3)[[file[0] for file in own].index(name)]
    assert found.parts.tolist() == sorted(found.parts.tolist()) and set(found.parts.tolist()) == {0, 2}


def device(path):
    path.symlink_to('/dev/zero')


def unix_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # its address must be short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)
    os.chdir(here)


def directory_of_images(path):
    path.mkdir(parents=True)
    Image.new('RGB', (40, 40)).save(path / 'x.png')


def text(path):
    path.write_text('hello')


HIDDEN, NAME, SPECIAL = 'hidden or a system\'s', 'not named as an image', 'FIFO, socket or device'
LEFT_OUT = [('.DS_Store', text, HIDDEN), ('._a.png', text, HIDDEN), ('.hidden', directory_of_images, HIDDEN),
            ('.ipynb_checkpoints', directory_of_images, HIDDEN), ('@eaDir', directory_of_images, HIDDEN),
            ('__MACOSX', directory_of_images, HIDDEN), ('Thumbs.db', text, HIDDEN), ('desktop.ini', text, HIDDEN),
            ('notes.txt', text, NAME), ('weights.h5', text, NAME), ('clip.mpg', text, NAME), ('image', text, NAME),
            ('archive.tar.gz', text, NAME), ('fifo.png', os.mkfifo, SPECIAL), ('zero.jpg', device, SPECIAL),
            ('socket.png', unix_socket, SPECIAL),
            ('loop', lambda path: path.symlink_to('.'), 'read before by another link')]


@pytest.mark.parametrize('name, make, why', LEFT_OUT)
def test_what_is_left_out_is_counted_with_an_example(root, name, make, why, capsys):
    make(root / name)
    assert len(load_data('folder', root, store_size=24).train) == 1
    assert capsys.readouterr().out.splitlines()[0] == f'{root}: left out 1 {why}, such as {root / name}'


def test_links_to_files_and_directories_are_followed(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp('elsewhere')
    directory_of_images(elsewhere / 'deep')
    (root / 'link').symlink_to(elsewhere)
    (root / 'again').symlink_to(elsewhere)  # read once
    (root / 'b.png').symlink_to('a.png')
    assert len(load_data('folder', root, store_size=24).train) == 3


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that are decoded from here on."""
    names, decode = [], decoding.decode

    def spy(path, *args):
        names.append(path.name)
        return decode(path, *args)

    monkeypatch.setattr(decoding, 'decode', spy)
    return names


PNG = b'\x89PNG\r\n\x1a\n'
DAMAGED = {'empty.png': b'', 'text.jpg': b'hello', 'magic.png': PNG, '32 bits.pfm': b'Pf\n2 2\n-1.0\n' + bytes(16)}


def make_damaged(place):
    for name, content in DAMAGED.items():
        (place / name).write_bytes(content)
    Image.fromarray(RGB).save(place / 'cut.png')
    whole = (place / 'cut.png').read_bytes()
    (place / 'cut.png').write_bytes(whole[:len(whole) // 2])
    (place / 'flipped.png').write_bytes(whole[:60] + bytes([whole[60] ^ 255]) + whole[61:])
    (place / 'broken link.png').symlink_to('nowhere.png')
    (place / 'to itself.png').symlink_to('to itself.png')
    Image.fromarray(np.zeros((4, 4), np.int32)).save(place / '32 bits.tif')
    Image.new('1', (3000, 3000)).save(place / 'bomb.png')  # 9 MP
    return [*DAMAGED, 'cut.png', 'flipped.png', 'broken link.png', 'to itself.png', '32 bits.tif', 'bomb.png']


def test_damaged_images_are_listed_in_one_go_and_skipped_on_request(root, capsys, monkeypatch, decoded):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)  # Pillow refuses twice as many
    Image.new('1', (3000, 2000)).save(root / 'large.png')
    names = make_damaged(root)
    for _ in range(2):
        with pytest.raises(UserError, match=r'10 damaged images.*--skip_damaged') as error:
            load_data('folder', root, store_size=24)
        assert sorted(line.split(': ')[0].strip() for line in str(error.value).splitlines()[1:]) == sorted(
            str(root / name) for name in names)
    data = load_data('folder', root, store_size=24, skip_damaged=True)
    assert len(data.train) == 2 and sorted(data.damaged) == sorted(names)
    assert '10 images damaged and left out, such as ' in capsys.readouterr().out
    assert decoded.count('a.png') == 1  # what is damaged is tried again, the others are not
    (root / 'nowhere.png').write_bytes((root / 'a.png').read_bytes())  # mends a link, whose own time stays
    assert len(load_data('folder', root, store_size=24, skip_damaged=True).train) == 4


@pytest.mark.parametrize('seed', range(12))
def test_damaged_images_of_any_part_are_listed_or_left_out_and_a_class_without_any_is_named(tmp_path, seed, capsys):
    dice, left = random.Random(seed), {}
    classes, bad = 'abc'[:dice.randint(2, 3)], []
    for split in 'train', 'test':
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(dice.randint(1, 3)):
                file = tmp_path / split / name / f'{i}.png'
                Image.new('RGB', (8, 8), (len(left), 0, 0)).save(file)
                whole = file.read_bytes()
                if dice.random() < 0.2:
                    flipped = whole[:45] + bytes([whole[45] ^ 255]) + whole[46:]
                    file.write_bytes(dice.choice([b'', PNG, whole[:45], whole[40:], bytes(99), b'<html>', flipped]))
                    bad.append(f'{split}/{name}/{i}.png')
                left.setdefault((split, name), []).extend([] if bad[-1:] == [f'{split}/{name}/{i}.png'] else [file])
    if bad:
        with pytest.raises(UserError, match=f'{tmp_path}: {len(bad)} damaged images') as error:
            load_data('folder', tmp_path, store_size=8)
        assert sorted(line.split(': ')[0].strip() for line in str(error.value).splitlines()[1:]) == sorted(
            str(tmp_path / name) for name in bad)
    kinds = dict(train='training', test='test')
    empty = [f'every {kinds[split]} image of {name} is damaged' for (split, name), files in left.items() if not files]
    if empty:
        with pytest.raises(UserError) as error:
            load_data('folder', tmp_path, store_size=8, skip_damaged=True)
        assert str(error.value).removeprefix(f'{tmp_path}: ') in [*empty, 'every image is damaged']
        return
    data = load_data('folder', tmp_path, store_size=8, skip_damaged=True)
    assert sorted(data.damaged) == sorted(bad) and (f'{len(bad)} images damaged and left out' in capsys.readouterr(
        ).out) == bool(bad)
    for split, images, labels in (('train', data.train, data.train_labels), ('test', data.test, data.test_labels)):
        wanted = [(label, file) for label, name in enumerate(classes) for file in left[split, name]]
        assert labels.tolist() == [label for label, _ in wanted]
        assert [image.tolist() for image in images] == [np.array(Image.open(file)).transpose(2, 0, 1).tolist()
                                                        for _, file in wanted]


def test_a_file_that_becomes_readable_is_taken_though_its_time_stays(root, monkeypatch):
    whole = Path.read_bytes

    def refuse(path):
        if 'secret' in str(path):
            raise PermissionError('Permission denied')
        return whole(path)

    shutil.copy(root / 'a.png', root / 'secret.png')
    monkeypatch.setattr(Path, 'read_bytes', refuse)
    with pytest.raises(UserError, match=r'secret.png: Permission denied'):
        load_data('folder', root, store_size=24)
    monkeypatch.undo()
    assert len(load_data('folder', root, store_size=24).train) == 2


def test_unreadable_directories_are_named_with_the_reason(root, monkeypatch):
    directory_of_images(root / 'closed')
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith('closed'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(UserError, match=r"1 problems:\n.*Permission denied: '.*closed'"):
        load_data('folder', root, store_size=24)


@pytest.mark.parametrize('sizes, kept', [([(32, 32)] * 3, 32), ([(256, 256)] * 2, 256), ([(257, 257)] * 2, 96),
                                         ([(32, 32), (33, 33)], 96), ([(40, 32)] * 2, 96)])
def test_store_size_is_the_images_own_where_they_are_squares_of_one_size(tmp_path, sizes, kept, capsys):
    for i, size in enumerate(sizes):
        Image.new('RGB', size).save(tmp_path / f'{i}.png')
    (tmp_path / 'z.txt').write_text('')
    data = load_data('folder', tmp_path)
    assert data.train.shape == (len(sizes), 3, kept, kept)
    assert f'{len(sizes)} images, kept at {kept} px in ' in capsys.readouterr().out


def tree(root, *directories):
    for i, directory in enumerate(directories):
        (root / directory).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (i + 1,) * 3).save(root / directory / 'x.png')


@pytest.mark.parametrize('directories', [['.'], ['a', 'b/c'], ['train'], ['train/one'], ['train/a/b', 'test/a'],
                                         ['train', 'unlabeled'], ['unlabeled/x']])
def test_without_two_classes_all_images_train_without_labels(tmp_path, directories):
    tree(tmp_path, *directories)
    data = load_data('folder', tmp_path)
    assert set(data.train_labels.tolist()) == {-1} and data.classes == [] and data.test.shape == (0, 3, 8, 8)
    training = [i + 1 for i, name in enumerate(directories) if 'test' not in name]
    assert sorted(data.train[:, 0, 0, 0].tolist()) == training
    with pytest.raises(UserError, match=r'has no labels: name a labelled data set by --dataset_name and --root'):
        load_data('folder', tmp_path, unlabeled=False)


def test_classes_match_in_any_unicode_form(tmp_path):
    nfc, nfd = (unicodedata.normalize(form, 'é') for form in ('NFC', 'NFD'))
    tree(tmp_path / nfd, f'train/{nfc}', 'train/a', f'test/{nfd}', 'test/a')
    data = load_data('folder', tmp_path / nfc)  # the root too
    assert data.classes == ['a', nfc] and data.train_labels.tolist() == [0, 1]
    assert data.train[:, 0, 0, 0].tolist() == [2, 1] and data.test[:, 0, 0, 0].tolist() == [4, 3]


def test_files_beside_the_classes_are_counted(tmp_path, capsys):
    tree(tmp_path, 'train/a', 'train/b', 'test/a', 'test/b', 'train')
    assert len(load_data('folder', tmp_path).train) == 2
    assert f'left out 1 outside the classes, such as {tmp_path}/train/x.png' in capsys.readouterr().out


def cache(root):
    return next((root / '.decoded').glob('*.npy'))


def test_images_are_decoded_once_and_only_new_ones_afterwards(root, decoded):
    tree(root, 'b', 'c')
    first = load_data('folder', root, store_size=24).train
    assert sorted(decoded) == ['a.png', 'x.png', 'x.png']
    again = load_data('folder', root, store_size=24).train
    assert len(decoded) == 3 and torch.equal(first, again)
    Image.new('RGB', (40, 40), (50,) * 3).save(root / 'aa.png')
    data = load_data('folder', root, store_size=24).train
    assert decoded[3:] == ['aa.png'] and torch.equal(data[[0, 2, 3]], first) and data[1].unique().tolist() == [50]
    os.utime(root / 'a.png', ns=(0, 0))
    load_data('folder', root, store_size=24)
    assert decoded[4:] == ['a.png']
    (root / 'aa.png').unlink()
    assert torch.equal(load_data('folder', root, store_size=24).train, first) and len(decoded) == 5
    assert [path.name for path in (root / '.decoded').iterdir() if path.suffix != '.lock'] in (['24-crop.npy', '.lock'],
                                                                                              ['.lock', '24-crop.npy'])


def test_a_damaged_cache_is_noticed_and_made_again(root, decoded):
    first = load_data('folder', root, store_size=24).train.clone()
    good = cache(root).read_bytes()
    rows = range(128, 128 + 3 * 24**2)
    damages = {'cut': good[:-1], 'empty': b'', 'text': b'hello', 'array alone': good[:rows.stop]}
    damages |= {i: good[:i] + bytes([good[i] ^ 16]) + good[i + 1:] for i in range(0, len(good), 37)}
    for where, content in damages.items():
        decoded.clear()
        cache(root).write_bytes(content)
        assert torch.equal(load_data('folder', root, store_size=24).train, first)
        assert decoded == ['a.png'] or isinstance(where, int) and where not in rows, where  # a zip has idle bytes


def test_where_the_cache_lies(root, tmp_path_factory, monkeypatch):
    user, other = Path(os.environ['XDG_CACHE_HOME']), tmp_path_factory.mktemp('other')
    load_data('folder', root, store_size=24, cache_dir=other)
    assert len(list(other.glob(f'{root.name}-*/24-crop.npy'))) == 1 and not (root / '.decoded').exists()
    access = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != root and access(path, mode))
    load_data('folder', root, store_size=24)
    assert not (root / '.decoded').exists() and len(list(user.glob(f'contrastive/{root.name}-*/24-crop.npy'))) == 1
    (other / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write .*24-crop.npy .*choose another --cache_dir'):
        load_data('folder', root, store_size=24, cache_dir=other / 'file')


def test_disk_space_is_checked_first_and_a_full_disk_leaves_nothing(root, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(UserError, match=r'takes 0.0 GB at 24 px, and 0.0 GB are free in .*--cache_dir, or lower'):
            load_data('folder', root, store_size=24)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r'cannot write .*No space left on device.*--cache_dir'):
        load_data('folder', root, store_size=24)
    assert [path.name for path in (root / '.decoded').iterdir()] in ([], ['.lock'])


def test_images_are_mapped_read_only_and_shared(root):
    data = load_data('folder', root, store_size=24)
    at = data.train.data_ptr()
    line = next(line for line in open('/proc/self/maps') if int(line.split('-')[0], 16) <= at < int(
        line.split('-')[1].split()[0], 16))
    assert 'r--s' in line and line.rstrip().endswith('24-crop.npy')


def test_joined_arrays_are_read_as_one():
    whole = torch.from_numpy(RNG.integers(256, size=(9, 3, 4, 4), dtype=np.uint8))
    joined, index = Joined([whole[:2], whole[2:]]), torch.tensor([8, 0, 2, 1, 8])
    assert torch.equal(joined.index_select(0, index), whole[index]) and torch.equal(joined[2], whole[2])
    assert joined.shape == whole.shape and len(joined) == 9 and joined.nbytes == whole.nbytes
    assert joined.to(torch.device('cpu')) is joined


def see(net):
    return partial(encode, net, autocast=torch.autocast('cpu', enabled=False), device=torch.device('cpu'))


def test_label_free_measures_are_those_of_the_papers():
    """Against loops over pairs and an SVD by numpy, of views that are drawn again."""
    net = Model(8, 'resnet18', width=0.125)
    images = torch.from_numpy(RNG.integers(256, size=(30, 3, 16, 16), dtype=np.uint8))
    found = label_free(see(net), images, 8, 0, {}, n=20)
    chosen = torch.randperm(30, generator=seeded(0))[:20].sort().values
    half = images[chosen[::2]]
    net.eval()
    with torch.no_grad():
        z = [net(apply(half, draw(10, 16, 16, seeded(view, 0)), 8))[1].double().numpy() for view in range(2)]
        f = net.f(normalize(images[chosen])).flatten(1).double()
    alignment = np.mean([((a - b) ** 2).sum() for a, b in zip(*z)])
    pairs = [[np.exp(-2 * ((v[i] - v[j]) ** 2).sum()) for i in range(10) for j in range(i)] for v in z]
    p = np.linalg.svd(f.numpy(), compute_uv=False)
    p /= p.sum()
    assert found['alignment'] == pytest.approx(alignment, rel=1e-4)
    assert found['uniformity'] == pytest.approx(np.mean([np.log(np.mean(x)) for x in pairs]), rel=1e-4)
    assert found['rankme'] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


def test_features_that_are_not_finite_have_no_rank():
    net, images = Model(8, 'resnet18', width=0.125), torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    net.f[1].running_var.fill_(torch.nan)
    found = label_free(see(net), images, 8, 0, {})
    assert np.isnan(found['rankme'])


def test_images_without_labels_train_are_looked_at_and_probed_on_another_set(tmp_path, tree, monkeypatch, capsys):
    mine, results = tmp_path / 'mine', tmp_path / 'r'
    mine.mkdir()
    for i in range(24):
        Image.fromarray(RNG.integers(256, size=(20, 20, 3), dtype=np.uint8)).save(mine / f'{i}.png')
    (mine / '7.png').write_bytes(PNG)
    words = ['--dataset_name', 'folder', '--root', str(mine), '--image_size', '8', '--batch_size', '8', '--arch',
             'resnet18', '--width', '0.125', '--epochs', '2', '--knn_every', '1', '--results_dir', str(results)]
    with pytest.raises(UserError, match='--skip_damaged'):
        main.main(words)
    main.main([*words, '--skip_damaged'])
    assert 'RankMe' in capsys.readouterr().out
    log, config = pd.read_csv(results / 'log.csv'), json.loads((results / 'config.json').read_text())
    assert log['test_acc@1'].isna().all() and (log[['alignment', 'rankme']] > 0).all(axis=None)
    assert config['classes'] == []
    assert config['images'] == dict(train=23, test=0, damaged=1, damaged_files=['7.png'])
    plot.main(['curves', str(results)])
    monkeypatch.setattr(plot.runtime, 'start', lambda: torch.device('cpu'))
    plot.main(['neighbours', str(results / 'model_2.pth')])
    assert (results / 'curves.png').exists() and (results / 'neighbours.png').exists()
    labels = [axes.get_ylabel() for axes in plot.curves(Namespace(paths=[results])).axes]
    assert [label.split(' ')[0] for label in labels] == ['training', 'alignment', 'uniformity', 'RankMe']
    how = dict(paths=[results / 'model_2.pth'], **dict.fromkeys(DEFAULTS), seed=0, memory=23, query=None)
    grid = plot.pictures.neighbours(Namespace(**how)).axes
    query, *found = (axes.images[0].get_array() for axes in grid[:12] if axes.images)
    assert len(found) == 10 and not any((query == image).all() for image in found)
    path = ['--model_path', str(results / 'model_2.pth'), '--epochs', '1', '--batch_size', '8']
    with pytest.raises(UserError, match='has no labels: name a labelled data set by --dataset_name and --root'):
        linear.main(path)
    linear.main([*path, '--dataset_name', 'folder', '--root', str(tree)])
    assert 'linear probe' in capsys.readouterr().out
    plot.main(['neighbours', str(results / 'model_2.pth'), '--root', str(tree), '--out', str(tmp_path / 'n.png')])
    with pytest.raises(UserError, match='has no labels'):
        main.main([*words, '--skip_damaged', '--oracle'])


def test_on_another_data_set_an_encoder_keeps_its_sizes_and_nothing_else():
    settings = dict(dataset_name='folder', root='mine', store_size=64, image_size=24, test_size=48, skip_damaged=True)
    other, same = (Namespace(**{**dict.fromkeys(DEFAULTS), 'dataset_name': name}) for name in ('cifar10', None))
    flags.fill_data_flags(other, settings)
    assert vars(other) == {**DEFAULTS, 'dataset_name': 'cifar10', 'image_size': 24, 'test_size': 48, 'store_size': 64}
    flags.fill_data_flags(same, settings)
    assert vars(same) == {**settings, 'cache_dir': None, 'fit': 'crop', 'holdout': 0.0}


@pytest.mark.parametrize('seed', range(5))
def test_holdout_parts_each_class_by_the_names_of_its_files_alone(tmp_path, seed):
    dice = random.Random(seed)
    held = sorted(dice.choice([0.01, 0.1, 0.5, 0.9, dice.random() * 0.9]) for _ in range(2))
    counts = {name: dice.choice([2, 3, 10, 100]) for name in 'abc'}
    for name, count in counts.items():
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / 'train' / name / f'{dice.choice("xéж")}{i}.png').touch()

    def parts(holdout):
        found = find_folder(tmp_path, holdout=holdout)
        assert found.classes == list('abc') and len(found.files) == len({name for name, *_ in found.files})
        return {name: (part, label) for (name, *_), part, label in zip(found.files, found.parts.tolist(),
                                                                           found.labels.tolist())}

    few, many = map(parts, held)
    for holdout, found in zip(held, (few, many)):
        for label, (name, count) in enumerate(counts.items()):
            own = [part for place, (part, _) in found.items() if f'/{name}/' in place]
            assert len(own) == count and {*own} == {0, 2}  # both, however few they are
            assert abs(own.count(2) - holdout * count) <= 1 + 4 * (holdout * (1 - holdout) * count)**0.5
            assert {part_label for place, (_, part_label) in found.items() if f'/{name}/' in place} == {label}
    assert all(many[name] == place for name, place in few.items() if place[0] == 2)
    (tmp_path / 'train' / 'b' / 'new.png').touch()
    for path in tmp_path.glob('train/c/*'):
        os.utime(path, ns=(seed, seed))
    again = parts(held[0])
    assert sum(again[name] != place for name, place in few.items()) <= 1  # the first and the last of a class may change


@pytest.mark.parametrize('fit', ['crop', 'squeeze', 'pad'])
@pytest.mark.parametrize('width, height', [(1, 1), (1, 90), (300, 1), (30, 10), (8, 24), (97, 98)])
def test_fit_takes_the_centre_or_all_or_all_on_white(root, fit, width, height):
    """An image of three bands along its longer side: red, green and blue."""
    long, size = max(width, height), 24
    bands = np.zeros((long, min(width, height), 3), np.uint8)
    for channel, rows in enumerate(np.array_split(np.arange(long), 3)):
        bands[rows, :, channel] = 255
    pixels = bands if height >= width else bands.transpose(1, 0, 2)
    Image.fromarray(pixels).save(root / 'b.png')
    found = load_data('folder', root, store_size=size, fit=fit).train[1]  # (3, size, size)
    along = found.transpose(1, 2) if width > height else found  # the longer side downwards
    middle = along[:, :, size // 2].T.tolist()  # (size, 3)
    if long == 1:
        assert all(pixel == [255, 0, 0] for pixel in middle)
    elif fit == 'crop':  # of bands as high as wide, or of less
        assert middle[size // 2] == [0, 255, 0] and (long < 100 or all(pixel == [0, 255, 0] for pixel in middle))
    else:
        assert [middle[1], middle[size // 2], middle[-2]] == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    kept = (along.amin(0) < 255).any(0)  # columns that are not white
    wide = max(1, round(min(width, height) / long * size)) if fit == 'pad' else size
    assert kept.sum() == wide and abs(kept.nonzero().float().mean() - (size - 1) / 2) <= 0.5
