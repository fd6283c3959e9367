"""SimCLR's training views, batched on the device of the images, each with parameters of its own.

    images = torch.randint(256, (512, 3, 96, 96), dtype=torch.uint8)
    p = draw(512, 96, 96, torch.Generator().manual_seed(0))
    views = apply(images, p, size=32)  # (512, 3, 32, 32), normalised

A file to copy into any project: it needs torch alone. The operations, and the distributions of
their parameters, are those of RandomResizedCrop, horizontal flip, ColorJitter in random order,
grayscale and Gaussian blur through PIL and OpenCV. After every step pixels are whole grey levels
from 0 to 255, rounded where PIL rounds and cut where it cuts. Drawing is apart from applying. Both
are plain torch operations without a synchronisation, for CPU and CUDA, eager and compiled.

From "Contrastive learning with hard negatives". MIT License, (c) 2026 its authors.
"""

import math

import torch
import torch.nn.functional as F

__version__ = '1.0'
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, as published
CROP_RATIO = (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)  # pixels
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grayscale


# Drawing


def draw(n, height, width, generator, **recipe):
    """Parameters of n views of (height, width) images, each drawn by itself.

    Args:
        generator: torch.Generator on the device of the images.
        recipe: blur, crop_min, jitter, grayscale, horizontal_flip and vertical_flip, as
            parameters() takes them.

    Returns:
        A dict of (n,) tensors: top, left, h and w of the crop, in pixels; flip and vertical_flip;
        brightness, contrast and saturation, factors of which 1 changes nothing; hue, in turns, in
        [-0.5, 0.5]; gray; sigma of the blur, in pixels, 0 for none. And order (n, 4): the four
        changes of colour in the order in which they act (0 brightness, 1 contrast, 2 saturation,
        3 hue). The distributions are torchvision's, with the ten tries of RandomResizedCrop and
        what it does when none fits.
    """
    return parameters(uniforms(n, generator), height, width, **recipe)


def uniforms(n, generator):
    """The random numbers of n views, uniform in [0, 1), in the order of parameters().

    They are 14 tensors (n,), (n, 4) or (n, 10), on the generator's device.
    """
    # Another number changes the views of every seed, unless it is made from one of these.
    columns = (10, 10, 1, 1, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1)
    u = torch.rand(sum(columns) * n, generator=generator, device=generator.device)
    numbers = []
    for k, part in zip(columns, u.split([n * k for k in columns])):
        if k > 1:
            part = part.view(n, k)  # (n k,) -> (n, k)
        numbers.append(part)
    return numbers


