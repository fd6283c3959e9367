"""Plant variants of photos among them, to measure what finds them again.

    python results/photos/variants.py ORIGINALS OUT [FIRST]

Copies every second photo below ORIGINALS, sorted by name, from place FIRST on (0), to OUT and adds
variants of some: of 50 one, of 50 three to five, and of one a burst of 15. truth.csv beside OUT
names, for each variant, its original and its kind. Another kind, crops of 60 %, is made of 50 more
photos.

small      150 px on the longer side, JPEG of quality 50
central    the central 80 % of each side
mirrored   left to right
bar        brighter by a quarter, with a white bar of a tenth of the height below
turned     the same pixels, stored on their side, with the EXIF tag that turns them upright
burst      a shifted cut of 90 to 100 % of each side, brightness within 10 %
crop60     a cut of 60 % of each side, anywhere
"""

import random
import shutil
import sys
from pathlib import Path

import pandas as pd
from PIL import Image, ImageEnhance, ImageOps

KINDS = 'small', 'central', 'mirrored', 'bar', 'turned'


def cut(image, part, x=0.5, y=0.5):
    """A part of each side, from place x, y in [0, 1] of what is free."""
    width, height = image.size
    w, h = round(part * width), round(part * height)
    left, top = round(x * (width - w)), round(y * (height - h))
    return image.crop((left, top, left + w, top + h))


def variant(image, kind, rng):
    """The variant of a PIL image, and the options by which it is saved."""
    options = dict(quality=92)
    if kind == 'small':
        image = image.copy()
        image.thumbnail((150, 150))
        options = dict(quality=50)
    elif kind == 'central':
        image = cut(image, 0.8)
    elif kind == 'mirrored':
        image = ImageOps.mirror(image)
    elif kind == 'bar':
        image = ImageEnhance.Brightness(image).enhance(1.25)
        bar = 0, 0, 0, image.height // 10
        image = ImageOps.expand(image, bar, 'white')
    elif kind == 'turned':
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6
        options['exif'] = exif
    elif kind == 'burst':
        image = cut(image, rng.uniform(0.9, 1), rng.random(), rng.random())
        image = ImageEnhance.Brightness(image).enhance(rng.uniform(0.9, 1.1))
    elif kind == 'crop60':
        image = cut(image, 0.6, rng.random(), rng.random())
    return image, options


def main():
    source, out = map(Path, sys.argv[1:3])
    first = 0
    if len(sys.argv) > 3:
        first = int(sys.argv[3])
    rng = random.Random(0)
    originals = sorted(source.rglob('*.JPEG'), key=lambda path: path.name)[first::2]
    out.mkdir(parents=True)
    for path in originals:
        shutil.copy(path, out / path.name)
    chosen = rng.sample(originals, 151)
    plan = [(path, [KINDS[i % 5]]) for i, path in enumerate(chosen[:50])]
    for path in chosen[50:100]:
        plan.append((path, rng.sample(KINDS, rng.randint(3, 5))))
    plan.append((chosen[100], ['burst'] * 15))
    plan += [(path, ['crop60']) for path in chosen[101:]]
    rows = []
    for path, kinds in plan:
        image = Image.open(path).convert('RGB')
        for number, kind in enumerate(kinds):
            changed, options = variant(image, kind, rng)
            name = f'{path.stem}_{kind}_{number}.jpg'
            changed.save(out / name, **options)
            rows.append((name, path.name, kind))
    table = pd.DataFrame(rows, columns=['variant', 'original', 'kind'])
    table.to_csv(out.with_name('truth.csv'), index=False)


if __name__ == '__main__':
    main()
