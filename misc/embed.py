"""Features of all images below a directory, with their names, for a search of your own; and near-duplicates among them.

    python misc/embed.py --model_path results/mine/model_400.pth --root DIR --out features.npz
    python misc/embed.py --model_path results/mine/model_400.pth --root DIR --out features.csv --duplicates 0.95
    torchrun --nproc_per_node 8 misc/embed.py …                                # each GPU takes a part of the images

An .npz holds names below DIR (n,), features (n, F), rows of unit length, and about, a JSON text of what made them; a
.csv has a row for each image, and a .json beside it. The cosine of two images is the product of their rows. Sizes and
the treatment of borders are the run's, from the config.json beside the checkpoint. Damaged images are named and left
out. With --duplicates C, features_duplicates.csv lists the pairs whose cosine is at least C, the most similar first.
"""

import json
import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg import runs
from hardneg import runtime
from hardneg.decoding import decode_or_why
from hardneg.evaluate import features_of
from hardneg.files import crc, lock, read_json, write, write_json
from hardneg.folder import Listing, in_any_form, own_size
from model import load_model, unit
from hardneg.runtime import UserError, cores, on_rank0, ranks, say

PAIRS = 1_000_000  # of near-duplicates that are listed at most


def main(argv=None):
    parser = flags.Parser(prog='embed.py', description=__doc__.partition('\n')[0])
    given = {name: (name, None, kind, text) for name, _, kind, text in flags.DATA}
    flags.add(parser, 'encoder and images',
              ('--model_path', 'results/model_400.pth', flags.path, 'checkpoint'),
              ('--root', 'data', flags.path, 'directory of the images, which may lie anywhere below it'),
              ('--out', 'features.npz', flags.path, 'file to write, .npz or .csv'),
              ('--duplicates', None, flags.real(0, 1), 'list the pairs with at least this cosine (default: no list)'),
              ('--precision', None, ('bf16', 'fp16', 'fp32'), 'precision of the encoder (default: bf16 on CUDA)'),
              *(given[name] for name in ('--store_size', '--fit', '--test_size')))
    args = parser.parse_args(argv)
    if Path(args.out).suffix not in ('.npz', '.csv'):
        parser.error(f'--out {args.out}: its name must end in .npz or .csv')
    path, root = Path(args.model_path), in_any_form(Path(args.root)).absolute()
    net, config = load_model(path, head=False), path.with_name('config.json')
    runs.accuracies(path)  # which checks that the run wrote this encoder
    settings = read_json(config)['settings'] if config.exists() else {}
    for name, default in dict(store_size=0, fit='crop', test_size=0).items():
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name, default))
    if not root.is_dir():
        raise UserError(f'{root} is not a directory: give that of the images by --root')
    listing = Listing(root)
    with tqdm(desc=f'Listing {root}', unit=' files', delay=3, leave=False, disable=None) as bar:
        files = listing.images(root, bar)
    if listing.problems or not files:
        raise UserError(listing.problems[0] if listing.problems else f'{root}: no image in it or below it')
    device = runtime.start()
    autocast = runtime.autocast(device, args.precision or runtime.default_precision())
    size, rows = args.store_size or own_size(root, files), Path(f'{args.out}.rows.part')
    shape, place = (len(files), net.features), Path(args.out).parent

    def create():
        lock(place, f'.{Path(args.out).stem}.lock')
        if 8 * math.prod(shape) > shutil.disk_usage(place).free:  # a mapped file that finds no room ends the process
            raise UserError(f'{place} has no room for {8 * math.prod(shape) / 1e9:.1f} GB: choose another --out')
        try:
            np.memmap(rows, np.float32, 'w+', shape=shape)  # a file, as all ranks write to it
        except OSError as error:
            raise UserError(f'cannot write {rows} ({error.strerror}): choose another --out') from error

    on_rank0(create)
    try:
        names, out = [name for name, *_ in files], np.memmap(rows, np.float32, 'r+', shape=shape)
        embed(net, root, names, size, args, autocast, device, out)
        runtime.sum_ranks(torch.zeros(1, device=device))  # all ranks have written
        about = dict(settings=vars(args), root=str(root), size=size, encoder=crc(path), **runs.provenance(device))
        if ranks().rank == 0:
            save(args, root, names, out, about, size)
    finally:
        if ranks().rank == 0:
            rows.unlink(missing_ok=True)


