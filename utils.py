"""The reference views, as the published utils.py makes them: image by image, through PIL and OpenCV."""

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from augment import BLUR_SIGMA, CROP_RATIO, JITTER, MEAN, STD, blur_kernel_size


class GaussianBlur(torch.nn.Module):
    """OpenCV's blur of a PIL image, with probability 0.5 and sigma uniform in BLUR_SIGMA (pixels)."""

    def __init__(self, kernel_size):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, image):
        if torch.rand(()) >= 0.5:
            return image
        sigma = torch.empty(()).uniform_(*BLUR_SIGMA).item()
        return Image.fromarray(cv2.GaussianBlur(np.array(image), (self.kernel_size,) * 2, sigma))


class Flips(torch.nn.Module):
    """Flips half of the images left to right and, with vertical, by the second bit of the same number, upside down."""

    def __init__(self, vertical):
        super().__init__()
        self.vertical = vertical

    def forward(self, image):
        u = torch.rand(1)
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if u < 0.5 else image
        return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if self.vertical and 2 * u % 1 < 0.5 else image


def reference_transform(size, blur=True, crop_min=0.08, jitter=1.0, grayscale=0.2, vertical_flip=False):
    """SimCLR's training view, PIL image -> (3, size, size) float32, normalised; by default as published.

    The arguments are those of augment.parameters().
    """
    return transforms.Compose([
        transforms.RandomResizedCrop(size, (crop_min, 1.0), CROP_RATIO),
        Flips(vertical_flip),
        transforms.RandomApply([transforms.ColorJitter(*(jitter * s for s in JITTER))], p=0.8),
        transforms.RandomGrayscale(grayscale),
        *([GaussianBlur(blur_kernel_size(size))] if blur else []),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])
