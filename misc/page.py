"""HTML pages of photos in groups. Each is one file with its pictures in it: it needs no server."""

import base64
import html
import io
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from hardneg import runtime
from hardneg.decoding import upright
from hardneg.files import write

SIDE = 160  # pixels of a thumbnail, at most
GROUPS = 1000  # on a page, at most
PHOTOS = 5000  # on a page, about: each takes some 8 KB
SHOWN = 100  # of a group
STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem;
  padding: 0 1rem; color: #222; background: #fff; }
h1 { font-size: 1.3rem; }
h2 { font-size: 1rem; margin: 1.8rem 0 .5rem; overflow-wrap: anywhere; }
section { border-top: 1px solid #ddd; content-visibility: auto;
  contain-intrinsic-size: auto 20rem; }
.photos { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-end; }
figure { margin: 0; width: 168px; }
img, .none { display: block; margin: auto; border: 4px solid transparent; }
.none { width: 150px; padding: 3rem 0; text-align: center; background: #eee; color: #666; }
.marked img { border-color: #009e73; }
figcaption { font-size: .8rem; overflow-wrap: anywhere; text-align: center; color: #555; }
figcaption bdi { color: #222; }
.mark { color: #00714f; font-weight: bold; }
"""


class Photo(NamedTuple):
    """A photo on a page: its file, its name, lines of text below, and a mark or ''."""

    path: Path
    name: str
    lines: list
    mark: str = ''


class Group(NamedTuple):
    title: str
    photos: list


def write_pages(out, title, about, groups):
    """Write Groups to the file out and, if they are many, to out_2 and so on.

    Args:
        title, about: texts at the top of each page.

    Returns how many of the photos could not be read.

    Raises:
        UserError: a file cannot be written.
    """
    missing = 0
    parts = pages_of(groups)
    files = [out]
    for number in range(2, len(parts) + 1):
        files.append(out.with_name(f'{out.stem}_{number}{out.suffix}'))
    total = sum(len(group.photos[:SHOWN]) for group in groups)
    bar = tqdm(total=total, desc='Thumbnails', unit='photo', delay=2, leave=False, disable=None)
    with ThreadPoolExecutor(runtime.cores()) as pool, bar:
        for number, (file, part) in enumerate(zip(files, parts)):
            paths = [photo.path for group in part for photo in group.photos[:SHOWN]]
            pictures = pool.map(thumbnail, paths)
            body = [links(files, number)]
            for group in part:
                own = list(islice(pictures, len(group.photos[:SHOWN])))
                missing += own.count(None)
                body.append(section(group, own))
                bar.update(len(own))
            body.append(links(files, number))
            write(file, whole_page(title, about, '\n'.join(body)).encode(errors='replace'))
    return missing


def pages_of(groups):
    """The Groups of each page: one list at least."""
    pages = [[]]
    photos = 0
    for group in groups:
        if len(pages[-1]) == GROUPS or photos >= PHOTOS:
            pages.append([])
            photos = 0
        pages[-1].append(group)
        photos += len(group.photos[:SHOWN])
    return pages


def whole_page(title, about, body):
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{html.escape(about)}</p>
{body}
</body>
</html>
"""


def links(files, current):
    """Links to the pages, if there are several."""
    if len(files) == 1:
        return ''
    found = []
    for number, file in enumerate(files):
        text = f'page {number + 1}'
        if number != current:
            text = f'<a href="{quote(os.fsencode(file.name))}">{text}</a>'
        found.append(text)
    return f'<nav>{" · ".join(found)}</nav>'


def section(group, pictures):
    """A Group, and the thumbnails of its first photos."""
    figures = [figure(photo, picture) for photo, picture in zip(group.photos, pictures)]
    more = len(group.photos) - len(figures)
    if more:
        figures.append(f'<p>and {more:,} more</p>')
    title = f'<h2><bdi>{html.escape(group.title)}</bdi></h2>'
    photos = '\n'.join(['<div class="photos">', *figures, '</div>'])
    return f'<section>\n{title}\n{photos}\n</section>'


def figure(photo, picture):
    """A Photo, and its thumbnail, which is None if the file cannot be read."""
    name = html.escape(photo.name)
    shown = '<span class="none">not found or damaged</span>'
    if picture is not None:
        data = base64.b64encode(picture).decode()
        place = html.escape(Path(os.path.abspath(photo.path)).as_uri())
        image = f'<img src="data:image/jpeg;base64,{data}" alt="{name}">'
        shown = f'<a href="{place}">{image}</a>'
    lines = [f'<bdi>{name}</bdi>', *map(html.escape, photo.lines)]
    start = '<figure>'
    if photo.mark:
        start = '<figure class="marked">'
        lines.insert(0, f'<span class="mark">{html.escape(photo.mark)}</span>')
    return f'{start}{shown}<figcaption>{"<br>".join(lines)}</figcaption></figure>'


def thumbnail(path):
    """A photo as a JPEG of at most SIDE pixels a side, in bytes; None if it cannot be read."""
    file = io.BytesIO()
    try:
        image = upright(path, SIDE // 2)
        image.thumbnail((SIDE, SIDE))
        image.info.clear()  # comments are private, and may be too long for a JPEG
        image.save(file, 'JPEG', quality=80)
    except Exception:  # whatever a decoder makes of a damaged file
        return None
    return file.getvalue()
