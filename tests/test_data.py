"""Every data set through its real loading code, from files of its exact format, and every way they can be wrong."""

import hashlib
import pickle
import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import CIFAR10, STL10

import data as sets
from data import load_data
from hardneg.runtime import UserError

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError('no network in tests')
    monkeypatch.setattr(urllib.request, 'urlopen', refuse)


def patch_checksums(monkeypatch, cls, folder):
    def with_md5(files):
        return [[name, hashlib.md5((folder / name).read_bytes()).hexdigest()] for name, _ in files]
    monkeypatch.setattr(cls, 'train_list', with_md5(cls.train_list))
    monkeypatch.setattr(cls, 'test_list', with_md5(cls.test_list))


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Files in STL10's format: uint8 images in column-major order, channel by channel; labels from 1 to 10."""
    folder, images = tmp_path / 'stl10_binary', {}
    folder.mkdir()
    for name, count in (('train', 20), ('test', 10), ('unlabeled', 15)):
        images[name] = RNG.integers(256, size=(count, 3, 96, 96), dtype=np.uint8)
        images[name].transpose(0, 1, 3, 2).tofile(folder / f'{name}_X.bin')
        if name != 'unlabeled':
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f'{name}_y.bin')
    names = ['airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship', 'truck']
    (folder / 'class_names.txt').write_text('\n'.join(names))
    (folder / 'fold_indices.txt').write_text('')
    patch_checksums(monkeypatch, STL10, folder)
    return tmp_path, images


def test_stl10(stl10):
    root, images = stl10
    data = load_data('stl10', root)
    assert torch.equal(data.train.index_select(0, torch.arange(35)),
                       torch.from_numpy(np.concatenate([images['train'], images['unlabeled']])))
    assert torch.equal(data.train[21], torch.from_numpy(images['unlabeled'][1]))
    assert torch.equal(data.train_labels, torch.cat([torch.arange(20) % 10, torch.full((15,), -1)]))
    assert torch.equal(data.test, torch.from_numpy(images['test']))
    assert torch.equal(data.test_labels, torch.arange(10)) and data.classes[7] == 'monkey'
    assert len(load_data('stl10', root, unlabeled=False).train) == 20


def test_stl10_lies_in_its_own_files_not_in_memory(stl10):
    data = load_data('stl10', stl10[0])
    maps = [line.split()[0].split('-') + line.split()[1:] for line in open('/proc/self/maps') if '_X.bin' in line]
    for tensor, name in zip((*data.train.datasets, data.test), ('train', 'unlabeled', 'test')):
        found, = (m for m in maps if int(m[0], 16) <= tensor.data_ptr() < int(m[1], 16))
        assert found[2] == 'r--s' and found[-1].endswith(f'{name}_X.bin')


@pytest.mark.parametrize('names', [None, 'airplane\nbird\n'])
def test_class_names_that_do_not_fit_the_labels_are_an_error(stl10, names):
    file = stl10[0] / 'stl10_binary' / 'class_names.txt'
    file.unlink()
    if names:
        file.write_text(names)
    with pytest.raises(UserError, match=r'[02] names of classes where the labels have 10: restore class_names.txt'):
        load_data('stl10', stl10[0])


@pytest.mark.parametrize('damage', [lambda b: b[:-5000], lambda b: bytes([b[0] ^ 1]) + b[1:], lambda b: b''])
def test_damaged_files_are_named_and_kept(stl10, damage):
    file = stl10[0] / 'stl10_binary' / 'test_X.bin'
    damaged = damage(file.read_bytes())
    file.write_bytes(damaged)
    with pytest.raises(UserError, match=r'test_X\.bin is truncated or damaged .*delete it, and STL10 is downloaded'):
        load_data('stl10', stl10[0])
    assert file.read_bytes() == damaged


@pytest.mark.parametrize('name', ['stl10', 'cifar10', 'cifar100'])
def test_missing_data_without_network(tmp_path, name):
    with pytest.raises(UserError, match=f'{name.upper()} is not in {tmp_path}.*no network.*--dataset_name shapes'):
        load_data(name, tmp_path / 'data')
    assert not (tmp_path / 'data').exists()


def test_cifar10(tmp_path, monkeypatch):
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()
    images = RNG.integers(256, size=(6, 4, 3, 32, 32), dtype=np.uint8)
    for (name, _), x in zip(CIFAR10.train_list + CIFAR10.test_list, images):
        (folder / name).write_bytes(pickle.dumps({'data': x.reshape(4, -1), 'labels': [1, 2, 3, 9]}))
    (folder / 'batches.meta').write_bytes(pickle.dumps({'label_names': list('abcdefghij')}))
    patch_checksums(monkeypatch, CIFAR10, folder)
    md5 = hashlib.md5((folder / 'batches.meta').read_bytes()).hexdigest()
    monkeypatch.setitem(CIFAR10.meta, 'md5', md5)
    data = load_data('cifar10', tmp_path)
    assert torch.equal(data.train, torch.from_numpy(images[:5].reshape(20, 3, 32, 32)))
    assert torch.equal(data.test, torch.from_numpy(images[5])) and data.test_labels.tolist() == [1, 2, 3, 9]
    assert data.classes == list('abcdefghij')