@torch.no_grad()
def embed(net, root, names, size, args, autocast, device, out, block=256):
    """Write the features of the images to the rows of out (n, F), this rank's blocks of them; 0 if they are damaged."""
    rank, world, _, _ = ranks()
    net.eval().to(device, memory_format=torch.channels_last)
    blocks = [range(i, min(i + block, len(names))) for i in range(rank * block, len(names), world * block)]
    with ThreadPoolExecutor(cores()) as pool:
        def read(rows):
            return [pool.submit(decode_or_why, root / names[i], size, args.fit) for i in rows]

        ahead = read(blocks[0]) if blocks else []
        for n, rows in enumerate(tqdm(blocks, f'Embedding {root}', unit='block', disable=None if rank == 0 else True)):
            found, ahead = [job.result() for job in ahead], read(blocks[n + 1]) if n + 1 < len(blocks) else []
            intact = [(i, result[0]) for i, result in zip(rows, found) if not isinstance(result, str)]
            if intact:
                images = torch.from_numpy(np.stack([pixels for _, pixels in intact])).to(device)
                out[[i for i, _ in intact]] = unit(features_of(net, images, args.test_size, autocast)).cpu().numpy()
    out.flush()


def save(args, root, names, features, about, size):
    """Write the file of the features and, if wanted, that of the duplicates."""
    intact, out = features.any(1).nonzero()[0], Path(args.out)
    if len(intact) < len(names):
        first = next(i for i, name in enumerate(names) if not features[i].any())
        say(f'{len(names) - len(intact)} images damaged and left out, such as {root / names[first]}: '
            f'{decode_or_why(root / names[first], size, args.fit)}')
    names, features = np.array(names)[intact], features if len(intact) == len(names) else features[intact]
    if out.suffix == '.npz':
        part = Path(f'{out}.npz.part')
        try:
            with open(part, 'wb') as file:
                np.savez(file, names=names, features=features, about=json.dumps(about))
            part.replace(out)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise UserError(f'cannot write {out} ({error.strerror}): choose another --out') from error
    else:
        table = pd.DataFrame(features, columns=[f'f{i}' for i in range(features.shape[1])])
        table.insert(0, 'name', names)
        write(out, table.to_csv(index=False).encode(errors='surrogateescape'))
        write_json(out.with_suffix('.json'), about)
    say(f'{len(names)} features of {features.shape[1]} numbers in {out}')
    if args.duplicates is not None:
        pairs = duplicates(features, args.duplicates)
        table = pd.DataFrame({'first': names[pairs[0]], 'second': names[pairs[1]], 'cosine': pairs[2].round(4)})
        file = out.with_name(f'{out.stem}_duplicates.csv')
        write(file, table.to_csv(index=False).encode(errors='surrogateescape'))
        say(f'{len(table)} pairs with a cosine of {args.duplicates} or more in {file}')


def duplicates(features, least, tile=2048):
    """The pairs i < j of rows of features (n, F), of unit length, whose product is at least `least`, in tiles.

    Returns i, j and the products, the largest first. Raises UserError beyond PAIRS.
    """
    found, count = [], 0
    for a in range(0, len(features), tile):
        x = torch.from_numpy(np.array(features[a:a + tile]))
        for b in range(a, len(features), tile):
            cosine = x @ torch.from_numpy(np.array(features[b:b + tile])).T
            i, j = (cosine.triu(1) if a == b else cosine).ge(max(least, 1e-9)).nonzero().T
            found.append((i + a, j + b, cosine[i, j]))
            count += len(i)
            if count > PAIRS:
                raise UserError(f'more than {PAIRS:,} pairs have a cosine of {least}: raise --duplicates')
    i, j, cosine = (torch.cat(parts) for parts in zip(*found))
    order = cosine.argsort(descending=True, stable=True)
    return [x[order].numpy() for x in (i, j, cosine)]


if __name__ == '__main__':
    runtime.run(main)
