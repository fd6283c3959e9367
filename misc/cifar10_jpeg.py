"""Download CIFAR-10 and write a part of it as JPEG files, the folder data set of the README's table: data/cifar10_jpeg.

    python misc/cifar10_jpeg.py     # the first 1,000 training and 200 test images of each class
"""

from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10


def main(root='data', parts=(('train', 1000), ('test', 200))):
    for split, count in parts:
        data, seen = CIFAR10(root, train=split == 'train', download=True), Counter()
        for image, label in data:
            name = data.classes[label]
            path = Path(root, 'cifar10_jpeg', split, name, f'{seen[name]:04}.jpg')
            if seen[name] < count:
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path, quality=75)
            seen[name] += 1


if __name__ == '__main__':
    main()