def parameters(
    u,
    height,
    width,
    blur=True,
    crop_min=0.08,
    jitter=1.0,
    grayscale=0.2,
    horizontal_flip=0.5,
    vertical_flip=0.0,
):
    """draw()'s parameters of the views whose random numbers are u, as uniforms() returns them.

    Args:
        blur: whether half of the views are blurred; if not, all sigmas are 0.
        crop_min: the smallest part of an image's area that a crop covers, in (0, 1].
        jitter: strength of the four changes of colour, in [0, 2.5], relative to the published
            (0.4, 0.4, 0.4, 0.1). SimCLR's on ImageNet is 2, and on CIFAR-10 1.
        grayscale: probability that a view loses its colours.
        horizontal_flip, vertical_flip: probabilities, independent of each other, that a view is
            flipped left to right, and upside down.
    """
    u_area, u_ratio, u_top, u_left, u_jitter, *u_factors, u_hue, u_order, u_blur, u_sigma = u[:-2]
    u_flip, u_gray = u[-2:]
    h, w, fits = _crop_size(u_area, u_ratio, height, width, crop_min)
    top = (u_top * (height - h + 1)).floor().minimum(height - h)
    left = (u_left * (width - w + 1)).floor().minimum(width - w)
    # If none of ten tries fits, the crop is the largest central one of an allowed ratio.
    h0 = min(height, round(width / CROP_RATIO[0]))
    w0 = min(width, round(height * CROP_RATIO[1]))
    jittered = u_jitter < 0.8
    *strengths, turn = (jitter * strength for strength in JITTER)
    factors = []
    for strength, u_factor in zip(strengths, u_factors):
        factor = _between(1 - strength, 1 + strength, u_factor)
        factors.append(torch.where(jittered, factor, 1))
    brightness, contrast, saturation = factors
    blurred = (u_blur < 0.5) & blur
    flip, upside_down = flips(u_flip, horizontal_flip, vertical_flip)
    return dict(
        top=torch.where(fits, top, (height - h0) // 2),
        left=torch.where(fits, left, (width - w0) // 2),
        h=torch.where(fits, h, h0),
        w=torch.where(fits, w, w0),
        flip=flip,
        vertical_flip=upside_down,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=torch.where(jittered, _between(-turn, turn, u_hue), 0),
        order=u_order.argsort(1),
        gray=u_gray < grayscale,
        sigma=torch.where(blurred, _between(*BLUR_SIGMA, u_sigma), 0),
    )


def flips(u, horizontal, vertical):
    """Which views are flipped left to right, and which upside down: (n,) each.

    u (n,) are uniform in [0, 1), and the other two are probabilities. One number decides both
    flips: given u < p, u / p is uniform again, else (u - p) / (1 - p), and decides the second.
    """
    p = float(horizontal)
    mirrored = u < p
    rest = torch.where(mirrored, u / max(p, 1e-30), (u - p) / max(1 - p, 1e-30))
    return mirrored, rest.clamp(max=1 - 2**-24) < vertical  # rounding may give 1


def _crop_size(u_area, u_ratio, height, width, crop_min):
    """Heights and widths (n,) of the first of ten tries that fits, and whether one does (n,)."""
    area = height * width * _between(crop_min, 1.0, u_area)  # (n, 10)
    low, high = CROP_RATIO
    ratio = _between(math.log(low), math.log(high), u_ratio).exp()
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # (n, 1)
    return h.gather(1, first)[:, 0], w.gather(1, first)[:, 0], fits.any(1)


def _between(low, high, u):
    return u * (high - low) + low


# Applying


def apply(images, p, size):
    """Views (n, 3, size, size) float32, normalised, of uint8 images (n, 3, H, W).

    p is what draw() returns.

    Raises:
        ValueError: images of another shape or type.
    """
    return normalize(transform(images, p, size))


def transform(images, p, size):
    """apply() without its last step: (n, 3, H, W) uint8 -> (n, 3, size, size) uint8."""
    _check(images)
    # bf16 holds whole grey levels, but not what lies between them.
    with torch.autocast(images.device.type, enabled=False):
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


def standardize(x, mean=MEAN, std=STD):
    """normalize() for grey levels of any type, such as those of resized images.

    mean and std are of the three channels, in [0, 1].
    """
    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f'images must be (n, 3, H, W), got {tuple(x.shape)}')
    channels = []
    for c in range(3):
        channels.append((x[:, c] / 255 - mean[c]) / std[c])
    x = torch.stack(channels, 1)  # 3 x (n, h, w) -> (n, 3, h, w)
    return x.contiguous(memory_format=torch.channels_last)


def _check(images):
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            'images must be (n, 3, H, W) uint8, in grey levels from 0 to 255, got '
            f'{tuple(images.shape)} {images.dtype}'
        )


def resized_crop(x, p, size):
    """Crop, antialiased resize and flips: (n, 3, H, W) -> (n, 3, size, size).

    An image x becomes W_y · x · W_xᵀ.
    """
    W_y = resize_weights(p['top'], p['h'], p['vertical_flip'], x.shape[2], size)  # (n, size, H)
    W_x = resize_weights(p['left'], p['w'], p['flip'], x.shape[3], size)  # (n, size, W)
    rows = x.flatten(1, 2) @ W_x.mT  # (n, 3, H, W) -> (n, 3H, W) -> (n, 3H, size)
    rows = rows.add_(0.5).floor_().unflatten(1, x.shape[1:3])  # -> (n, 3, H, size)
    return (W_y[:, None] @ rows).add_(0.5).floor_()


def resize_weights(start, length, flip, in_size, size):
    """(n, size, in_size) rows of PIL's triangle filter that resize [start, start + length) to size.

    The filter is as wide as an output pixel, at least one input pixel. It ends where the crop ends,
    as after a crop in PIL.
    """
    scale = (length / size).view(-1, 1, 1)
    out = torch.arange(size, device=start.device)
    out = torch.where(flip[:, None], size - 1 - out, out)[:, :, None]  # (n, size, 1)
    # (n, 1, in_size), counted from the edge of the crop
    pixel = torch.arange(in_size, device=start.device) - start.view(-1, 1, 1)
    distance = (pixel + 0.5 - (out + 0.5) * scale).abs()  # (n, size, in_size)
    weights = (1 - distance / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < length.view(-1, 1, 1)))
    return weights / weights.sum(2, keepdim=True)


def color_jitter(x, p):
    """Brightness, contrast, saturation and hue, in each image's own order: (n, 3, h, w) -> same.

    Each image meets hue once, so three blends before it and three after it hold any order. A blend
    that an image does not have at that place has the factor 1.
    """
    factors = torch.stack([p['brightness'], p['contrast'], p['saturation']], 1)  # (n, 3)
    place_of = p['order'].argsort(1)  # (n, 4): the place of each operation
    hue_place = place_of[:, 3]
    for place in range(3):
        x = blend(x, p['order'][:, place], factors, place < hue_place)
    x = shift_hue(x, p['hue'])
    for place in range(1, 4):
        x = blend(x, p['order'][:, place], factors, place > hue_place)
    return x


