"""Features of all images below a directory, with their names; and near-duplicates among them.

    python misc/embed.py --model_path results/mine/model_400.pth --root DIR --out features.npz
    python misc/embed.py … --out features.csv --duplicates 0.95
    torchrun --nproc_per_node 8 misc/embed.py …       # each GPU takes a part of the images

An .npz holds names below DIR (n,), features (n, F), rows of unit length, and about, a JSON text of
what made them. A .csv has a row for each image, and a .json beside it. The cosine of two images is
the product of their rows. Sizes, and how images become squares, are the run's, from the config.json
beside the checkpoint. Damaged and too large images are left out; about names them. With
--duplicates C, features_duplicates.csv lists the pairs whose cosine is at least C, the most similar
first. The features are kept in memory: 2 GB for a million images by a ResNet-18, 8 GB by a
ResNet-50.
"""

import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runs, runtime, timm_models
from hardneg.decoding import FITS, decode_or_why
from hardneg.evaluate import Evaluator
from hardneg.files import lock, write, write_json, write_table
from hardneg.folder import Listing, in_any_form, own_size
from hardneg.runtime import UserError, ranks, say
from hardneg.timm_models import encoder_crc
from model import load_encoder, unit

BLOCK = 256  # images that a rank decodes while it encodes the block before
PAIRS = 1_000_000  # near-duplicates that are listed at most


def arguments(argv=None):
    parser = flags.Parser(prog='embed.py', description=__doc__.partition('\n')[0])
    flags.add_model_path(parser)
    parser.add_argument(
        '--root',
        type=flags.path,
        default='data',
        help='directory of the images, which may lie anywhere below it (%(default)s)',
    )
    parser.add_argument(
        '--out',
        type=flags.path,
        default='features.npz',
        help='file to write, .npz or .csv (%(default)s)',
    )
    parser.add_argument(
        '--duplicates',
        type=flags.real(0, 1),
        help='list the pairs of images with at least this cosine (no list)',
    )
    flags.add_precision(parser, 'the encoder')
    sizes = parser.add_argument_group(
        'sizes (default: as in the config.json beside the checkpoint)'
    )
    sizes.add_argument(
        '--store_size',
        type=flags.store_size,
        help='pixels to which images are decoded; 0: their own if they are squares of one size of '
        'at most 256 px, else 96',
    )
    sizes.add_argument('--fit', choices=FITS, help='how images become squares')
    sizes.add_argument(
        '--test_size',
        type=flags.integer(0, 1024),
        help='pixels to which they are then resized; 0: no more',
    )
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in ('.npz', '.csv'):
        parser.error(f'--out {args.out}: its name must end in .npz or .csv')
    return args


def main(argv=None):
    args = arguments(argv)
    runtime.check_machine(args.precision)
    out = Path(args.out)
    net = load_encoder(args.model_path, args.prefix, args.arch)
    encoder = encoder_crc(args.model_path, net)
    flags.fill_precision(args, arch=net.backbone['arch'])
    config = runs.read_config(Path(args.model_path).with_name('config.json')) or {}
    sizes = {name: flags.DATA[name] for name in ('store_size', 'fit', 'test_size')}
    flags.fill(args, sizes, config.get('settings') or net.sizes())
    root = in_any_form(Path(args.root)).absolute()
    files = image_files(root)
    found = [name for name, *_ in files]
    size = args.store_size or own_size(root, files)
    timm_models.check_sizes(net.backbone['arch'], args.test_size or size)
    device = runtime.start()
    # It also tells, before hours of work, that the directory cannot be written.
    runtime.on_rank0(lambda: lock(out.parent, f'.{out.stem}.lock'))
    net.eval().to(device, memory_format=torch.channels_last)
    evaluator = Evaluator(net, device, runtime.autocast(device, args.precision))

    def decode(name):
        return decode_or_why(root / name, size, args.fit)

    features = embed(found, decode, evaluator, args.test_size)
    if ranks().rank != 0:
        return
    intact = features.any(1)
    names = np.array(found)
    damaged = names[~intact].tolist()
    if damaged:
        why = f'such as {root / damaged[0]}: {decode(damaged[0])}'
        say(f'{len(damaged)} images damaged or too large and left out, {why}')
        names, features = names[intact], features[intact]
    about = dict(
        settings=vars(args),
        root=str(root),
        size=size,
        damaged=damaged,
        encoder=encoder,
        **runs.provenance(device),
    )
    save(out, names, features, about)
    if args.duplicates is not None:
        save_duplicates(out, names, features, args.duplicates)


