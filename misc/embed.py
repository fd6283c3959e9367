"""Features of all images below a directory, with their names.

    python misc/embed.py --model_path results/mine/model_400.pth --root DIR --out features.npz
    python misc/embed.py --out features.npz           # images have changed: encodes new ones alone
    torchrun --nproc_per_node 8 misc/embed.py …       # each GPU takes a part of the images

An .npz holds names below DIR (n,), features (n, F), rows of unit length, the number of pixels and
bytes of each image, and about, a JSON text of what made them (hardneg/embedded.py). The cosine of
two images is the product of their rows. If the file is there already, images that have not changed
keep their features; encoder, directory and sizes that are not given are the file's. A run saves
what it has every ten minutes, and the same command goes on from there.

Sizes, and how images become squares, are the run's, from the config.json beside the checkpoint.
Damaged and too large images are left out; about names them. misc/search.py searches the file, and
finds near-duplicates in it. The features are kept in memory: 2 GB for a million images by a
ResNet-18, 8 GB by a ResNet-50. A name takes four bytes for each letter of the longest one.
"""

import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runs, runtime, timm_models
from hardneg.decoding import FITS, decode_or_why, tell_of_dark
from hardneg.embedded import ARRAYS, Embedded, read_embedded, write_embedded
from hardneg.evaluate import Evaluator
from hardneg.files import delete_parts, lock
from hardneg.folder import Listing, own_size
from hardneg.runtime import UserError, ranks, say
from model import load_encoder, unit

BLOCK = 256  # images that a rank decodes while it encodes the block before
SAVE_SECONDS = 600  # between saves of the file
SIZES = ('store_size', 'fit', 'test_size')


