"""misc/search.py: what it finds is what was planted, and its pages show it, whatever the names."""

import base64
import io
import os
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import embed
import model
import page
import search
from hardneg.embedded import Embedded, read_embedded, write_embedded
from hardneg.files import write_tensors
from hardneg.runtime import UserError
from model import unit

rng = np.random.default_rng(0)


def save_random(path, size=(32, 32)):
    pixels = rng.integers(256, size=(*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """A directory with photos, an encoder, and features: 14 images, a copy, and 3 of another."""
    place = tmp_path_factory.mktemp('made')
    (place / 'photos' / 'sub').mkdir(parents=True)
    for i in range(14):
        save_random(place / 'photos' / f'{i}.png')
    shutil.copy(place / 'photos' / '3.png', place / 'photos' / 'sub' / 'copy of 3.png')
    with Image.open(place / 'photos' / '5.png') as image:
        image.resize((64, 64), Image.Resampling.NEAREST).save(place / 'photos' / '5 large.png')
        image.save(place / 'photos' / '5.bmp')
    torch.manual_seed(0)
    net = model.Model(8, 'resnet18', 8, width=0.25)
    write_tensors(place / 'model_1.pth', net.state_dict())
    flags = f'--model_path {place}/model_1.pth --root {place}/photos --out {place}/f.npz'
    embed.main([*flags.split(), '--store_size', '32', '--precision', 'fp32'])
    # By an untrained encoder all are alike. These are as apart as by a good one.
    found = read_embedded(place / 'f.npz')
    copies = {'sub/copy of 3.png': '3.png', '5 large.png': '5.png', '5.bmp': '5.png'}
    own = {name: rng.normal(size=64) for name in found.names}
    rows = [own[copies.get(name, name)] + 0.05 * own[name] for name in found.names]
    found.features = unit(torch.tensor(np.array(rows, np.float32))).numpy()
    write_embedded(place / 'apart.npz', found)
    return place


class Parsed(HTMLParser):
    """The sections of a page: the texts, pictures and links in each."""

    def __init__(self, file):
        super().__init__()
        self.sections = []
        self.open = []
        self.links = []
        self.feed(file.read_text('utf-8'))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ('meta', 'br', 'img'):
            self.open.append(tag)
        if tag == 'section':
            self.sections.append(dict(texts=[], pictures=[], files=[]))
        if tag == 'img':
            kind, data = attributes['src'].split(',')
            assert kind == 'data:image/jpeg;base64'
            image = Image.open(io.BytesIO(base64.b64decode(data)))
            self.sections[-1]['pictures'].append((attributes['alt'], image.size))
        if tag == 'a' and 'section' in self.open[:-1]:
            self.sections[-1]['files'].append(attributes['href'])
        elif tag == 'a':
            self.links.append(attributes['href'])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if 'section' in self.open and data.strip():
            self.sections[-1]['texts'].append(data)


def test_a_search_prints_the_nearest_and_shows_them_on_a_page(made, tmp_path, capsys):
    photo = tmp_path / 'mine.png'
    shutil.copy(made / 'photos' / '3.png', photo)
    search.main([str(made / 'f.npz'), str(photo), '--top', '4'])
    found = read_embedded(made / 'f.npz')
    own = found.features[found.names.tolist().index('3.png')]
    order = (found.features @ own).argsort(kind='stable')[::-1][:4]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(photo)
    assert {line.split(maxsplit=1)[1] for line in lines[1:3]} == {'3.png', 'sub/copy of 3.png'}
    assert [line.split()[0] for line in lines[1:3]] == ['1.000', '1.000']
    assert sorted(line.split(maxsplit=1)[1] for line in lines[1:5]) == sorted(found.names[order])
    assert lines[5] == str(made / 'f_search.html')
    (section,) = Parsed(made / 'f_search.html').sections
    names = [name for name, _ in section['pictures']]
    assert names == ['mine.png', *(line.split(maxsplit=1)[1] for line in lines[1:5])]
    assert section['files'][0] == photo.as_uri()


def test_a_photo_of_the_set_does_not_find_itself(made, capsys):
    search.main([str(made / 'f.npz'), str(made / 'photos' / '3.png'), '--top', '2'])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=1) == ['1.000', 'sub/copy of 3.png']
    assert '3.png' not in [line.split(maxsplit=1)[1] for line in lines[1:3]]


def test_groups_of_copies_are_found_and_the_largest_is_kept(made, capsys):
    before = sorted((path, path.stat().st_mtime_ns) for path in (made / 'photos').rglob('*'))
    search.main([str(made / 'apart.npz'), '--duplicates'])
    table = pd.read_csv(made / 'apart_groups.csv')
    groups = {frozenset(rows['name']) for _, rows in table.groupby('group')}
    assert groups == {
        frozenset(['3.png', 'sub/copy of 3.png']),
        frozenset(['5.png', '5.bmp', '5 large.png']),
    }
    kept = table.loc[table['keep'], 'name'].tolist()
    assert sorted(kept) == ['3.png', '5 large.png']
    found = read_embedded(made / 'apart.npz')
    place = {name: i for i, name in enumerate(found.names)}
    for _, rows in table.groupby('group'):
        best = found.features[place[rows.loc[rows['keep'], 'name'].item()]]
        for row in rows.itertuples():
            i = place[row.name]
            assert row.cosine == pytest.approx(best @ found.features[i], abs=1e-4)
            assert (row.pixels, row.bytes) == (found.pixels[i], found.bytes[i])
    assert table['pixels'].max() == 64 * 64
    after = sorted((path, path.stat().st_mtime_ns) for path in (made / 'photos').rglob('*'))
    assert after == before
    assert '2 groups, 5 of 17 photos: ' in capsys.readouterr().out
    sections = Parsed(made / 'apart_groups.html').sections
    assert {frozenset(name for name, _ in section['pictures']) for section in sections} == groups
    for section in sections:
        mark = section['texts'].index('keep')
        assert section['texts'][mark + 1] in ('3.png', '5 large.png')


def test_a_cosine_and_a_number_of_pairs_are_other_rules(made, tmp_path):
    out = str(tmp_path / 'g.html')
    search.main([str(made / 'apart.npz'), '--at_least', '0.9', '--out', out])
    assert len(pd.read_csv(tmp_path / 'g.csv')['group'].unique()) == 2
    search.main([str(made / 'apart.npz'), '--top_pairs', '3', '--out', out])
    table = pd.read_csv(tmp_path / 'g.csv')
    assert table['group'].tolist() == [1, 1, 2, 2, 3, 3]
    assert table['keep'].tolist() == [True, False] * 3
    search.main([str(made / 'apart.npz'), '--duplicates', '--ratio', '0.0101', '--out', out])
    strict = pd.read_csv(tmp_path / 'g.csv')
    assert strict.empty  # no copies are as near as that
    search.main([str(made / 'f.npz'), '--at_least', '1', '--out', str(tmp_path / 'none.html')])
    Parsed(tmp_path / 'none.html')


def test_groups_come_in_the_order_of_their_least_similar_photo():
    angles = torch.tensor([0.0, 0.1, 0.6, 2.0, 2.3])  # cosines 0.995 and 0.825, and 0.955
    features = torch.stack([angles.cos(), angles.sin()], 1).numpy()
    numbers = np.arange(5, 0, -1)  # the first photo of each group is kept
    embedded = Embedded(np.array(list('abcde')), features, numbers, numbers, numbers, {})
    table = search.table_of(embedded, [torch.tensor([0, 1, 2]), torch.tensor([3, 4])])
    assert table['name'].tolist() == ['d', 'e', 'a', 'b', 'c']
    assert table['group'].tolist() == [1, 1, 2, 2, 2]


def test_a_wrong_place_of_the_photos_is_told(made, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    words = ['--duplicates', '--root', str(tmp_path / 'empty'), '--out', str(tmp_path / 'a.html')]
    search.main([str(made / 'apart.npz'), *words])
    said = capsys.readouterr().out
    assert f'5 photos of the page were not found in {tmp_path}/empty' in said


def test_a_table_of_something_else_is_not_replaced(made, tmp_path):
    (tmp_path / 'f.csv').write_text('name,f0\na.png,1\n')
    with pytest.raises(UserError, match=r'f\.csv is there, and no table of groups'):
        search.main([str(made / 'f.npz'), '--at_least', '0.9', '--out', str(tmp_path / 'f.html')])
    assert (tmp_path / 'f.csv').read_text() == 'name,f0\na.png,1\n'
    assert not (tmp_path / 'f.html').exists()


@pytest.mark.parametrize(
    'words, message',
    [
        ([], 'give photos to search for, or --duplicates'),
        (['a.png', '--duplicates'], 'not both'),
        (['--at_least', '0.9', '--top_pairs', '3'], 'are two rules: choose one'),
        (['--duplicates', '--top', '3'], '--top, --model_path and --arch are for a search'),
        (['a.png', '--out', 'a.txt'], 'must end in .html'),
    ],
)
def test_flags_that_do_not_fit_are_usage_errors(made, words, message):
    with pytest.raises(UserError, match=message):
        search.main([str(made / 'f.npz'), *words])


def test_what_is_missing_or_has_moved_is_named(made, tmp_path):
    photo = str(made / 'photos' / '3.png')
    with pytest.raises(UserError, match=r'no\.npz: no such file\. misc/embed.py --out makes it'):
        search.main([str(tmp_path / 'no.npz'), photo])
    with pytest.raises(UserError, match=r'away\.png: No such file or directory$'):
        search.main([str(made / 'f.npz'), str(tmp_path / 'away.png')])
    other = model.Model(8, 'resnet18', 8, width=0.25)
    write_tensors(tmp_path / 'other.pth', other.state_dict())
    with pytest.raises(UserError, match='is not the encoder of the features'):
        search.main([str(made / 'f.npz'), photo, '--model_path', str(tmp_path / 'other.pth')])

    moved = tmp_path / 'all'
    shutil.copytree(made, moved)
    found = read_embedded(moved / 'f.npz')
    found.about['root'] = str(tmp_path / 'gone')
    found.about['settings']['model_path'] = str(tmp_path / 'gone.pth')
    write_embedded(moved / 'f.npz', found)
    with pytest.raises(UserError, match='gone is not a directory: give .* with --root'):
        search.main([str(moved / 'f.npz'), photo])
    words = ['--root', str(moved / 'photos'), '--model_path', str(moved / 'model_1.pth')]
    search.main([str(moved / 'f.npz'), photo, *words])
    (section,) = Parsed(moved / 'f_search.html').sections
    assert len(section['pictures']) == 11


# Pages


NAMES = ['<b>bold.png', '"quoted" & \'so\'.png', 'über süß.png', 'שלום.png', 'a\u202eb.png']


def test_names_of_any_letters_are_text_on_a_page_and_links_lead_to_the_files(tmp_path):
    photos = []
    for name in [*NAMES, os.fsdecode(b'latin-\xe9.png')]:
        save_random(tmp_path / name, (40, 400))
        photos.append(page.Photo(tmp_path / name, name, ['<i>line</i>']))
    photos.append(page.Photo(tmp_path / 'gone.png', 'gone.png', []))
    title = '</section><script>alert(1)</script>'
    page.write_pages(tmp_path / 'p.html', title, title, [page.Group(title, photos)])
    assert '<script' not in (tmp_path / 'p.html').read_text()
    (section,) = Parsed(tmp_path / 'p.html').sections
    shown = [name for name, _ in section['pictures']]
    assert shown == [*NAMES, 'latin-?.png']
    assert {size for _, size in section['pictures']} == {(160, 16)}
    assert set(shown) | {title, '<i>line</i>', 'gone.png'} <= set(section['texts'])
    assert section['files'] == [photo.path.as_uri() for photo in photos[:-1]]
    assert 'not found or damaged' in section['texts']


def test_many_groups_go_to_further_pages_and_large_ones_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'GROUPS', 2)
    monkeypatch.setattr(page, 'SHOWN', 3)
    photo = page.Photo(tmp_path / 'gone.png', 'gone.png', [])
    groups = [page.Group(f'group {i}', [photo] * (i + 2)) for i in range(5)]
    page.write_pages(tmp_path / 'p.html', 'title', 'about', groups)
    titles = []
    for name in 'p.html', 'p_2.html', 'p_3.html':
        parsed = Parsed(tmp_path / name)
        titles += [section['texts'][0] for section in parsed.sections]
        assert set(parsed.links) == {'p.html', 'p_2.html', 'p_3.html'} - {name}
    assert titles == [f'group {i}' for i in range(5)]
    texts = Parsed(tmp_path / 'p_3.html').sections[0]['texts']
    assert texts.count('gone.png') == 3
    assert texts[-1] == 'and 3 more'


def test_a_page_has_not_too_many_photos_and_no_comments_of_theirs(tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'PHOTOS', 4)
    photo = page.Photo(tmp_path / 'a.gif', 'a.gif', [])
    Image.new('RGB', (9, 9)).save(photo.path, comment=b'private' * 10_000)
    page.write_pages(tmp_path / 'p#.html', 'title', '', [page.Group('group', [photo] * 3)] * 4)
    pages = [Parsed(tmp_path / name) for name in ('p#.html', 'p#_2.html')]
    assert [len(parsed.sections) for parsed in pages] == [2, 2]
    assert set(pages[0].links) == {'p%23_2.html'}
    picture = page.thumbnail(photo.path)
    assert picture is not None
    assert b'private' not in picture


def test_a_photo_on_its_side_stands_upright_on_the_page(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (60, 30)).save(tmp_path / 'a.jpg', exif=exif)
    image = Image.open(io.BytesIO(page.thumbnail(tmp_path / 'a.jpg')))
    assert image.size == (30, 60)