def image_files(root):
    """The image files below root, as folder.Listing gives them.

    Raises:
        UserError: there are none, or some cannot be read.
    """
    if not root.is_dir():
        raise UserError(f'{root} is not a directory: give that of the images by --root')
    listing = Listing(root)
    with tqdm(
        desc=f'Listing {root}', unit=' files', delay=3, leave=False, disable=runtime.no_bar()
    ) as bar:
        files = listing.images(root, bar)
    listing.report()
    if not files:
        raise UserError(f'{root}: no image in it or below it')
    return files


@torch.no_grad()
def embed(names, decode, evaluator, test_size):
    """Features (n, F) of n images: rows of unit length, 0 if an image is damaged.

    Args:
        names: n names.
        decode: function of a name that returns what decoding.decode_or_why() does.
        evaluator: evaluate.Evaluator.
        test_size: side in pixels at which the encoder sees the images; 0: the decoded one.

    Returns None on other ranks than 0.
    """
    rank, world, _, _ = ranks()
    together = world * BLOCK  # images that all ranks encode at a time
    features = None
    if rank == 0:
        features = np.empty((len(names), evaluator.net.features), np.float32)
    with ThreadPoolExecutor(runtime.cores()) as pool:

        def read(start):
            first = start + rank * BLOCK
            return pool.map(decode, names[first : first + BLOCK])

        starts = range(0, len(names), together)
        ahead = read(0)
        for start in tqdm(starts, 'Embedding', unit='block', disable=runtime.no_bar()):
            results = list(ahead)
            ahead = read(start + together)
            own = torch.zeros(len(results), evaluator.net.features, device=evaluator.device)
            intact = [i for i, result in enumerate(results) if not isinstance(result, str)]
            if intact:
                pixels = np.stack([results[i].pixels for i in intact])  # (b, 3, size, size)
                images = torch.from_numpy(pixels).to(evaluator.device)
                own[intact] = unit(evaluator.encode(images, test_size))
            whole = runtime.gather(own)
            if rank == 0:
                features[start : start + len(whole)] = whole.cpu().numpy()
    return features


def save(out, names, features, about):
    """Write names (n,), features (n, F) and the dict about, which says what made them."""
    if out.suffix == '.npz':
        file = io.BytesIO()
        np.savez(file, names=names, features=features, about=json.dumps(about))
        write(out, file.getbuffer())
    else:
        columns = ['name', *(f'f{i}' for i in range(features.shape[1]))]
        table = pd.DataFrame(features, columns=columns[1:])
        table.insert(0, 'name', names)
        write_table(out, table, columns)
        write_json(out.with_suffix('.json'), about)
    say(f'{len(names)} features of {features.shape[1]} numbers in {out}')


def save_duplicates(out, names, features, least):
    first, second, cosine = duplicates(torch.from_numpy(features), least)
    file = out.with_name(f'{out.stem}_duplicates.csv')
    pairs = dict(
        first=names[first.numpy()],
        second=names[second.numpy()],
        cosine=cosine.numpy().round(4),
    )
    write_table(file, pd.DataFrame(pairs), list(pairs))
    say(f'{len(cosine)} pairs with a cosine of {least} or more in {file}')


def duplicates(features, least, tile=2048):
    """The pairs i < j of rows of features (n, F), of unit length, whose cosine is at least `least`.

    Returns i, j and cosine, (pairs,) each, the largest cosine first. It goes tile by tile, as there
    are n^2 cosines.

    Raises:
        UserError: there are too many pairs.
    """
    least = max(least, 1e-9)  # at 0, the pairs that triu() leaves out would count
    parts = features.split(tile)
    found, count = [], 0
    for a in range(len(parts)):
        for b in range(a, len(parts)):
            cosine = parts[a] @ parts[b].T  # (tile, F) x (F, tile) -> (tile, tile)
            if a == b:
                cosine = cosine.triu(1)
            i, j = cosine.ge(least).nonzero().T  # (pairs, 2) -> 2 x (pairs,)
            found.append((i + a * tile, j + b * tile, cosine[i, j]))
            count += len(i)
            if count > PAIRS:
                raise UserError(
                    f'more than {PAIRS:,} pairs have a cosine of {least}: raise --duplicates'
                )
    i, j, cosine = (torch.cat(x) for x in zip(*found))
    order = cosine.argsort(descending=True, stable=True)
    return i[order], j[order], cosine[order]


if __name__ == '__main__':
    runtime.run(main)