def arguments(argv=None):
    parser = flags.Parser(prog='embed.py', description=__doc__.partition('\n')[0])
    flags.add_model_path(parser, default=None, note=f'that of --out, or else {flags.MODEL_PATH}')
    parser.add_argument(
        '--root',
        type=flags.path,
        help='directory of the images, which may lie anywhere below it (that of --out, or else '
        f'{flags.DATA["root"]})',
    )
    parser.add_argument(
        '--out',
        type=flags.path,
        default='features.npz',
        help='.npz file to write, or to bring up to date (%(default)s)',
    )
    flags.add_precision(parser, 'the encoder')
    sizes = parser.add_argument_group(
        'sizes (default: those of --out, or as in the config.json beside the checkpoint)'
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
    if Path(args.out).suffix != '.npz':
        parser.error(f'--out {args.out}: its name must end in .npz')
    return args


def main(argv=None):
    args = arguments(argv)
    out = Path(args.out)
    if ranks().rank == 0:  # it also tells, before hours of work, where nothing can be written
        lock(out.parent, f'.{out.stem}.lock')
        delete_parts(out.parent, re.escape(out.name))
    before = None
    if out.exists():
        before = read_embedded(out)
        fill_from_file(args, before)
    flags.fill(args, dict(model_path=flags.MODEL_PATH, root=flags.DATA['root']))
    runtime.check_machine(args.precision)
    net = load_encoder(args.model_path, args.prefix, args.arch)
    encoder = timm_models.tensors_crc(net.f)
    if before and encoder != before.about['encoder']:
        raise UserError(
            f'{out} holds features of another encoder, {before.about["settings"]["model_path"]}: '
            'choose another --out'
        )
    fill_sizes(args, net)
    device = runtime.start()
    root = Path(args.root).absolute()
    files = runtime.on_rank0(lambda: image_files(root))  # others may find a new image already
    if before:
        size = before.about['size']
    else:
        size = args.store_size or own_size(root, files)
    timm_models.check_sizes(net.backbone['arch'], args.test_size or size)
    net.eval().to(device, memory_format=torch.channels_last)
    evaluator = Evaluator(net, device, runtime.autocast(device, args.precision))

    about = dict(
        settings=settings_of_features(args, net),
        root=str(root),
        size=size,
        encoder=encoder,
        **runs.provenance(device),
    )
    found = start_from(before, files, net.features, about)
    todo = (found.pixels == 0).nonzero()[0]
    if before:
        tell_what_changed(out, before, found, len(todo))
        before = None  # its features may take much memory
    encode_all(found, todo, evaluator, args, out)
    if ranks().rank != 0:
        return
    result = intact(found)
    damaged = found.names[found.pixels == 0].tolist()
    if damaged:
        first = root / damaged[0]
        why = decode_or_why(first, size, args.fit)
        if not isinstance(why, str):
            why = 'its features are not finite: choose --precision fp32'
        say(f'{len(damaged)} images damaged or too large and left out, such as {first}: {why}')
    result.about['damaged'] = damaged
    write_embedded(out, result)
    say(f'{len(result.names)} features of {net.features} numbers in {out}')


def fill_from_file(args, before):
    """Give flags that were not given the values in the Embedded that is brought up to date.

    Raises:
        UserError: a given one differs.
    """
    settings = before.about['settings']
    for name in (*SIZES, 'precision'):
        if getattr(args, name) not in (None, settings[name]):
            raise UserError(
                f'{args.out} holds features made with --{name} {settings[name]}: leave out '
                f'--{name}, or choose another --out'
            )
    root = before.about['root']
    moved = args.root is not None and os.path.realpath(args.root) != os.path.realpath(root)
    if moved and os.path.exists(root):
        raise UserError(f'{args.out} holds features of the images in {root}: choose another --out')
    of_a_run = args.model_path and Path(args.model_path).with_name('config.json').exists()
    if of_a_run:  # which tells the architecture
        settings = {name: settings[name] for name in (*SIZES, 'precision')}
    flags.fill(args, dict.fromkeys(settings), settings)
    flags.fill(args, dict(root=root))


def fill_sizes(args, net):
    """Give sizes and precision, where not given, the values of the encoder's run or weights."""
    flags.fill_precision(args, arch=net.backbone['arch'])
    config = runs.config_beside(args.model_path) or {}
    sizes = {name: flags.DATA[name] for name in SIZES}
    flags.fill(args, sizes, config.get('settings') or net.sizes())


def settings_of_features(args, net):
    """The flags that decide the features, as a file of them keeps them."""
    settings = {name: getattr(args, name) for name in (*SIZES, 'precision', 'prefix')}
    settings['arch'] = None
    if timm_models.is_timm(net.backbone['arch']):
        settings['arch'] = net.backbone['arch']
    settings['model_path'] = args.model_path
    if not timm_models.names_weights(args.model_path):
        settings['model_path'] = os.path.abspath(args.model_path)
    return settings


def image_files(root):
    """The image files below root, as folder.Listing gives them, without links to others of them.

    Raises:
        UserError: there are none, or some cannot be read.
    """
    if not root.is_dir():
        raise UserError(f'{root} is not a directory: say with --root where the images are')
    listing = Listing(root)
    with tqdm(
        desc=f'Listing {root}', unit=' files', delay=3, leave=False, disable=runtime.no_bar()
    ) as bar:
        files = listing.images(root, bar)
    seen = {}
    for file in sorted(files, key=lambda file: (root / file[0]).is_symlink()):  # links last
        path = root / file[0]
        first = seen.setdefault(os.path.realpath(path), file)
        if first is not file:
            listing.leave_out(path, 'linked to another of them')
    listing.report()
    if not files:
        raise UserError(f'{root}: no image in it or below it')
    return sorted(seen.values())


def start_from(before, files, dimension, about):
    """An Embedded of the files, whose features and pixels are 0 where they are not in `before`.

    Features are on rank 0 alone.

    Args:
        before: Embedded, or None.
        files: as folder.Listing.images() returns them.
        dimension: of the features.
    """
    names, sizes, times, _ = zip(*files)
    rows = len(files) if ranks().rank == 0 else 0
    found = Embedded(
        names=np.array(names),
        features=np.zeros((rows, dimension), np.float32),
        pixels=np.zeros(len(files), np.int64),
        bytes=np.array(sizes),
        times=np.array(times),
        about=about,
    )
    if before is None:
        return found
    known = {key: i for i, key in enumerate(before.file_keys())}
    for i, key in enumerate(found.file_keys()):
        if key in known:
            found.pixels[i] = before.pixels[known[key]]
            if rows:
                found.features[i] = before.features[known[key]]
    return found


def tell_what_changed(out, before, found, new):
    damaged = set(before.about.get('damaged', [])) & set(found.names.tolist())
    gone = set(before.names.tolist()) - set(found.names.tolist())
    text = (
        f'{out}: {len(found.names) - new} images unchanged, {new - len(damaged)} new or changed, '
        f'{len(gone)} gone'
    )
    if damaged:
        text += f', {len(damaged)} damaged before and tried again'
    say(text)


def encode_all(found, todo, evaluator, args, out):
    """Encode the images of an Embedded at the indices todo (m,), in place.

    They are saved now and then, and at Ctrl-C.
    """
    root, size = Path(found.about['root']), found.about['size']
    dark = []

    def decode(name):
        result = decode_or_why(root / name, size, args.fit)
        if not isinstance(result, str) and result.dark:
            dark.append(name)
        return result

    saved = time.monotonic()
    blocks = encode_blocks(found.names, todo, decode, evaluator, args.test_size)
    try:
        for index, features, pixels in blocks:
            if ranks().rank != 0:
                continue
            found.features[index] = features
            found.pixels[index] = pixels
            if time.monotonic() - saved > SAVE_SECONDS:
                write_embedded(out, intact(found))
                saved = time.monotonic()
    except KeyboardInterrupt:
        if ranks().rank == 0:
            write_embedded(out, intact(found))
            say(f'Stopped, saved in {out}; the same command continues')
        raise
    tell_of_dark(root, dark)


def intact(found):
    """The Embedded without the images that have no features."""
    there = found.pixels > 0
    if there.all():
        return found
    rows = {name: getattr(found, name)[there] for name in ARRAYS}
    return Embedded(**rows, about=found.about)


@torch.no_grad()
def encode_blocks(names, todo, decode, evaluator, test_size):
    """Encode the images at the indices todo (m,) of names (n,), block by block.

    Args:
        decode: function of a name that returns what decoding.decode_or_why() does.
        evaluator: evaluate.Evaluator.
        test_size: side in pixels at which the encoder sees the images; 0: the decoded one.

    Yields the indices (b,) of a block's images, their features (b, F) of unit length and the
    numbers of pixels (b,) in their files. Both are 0 of a damaged image, or of one whose features
    are not finite.
    """
    rank, world, _, _ = ranks()
    together = world * BLOCK  # images that all ranks encode at a time
    with ThreadPoolExecutor(runtime.cores()) as pool:

        def read(start):
            first = start + rank * BLOCK
            return pool.map(decode, names[todo[first : first + BLOCK]].tolist())

        starts = range(0, len(todo), together)
        ahead = read(0)
        for start in tqdm(starts, 'Embedding', unit='block', disable=runtime.no_bar()):
            results = list(ahead)
            ahead = read(start + together)
            features = torch.zeros(len(results), evaluator.net.features, device=evaluator.device)
            areas = torch.zeros(len(results), dtype=torch.int64, device=evaluator.device)
            good = [i for i, result in enumerate(results) if not isinstance(result, str)]
            if good:
                pixels = np.stack([results[i].pixels for i in good])  # (b, 3, size, size)
                images = torch.from_numpy(pixels).to(evaluator.device)
                rows = unit(evaluator.encode(images, test_size))  # (b, F)
                finite = rows.isfinite().all(1)
                features[good] = rows.where(finite[:, None], 0)
                areas[good] = finite * torch.tensor([results[i].area for i in good]).to(areas)
            features, areas = runtime.gather(features), runtime.gather(areas)
            yield todo[start : start + together], features.cpu().numpy(), areas.cpu().numpy()


if __name__ == '__main__':
    runtime.run(main)
