"""SimCLR's training views, batched on the device that holds the images: every image with parameters of its own.

    images = torch.randint(256, (512, 3, 96, 96), dtype=torch.uint8)
    p = draw(512, 96, 96, torch.Generator().manual_seed(0))
    views = apply(images, p, size=32)                                 # (512, 3, 32, 32), normalised

A file to copy into any project: it needs torch alone. The operations and the distributions of their parameters are
those of RandomResizedCrop, horizontal flip, ColorJitter in random order, grayscale and Gaussian blur through PIL and
OpenCV. Pixels are whole grey levels from 0 to 255 after every step, rounded where PIL rounds and cut where it cuts.
Drawing is apart from applying, and both are plain torch operations without a synchronisation, for CPU and CUDA, eager
and compiled.

From "Contrastive learning with hard negatives". MIT License, (c) 2026 its authors.
"""

import math

import torch
import torch.nn.functional as F

__version__ = '1.0'
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, on every data set, as published
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)  # pixels
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grayscale


def draw(n, height, width, generator, **recipe):
    """Parameters of n views of (height, width) images, each drawn by itself, on the generator's device.

    Args:
        recipe: blur, crop_min, jitter, grayscale and vertical_flip, as parameters() takes them.

    Returns a dict of (n,) tensors: top, left, h, w of the crop in pixels; flip and vertical_flip; brightness, contrast,
    saturation (factors, 1 = unchanged) and hue (turns, in [-0.5, 0.5]); order (n, 4), the jitter operations in the
    order they act (0 brightness, 1 contrast, 2 saturation, 3 hue); gray; sigma of the blur in pixels (0 = none). The
    distributions are torchvision's: RandomResizedCrop's ten tries with its fall-back included.
    """
    return parameters(uniforms(n, generator), height, width, **recipe)


def uniforms(n, generator):
    """The random numbers of n views, uniform in [0, 1): 14 tensors (n,), (n, 4) or (n, 10), in parameters()'s order."""
    columns = (10, 10, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1)
    u = torch.rand(sum(columns) * n, generator=generator, device=generator.device)
    return [x.view(n, k) if k > 1 else x for x, k in zip(u.split([n * k for k in columns]), columns)]


