"""Decoding: pixels of every kind of image file, damaged files, and the file of decoded images."""

import os
import shutil
import stat
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import pil_to_tensor

from hardneg import decoding, folder, runtime
from hardneg.runtime import Ranks, UserError
from utils import load_data

rng = np.random.default_rng(0)
SQUARES = rng.integers(256, size=(8, 10, 3))
RGB = np.kron(SQUARES, np.ones((4, 4, 1))).astype(np.uint8)  # (8, 10, 3) -> (32, 40, 3)
WIDE = (RGB[..., 0].astype(np.uint16) << 8) + 7  # (32, 40), of 16 bits
WIDE[0, 0] = 65535


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The directory of this test's decoded images, which is not there yet."""
    user = tmp_path_factory.mktemp('user')
    monkeypatch.setenv('XDG_CACHE_HOME', str(user))
    return user / 'hardneg'


@pytest.fixture
def root(tmp_path):
    """A folder of one black image, a.png, which comes before the others."""
    Image.new('RGB', (40, 40)).save(tmp_path / 'a.png')
    return tmp_path


def load(root, size=24, **how):
    return load_data('folder', root, store_size=size, **how)


def second(root, size=24, **how):
    """The image (3, size, size) of the file beside a.png."""
    images = load(root, size, **how).train
    assert len(images) == 2
    return images[1].int()