def test_shapes_are_balanced_fixed_and_not_told_by_colour():
    data, whole = sets._shapes(600, 200), sets._shapes(800, 0)
    assert torch.equal(torch.cat([data.train, data.test]), whole.train) and data.train.shape == (600, 3, 32, 32)
    assert torch.equal(torch.cat([data.train_labels, data.test_labels]), whole.train_labels)
    assert len(whole.train.flatten(1).unique(dim=0)) == 800
    assert data.train_labels.bincount().min() > 30 and len(data.classes) == 10
    mean = data.train.float().mean((2, 3))  # (600, 3)
    centres = torch.stack([mean[data.train_labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(data.test.float().mean((2, 3)), centres).argmin(1)
    assert (nearest == data.test_labels).float().mean() < 0.2


@pytest.fixture
def folder(tmp_path):
    for split, count in (('train', 3), ('test', 2)):
        for name in ('big cats', 'ペンギン'):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(RNG.integers(256, size=(30, 40, 3), dtype=np.uint8))
                image.save(tmp_path / split / name / f'{i}.png')
    return tmp_path


def test_folder_with_unlabeled_images(folder):
    (folder / 'unlabeled' / 'deep' / 'er').mkdir(parents=True)
    Image.new('RGB', (50, 50), (10, 20, 30)).save(folder / 'unlabeled' / 'deep' / 'er' / 'x.bmp')
    data = load_data('folder', folder, store_size=24)
    assert data.train.shape == (7, 3, 24, 24) and data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, -1]
    assert data.test_labels.tolist() == [0, 0, 1, 1] and data.classes == ['big cats', 'ペンギン']
    assert data.train[6].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert len(load_data('folder', folder, store_size=24, unlabeled=False).train) == 6
    (folder / 'test').rename(folder / 'val')
    assert len(load_data('folder', folder, store_size=24).test) == 4


def test_folder_resizes_and_crops_as_torchvision(folder):
    image = Image.open(folder / 'train' / 'big cats' / '0.png')
    resize = torchvision.transforms.Compose([torchvision.transforms.Resize(24), torchvision.transforms.CenterCrop(24)])
    theirs = torch.from_numpy(np.array(resize(image))).permute(2, 0, 1).float()
    ours = load_data('folder', folder, store_size=24).train[0].float()
    assert (ours - theirs).abs().mean() < 8  # theirs crops whole pixels after resizing, ours exact ones before


@pytest.mark.parametrize('mode, value, expected', [
    ('L', 200, [200] * 3), ('RGBA', (50, 60, 70, 0), [255] * 3), ('CMYK', (0, 0, 0, 0), [255] * 3),
    ('I;16', 200 * 256, [200] * 3), ('1', 1, [255] * 3), ('P', 0, [1, 2, 3]), ('LA', (90, 255), [90] * 3)])
def test_every_kind_of_image_is_read(folder, mode, value, expected):
    image = Image.new(mode, (40, 30), value)
    if mode == 'P':
        image.putpalette([1, 2, 3] * 256)
    image.save(folder / 'train' / 'big cats' / ('0.jpg' if mode == 'CMYK' else '0.png'))
    (folder / 'train' / 'big cats' / ('0.png' if mode == 'CMYK' else 'none')).unlink(missing_ok=True)
    assert load_data('folder', folder, store_size=24).train[0, :, 12, 12].tolist() == expected


def test_odd_files_are_read_or_passed_over(folder):
    place = folder / 'train' / 'big cats'
    Image.new('RGB', (1, 1), (9, 9, 9)).save(place / '1x1.png')
    first, second = Image.new('RGB', (20, 20), (255, 0, 0)), Image.new('RGB', (20, 20), (0, 0, 255))
    first.save(place / 'animated.webp', save_all=True, append_images=[second], lossless=True)
    (place / 'notes.txt').write_text('not an image')
    (place / 'loop').symlink_to(folder / 'train')  # a loop of directories
    data = load_data('folder', folder, store_size=24)
    assert len(data.train) == 8
    assert data.train[2].unique().tolist() == [9]  # sorted: 0.png 1.png 1x1.png 2.png animated.webp
    assert data.train[4, :, 5, 5].tolist() == [255, 0, 0]


def test_wrong_trees_are_explained(folder):
    with pytest.raises(UserError, match=r'nowhere is not a directory.*shapes needs no files'):
        load_data('folder', folder / 'nowhere')
    (folder / 'test' / 'extra').mkdir()
    with pytest.raises(UserError, match=r"classes differ: only in .*train: none; only in .*test: \['extra'\]"):
        load_data('folder', folder)
    (folder / 'train' / 'extra').mkdir()
    with pytest.raises(UserError, match='2 problems:\n.*train/extra: no image in it\n.*test/extra: no image in it'):
        load_data('folder', folder, store_size=24)
    for split in ('train', 'test'):
        (folder / split / 'extra').rmdir()
    with pytest.raises(UserError, match='lower --store_size'):
        load_data('folder', folder, store_size=10**6)
    (folder / 'test').rename(folder / 'other')
    with pytest.raises(UserError, match=r'train has classes, and .*test is not.*Give --holdout 0.1 .*--root .*train'):
        load_data('folder', folder)