def parameters(u, height, width, blur=True, crop_min=0.08, jitter=1.0, grayscale=0.2, vertical_flip=False):
    """draw()'s parameters of the views whose random numbers are u, as uniforms() gives them.

    Args:
        blur: whether half of the views are blurred; without, all sigmas are 0.
        crop_min: the smallest part of an image's area that a crop covers, in (0, 1].
        jitter: the strength of the four colour changes, in [0, 2.5], as a factor on SimCLR's.
        grayscale: the probability that a view loses its colours.
        vertical_flip: whether half of the views are flipped upside down.
    """
    scale, ratio, y, x, jittered, *factors, hue, order, blurred, sigma, flip, gray = u

    def between(low, high, u):
        return u * (high - low) + low

    area = height * width * between(crop_min, 1.0, scale)  # (n, 10): ten tries each
    ratio = between(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), ratio).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    top = (y * (height - h + 1)).floor().minimum(height - h)
    left = (x * (width - w + 1)).floor().minimum(width - w)
    # If none of the ten fits: the largest central crop with an allowed ratio.
    w0 = min(width, round(height * CROP_RATIO[1]))
    h0 = min(height, round(width / CROP_RATIO[0]))
    w, h = torch.where(fits, w, w0), torch.where(fits, h, h0)
    top, left = torch.where(fits, top, (height - h0) // 2), torch.where(fits, left, (width - w0) // 2)

    jittered, (*strengths, turn) = jittered < 0.8, [jitter * s for s in JITTER]
    brightness, contrast, saturation = (torch.where(jittered, between(1 - s, 1 + s, u), 1)
                                        for s, u in zip(strengths, factors))
    return dict(top=top, left=left, h=h, w=w, flip=flip < 0.5,
                vertical_flip=(2 * flip % 1 < 0.5) & vertical_flip,  # the second bit of the same number
                brightness=brightness, contrast=contrast, saturation=saturation,
                hue=torch.where(jittered, between(-turn, turn, hue), 0), order=order.argsort(1), gray=gray < grayscale,
                sigma=torch.where(blurred < 0.5, between(*BLUR_SIGMA, sigma), 0) * blur)


def apply(images, p, size):
    """(n, 3, H, W) uint8 images and draw()'s parameters -> (n, 3, size, size) float32 views, normalised.

    Raises:
        ValueError: images of another shape or type.
    """
    return normalize(transform(images, p, size))


def transform(images, p, size):
    """apply() without its last step: (n, 3, H, W) uint8 images -> (n, 3, size, size) uint8 views."""
    _check(images)
    with torch.autocast(images.device.type, enabled=False):  # bf16 holds whole levels up to 256, but no fractions
        x = resized_crop(images.float(), p, size)  # (n, 3, H, W) -> (n, 3, size, size)
        x = color_jitter(x, p)
        x = torch.where(p['gray'].view(-1, 1, 1, 1), luma(x), x)
        return gaussian_blur(x, p['sigma'], blur_kernel_size(size)).byte()


def normalize(images):
    """(n, 3, h, w) uint8 images -> float32, scaled to [0, 1] and by MEAN and STD, channels last.

    Raises:
        ValueError: images of another shape or type.
    """
    _check(images)
    return standardize(images)


def standardize(x):
    """normalize() for grey levels of any type, such as those of resized images."""
    channels = [(x[:, c] / 255 - mean) / std for c, (mean, std) in enumerate(zip(MEAN, STD))]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


def _check(images):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError('images must be (n, 3, H, W) uint8, in grey levels from 0 to 255, got '
                         f'{tuple(images.shape)} {images.dtype}')


def resized_crop(x, p, size):
    """Crop, antialiased resize and flips: (n, 3, H, W) -> (n, 3, size, size), as W_y · x · W_xᵀ for each image."""
    W_y = resize_weights(p['top'], p['h'], p['vertical_flip'], x.shape[2], size)  # (n, size, H)
    W_x = resize_weights(p['left'], p['w'], p['flip'], x.shape[3], size)  # (n, size, W)
    x = (x.flatten(1, 2) @ W_x.mT).add_(0.5).floor_().unflatten(1, x.shape[1:3])  # (n, 3H, W) -> (n, 3, H, size)
    return (W_y[:, None] @ x).add_(0.5).floor_()


def resize_weights(start, length, flip, in_size, size):
    """(n, size, in_size) rows of PIL's triangle filter that resize [start, start + length) to size pixels.

    The filter is as wide as an output pixel, at least one input pixel, and ends where the crop ends, as after
    a crop in PIL.
    """
    scale = (length / size).view(-1, 1, 1)
    out = torch.arange(size, device=start.device)
    out = torch.where(flip[:, None], size - 1 - out, out)[:, :, None]  # (n, size, 1)
    pixel = torch.arange(in_size, device=start.device) - start.view(-1, 1, 1)  # (n, 1, in_size), 0 at the crop's edge
    weights = (1 - (pixel + 0.5 - (out + 0.5) * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length.view(-1, 1, 1)))
    return weights / weights.sum(2, keepdim=True)


def color_jitter(x, p):
    """Brightness, contrast, saturation and hue in each image's own order: (n, 3, h, w) in levels -> the same.

    Each image meets hue once, so three blends before it and three after it hold any order; a blend that an
    image does not have at that place has factor 1.
    """
    factors = torch.stack([p['brightness'], p['contrast'], p['saturation']], 1)  # (n, 3)
    rank = p['order'].argsort(1)  # (n, 4): the place of each operation
    hue_place = rank[:, 3]
    for place in range(3):
        x = blend(x, p['order'][:, place], factors, place < hue_place)
    x = shift_hue(x, p['hue'])
    for place in range(1, 4):
        x = blend(x, p['order'][:, place], factors, place > hue_place)
    return x


def blend(x, operation, factors, active):
    """Mix x with black (operation 0), with its mean gray (1) or with its gray (2): to the level below, in [0, 255]."""
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, 0]
    factor = torch.where(active, factor, 1).view(-1, 1, 1, 1)
    contrast, saturation = (operation == 1).view(-1, 1, 1, 1), (operation == 2).view(-1, 1, 1, 1)
    gray = luma(x)  # (n, 1, h, w)
    base = gray * saturation + gray.mean((2, 3), keepdim=True).round() * contrast
    return ((x - base) * factor).add_(base).clamp_(0, 255).floor_()


