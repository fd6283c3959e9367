"""misc/embed.py: features are the encoder's, by names of files."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import embed
import model
from hardneg import runs
from hardneg.augment import normalize
from hardneg.embedded import read_embedded
from hardneg.files import write_json, write_tensors
from hardneg.runtime import UserError
from hardneg.timm_models import tensors_crc


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    net = model.Model(8, 'resnet18', 8, width=0.25)
    write_tensors(tmp_path / 'model_1.pth', net.state_dict())
    return tmp_path / 'model_1.pth'


def run(encoder, root, out, *flags):
    embed.main(
        [
            '--model_path',
            str(encoder),
            '--root',
            str(root),
            '--out',
            str(out),
            '--precision',
            'fp32',
            *flags,
        ]
    )


@torch.no_grad()
def features_of(encoder, images):
    """Of images (n, 3, H, W) uint8, by the network itself."""
    return model.load_model(encoder).eval()(normalize(images))[0]


def test_features_are_those_of_load_model_under_their_names(encoder, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, 'BLOCK', 7)  # the last block is smaller
    (tmp_path / 'f.npz.17.part').write_text('of a process that was killed')
    run(encoder, tree, tmp_path / 'f.npz')
    found = np.load(tmp_path / 'f.npz')
    names, features = found['names'].tolist(), found['features']
    about = json.loads(str(found['about']))
    assert names == sorted(path.relative_to(tree).as_posix() for path in tree.rglob('*.png'))
    assert about['size'] == 16
    assert about['encoder'] == tensors_crc(model.load_model(encoder).f)
    images = np.stack([np.asarray(Image.open(tree / name)) for name in names])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # (n, H, W, 3) -> (n, 3, H, W)
    expected = features_of(encoder, images).numpy()
    assert np.abs(features - expected).max() < 1e-6
    assert not list(tmp_path.glob('*.part'))


def test_sizes_are_the_runs_unless_a_flag_says_otherwise(encoder, tree, tmp_path):
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    config['settings'] = dict(store_size=24, fit='pad', test_size=12)
    write_json(encoder.with_name('config.json'), config)
    found = []
    for flags in [], ['--fit', 'squeeze', '--test_size', '0']:
        out = tmp_path / f'{len(found)}.npz'
        run(encoder, tree, out, *flags)
        about = json.loads(str(np.load(out)['about']))
        own = about['settings']
        found.append((about['size'], own['fit'], own['test_size']))
    assert found == [(24, 'pad', 12), (24, 'squeeze', 0)]


def test_damaged_and_too_large_images_are_left_out_and_all_named(
    encoder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)  # Pillow refuses twice as many
    for i in range(5):
        Image.new('RGB', (16, 16), (50 * i, 0, 0)).save(tmp_path / f'{i}.png')
    for name in '1.png', '3.png':
        (tmp_path / name).write_bytes(b'no image')
    Image.new('1', (3000, 3000)).save(tmp_path / 'large.png')
    run(encoder, tmp_path, tmp_path / 'f.npz')
    found = np.load(tmp_path / 'f.npz')
    assert found['names'].tolist() == ['0.png', '2.png', '4.png']
    assert found['features'].shape == (3, 128)
    about = json.loads(str(found['about']))
    assert about['damaged'] == ['1.png', '3.png', 'large.png']
    said = capsys.readouterr().out
    first = f'such as {tmp_path}/1.png: empty, or not an image'
    assert f'3 images damaged or too large and left out, {first}' in said


def test_among_the_images_only_the_file_is_visible_and_runs_are_left_out(encoder, tmp_path, capsys):
    place = tmp_path / 'photos'
    for name in 'a.png', 'results/mine/curves.png':
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (16, 16)).save(place / name)
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    write_json(place / 'results' / 'mine' / 'config.json', config)
    for _ in range(2):
        run(encoder, place, place / 'f.npz')
        assert np.load(place / 'f.npz')['names'].tolist() == ['a.png']
    visible = [path.name for path in place.iterdir() if path.name[0] != '.']
    assert sorted(visible) == ['a.png', 'f.npz', 'results']
    said = capsys.readouterr().out
    assert f'{place}: left out 1 with a run in it, such as {place}/results/mine' in said


@pytest.mark.parametrize(
    'root, message', [('nowhere', 'nowhere is not a directory'), ('empty', 'no image in it')]
)
def test_nothing_to_embed_is_one_line(encoder, tmp_path, root, message):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        run(encoder, tmp_path / root, tmp_path / 'f.npz')
    assert not (tmp_path / 'f.npz').exists()


def test_a_place_that_cannot_be_written_is_named_before_the_work(encoder, tree, monkeypatch):
    monkeypatch.setattr(embed, 'load_encoder', None)
    with pytest.raises(UserError, match='cannot write in /proc/nowhere'):
        run(encoder, tree, '/proc/nowhere/f.npz')


def test_no_home_directory_is_needed(encoder, tree, tmp_path, monkeypatch):
    for variable in 'XDG_CACHE_HOME', 'HOME':
        monkeypatch.setenv(variable, '/proc/nowhere')
    run(encoder, tree, tmp_path / 'f.npz')
    assert len(np.load(tmp_path / 'f.npz')['names']) == 39


def test_the_name_of_the_file_ends_in_npz(capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(['--out', 'features.csv'])
    assert stop.value.code == 2
    assert 'its name must end in .npz' in capsys.readouterr().err


# A file that is brought up to date


@pytest.fixture
def photos(tmp_path):
    """A directory of 5 images of 16 px, of random pixels."""
    place = tmp_path / 'photos'
    place.mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f'{i}.png')
    return place


def test_only_new_and_changed_images_are_encoded_again(encoder, photos, tmp_path, decoded, capsys):
    out = tmp_path / 'f.npz'
    run(encoder, photos, out, '--store_size', '16')
    (photos / '1.png').unlink()
    (photos / '3.png').write_bytes(b'no image')
    shutil.copy(photos / '0.png', photos / '2.png')
    os.utime(photos / '2.png', (1, 1))
    Image.new('RGB', (20, 10)).save(photos / 'new.png')
    capsys.readouterr()
    decoded.clear()
    embed.main(['--out', str(out)])  # all else is in the file
    assert set(decoded) == {'2.png', '3.png', 'new.png'}
    assert f'{out}: 2 images unchanged, 3 new or changed, 1 gone' in capsys.readouterr().out
    found = read_embedded(out)
    assert found.names.tolist() == ['0.png', '2.png', '4.png', 'new.png']
    assert found.about['damaged'] == ['3.png']
    assert found.pixels.tolist() == [256, 256, 256, 200]
    assert found.bytes.tolist() == [(photos / name).stat().st_size for name in found.names]
    np.testing.assert_array_equal(found.features[0], found.features[1])

    run(encoder, photos, tmp_path / 'anew.npz', '--store_size', '16')
    anew = read_embedded(tmp_path / 'anew.npz')
    np.testing.assert_allclose(found.features, anew.features, atol=1e-6)
    decoded.clear()
    run(encoder, photos, out)
    assert set(decoded) == {'3.png'}


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--fit', 'pad'], r'with --fit crop: leave out --fit, or choose another --out'),
        (['--store_size', '24'], 'with --store_size 0: leave out'),
        (['--precision', 'bf16'], 'with --precision fp32: leave out'),
        (['--model_path', 'other'], 'features of another encoder, .*model_1.pth'),
        (['--root', 'other'], 'features of the images in .*photos: choose another --out'),
    ],
)
def test_a_file_of_other_features_is_refused_and_stays(encoder, photos, tmp_path, flags, message):
    out = tmp_path / 'f.npz'
    run(encoder, photos, out)
    (tmp_path / 'other').mkdir()
    if flags[0] == '--model_path':
        net = model.Model(8, 'resnet18', 8, width=0.25)
        write_tensors(tmp_path / 'other.pth', net.state_dict())
        flags = ['--model_path', str(tmp_path / 'other.pth')]
    if flags[0] == '--root':
        flags = ['--root', str(tmp_path / 'other')]
    before = out.read_bytes()
    with pytest.raises(UserError, match=message):
        embed.main(['--out', str(out), *flags])
    assert out.read_bytes() == before


@pytest.mark.parametrize('content', ['text', 'another', 'cut'])
def test_a_file_that_is_damaged_or_anothers_is_refused_and_stays(
    encoder, photos, tmp_path, content
):
    out = tmp_path / 'f.npz'
    if content == 'text':
        out.write_text('my notes')
    elif content == 'another':
        np.savez(out, names=['a'], features=[[1.0]])
    else:
        run(encoder, photos, out)
        out.write_bytes(out.read_bytes()[:-300])
    before = out.read_bytes()
    with pytest.raises(UserError, match=r'damaged or not an \.npz file of misc/embed.py'):
        run(encoder, photos, out)
    assert out.read_bytes() == before


def test_moved_images_and_a_moved_encoder_keep_the_features(encoder, photos, tmp_path, decoded):
    out = tmp_path / 'f.npz'
    run(encoder, photos, out)
    moved = photos.rename(tmp_path / 'moved')
    elsewhere = encoder.rename(tmp_path / 'elsewhere.pth')
    decoded.clear()
    embed.main(['--out', str(out), '--root', str(moved), '--model_path', str(elsewhere)])
    assert not decoded
    about = read_embedded(out).about
    assert (about['root'], about['settings']['model_path']) == (str(moved), str(elsewhere))


def test_a_kill_loses_ten_minutes_at_most(encoder, photos, tmp_path, monkeypatch, decoded):
    monkeypatch.setattr(embed, 'BLOCK', 2)
    monkeypatch.setattr(embed, 'SAVE_SECONDS', -1)  # after each block
    out = tmp_path / 'f.npz'
    write = embed.write_embedded

    def killed(*args):
        write(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, 'write_embedded', killed)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, photos, out)
    assert read_embedded(out).names.tolist() == ['0.png', '1.png']
    monkeypatch.setattr(embed, 'write_embedded', write)
    decoded.clear()
    run(encoder, photos, out)
    assert set(decoded) == {'2.png', '3.png', '4.png'}
    assert len(read_embedded(out).names) == 5


def test_an_image_whose_features_are_not_finite_is_left_out_and_named(
    encoder, photos, tmp_path, monkeypatch, capsys
):
    encode = embed.Evaluator.encode

    def overflow(self, images, size):
        features = encode(self, images, size)
        features[2] = torch.inf
        return features

    monkeypatch.setattr(embed.Evaluator, 'encode', overflow)
    run(encoder, photos, tmp_path / 'f.npz')
    assert read_embedded(tmp_path / 'f.npz').names.tolist() == ['0.png', '1.png', '3.png', '4.png']
    assert '2.png: its features are not finite' in capsys.readouterr().out


def test_links_to_images_that_are_there_are_left_out(encoder, photos, tmp_path, capsys):
    (photos / '00.png').symlink_to(photos / '3.png')
    (tmp_path / 'elsewhere.png').write_bytes((photos / '0.png').read_bytes())
    (photos / 'link.png').symlink_to(tmp_path / 'elsewhere.png')
    (photos / 'loop.png').symlink_to('loop.png')
    run(encoder, photos, tmp_path / 'f.npz')
    names = read_embedded(tmp_path / 'f.npz').names.tolist()
    assert names == ['0.png', '1.png', '2.png', '3.png', '4.png', 'link.png']
    assert (
        f'left out 1 linked to another of them, such as {photos}/00.png' in capsys.readouterr().out
    )


def test_a_stop_saves_what_there_is(encoder, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(embed, 'BLOCK', 2)
    calls = []
    encode = embed.Evaluator.encode

    def interrupted(self, images, size):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, images, size)

    monkeypatch.setattr(embed.Evaluator, 'encode', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, photos, tmp_path / 'f.npz')
    assert read_embedded(tmp_path / 'f.npz').names.tolist() == ['0.png', '1.png']
    assert 'the same command continues' in capsys.readouterr().out


def test_what_is_no_regular_file_is_left_out_and_heic_told(encoder, photos, tmp_path, capsys):
    os.mkfifo(photos / 'pipe.png')
    (photos / 'phone.HEIC').write_bytes(b'')
    pixels = np.full((8, 8), 900, np.uint16)  # ten of 16 bits
    Image.fromarray(pixels).save(photos / 'dark.png')
    run(encoder, photos, tmp_path / 'f.npz')
    names = read_embedded(tmp_path / 'f.npz').names.tolist()
    assert names == ['0.png', '1.png', '2.png', '3.png', '4.png', 'dark.png']
    said = capsys.readouterr().out
    assert f'1 no regular file, such as {photos}/pipe.png' in said
    assert f'1 in HEIC, which needs converting first, such as {photos}/phone.HEIC' in said
    assert '1 grey images of 16 bits come out dark' in said
    assert 'such as dark.png' in said
