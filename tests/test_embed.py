"""misc/embed.py: the features are the encoder's, under the names of their files, and duplicates are the pairs above."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import embed
import model
from hardneg.augment import normalize
from hardneg.files import write_tensors
from hardneg.runtime import UserError


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    net = model.Model(8, 'resnet18', 8, width=0.125).eval()
    write_tensors(tmp_path / 'model_1.pth', net.state_dict())
    return tmp_path / 'model_1.pth'


@pytest.mark.parametrize('form', ['npz', 'csv'])
def test_features_are_those_of_load_model_under_their_names(encoder, tree, tmp_path, form, monkeypatch):
    monkeypatch.setattr(embed.embed.__wrapped__, '__defaults__', (7,))  # blocks, the last of which is smaller
    out = tmp_path / f'features.{form}'
    embed.main(['--model_path', str(encoder), '--root', str(tree), '--out', str(out)])
    if form == 'npz':
        found = np.load(out)
        names, features, about = found['names'].tolist(), found['features'], json.loads(str(found['about']))
    else:
        table, about = pd.read_csv(out), json.loads(out.with_suffix('.json').read_text())
        names, features = table['name'].tolist(), table.drop(columns='name').to_numpy()
    assert names == sorted(f'{part}/{name}/{i}.png' for part, n in (('train', 10), ('test', 3))
                           for name in 'abc' for i in range(n)) and about['size'] == 16
    images = np.stack([np.asarray(Image.open(tree / name)) for name in names]).transpose(0, 3, 1, 2)
    expected = model.load_model(encoder).eval()(normalize(torch.from_numpy(images)))[0]
    assert np.abs(features - expected.detach().numpy()).max() < 1e-6
    assert not list(tmp_path.glob('*.part'))


def test_damaged_images_are_left_out_and_named(encoder, tmp_path, capsys):
    for i in range(3):
        Image.new('RGB', (16, 16), (80 * i, 0, 0)).save(tmp_path / f'{i}.png')
    (tmp_path / '1.png').write_bytes(b'no image')
    embed.main(['--model_path', str(encoder), '--root', str(tmp_path), '--out', str(tmp_path / 'f.npz')])
    assert np.load(tmp_path / 'f.npz')['names'].tolist() == ['0.png', '2.png']
    assert f'1 images damaged and left out, such as {tmp_path}/1.png: empty, or not an image' in capsys.readouterr().out


def test_duplicates_are_all_pairs_above_the_cosine(monkeypatch):
    x = torch.nn.functional.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    i, j, cosine = embed.duplicates(x.numpy(), 0.8, tile=16)
    whole = (x @ x.T).triu(1)
    assert {*zip(i.tolist(), j.tolist())} == {*map(tuple, (whole >= 0.8).nonzero().tolist())} and len(i) > 20
    assert (np.diff(cosine) <= 0).all() and np.allclose(cosine, whole[i, j], atol=1e-6)
    monkeypatch.setattr(embed, 'PAIRS', 10)
    with pytest.raises(UserError, match='raise --duplicates'):
        embed.duplicates(x.numpy(), 0.8)


@pytest.mark.parametrize('flags, message', [(['--root', 'nowhere'], 'nowhere is not a directory'),
                                            (['--root', '{empty}'], 'no image in it')])
def test_nothing_to_embed_is_one_line(encoder, tmp_path, flags, message):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        embed.main(['--model_path', str(encoder), '--out', str(tmp_path / 'f.npz'),
                    *(flag.format(empty=tmp_path / 'empty') for flag in flags)])
    assert not (tmp_path / 'f.npz').exists()