def central_square(image, size):
    """The largest central square of a PIL image, resized: (3, size, size)."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = left, top, left + side, top + side
    return pil_to_tensor(image.resize((size, size), Image.Resampling.BILINEAR, box)).int()


# Pixels

SAVED = [  # name of the file, mode of the image, options of save()
    ('b1.png', '1', {}),
    ('bL.png', 'L', {}),
    ('bLA.png', 'LA', {}),
    ('bP.png', 'P', {}),
    ('bRGB.png', 'RGB', {}),
    ('bRGBA.png', 'RGBA', {}),
    ('bL.jpg', 'L', {}),
    ('bRGB.jpeg', 'RGB', {}),
    ('bCMYK.jpe', 'CMYK', {}),
    ('b progressive.jfif', 'RGB', dict(format='JPEG', progressive=True)),
    ('bRGB.tif', 'RGB', {}),
    ('bCMYK.tiff', 'CMYK', {}),
    ('b lzw.tif', 'RGB', dict(compression='tiff_lzw')),
    ('bRGB.bmp', 'RGB', {}),
    ('bP.gif', 'P', {}),
    ('b animated.gif', 'P', dict(save_all=True, append_images=[Image.new('P', (40, 32))])),
    ('bRGB.ppm', 'RGB', {}),
    ('bL.pgm', 'L', {}),
    ('b1.pbm', '1', {}),
    ('bRGB.tga', 'RGB', {}),
    ('bRGB.pcx', 'RGB', {}),
    ('bRGB.dds', 'RGB', {}),
    ('bRGB.sgi', 'RGB', {}),
    ('b1.xbm', '1', {}),
    ('b1.msp', '1', {}),
    ('bRGB.jp2', 'RGB', {}),
    ('bRGB.webp', 'RGB', {}),
    ('bRGBA.webp', 'RGBA', dict(lossless=True)),
    ('b UPPER.PNG', 'RGB', dict(format='PNG')),
    ('b a png.jpg', 'RGB', dict(format='PNG')),
    ('ペンギン.png', 'RGB', {}),
    (os.fsdecode(b'latin-\xe9.png'), 'RGB', {}),
]


@pytest.mark.parametrize('name, mode, options', SAVED)
def test_pixels_are_those_of_torchvisions_loader(root, name, mode, options):
    Image.fromarray(RGB).convert(mode).save(root / name, **options)
    theirs = central_square(pil_loader(root / name), 24)
    assert (second(root) - theirs).abs().max() <= 1


UPRIGHT = {  # by EXIF's orientation
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}


@pytest.mark.parametrize('name', ['b.png', 'b.tif', 'b.webp'])
@pytest.mark.parametrize('orientation', UPRIGHT)
def test_exif_orientation_is_applied(root, orientation, name):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {}
    if name == 'b.webp':
        options = dict(lossless=True)
    Image.fromarray(RGB).save(root / name, exif=exif, **options)
    upright = np.ascontiguousarray(UPRIGHT[orientation](RGB))
    assert torch.equal(second(root, 32), central_square(Image.fromarray(upright), 32))


@pytest.mark.parametrize('exif', [b'Exif\0\0MM\0\x2anonsense', b'Exif\0\0nonsense'])
def test_damaged_exif_is_no_damaged_image(root, exif):
    Image.fromarray(RGB).save(root / 'b.png', exif=exif)
    assert torch.equal(second(root, 32), central_square(Image.fromarray(RGB), 32))


def test_transparency_is_laid_on_white(root):
    alpha = np.full(RGB.shape[:2], 51, np.uint8)  # a fifth
    Image.fromarray(np.dstack([RGB, alpha])).save(root / 'b.png')
    on_white = 255 - 0.2 * (255 - RGB.astype(float))
    theirs = central_square(Image.fromarray(on_white.round().astype(np.uint8)), 32)
    assert (second(root, 32) - theirs).abs().max() <= 1


def test_a_transparent_colour_of_a_palette_is_laid_on_white(root):
    image = Image.new('P', (40, 40), 1)
    image.putpalette([9, 9, 9, 50, 60, 70])
    image.save(root / 'b.png', transparency=1)
    assert second(root).unique().tolist() == [255]


@pytest.mark.parametrize('name', ['b.png', 'b.tif', 'b.jp2', 'b.pgm', 'big endian.tif'])
def test_sixteen_bits_are_scaled_to_eight(root, name, capsys):
    if name == 'b.pgm':
        (root / name).write_bytes(b'P5 40 32 65535\n' + WIDE.astype('>u2').tobytes())
    elif name == 'big endian.tif':
        Image.frombytes('I;16B', (40, 32), WIDE.astype('>u2').tobytes()).save(root / name)
    else:
        Image.fromarray(WIDE).save(root / name)
    eight_bits = Image.fromarray((WIDE >> 8).astype(np.uint8)).convert('RGB')
    assert torch.equal(second(root), central_square(eight_bits, 24))
    assert 'come out dark' not in capsys.readouterr().out


def test_less_than_fourteen_bits_in_sixteen_are_reported_when_they_are_decoded(root, capsys):
    for name, brightest in (('scan', 2**14 - 1), ('photo', 2**14)):
        Image.fromarray(np.minimum(WIDE, brightest)).save(root / f'{name}.png')
    told = (
        '1 grey images of 16 bits come out dark, as they use less than 14 of them: scale them '
        'first, such as scan.png'
    )
    load(root)
    assert told in capsys.readouterr().out
    load(root)
    assert told not in capsys.readouterr().out


def test_few_bits_are_reported_by_whichever_rank_decodes(root, monkeypatch, capsys):
    Image.fromarray(WIDE >> 4).save(root / 'b.png')
    monkeypatch.setattr(runtime, 'ranks', lambda: Ranks(1, 2, 1, 2))
    load(root)
    said = capsys.readouterr().out
    assert '1 grey images of 16 bits come out dark' in said
    assert 'Another place: --cache_dir' in said


@pytest.mark.parametrize('fit', decoding.FITS)
@pytest.mark.parametrize('width, height', [(1, 1), (1, 90), (300, 1), (30, 10), (8, 24), (97, 98)])
def test_fit_takes_the_centre_or_all_or_all_on_white(root, fit, width, height):
    """An image of three bands along its longer side: red, green and blue."""
    size, long, short = 24, max(width, height), min(width, height)
    bands = np.zeros((long, short, 3), np.uint8)
    for channel, rows in enumerate(np.array_split(np.arange(long), 3)):
        bands[rows, :, channel] = 255
    if width > height:
        bands = bands.transpose(1, 0, 2)
    Image.fromarray(bands).save(root / 'b.png')
    found = second(root, size, fit=fit)
    if width > height:
        found = found.transpose(1, 2)
    middle = found[:, :, size // 2].T.tolist()  # (size, 3), along the longer side
    if long == 1:
        assert middle[size // 2] == [255, 0, 0]
    elif fit == 'crop':
        assert middle[size // 2] == [0, 255, 0]
        if long > 2 * short:
            assert middle[1] == middle[-2] == [0, 255, 0]
    else:
        assert middle[1] == [255, 0, 0]
        assert middle[size // 2] == [0, 255, 0]
        assert middle[-2] == [0, 0, 255]
    columns = (found.amin(0) < 255).any(0).nonzero().float()  # those that are not white
    wide = size
    if fit == 'pad':
        wide = max(1, round(short / long * size))
    assert len(columns) == wide
    assert abs(columns.mean() - (size - 1) / 2) <= 0.5


@pytest.mark.parametrize(
    'sizes, kept',
    [
        ([(32, 32)] * 3, 32),
        ([(256, 256)] * 2, 256),
        ([(257, 257)] * 2, 96),
        ([(32, 32), (33, 33)], 96),
        ([(40, 32)] * 2, 96),
    ],
)
def test_images_keep_their_size_if_they_are_squares_of_one_size(tmp_path, sizes, kept, capsys):
    for i, size in enumerate(sizes):
        Image.new('RGB', size).save(tmp_path / f'{i}.png')
    assert load_data('folder', tmp_path).train.shape == (len(sizes), 3, kept, kept)
    assert f'{len(sizes)} images, kept at {kept} px in ' in capsys.readouterr().out


# Damaged files


def make_damaged(place):
    """Damaged files of every kind; returns their names."""
    contents = {
        'empty.png': b'',
        'text.jpg': b'hello',
        'magic.png': b'\x89PNG\r\n\x1a\n',
        '32 bits.pfm': b'Pf\n2 2\n-1.0\n' + bytes(16),
    }
    Image.fromarray(RGB).save(place / 'cut.png')
    whole = (place / 'cut.png').read_bytes()
    contents['cut.png'] = whole[: len(whole) // 2]
    contents['flipped.png'] = whole[:60] + bytes([whole[60] ^ 255]) + whole[61:]
    for name, content in contents.items():
        (place / name).write_bytes(content)
    (place / 'broken link.png').symlink_to('nowhere.png')
    (place / 'to itself.png').symlink_to('to itself.png')
    Image.fromarray(np.zeros((4, 4), np.int32)).save(place / '32 bits.tif')
    Image.new('1', (3000, 3000)).save(place / 'bomb.png')  # 9 MP
    return [*contents, 'broken link.png', 'to itself.png', '32 bits.tif', 'bomb.png']


def test_damaged_images_are_listed_in_one_go_and_skipped_on_request(root, capsys, monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)  # Pillow refuses twice as many
    Image.new('1', (3000, 2000)).save(root / 'large.png')
    names = make_damaged(root)
    for _ in range(2):  # decoded, and from the file
        with pytest.raises(UserError, match=r'10 images damaged or .*--skip_damaged') as error:
            load(root)
        _, *lines = str(error.value).splitlines()
        listed = [line.split(': ')[0].strip() for line in lines]
        assert sorted(listed) == sorted(str(root / name) for name in names)
        large = [line for line in lines if 'too large' in line]
        assert large == [f'  {root}/bomb.png: too large: more than 8 megapixels']
    data = load(root, skip_damaged=True)
    assert len(data.train) == 2
    assert sorted(data.damaged) == sorted(names)
    told = '10 images damaged or too large and left out, such as '
    assert told in capsys.readouterr().out


def test_an_image_that_becomes_readable_is_taken_though_its_time_stays(root, monkeypatch, decoded):
    read = Path.read_bytes

    def refuse(path):
        if path.name == 'secret.png':
            raise PermissionError('Permission denied')
        return read(path)

    shutil.copy(root / 'a.png', root / 'secret.png')
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'read_bytes', refuse)
        for _ in range(2):
            with pytest.raises(UserError, match=r'secret.png: Permission denied'):
                load(root)
    assert decoded.count('a.png') == 1  # the others are not decoded again
    assert len(load(root).train) == 2


def test_ghostscript_is_started_for_no_file(root, monkeypatch):
    """Under the name of another image, too: it would run the file as a program."""

    def refuse(*args):
        raise AssertionError('Ghostscript was started')

    Image.fromarray(RGB).save(root / 'b.eps')
    shutil.copy(root / 'b.eps', root / 'b.png')
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', refuse)
    with pytest.raises(UserError, match=r'1 images damaged(.*\n.*)b.png: empty, or not an image'):
        load(root)


@pytest.mark.parametrize('kind', ['profile', 'zTXt', 'iTXt'])
def test_metadata_of_megabytes_are_no_damage(root, kind):
    """Pillow's own limit is 1 MB for each."""
    text = 'x' * 2**20
    info = PngInfo()
    profile = None
    if kind == 'profile':
        profile = (2 * text).encode()
    elif kind == 'iTXt':
        info.add_itxt('Comment', 2 * text, zip=True)
    else:
        info.add_text('Comment', 2 * text, zip=True)
    (root / 'a.png').unlink()
    Image.fromarray(RGB[:, :32]).save(root / 'b.png', icc_profile=profile, pnginfo=info)
    (image,) = load(root, size=0).train  # of its own size, which the header tells
    assert np.array_equal(image.permute(1, 2, 0), RGB[:, :32])  # (3, H, W) -> (H, W, 3)


