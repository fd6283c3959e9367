"""SimCLR's training views, batched on the device that holds the images: every image with parameters of its own.

    images = torch.randint(256, (512, 3, 96, 96), dtype=torch.uint8)
    p = draw(512, 96, 96, torch.Generator().manual_seed(0))
    views = apply(images, p, size=32)                                 # (512, 3, 32, 32), normalised

The operations and the distributions of their parameters are those of utils.reference_transform, which goes
image by image through PIL and OpenCV: RandomResizedCrop, horizontal flip, ColorJitter in random order,
grayscale, Gaussian blur. Pixels are whole grey levels from 0 to 255 after every step, rounded where PIL rounds and cut
where it cuts. Drawing is apart from applying, and both are plain torch operations without a synchronisation, for CPU
and CUDA, eager and compiled.
"""

import hashlib
import math

import torch
import torch.nn.functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's, on every data set, as published
CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
JITTER = (0.4, 0.4, 0.4, 0.1)  # brightness, contrast, saturation, hue
BLUR_SIGMA = (0.1, 2.0)  # pixels
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grayscale


def draw(n, height, width, generator, blur=True):
    """Parameters of n views of (height, width) images, each drawn by itself, on the generator's device.

    Returns a dict of (n,) tensors: top, left, h, w of the crop in pixels; flip; brightness, contrast,
    saturation (factors, 1 = unchanged) and hue (turns, in [-0.5, 0.5]); order (n, 4), the jitter operations
    in the order they act (0 brightness, 1 contrast, 2 saturation, 3 hue); gray; sigma of the blur in pixels
    (0 = none). The distributions are torchvision's: RandomResizedCrop's ten tries with its fall-back included.
    Without blur, all sigmas are 0.
    """
    return parameters(uniforms(n, generator), height, width, blur)


def uniforms(n, generator):
    """The random numbers of n views, uniform in [0, 1): (n, 35)"""
    u = torch.rand(35 * n, generator=generator, device=generator.device)
    tries, crop, order, rest = u.split([20 * n, 7 * n, 4 * n, 4 * n])
    return torch.cat([*tries.view(2, n, 10), crop.view(7, n).T, order.view(n, 4), rest.view(4, n).T], 1)


