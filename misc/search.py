"""Search the photos of a file of features by photos, or list the near-duplicates among them.

    python misc/search.py features.npz photo.jpg                 # the photos most like a photo
    python misc/search.py features.npz --duplicates              # groups of near-duplicates
    python misc/search.py features.npz --at_least 0.95           # by a cosine that you choose
    python misc/search.py features.npz --top_pairs 100           # the 100 nearest pairs

misc/embed.py makes the file. A search prints names and cosines. All commands write a page of the
photos beside the file, such as features_search.html or features_groups.html, which any browser
opens.

Near-duplicates are photos that are much nearer to each other than to all others, by a rule in which
there is no cosine to choose (hardneg/neighbours.py). features_groups.csv has a row for each photo
in a group: group, name, cosine to the one that is kept, pixels, bytes, keep. Kept is the photo with
most pixels, then with most bytes. No photo is deleted or changed.

The encoder and the size of the images are those of the file. A search encodes only what it searches
for. Among 100,000 photos it takes seconds on a CPU, most of them to start.
"""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import page
from hardneg import flags, neighbours, runtime, timm_models
from hardneg.decoding import decode_or_why
from hardneg.embedded import read_embedded
from hardneg.evaluate import Evaluator
from hardneg.files import check_directory, write_table
from hardneg.runtime import UsageError, UserError, say
from model import load_encoder, unit