# The file


def files_of(cache):
    """The index and the rows of the only folder in the cache."""
    (index,) = cache.glob('*/*.index')
    (rows,) = cache.glob('*/*.rows')
    return index, rows


def entries(directory):
    """All that is in the directory and below it, with times and content."""
    found = {}
    for path in (directory, *directory.rglob('*')):
        about = path.lstat()
        found[path] = about.st_mtime_ns, about.st_ctime_ns, about.st_ino
    return found


@pytest.mark.parametrize('holdout', [0, 0.5])
def test_a_directory_of_images_is_only_read(tmp_path, holdout):
    for name in 'x/1.png', 'x/2.png', 'y/1.png', 'y/2.png':
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / name)
    before = entries(tmp_path)
    for size in (0, 24):
        load(tmp_path, size, holdout=holdout)
        load(tmp_path, size, holdout=holdout)
    assert entries(tmp_path) == before
    assert len(ImageFolder(tmp_path)) == 4  # every directory is a class with images


def test_images_are_decoded_once_and_only_new_ones_afterwards(root, cache, decoded):
    Image.new('RGB', (8, 8), (90, 90, 90)).save(root / 'c.png')
    first = load(root).train
    assert sorted(decoded) == ['a.png', 'c.png']
    assert torch.equal(load(root).train, first)
    assert len(decoded) == 2
    Image.new('RGB', (40, 40), (50, 50, 50)).save(root / 'b.png')
    images = load(root).train
    assert decoded[2:] == ['b.png']
    assert torch.equal(images[[0, 2]], first)
    assert images[1].unique().tolist() == [50]
    (root / 'b.png').unlink()
    assert torch.equal(load(root).train, first)
    assert len(decoded) == 3
    index, rows = files_of(cache)  # and no earlier rows
    assert {path.name for path in index.parent.iterdir()} <= {
        '24-crop.index',
        '24-crop.lock',
        rows.name,
    }
    assert rows.read_bytes() == first.numpy().tobytes()