def parameters(u, height, width, blur=True):
    """draw()'s parameters of the views whose random numbers are u (n, 35)."""
    scale, ratio, (y, x, jitter, *factors, hue), order, (blurred, sigma, flip, gray) = (
        u[:, :10], u[:, 10:20], u[:, 20:27].T, u[:, 27:31], u[:, 31:].T)

    def between(low, high, u):
        return u * (high - low) + low

    area = height * width * between(*CROP_SCALE, scale)  # (n, 10): ten tries each
    ratio = between(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]), ratio).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h, fits = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0], fits.any(1)
    top = (y * (height - h + 1)).floor().minimum(height - h)
    left = (x * (width - w + 1)).floor().minimum(width - w)
    # none of the ten fits: the largest central crop with an allowed ratio
    w0 = min(width, round(height * CROP_RATIO[1]))
    h0 = min(height, round(width / CROP_RATIO[0]))
    w, h = torch.where(fits, w, w0), torch.where(fits, h, h0)
    top, left = torch.where(fits, top, (height - h0) // 2), torch.where(fits, left, (width - w0) // 2)

    jitter = jitter < 0.8
    factors = [torch.where(jitter, between(1 - s, 1 + s, u), 1) for s, u in zip(JITTER, factors)]
    hue = torch.where(jitter, between(-JITTER[3], JITTER[3], hue), 0)
    sigma = torch.where(blurred < 0.5, between(*BLUR_SIGMA, sigma), 0) * blur
    return dict(top=top, left=left, h=h, w=w, flip=flip < 0.5, brightness=factors[0], contrast=factors[1],
                saturation=factors[2], hue=hue, order=order.argsort(1), gray=gray < 0.2, sigma=sigma)


def random_views(images, u, size, blur=True):
    """(n, 3, H, W) uint8 images and uniforms() u (n, 35) -> the views that apply() gives (n, 3, size, size).

    One function, so that all but drawing u compiles.
    """
    p, n = parameters(u, *images.shape[2:], blur), max(1, len(images))
    # eager on a CPU some images at a time, few enough for a core's cache
    some = 48 if images.device.type == 'cpu' and not torch.compiler.is_compiling() else n
    return torch.cat([apply(images[i:i + some], {name: values[i:i + some] for name, values in p.items()}, size)
                      for i in range(0, n, some)])


def apply(images, p, size):
    """(n, 3, H, W) uint8 images and draw()'s parameters -> (n, 3, size, size) float32 views, normalised."""
    if images.dtype != torch.uint8:
        raise ValueError(f'images must be uint8, in grey levels from 0 to 255, got {images.dtype}')
    x = resized_crop(images.float(), p, size)  # (n, 3, H, W) -> (n, 3, size, size)
    x = color_jitter(x, p)
    x = torch.where(p['gray'].view(-1, 1, 1, 1), luma(x), x)
    x = gaussian_blur(x, p['sigma'], blur_kernel_size(size))
    return normalize(x)


def normalize(x):
    """(n, 3, h, w) in grey levels -> the same, scaled to [0, 1] and by MEAN and STD, channels last."""
    channels = [(x[:, c] / 255 - mean) / std for c, (mean, std) in enumerate(zip(MEAN, STD))]
    return torch.stack(channels, 1).contiguous(memory_format=torch.channels_last)


def resized_crop(x, p, size):
    """Crop, antialiased resize and flip: (n, 3, H, W) -> (n, 3, size, size), as W_y · x · W_xᵀ for each image."""
    still = torch.zeros_like(p['flip'])
    W_y = resize_weights(p['top'], p['h'], still, x.shape[2], size)  # (n, size, H)
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
    """Turn the hue by (n,) turns in PIL's HSV of 8 bits, whose hue wraps at 256 and scales by 255; 0 does nothing."""
    r, g, b = x.unbind(1)
    top = x.amax(1)
    chroma = top - x.amin(1)
    turn = torch.where(top == r, g - b, torch.where(top == g, b - r, r - g)) / (6 * chroma).clamp_(min=1)
    turn += torch.where(top == r, 1, torch.where(top == g, 4 / 3, 5 / 3)) + 4e-6  # a thousandth of a level
    turn = turn.remainder_(1).mul_(255).floor_().add_((255 * hue).trunc().view(-1, 1, 1)).remainder_(256).div_(255)
    chroma = (255 * chroma / top.clamp(min=1)).floor_().mul_(top).div_(255)
    distance = torch.stack([turn, turn - 1 / 3, turn - 2 / 3], 1)  # (n, 3, h, w) from red, green and blue
    distance -= distance.round()
    turned = top[:, None] - chroma[:, None] * distance.abs_().mul_(6).sub_(1).clamp_(0, 1)
    return torch.where(hue.view(-1, 1, 1, 1) == 0, x, turned.round_())


def gaussian_blur(x, sigma, kernel_size):
    """OpenCV's GaussianBlur, border mirrored without its edge pixel, sigma (n,) in pixels: (n, 3, h, w) -> the same."""
    r, h, w = kernel_size // 2, x.shape[2], x.shape[3]
    offset = torch.arange(-r, r + 1, device=x.device)
    kernel = (-0.5 * (offset / sigma[:, None].clamp(min=1e-3)) ** 2).exp()  # sigma 0: all weight in the middle
    # OpenCV's has 8 bits; from its ends inwards, each weight passes its rounding error on to the next
    ends = F.pad((256 * kernel[:, :r] / kernel.sum(1, keepdim=True)).cumsum(1).round_(), (1, 0)).diff(dim=1) / 256
    kernel = torch.cat([ends, 1 - 2 * ends.sum(1, keepdim=True), ends.flip(1)], 1).T.reshape(kernel_size, -1, 1, 1, 1)
    x = F.pad(x, (r, r, r, r), mode='reflect')
    x = sum(k * x[:, :, i:i + h] for i, k in enumerate(kernel))
    return sum(k * x[:, :, :, i:i + w] for i, k in enumerate(kernel)).round_()


def seeded(*key, device='cpu'):
    """A generator whose stream is a function of the key, integers such as (seed, epoch, step), alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'big') >> 1)


def epoch_batches(n, batch_size, seed, epoch, drop_last=True, labels=None, views=2):
    """The epoch's shuffle of n images in whole batches: indices (W, b) of the images that its views are made of.

    W is 1, all views being of one image, or with labels (n,) the number of views: every view but the first is then of
    a random image of the same class, itself possible, drawn anew each epoch. All is a function of (seed, epoch) alone.
    """
    order = torch.randperm(n, generator=seeded(seed, epoch))[None]  # (1, n)
    if labels is not None:
        draws = [same_class(labels, seeded(seed, epoch, 0, view)) for view in range(1, views)]
        order = torch.cat([order, *(other[order] for other in draws)])  # (V, n)
    batches = order.split(batch_size, 1)
    return batches[:n // batch_size] if drop_last else batches


def same_class(labels, generator):
    """For each of n images the index of a random one that has its label: (n,) -> (n,)"""
    by_class, counts = labels.argsort(), labels.bincount()
    first, count = (counts.cumsum(0) - counts)[labels], counts[labels]
    return by_class[first + (torch.rand(len(labels), generator=generator, dtype=torch.float64) * count).long()]


def blur_kernel_size(size):
    """The published 0.1 of the image, made odd, which OpenCV needs: 3 pixels at 32."""
    return int(0.1 * size) | 1


class DeviceViews:
    """What utils.ReferenceViews yields, made in batches on the device.

    The images are kept on the device, or, with resident=False, in host memory: then each batch is copied from
    pinned memory on a stream of its own while the batch before it trains.
    """

    def __init__(self, images, batch_size, size, views=2, seed=0, device='cpu', rank=0, world=1, drop_last=True,
                 resident=True, compile=False, blur=True, labels=None):
        self.device, self.resident = torch.device(device), resident
        self.images = images.to(self.device) if resident else images
        self.batch_size, self.size, self.views, self.seed, self.drop_last = batch_size, size, views, seed, drop_last
        self.rank, self.world, self.blur, self.labels = rank, world, blur, labels
        self.random_views = torch.compile(random_views, dynamic=False) if compile else random_views
        self.stream = None if resident else torch.cuda.Stream(self.device)

    def part(self, x, dim=0):
        """This rank's part of a whole batch."""
        return x.tensor_split(self.world, dim)[self.rank]

    def epoch(self, epoch, start=0):
        batches = epoch_batches(len(self.images), self.batch_size, self.seed, epoch, self.drop_last, self.labels,
                                self.views)
        sizes = [batch.shape[1] for batch in batches]
        order = torch.cat(batches, 1).to(self.device if self.resident else 'cpu')  # (W, steps * batch_size), moved once
        parts = [self.part(batch, 1) for batch in order.split(sizes, 1)]
        ahead = self.fetch(parts[start]) if start < len(parts) else None
        for step in range(start, len(parts)):
            images, index = self.arrived(ahead)
            generator = seeded(self.seed, epoch, step, device=self.device)
            views = [self.view(images[min(v, len(images) - 1)], sizes[step], generator) for v in range(self.views)]
            if step + 1 < len(parts):  # the device has the views to make meanwhile
                ahead = self.fetch(parts[step + 1])
            yield views, index

    def fetch(self, index):
        """Start bringing the images (W, b, 3, H, W') of index (W, b) to the device, and the index of the first."""
        if self.resident:
            return self.images.index_select(0, index.flatten()).unflatten(0, index.shape), index[0]
        # torch gives pinned memory to another tensor only when the copies from it have ended.
        pinned = torch.empty(index.numel(), *self.images.shape[1:], dtype=torch.uint8, pin_memory=True)
        select = torch.index_select if isinstance(self.images, torch.Tensor) else type(self.images).index_select
        select(self.images, 0, index.flatten(), out=pinned)
        with torch.cuda.stream(self.stream):
            return [x.to(self.device, non_blocking=True) for x in (pinned.unflatten(0, index.shape),
                                                                   index[0].pin_memory())]

    def arrived(self, batch):
        """Let the current stream wait for a batch that fetch() started."""
        if not self.resident:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for x in batch:
                x.record_stream(current)
        return batch

    def view(self, images, whole, generator):
        """A random view of each image; the numbers are drawn for the whole batch, the same on any number of ranks."""
        return self.random_views(images, self.part(uniforms(whole, generator)), self.size, self.blur)