COLUMNS = ('group', 'name', 'cosine', 'pixels', 'bytes', 'keep')
QUERIES = 256  # photos that are encoded before they are searched for


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
        '--arch',
        type=flags.timm_name,
        help="timm/NAME, if --model_path is a file of timm's weights",
    )
    parser.add_argument(
        '--out',
        type=flags.path,
        help='page to write, .html (beside the features: _search.html, _groups.html, ...)',
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
    if args.duplicates and (args.top or args.model_path or args.arch):
        raise UsageError('--top, --model_path and --arch are for a search')
    args.top = args.top or 10
    features = Path(args.features)
    if args.out is None:
        args.out = features.with_name(f'{features.stem}_{kind_of_page(args)}.html')
    if Path(args.out).suffix != '.html':
        raise UsageError(f'--out {args.out}: its name must end in .html')


def kind_of_page(args):
    if args.top_pairs:
        return 'pairs'
    if args.at_least is not None:
        return f'groups_{args.at_least:g}'
    if args.duplicates:
        return 'groups'
    return 'search'


def main(argv=None):
    args = arguments(argv)
    embedded = read_embedded(args.features, args.root)
    root = embedded.about['root']
    if not Path(root).is_dir():
        raise UserError(f'{root} is not a directory: give that of the photos with --root')
    out = Path(args.out)
    check_directory(out.parent)
    check_machine(embedded)
    device = runtime.start()
    if args.duplicates:
        list_duplicates(args, embedded, device, out)
    else:
        search_photos(args, embedded, device, out)


def check_machine(embedded):
    """runtime.check_machine() for the precision of features. Without TF32, fp32 serves."""
    precision = embedded.about['settings']['precision']
    if precision == 'tf32':
        precision = 'fp32'
    runtime.check_machine(precision)


# Search


def search_photos(args, embedded, device, out):
    """Print the photos that are most like each of args.photos, and write a page of them."""
    evaluator = open_encoder(embedded, device, args.model_path, args.arch)
    groups = []
    for start in range(0, len(args.photos), QUERIES):
        paths = args.photos[start : start + QUERIES]
        queries = encode(paths, embedded, evaluator)  # (q, F)
        for path, query in zip(paths, queries):
            cosine = embedded.features @ query  # (n, F) x (F,) -> (n,)
            photos = [page.Photo(Path(path), Path(path).name, [], 'searched for')]
            print(path)
            for i in best(cosine, path, embedded, args.top):
                name, text = embedded.names[i], f'{cosine[i]:.3f}'
                print(f'  {text}  {name}')
                photos.append(page.Photo(embedded.path(i), name, [f'cosine {text}']))
            groups.append(page.Group(str(path), photos))
    about = f'The photos of {embedded.about["root"]} that are most like each photo, nearest first.'
    missing = page.write_pages(out, 'Photos found', about, groups)
    tell_of_missing(missing, embedded)
    print(out)


def open_encoder(embedded, device, model_path, arch):
    """The Evaluator of the encoder of an Embedded.

    Args:
        model_path: the encoder, if it is not where it was, or None.
        arch: timm/NAME, of a file of timm's weights; None: that of the Embedded.

    Raises:
        UserError: the encoder is gone, or another one.
    """
    about = embedded.about
    settings = about['settings']
    source = model_path or settings['model_path']
    net = load_encoder(source, settings['prefix'], arch or settings['arch']).eval()
    if timm_models.tensors_crc(net.f) != about['encoder']:
        raise UserError(f'{source} is not the encoder of the features: give that with --model_path')
    net.to(device, memory_format=torch.channels_last)
    return Evaluator(net, device, runtime.autocast(device, settings['precision']))


@torch.no_grad()
def encode(paths, embedded, evaluator):
    """Features (n, F) of image files, as those in an Embedded were made.

    Raises:
        UserError: an image cannot be read.
    """
    size, settings = embedded.about['size'], embedded.about['settings']
    pixels = []
    for path in paths:
        found = decode_or_why(path, size, settings['fit'])
        if isinstance(found, str):
            raise UserError(f'{path}: {found}')
        pixels.append(found.pixels)
    images = torch.from_numpy(np.stack(pixels)).to(evaluator.device)  # (n, 3, size, size)
    return unit(evaluator.encode(images, settings['test_size'])).cpu().numpy()


def best(cosine, path, embedded, top):
    """Indices of the `top` highest of cosines (n,), nearest first, but for the file at path."""
    order = torch.from_numpy(cosine).topk(min(top + 1, len(cosine))).indices.tolist()
    own = os.path.realpath(path)
    return [i for i in order if os.path.realpath(embedded.path(i)) != own][:top]


def tell_of_missing(count, embedded):
    if count:
        say(
            f'{count} photos of the page were not found in {embedded.about["root"]}, or are '
            'damaged: if the photos have moved, give --root'
        )


# Near-duplicates


def list_duplicates(args, embedded, device, out):
    """Write a table and a page of the groups of near-duplicates."""
    table_file = out.with_suffix('.csv')
    check_is_ours(table_file)
    groups, rule = find_groups(args, on_device(embedded.features, device))
    table = table_of(embedded, groups)
    columns = list(COLUMNS)
    write_table(table_file, table[columns], columns)
    photos = table['name'].nunique()
    text = f'{len(groups):,} groups, {photos:,} of {len(embedded.names):,} photos: {rule}'
    about = (
        f'{text}. Marked is the photo with most pixels, then with most bytes. Nothing is deleted.'
    )
    shown = []
    for number, rows in table.groupby('group'):
        shown.append(page_group(number, rows, embedded))
    missing = page.write_pages(out, 'Near-duplicates', about, shown)
    tell_of_missing(missing, embedded)
    say(f'{text}\n{table_file}\n{out}')


def check_is_ours(file):
    """Raise UserError if another file is there than a table of groups, which may be replaced."""
    if not file.exists():
        return
    try:
        with open(file, encoding='utf-8') as lines:
            ours = lines.readline().strip() == ','.join(COLUMNS)
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise UserError(f'{file} is there, and no table of groups: choose another --out')


def on_device(features, device):
    """The array features (n, F) as a tensor, on the device if they fit on it."""
    features = torch.from_numpy(features)
    if runtime.fits(device, features, reserved=features.nbytes):  # of crowded rows a copy is made
        return features.to(device)
    return features


def find_groups(args, features):
    """The groups, tensors (m,) of rows of features (n, F), and a text of the rule."""
    if args.at_least is not None:
        label = neighbours.joined_by_cosine(features, args.at_least)
        return neighbours.groups(label), f'a cosine of {args.at_least} or more'
    if args.top_pairs:
        first, second, _ = neighbours.top_pairs(features, args.top_pairs)
        return list(torch.stack([first, second], 1)), 'the pairs with the highest cosines'
    ratio = args.ratio or neighbours.RATIO
    label = neighbours.near_duplicates(features, ratio)
    return neighbours.groups(label), f'much nearer to each other than to others (ratio {ratio})'


def table_of(embedded, groups):
    """A DataFrame of the photos in groups, lists of rows: in each the one to keep comes first.

    Groups are sorted by the photo that is least like the one to keep, the safest group first. The
    column row has the places of the photos in the Embedded.
    """
    if not groups:
        return pd.DataFrame(columns=['row', *COLUMNS])
    rows = torch.cat(groups).numpy()
    table = pd.DataFrame(
        dict(
            row=rows,
            group=np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
            name=embedded.names[rows],
            pixels=embedded.pixels[rows],
            bytes=embedded.bytes[rows],
        )
    )
    order = ['group', 'pixels', 'bytes', 'name']
    table = table.sort_values(order, ascending=[True, False, False, True], ignore_index=True)
    table['keep'] = ~table['group'].duplicated()
    kept = table['row'].where(table['keep']).ffill().astype(int)
    table['cosine'] = cosines(embedded.features, table['row'].to_numpy(), kept.to_numpy())
    least = table['cosine'].where(~table['keep']).groupby(table['group']).min()
    rank = least.rank(method='first', ascending=False).astype(int)
    table['group'] = table['group'].map(rank)
    order = ['group', 'keep', 'cosine', 'name']
    return table.sort_values(order, ascending=[True, False, False, True], ignore_index=True)


def cosines(features, rows, others):
    """The cosines (m,) of pairs of rows of features (n, F), rounded to four digits."""
    found = []
    for start in range(0, len(rows), 4096):
        part = slice(start, start + 4096)
        found.append((features[rows[part]] * features[others[part]]).sum(1))
    return np.concatenate(found).astype(float).round(4)


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