def test_files_that_kept_their_name_size_and_times_are_not_read_again(root, monkeypatch):
    Image.new('RGB', (40, 40), (50, 50, 50)).save(root / 'b.png')
    load(root)
    Image.new('RGB', (40, 40), (70, 70, 70)).save(root / 'c.png')
    read = Path.read_bytes
    names = []

    def spy(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(Path, 'read_bytes', spy)
    assert load(root).train[:, 0, 0, 0].tolist() == [0, 50, 70]
    assert {name for name in names if name.endswith('.png')} == {'c.png'}


def gray_bmps(directory, levels):
    """Images of one size and time, as an archive with fixed times gives them."""
    directory.mkdir()
    for i, level in enumerate(levels):
        path = directory / f'{i}.bmp'
        Image.new('L', (24, 24), level).save(path)
        os.utime(path, ns=(0, 0))


def test_of_two_folders_of_equal_names_sizes_and_times_each_has_its_own_images(
    tmp_path, monkeypatch
):
    """Even if all were made within a tick of the clock."""
    status = SimpleNamespace(st_mode=stat.S_IFREG, st_size=1000, st_mtime_ns=0, st_ctime_ns=0)
    monkeypatch.setattr(folder, '_status', lambda path: status)
    gray_bmps(tmp_path / 'clean', [10, 20])
    gray_bmps(tmp_path / 'noisy', [30, 20])
    clean, noisy = (load(tmp_path / name) for name in ('clean', 'noisy'))
    assert clean.train[:, 0, 0, 0].tolist() == [10, 20]
    assert noisy.train[:, 0, 0, 0].tolist() == [30, 20]
    assert clean.digest != noisy.digest


def test_a_file_that_was_replaced_and_kept_its_size_and_time_is_noticed(tmp_path):
    gray_bmps(tmp_path / 'photos', [10, 20])
    before = load(tmp_path / 'photos')
    gray_bmps(tmp_path / 'others', [30])
    shutil.copy2(tmp_path / 'others/0.bmp', tmp_path / 'photos/0.bmp')
    after = load(tmp_path / 'photos')
    assert after.train[:, 0, 0, 0].tolist() == [30, 20]
    assert after.digest != before.digest


def test_rows_that_a_process_maps_stay_as_they_are_when_the_folder_changes(root):
    first = load(root).train
    before = first.clone()
    Image.new('RGB', (40, 40), (50, 50, 50)).save(root / 'A.png')  # the first row from now on
    assert load(root).train[0].unique().tolist() == [50]
    assert torch.equal(first, before)


def test_of_two_at_once_one_decodes_and_the_other_waits(root, decoded):
    for i in range(20):
        shutil.copy(root / 'a.png', root / f'{i}.png')
    begin = threading.Barrier(2)
    found = []

    def start():
        begin.wait()
        found.append(load(root).train)

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(decoded) == 21
    assert torch.equal(*found)


def test_rows_stay_with_their_files_where_others_are_damaged(root, decoded):
    Image.new('RGB', (8, 8), (90, 90, 90)).save(root / 'c.png')
    (root / 'b.png').write_bytes(b'')
    load(root, skip_damaged=True)
    (root / 'a.png').unlink()
    Image.new('RGB', (8, 8), (70, 70, 70)).save(root / 'd.png')
    decoded.clear()
    images = load(root, skip_damaged=True).train
    assert images[:, 0, 0, 0].tolist() == [90, 70]
    assert 'c.png' not in decoded


def test_images_that_keep_their_size_are_decoded_again_when_the_size_changes(root):
    assert load(root, size=0).train.shape == (1, 3, 40, 40)
    Image.new('RGB', (30, 30)).save(root / 'b.png')
    assert load(root, size=0).train.shape == (2, 3, 96, 96)


def test_a_damaged_file_is_noticed_and_made_again(root, cache, decoded):
    """The index or the rows: cut, of another kind, or missing."""
    (root / 'b.png').write_bytes(b'')

    def loaded():
        data = load(root, skip_damaged=True)
        return data.digest, data.damaged, data.train.tolist()

    first = loaded()
    damages = [
        lambda good: good[:-1],
        lambda good: b'',
        lambda good: b'hello',
        lambda good: b'[1, 2]',
        lambda good: b'{"digests": [-5]}',
        lambda good: good.replace(b'"size": 24', b'"size": 16') + b' ',
    ]
    for which in 0, 1:
        for damage in damages:
            decoded.clear()
            file = files_of(cache)[which]
            content = damage(file.read_bytes())
            file.write_bytes(content)
            assert loaded() == first, content
            assert 'a.png' in decoded, content
        files_of(cache)[which].unlink()
        for name in list(cache.glob('*/*.rows')):  # as a run leaves them that was killed
            shutil.copy(name, name.with_name('24-crop-killed.rows'))
        assert loaded() == first
        assert len(files_of(cache)) == 2


def test_where_the_file_lies(root, cache, tmp_path_factory, monkeypatch):
    """In --cache_dir, $XDG_CACHE_HOME or else the home directory: the first that can be written."""
    other, home = (tmp_path_factory.mktemp(name) for name in ('other', 'home'))
    monkeypatch.setenv('HOME', str(home))
    load(root, cache_dir=other)
    assert len(list(other.glob(f'{root.name}-*/24-crop.index'))) == 1
    assert not cache.exists()
    load(root)
    assert len(list(cache.glob(f'{root.name}-*/24-crop.index'))) == 1
    assert list(home.iterdir()) == []
    for variable in ('/proc/nowhere', 'relative', ''):
        monkeypatch.setenv('XDG_CACHE_HOME', variable)
        load(root)
        assert len(list(home.glob(f'.cache/hardneg/{root.name}-*/24-crop.index'))) == 1
        shutil.rmtree(home / '.cache')
    (other / 'file').write_text('')
    with pytest.raises(UserError, match=r'cannot write in .*file/.*another --cache_dir'):
        load(root, cache_dir=other / 'file')


@pytest.mark.parametrize('home', ['/proc/nowhere', None])
def test_without_a_place_that_can_be_written_one_line_names_cache_dir(root, monkeypatch, home):
    def no_home():
        raise RuntimeError('Could not determine home directory.')

    monkeypatch.setenv('XDG_CACHE_HOME', '/proc/elsewhere')
    if home:
        monkeypatch.setenv('HOME', home)
    else:
        monkeypatch.setattr(Path, 'home', no_home)
    with pytest.raises(UserError, match=r'^/proc/elsewhere.* cannot be written: .*--cache_dir'):
        load(root)


def test_size_and_place_are_said_before_the_file_is_made(root, cache, monkeypatch, capsys):
    said = []

    def decode(*args):
        said.append(capsys.readouterr().out)
        return 'damaged'

    for i in range(9):
        shutil.copy(root / 'a.png', root / f'{i}.png')
    monkeypatch.setattr(decoding, 'decode_or_why', decode)
    with pytest.raises(UserError, match='10 images damaged'):
        load(root, 1000)
    told = f'{root}: 10 images of 1000 px take 0.03 GB in {cache}/{root.name}-'
    assert told in said[0]
    assert 'Another place: --cache_dir' in said[0]


def test_disk_space_is_checked_first_and_a_full_disk_leaves_nothing(root, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        with pytest.raises(UserError, match=r'takes 0.0 GB at 24 px, and 0.0 GB are free in .*'):
            load(root)

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match=r'cannot write .*No space left on device.*--cache_dir'):
        load(root)
    assert {path.name for path in cache.glob('*/*')} <= {'24-crop.lock'}


def test_images_are_mapped_read_only_and_shared(root, cache):
    images = load(root).train
    _, rows = files_of(cache)
    address = images.data_ptr()
    for line in open('/proc/self/maps'):
        start, end = (int(x, 16) for x in line.split()[0].split('-'))
        if start <= address < end:
            assert 'r--s' in line
            assert line.rstrip().endswith(str(rows))
            return
    raise AssertionError('the images are in no mapping')
