"""The data sets: pixels and labels from files of their exact formats, and errors of wrong ones."""

import hashlib
import os
import pickle
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, STL10
from torchvision.transforms import CenterCrop, Compose, Resize

from hardneg import shapes
from hardneg.runtime import UserError
from utils import load_data, shapes_data

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError('no network in tests')

    monkeypatch.setattr(urllib.request, 'urlopen', refuse)


# STL10 and CIFAR


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def patch_checksums(monkeypatch, cls, folder):
    for files in ('train_list', 'test_list'):
        checksums = [[name, md5(folder / name)] for name, _ in getattr(cls, files)]
        monkeypatch.setattr(cls, files, checksums)


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Files in STL10's format, and their images.

    The images are uint8, channel by channel, each in column-major order; labels count from 1.
    """
    folder = tmp_path / 'stl10_binary'
    folder.mkdir()
    images = {}
    for name, count in (('train', 20), ('test', 10), ('unlabeled', 15)):
        array = rng.integers(256, size=(count, 3, 96, 96), dtype=np.uint8)
        array.transpose(0, 1, 3, 2).tofile(folder / f'{name}_X.bin')
        images[name] = torch.from_numpy(array)
        if name != 'unlabeled':
            labels = np.arange(count) % 10 + 1
            labels.astype(np.uint8).tofile(folder / f'{name}_y.bin')
    names = 'airplane bird car cat deer dog horse monkey ship truck'
    (folder / 'class_names.txt').write_text(names.replace(' ', '\n'))
    (folder / 'fold_indices.txt').write_text('')
    patch_checksums(monkeypatch, STL10, folder)
    return tmp_path, images


def test_stl10(stl10):
    root, images = stl10
    data = load_data('stl10', root)
    assert torch.equal(data.train, torch.cat([images['train'], images['unlabeled']]))
    labels = torch.arange(20) % 10
    assert torch.equal(data.train_labels, torch.cat([labels, torch.full((15,), -1)]))
    assert torch.equal(data.test, images['test'])
    assert torch.equal(data.test_labels, torch.arange(10))
    assert data.classes[7] == 'monkey'


def test_stl10_without_unlabeled_images(stl10):
    root, images = stl10
    data = load_data('stl10', root, unlabeled=False)
    assert torch.equal(data.train, images['train'])
    assert data.train.is_contiguous()  # it is read by rows
    assert torch.equal(data.train_labels, torch.arange(20) % 10)
    assert data.digest == load_data('stl10', root).digest


@pytest.mark.parametrize('names', [None, 'airplane\nbird\n'])
def test_class_names_that_do_not_fit_the_labels_are_an_error(stl10, names):
    root, _ = stl10
    file = root / 'stl10_binary' / 'class_names.txt'
    file.unlink()
    if names:
        file.write_text(names)
    with pytest.raises(UserError, match=r'[02] names of classes .* 10: restore class_names.txt'):
        load_data('stl10', root)


@pytest.mark.parametrize(
    'damage', [lambda b: b[:-5000], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b'']
)
def test_damaged_files_are_named_and_kept(stl10, damage):
    root, _ = stl10
    file = root / 'stl10_binary' / 'test_X.bin'
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    message = r'test_X\.bin is truncated or damaged .*delete it, and STL10 is downloaded'
    with pytest.raises(UserError, match=message):
        load_data('stl10', root)
    assert file.read_bytes() == damaged


@pytest.mark.parametrize('name', ['stl10', 'cifar10', 'cifar100'])
def test_missing_data_without_network(tmp_path, name):
    message = f'{name.upper()} is not in {tmp_path}.*no network.*--dataset_name shapes'
    with pytest.raises(UserError, match=message):
        load_data(name, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    images = rng.integers(256, size=(6, 4, 3, 32, 32), dtype=np.uint8)
    for (name, _), batch in zip(CIFAR10.train_list + CIFAR10.test_list, images):
        content = {'data': batch.reshape(4, -1), 'labels': [1, 2, 3, 9]}  # -> (4, 3072)
        (folder / name).write_bytes(pickle.dumps(content))
    meta = folder / 'batches.meta'
    meta.write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    patch_checksums(monkeypatch, CIFAR10, folder)
    monkeypatch.setitem(CIFAR10.meta, 'md5', md5(meta))
    data = load_data('cifar10', tmp_path)
    assert torch.equal(data.train, torch.from_numpy(images[:5].reshape(20, 3, 32, 32)))
    assert data.train_labels.tolist() == [1, 2, 3, 9] * 5
    assert torch.equal(data.test, torch.from_numpy(images[5]))
    assert data.test_labels.tolist() == [1, 2, 3, 9]
    assert data.classes == list('abcdefghij')


# Shapes


def test_shapes_are_the_same_however_many_are_drawn():
    data = shapes_data(600, 200)
    images, labels, classes = shapes.draw(800)
    assert data.train.shape == (600, 3, 32, 32)
    assert torch.equal(torch.cat([data.train, data.test]), images)
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), labels)
    assert data.classes == classes


def test_shapes_are_ten_classes_of_different_images_that_colour_does_not_tell():
    images, labels, classes = shapes.draw(800)
    assert len(classes) == 10
    assert labels.bincount().min() > 50
    assert len(images.flatten(1).unique(dim=0)) == 800
    colours = images.float().mean((2, 3))  # (800, 3, 32, 32) -> (800, 3)
    centres = torch.stack([colours[:600][labels[:600] == c].mean(0) for c in range(10)])
    nearest = torch.cdist(colours[600:], centres).argmin(1)
    assert (nearest == labels[600:]).float().mean() < 0.2


# Folders


@pytest.fixture
def folder(tmp_path):
    """Two classes of 3 training and 2 test images, 30 x 40."""
    for split, count in (('train', 3), ('test', 2)):
        for name in ('big cats', 'ペンギン'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(256, size=(30, 40, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f'{i}.png')
    return tmp_path


def test_a_folder_has_its_labelled_images_first_and_then_those_without(folder):
    (folder / 'unlabeled' / 'deep').mkdir(parents=True)
    Image.new('RGB', (50, 50), (10, 20, 30)).save(folder / 'unlabeled' / 'deep' / 'x.bmp')
    data = load_data('folder', folder, store_size=24)
    assert data.train.shape == (7, 3, 24, 24)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.classes == ['big cats', 'ペンギン']
    assert data.train[6, :, 12, 12].tolist() == [10, 20, 30]
    labelled = load_data('folder', folder, store_size=24, unlabeled=False)
    assert torch.equal(labelled.train, data.train[:6])
    assert torch.equal(labelled.test, data.test)


def test_a_folder_without_labels_has_no_test_images(tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / 'x.png')
    data = load_data('folder', tmp_path)
    assert data.train_labels.tolist() == [-1]
    assert data.classes == []
    assert data.test.shape == (0, 3, 8, 8)


def test_images_are_resized_and_cropped_much_as_by_torchvision(folder):
    image = Image.open(folder / 'train' / 'big cats' / '0.png')
    theirs = np.array(Compose([Resize(24), CenterCrop(24)])(image))
    ours = load_data('folder', folder, store_size=24).train[0].permute(1, 2, 0)  # -> (24, 24, 3)
    # theirs crops whole pixels after resizing, ours exact ones before
    assert (ours.float() - torch.from_numpy(theirs).float()).abs().mean() < 8


def test_damaged_images_are_left_out_with_their_labels(folder):
    whole = load_data('folder', folder, store_size=24)
    (folder / 'train' / 'big cats' / '1.png').write_bytes(b'')
    (folder / 'test' / 'ペンギン' / '0.png').write_bytes(b'')
    with pytest.raises(UserError, match='2 images damaged.*\n.*/1.png: empty.*\n.*/0.png: empty'):
        load_data('folder', folder, store_size=24)
    data = load_data('folder', folder, store_size=24, skip_damaged=True)
    assert set(data.damaged) == {'train/big cats/1.png', 'test/ペンギン/0.png'}
    assert torch.equal(data.train, whole.train[[0, 2, 3, 4, 5]])
    assert data.train_labels.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(data.test, whole.test[[0, 1, 3]])
    assert data.test_labels.tolist() == [0, 0, 1]
    assert data.digest != whole.digest


@pytest.mark.parametrize('split, kind', [('train', 'training'), ('test', 'test')])
def test_a_class_whose_images_are_all_damaged_is_named(folder, split, kind):
    for path in (folder / split / 'ペンギン').iterdir():
        path.write_bytes(b'')
    with pytest.raises(UserError, match=f'every {kind} image of ペンギン is damaged'):
        load_data('folder', folder, store_size=24, skip_damaged=True)


def test_a_folder_whose_images_are_all_damaged_is_an_error(tmp_path):
    (tmp_path / 'x.png').write_bytes(b'')
    with pytest.raises(UserError, match='every image is damaged'):
        load_data('folder', tmp_path, skip_damaged=True)


def test_a_store_size_that_fits_no_disk_is_an_error(folder):
    with pytest.raises(UserError, match='lower --store_size'):
        load_data('folder', folder, store_size=10**6)


def test_a_folders_digest_is_of_its_content_and_not_of_place_or_time(folder):
    """Runs name it: the value of this folder of fixed images must never change."""
    for i, path in enumerate(sorted(folder.glob('*/*/*'))):
        header = f'P6 2 2 255\n{i:04}'.encode()
        path.write_bytes(header + bytes(range(8)))
    digest = load_data('folder', folder).digest
    assert digest == '358111c768106131728ca7e99a8927a96df4db5e65db0e85190bd27dd4f9befa'
    for path in folder.glob('*/*/*'):
        os.utime(path, ns=(0, 0))
    moved = folder.rename(folder.with_name(f'{folder.name}_moved'))
    assert load_data('folder', moved, store_size=48).digest == digest
