"""misc/embed.py: features are the encoder's, by names of files; duplicates are the pairs above."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import embed
import model
from hardneg import runs
from hardneg.augment import normalize
from hardneg.files import crc, write_json, write_tensors
from hardneg.runtime import UserError


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


@pytest.mark.parametrize('form', ['npz', 'csv'])
def test_features_are_those_of_load_model_under_their_names(
    encoder, tree, tmp_path, form, monkeypatch
):
    monkeypatch.setattr(embed, 'BLOCK', 7)  # the last block is smaller
    out = tmp_path / f'features.{form}'
    run(encoder, tree, out)
    if form == 'npz':
        found = np.load(out)
        names, features = found['names'].tolist(), found['features']
        about = json.loads(str(found['about']))
    else:
        table = pd.read_csv(out)
        names, features = table['name'].tolist(), table.drop(columns='name').to_numpy()
        about = json.loads(out.with_suffix('.json').read_text())
    assert names == sorted(path.relative_to(tree).as_posix() for path in tree.rglob('*.png'))
    assert about['size'] == 16
    assert about['encoder'] == crc(encoder)
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
        run(encoder, tree, tmp_path / 'features.npz', *flags)
        about = json.loads(str(np.load(tmp_path / 'features.npz')['about']))
        own = about['settings']
        found.append((about['size'], own['fit'], own['test_size']))
    assert found == [(24, 'pad', 12), (24, 'squeeze', 0)]


@pytest.mark.parametrize('form', ['npz', 'csv'])
def test_damaged_and_too_large_images_are_left_out_and_all_named(
    encoder, tmp_path, form, monkeypatch, capsys
):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 4_000_000)  # Pillow refuses twice as many
    for i in range(5):
        Image.new('RGB', (16, 16), (50 * i, 0, 0)).save(tmp_path / f'{i}.png')
    for name in '1.png', '3.png':
        (tmp_path / name).write_bytes(b'no image')
    Image.new('1', (3000, 3000)).save(tmp_path / 'large.png')
    out = tmp_path / f'f.{form}'
    run(encoder, tmp_path, out)
    if form == 'npz':
        found = np.load(out)
        names, about = found['names'].tolist(), json.loads(str(found['about']))
        assert found['features'].shape == (3, 128)
    else:
        names = pd.read_csv(out)['name'].tolist()
        about = json.loads(out.with_suffix('.json').read_text())
    assert names == ['0.png', '2.png', '4.png']
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


def test_pairs_of_files_are_listed_with_their_cosines(encoder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in 'a', 'b':
        pixels = rng.integers(256, size=(16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f'{name}.png')
        Image.fromarray(pixels).save(tmp_path / f'{name}_copy.png')
    run(encoder, tmp_path, tmp_path / 'f.csv', '--duplicates', '0.99999')
    rows = pd.read_csv(tmp_path / 'f_duplicates.csv')
    pairs = rows[['first', 'second']].values.tolist()
    assert sorted(pairs) == [['a.png', 'a_copy.png'], ['b.png', 'b_copy.png']]
    assert rows['cosine'].tolist() == [1, 1]
    assert '2 pairs with a cosine of 0.99999 or more' in capsys.readouterr().out


def test_duplicates_are_all_pairs_above_the_cosine(monkeypatch):
    x = F.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    i, j, cosine = embed.duplicates(x, 0.8, tile=16)
    whole = (x @ x.T).triu(1)
    expected = (whole >= 0.8).nonzero().tolist()
    assert sorted(zip(i.tolist(), j.tolist())) == sorted(map(tuple, expected))
    assert len(i) > 20
    assert (cosine.diff() <= 0).all()
    torch.testing.assert_close(cosine, whole[i, j])
    monkeypatch.setattr(embed, 'PAIRS', 10)
    with pytest.raises(UserError, match='raise --duplicates'):
        embed.duplicates(x, 0.8)


@pytest.mark.parametrize(
    'root, message', [('nowhere', 'nowhere is not a directory'), ('empty', 'no image in it')]
)
def test_nothing_to_embed_is_one_line(encoder, tmp_path, root, message):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        run(encoder, tmp_path / root, tmp_path / 'f.npz')
    assert not (tmp_path / 'f.npz').exists()


def test_a_place_that_cannot_be_written_is_named_before_the_work(encoder, tree, monkeypatch):
    monkeypatch.setattr(embed, 'embed', None)
    with pytest.raises(UserError, match='cannot write in /proc/nowhere'):
        run(encoder, tree, '/proc/nowhere/f.npz')


def test_no_home_directory_is_needed(encoder, tree, tmp_path, monkeypatch):
    for variable in 'XDG_CACHE_HOME', 'HOME':
        monkeypatch.setenv(variable, '/proc/nowhere')
    run(encoder, tree, tmp_path / 'f.npz')
    assert len(np.load(tmp_path / 'f.npz')['names']) == 39


def test_the_name_of_the_file_says_its_form(capsys):
    with pytest.raises(SystemExit) as stop:
        embed.main(['--out', 'features.txt'])
    assert stop.value.code == 2
    assert 'its name must end in .npz or .csv' in capsys.readouterr().err
