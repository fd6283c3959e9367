"""Write a part of CIFAR-10 as JPEG files, the folder data set of the README's table; CIFAR-10 is downloaded if missing.

    python misc/cifar10_jpeg.py     # data/cifar10_jpeg: the first 1,000 training and 200 test images of each class
"""

import shutil
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import flags
import runtime
from data import load_data
from runtime import UserError


def main(argv=None):
    parser = flags.Parser(prog='cifar10_jpeg.py', description=__doc__.partition('\n')[0])
    parser.add_argument('--root', default='data', help='where CIFAR-10 is or comes to, and cifar10_jpeg comes to')
    parser.add_argument('--train', default=1000, type=flags.integer(1, 5000), help='training images of each class')
    parser.add_argument('--test', default=200, type=flags.integer(1, 1000), help='test images of each class')
    args = parser.parse_args(argv)
    out, beside = Path(args.root, 'cifar10_jpeg'), Path(args.root, 'cifar10_jpeg.part')
    if out.exists():
        raise UserError(f'{out} is there already')
    data = load_data('cifar10', args.root)
    shutil.rmtree(beside, ignore_errors=True)  # what an interrupted call left
    splits = ('train', data.train, data.train_labels, args.train), ('test', data.test, data.test_labels, args.test)
    for split, images, labels, count in splits:
        for label, name in enumerate(data.classes):
            folder = beside / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, index in enumerate((labels == label).nonzero()[:count, 0]):
                image = Image.fromarray(images[index].permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
                image.save(folder / f'{i:04}.jpg', quality=75)
    beside.rename(out)
    print(out)


if __name__ == '__main__':
    runtime.run(main)