def luma(x):
    """(n, 3, h, w) -> (n, 1, h, w)"""
    return (LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]).round_()


def shift_hue(x, hue):
    """Turn the hue by (n,) turns, as PIL does in HSV of 8 bits; 0 does nothing: (n, 3, h, w) in levels -> the same."""
    turn, chroma, value = rgb_to_hsv(x)
    shift = (255 * hue).trunc().view(-1, 1, 1)  # in PIL's levels of hue, which wrap at 256
    turned = hsv_to_rgb((turn + shift).remainder_(256), chroma, value)
    return torch.where(hue.view(-1, 1, 1, 1) == 0, x, turned)


def rgb_to_hsv(x):
    """(n, 3, h, w) -> (n, h, w) each: PIL's hue in whole levels, saturation times value in levels, and value."""
    (r, g, b), value = x.unbind(1), x.amax(1)
    chroma = value - x.amin(1)
    hue = torch.where(value == r, g - b, torch.where(value == g, b - r, r - g)) / (6 * chroma).clamp_(min=1)
    hue += torch.where(value == r, 1, torch.where(value == g, 4 / 3, 5 / 3)) + 4e-6  # a thousandth of a level
    saturation = (255 * chroma / value.clamp(min=1)).floor_()
    return hue.remainder_(1).mul_(255).floor_(), saturation.mul_(value).div_(255), value


def hsv_to_rgb(hue, chroma, value):
    """The inverse of rgb_to_hsv(), rounded to whole levels: 3 x (n, h, w) -> (n, 3, h, w)."""
    turn = hue / 255
    distance = torch.stack([turn, turn - 1 / 3, turn - 2 / 3], 1)  # (n, 3, h, w), in turns from red, green and blue
    distance -= distance.round()
    return (value[:, None] - chroma[:, None] * distance.abs_().mul_(6).sub_(1).clamp_(0, 1)).round_()


def gaussian_blur(x, sigma, kernel_size):
    """OpenCV's GaussianBlur, border mirrored without its edge pixel, sigma (n,) in pixels: (n, 3, h, w) -> the same."""
    r, h, w = kernel_size // 2, x.shape[2], x.shape[3]
    offset = torch.arange(-r, r + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2).exp()  # sigma 0: all weight in the middle
    # OpenCV's kernel has 8 bits; from its ends inwards, each weight passes its rounding error to the next.
    ends = F.pad((256 * kernel[:, :r] / kernel.sum(1, keepdim=True)).cumsum(1).round_(), (1, 0)).diff(dim=1) / 256
    kernel = torch.cat([ends, 1 - 2 * ends.sum(1, keepdim=True), ends.flip(1)], 1).T.reshape(kernel_size, -1, 1, 1, 1)
    x = F.pad(x, (r, r, r, r), mode='reflect')
    x = sum(k * x[:, :, i:i + h] for i, k in enumerate(kernel))
    return sum(k * x[:, :, :, i:i + w] for i, k in enumerate(kernel)).round_()


def blur_kernel_size(size):
    """The published 0.1 of the image, made odd, which OpenCV needs: 3 pixels at 32."""
    return int(0.1 * size) | 1
