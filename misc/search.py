"""Search the photos of a file of features by photos, or list the near-duplicates among them.

    python misc/search.py features.npz photo.jpg                 # the photos most like a photo
    python misc/search.py features.npz --duplicates              # groups of near-duplicates
    python misc/search.py features.npz --at_least 0.95           # by a cosine that you choose
    python misc/search.py features.npz --top_pairs 100           # the 100 nearest pairs

misc/embed.py makes the file. A search prints names and cosines. All commands write a page of the
photos beside the file, features_search.html or features_groups.html, which any browser opens.

Near-duplicates are photos that are much nearer to each other than to all others: the rule stands in
hardneg/neighbours.py. features_groups.csv has a row for each photo in a group: group, name, cosine
to the one that is kept, pixels, bytes, keep. Kept is the photo with most pixels, then with most
bytes. No photo is deleted or changed.

The encoder and the size of the images are those of the file. A search encodes only what it searches
for. Among 100,000 photos it takes seconds on a CPU, most of them to start.
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import page
from embed import on_device
from hardneg import flags, neighbours, runtime
from hardneg.decoding import decode_or_why
from hardneg.embedded import read_embedded
from hardneg.evaluate import Evaluator
from hardneg.files import write_table
from hardneg.runtime import UsageError, UserError, say
from hardneg.timm_models import encoder_crc
from model import load_encoder, unit

COLUMNS = ('group', 'name', 'cosine', 'pixels', 'bytes', 'keep')


def arguments(argv=None):
    parser = flags.Parser(prog='search.py', description=__doc__.partition('\n')[0])
    parser.add_argument('features', type=flags.path, help='.npz file of misc/embed.py')
    parser.add_argument('photos', nargs='*', type=flags.path, help='image files to search for')
    parser.add_argument('--top', type=flags.count, help='photos that are found for each (10)')
    parser.add_argument(
        '--root',
        type=flags.path,
        help='where the photos of the file are now, if they have moved',
    )
    parser.add_argument(
        '--model_path',
        type=flags.path,
        help='where the encoder is now, if it has moved',
    )
    parser.add_argument(
        '--out',
        type=flags.path,
        help='page to write, .html (beside the features: _search.html or _groups.html)',
    )
    rules = parser.add_argument_group('near-duplicates')
    rules.add_argument(
        '--duplicates', action='store_true', help='group near-duplicates, by a rule of distances'
    )
    rules.add_argument(
        '--ratio',
        type=flags.real(0.01, 0.99),
        help=f'of distances in the rule: less finds fewer, and more surely ({neighbours.RATIO})',
    )
    rules.add_argument(
        '--at_least', type=flags.real(-1, 1), help='group photos with at least this cosine instead'
    )
    rules.add_argument(
        '--top_pairs',
        type=flags.integer(1, 100_000),
        help='list this many pairs with the highest cosines instead',
    )
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args):
    """Complete the flags.

    Raises:
        UsageError: they do not fit each other.
    """
    rules = [name for name in ('ratio', 'at_least', 'top_pairs') if getattr(args, name) is not None]
    if len(rules) > 1:
        raise UsageError(f'--{rules[0]} and --{rules[1]} are two rules: choose one')
    if rules:
        args.duplicates = True
    if args.duplicates and args.photos:
        raise UsageError('give photos to search for, or a rule for near-duplicates, not both')
    if not args.duplicates and not args.photos:
        raise UsageError('give photos to search for, or --duplicates')
    if args.duplicates and (args.top or args.model_path):
        raise UsageError('--top and --model_path are for a search')
    args.top = args.top or 10
    if args.out is None:
        kind = 'groups' if args.duplicates else 'search'
        features = Path(args.features)
        args.out = features.with_name(f'{features.stem}_{kind}.html')
    if Path(args.out).suffix != '.html':
        raise UsageError(f'--out {args.out}: its name must end in .html')


def main(argv=None):
    args = arguments(argv)
    embedded = read_embedded(args.features)
    root = Path(args.root or embedded.about['root'])
    if not root.is_dir():
        raise UserError(f'{root} is not a directory: give that of the photos by --root')
    embedded.about['root'] = str(root)
    out = Path(args.out)
    runtime.check_machine(None)
    device = runtime.start()
    if args.duplicates:
        list_duplicates(args, embedded, device, out)
    else:
        search(args, embedded, device, out)


# Search


def search(args, embedded, device, out):
    """Print the photos that are most like each of args.photos, and write a page of them."""
    queries = encode(args.photos, embedded, device, args.model_path)  # (q, F)
    cosine = queries @ embedded.features.T  # (q, F) x (F, n) -> (q, n)
    groups = []
    for path, row in zip(args.photos, cosine):
        photos = [page.Photo(Path(path), Path(path).name, [], 'searched for')]
        print(path)
        for i in best(row, path, embedded, args.top):
            print(f'  {row[i]:.3f}  {embedded.names[i]}')
            photos.append(page.Photo(embedded.path(i), embedded.names[i], [f'cosine {row[i]:.3f}']))
        groups.append(page.Group(str(path), photos))
    about = f'The photos of {embedded.about["root"]} that are most like each photo, nearest first.'
    page.write_pages(out, 'Photos found', about, groups)
    print(out)


def encode(paths, embedded, device, model_path=None):
    """Features (n, F) of image files, as those in an Embedded were made.

    Args:
        model_path: the encoder, if it is not where it was.

    Raises:
        UserError: an image cannot be read, or the encoder is gone or another one.
    """
    about = embedded.about
    settings = about['settings']
    source = model_path or settings['model_path']
    net = load_encoder(source, settings['prefix'], settings['arch']).eval()
    if encoder_crc(source, net) != about['encoder']:
        raise UserError(f'{source} is not the encoder of the features: give that by --model_path')
    net.to(device, memory_format=torch.channels_last)
    evaluator = Evaluator(net, device, runtime.autocast(device, settings['precision']))
    pixels = []
    for path in paths:
        found = decode_or_why(path, about['size'], settings['fit'])
        if isinstance(found, str):
            raise UserError(f'{path}: {found}')
        pixels.append(found.pixels)
    images = torch.from_numpy(np.stack(pixels)).to(device)  # (n, 3, size, size)
    with torch.no_grad():
        return unit(evaluator.encode(images, settings['test_size'])).cpu().numpy()


def best(cosine, path, embedded, top):
    """Indices of the `top` highest of cosines (n,), nearest first, but for the file at path."""
    order = torch.from_numpy(cosine).topk(min(top + 1, len(cosine))).indices.tolist()
    own = Path(path).resolve()
    return [i for i in order if embedded.path(i).resolve() != own][:top]


# Near-duplicates


def list_duplicates(args, embedded, device, out):
    """Write a table and a page of the groups of near-duplicates."""
    groups, rule = find_groups(args, on_device(embedded.features, device))
    tables = []
    for rows in groups:
        tables.append(table_of(embedded, rows.numpy()))
    tables.sort(key=lambda table: -table['cosine'].iloc[1])
    for number, table in enumerate(tables, 1):
        table.insert(0, 'group', number)
    whole = pd.concat([pd.DataFrame(columns=COLUMNS), *tables])
    write_table(out.with_suffix('.csv'), whole[list(COLUMNS)], list(COLUMNS))
    text = f'{len(tables):,} groups of {len(whole):,} photos, among {len(embedded.names):,}: {rule}'
    shown = [page_group(number, table, embedded) for number, table in enumerate(tables, 1)]
    about = (
        f'{text}. Marked is the photo with most pixels, then with most bytes. Nothing is deleted.'
    )
    page.write_pages(out, 'Near-duplicates', about, shown)
    say(f'{text}\n{out.with_suffix(".csv")}\n{out}')


def find_groups(args, features):
    """The groups, tensors (m,) of rows of features (n, F), and a text of the rule."""
    if args.at_least is not None:
        label = neighbours.alike(features, args.at_least)
        return neighbours.groups(label), f'a cosine of {args.at_least} or more'
    if args.top_pairs:
        first, second, _ = neighbours.top_pairs(features, args.top_pairs)
        return list(torch.stack([first, second], 1)), 'the pairs with the highest cosines'
    ratio = args.ratio or neighbours.RATIO
    label = neighbours.near_duplicates(features, ratio)
    return neighbours.groups(label), f'much nearer to each other than to others (ratio {ratio})'


def table_of(embedded, rows):
    """A DataFrame of the photos of a group: the one to keep first, then those nearest to it.

    Its column row has their places in the Embedded.
    """
    table = pd.DataFrame(
        dict(
            row=rows,
            name=embedded.names[rows],
            pixels=embedded.pixels[rows],
            bytes=embedded.bytes[rows],
        )
    )
    order = table.sort_values(['pixels', 'bytes', 'name'], ascending=[False, False, True])
    kept = order.index[0]
    features = embedded.features[rows]
    table['cosine'] = (features @ features[kept]).astype(float).round(4)
    table['keep'] = table.index == kept
    return table.sort_values(['keep', 'cosine', 'name'], ascending=[False, False, True])


def page_group(number, table, embedded):
    """A page.Group of the DataFrame of a group."""
    photos = []
    for photo in table.itertuples():
        mark = ''
        lines = [f'{photo.pixels / 1e6:.2f} megapixels, {photo.bytes / 1e3:,.0f} KB']
        if photo.keep:
            mark = 'keep'
        else:
            lines.insert(0, f'cosine {photo.cosine:.3f}')
        photos.append(page.Photo(embedded.path(photo.row), photo.name, lines, mark))
    return page.Group(f'Group {number}: {len(table)} photos', photos)


if __name__ == '__main__':
    runtime.run(main)