def blend(x, operation, factors, active):
    """Mix x (n, 3, h, w) with black (operation 0), its mean gray (1) or its gray (2).

    The result is the grey level below, in [0, 255]. operation and active are (n,), factors (n, 3).
    """
    factor = factors.gather(1, operation.clamp(max=2)[:, None])[:, 0]
    factor = torch.where(active, factor, 1).view(-1, 1, 1, 1)
    contrast = (operation == 1).view(-1, 1, 1, 1)
    saturation = (operation == 2).view(-1, 1, 1, 1)
    gray = luma(x)  # (n, 1, h, w)
    base = gray * saturation + gray.mean((2, 3), keepdim=True).round() * contrast
    return ((x - base) * factor).add_(base).clamp_(0, 255).floor_()


def luma(x):
    """The gray of colours: (n, 3, h, w) -> (n, 1, h, w)."""
    return (LUMA[0] * x[:, :1] + LUMA[1] * x[:, 1:2] + LUMA[2] * x[:, 2:]).round_()


def shift_hue(x, hue):
    """Turn the hue of x (n, 3, h, w) by (n,) turns, as PIL does in HSV of 8 bits."""
    level, chroma, value = rgb_to_hsv(x)
    shift = (255 * hue).trunc().view(-1, 1, 1)  # in PIL's levels of hue, which wrap at 256
    turned = hsv_to_rgb((level + shift).remainder_(256), chroma, value)
    return torch.where(hue.view(-1, 1, 1, 1) == 0, x, turned)


def rgb_to_hsv(x):
    """(n, 3, h, w) -> 3 x (n, h, w): PIL's hue in whole levels, chroma in levels, and value.

    Chroma is saturation times value, from PIL's whole levels of saturation.
    """
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    red_is_highest = value == r
    green_is_highest = value == g
    difference = torch.where(green_is_highest, b - r, r - g)
    difference = torch.where(red_is_highest, g - b, difference)
    third = torch.where(green_is_highest, 4 / 3, 5 / 3)
    third = torch.where(red_is_highest, 1, third)
    hue = difference / (6 * chroma).clamp_(min=1)
    hue += third + 4e-6  # a thousandth of a level
    level = hue.remainder_(1).mul_(255).floor_()
    # Of whole numbers; the half keeps a quotient that is whole whole, however a GPU rounds it.
    saturation = ((255 * chroma + 0.5) / value.clamp(min=1)).floor_()
    return level, saturation.mul_(value).div_(255), value


def hsv_to_rgb(level, chroma, value):
    """The inverse of rgb_to_hsv(), rounded to whole levels: 3 x (n, h, w) -> (n, 3, h, w)."""
    turn = level / 255
    # (n, 3, h, w), in turns from red, green and blue
    distance = torch.stack([turn, turn - 1 / 3, turn - 2 / 3], 1)
    distance -= distance.round()
    missing = distance.abs_().mul_(6).sub_(1).clamp_(0, 1)
    return (value[:, None] - chroma[:, None] * missing).round_()


def gaussian_blur(x, sigma, kernel_size):
    """OpenCV's GaussianBlur: (n, 3, h, w) and sigma (n,) in pixels -> (n, 3, h, w).

    The border is mirrored without its edge pixel.
    """
    r = kernel_size // 2
    h, w = x.shape[2:]
    kernel = _gaussian_kernel(sigma, r)  # (kernel_size, n, 1, 1, 1)
    x = F.pad(x, (r, r, r, r), mode='reflect')
    x = sum(k * x[:, :, i : i + h] for i, k in enumerate(kernel))
    return sum(k * x[:, :, :, i : i + w] for i, k in enumerate(kernel)).round_()


def _gaussian_kernel(sigma, r):
    """OpenCV's kernels of 8 bits, (2 r + 1, n, 1, 1, 1). With sigma 0 only the middle weighs."""
    offset = torch.arange(-r, r + 1, device=sigma.device)
    kernel = (-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2).exp()  # (n, 2 r + 1)
    # From the ends inwards each weight passes its rounding error to the next.
    ends = (256 * kernel[:, :r] / kernel.sum(1, keepdim=True)).cumsum(1).round_()
    ends = F.pad(ends, (1, 0)).diff(dim=1) / 256  # (n, r)
    middle = 1 - 2 * ends.sum(1, keepdim=True)
    kernel = torch.cat([ends, middle, ends.flip(1)], 1)
    return kernel.T[:, :, None, None, None]  # (n, 2 r + 1) -> (2 r + 1, n, 1, 1, 1)


def blur_kernel_size(size):
    """The published 0.1 of the image, made odd, which OpenCV needs: 3 pixels at 32."""
    return int(0.1 * size) | 1
