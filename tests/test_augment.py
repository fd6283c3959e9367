"""The batched views against PIL and OpenCV: the same pixels, and the same distributions."""

import itertools
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from hardneg import augment, batches
from hardneg.augment import (
    BLUR_SIGMA,
    CROP_RATIO,
    JITTER,
    MEAN,
    STD,
    apply,
    blur_kernel_size,
    draw,
    flips,
    normalize,
    parameters,
    transform,
    uniforms,
)
from hardneg.batches import Batches, DeviceViews, random_views, same_class, seeded
from utils import ReferenceViews, reference_transform

COLOURS = ('brightness', 'contrast', 'saturation', 'hue')
ADJUST = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)


def photographs(n, height, width, seed=0):
    """(n, 3, height, width) uint8 with a photograph's 1/f spectrum, edges and a little noise.

    The channels are correlated.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency = frequency.clip(1 / max(height, width))
    spectrum = np.fft.rfft2(rng.standard_normal((n, 4, height, width))) / frequency
    field = np.fft.irfft2(spectrum, (height, width))
    field = field / field.std((2, 3), keepdims=True)
    common = field[:, :1]
    image = 128 + 45 * (0.7 * common + 0.5 * field[:, 1:])
    image += 60 * (common > 0.7) * rng.uniform(-1, 1, (n, 3, 1, 1))
    image += rng.normal(0, 3, image.shape)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


IMAGES = photographs(50, 40, 40)


# The same pixels


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)


def levels(images):
    """n PIL images -> (n, 3, h, w) in grey levels"""
    arrays = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float()  # (n, h, w, 3) -> (n, 3, h, w)


def one(p, i):
    """The parameters of one view."""
    return SimpleNamespace(**{name: values[i].tolist() for name, values in p.items()})


def crop_by_pil(image, q, size):
    box = int(q.top), int(q.left), int(q.h), int(q.w)
    image = TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BILINEAR)
    if q.flip:
        image = TF.hflip(image)
    return image


def blur_by_opencv(image, sigma, size):
    kernel = blur_kernel_size(size), blur_kernel_size(size)
    return Image.fromarray(cv2.GaussianBlur(np.array(image), kernel, sigma))


def view_by_pil(image, q, size):
    image = crop_by_pil(image, q, size)
    if q.hue:  # a view is jittered, by all four operations, or not at all
        for operation in q.order:
            image = ADJUST[operation](image, getattr(q, COLOURS[operation]))
    if q.gray:
        image = TF.rgb_to_grayscale(image, 3)
    if q.sigma:
        image = blur_by_opencv(image, q.sigma, size)
    return image


@pytest.fixture(scope='module', params=[(32, 32), (96, 96), (72, 120)], ids=str)
def case(request):
    """180 images and as many views' parameters."""
    height, width = request.param
    return photographs(180, height, width), draw(180, height, width, seeded(height, width))


@pytest.mark.parametrize('size', [16, 32, 64])
def test_crop_resize_flip_is_pils(case, size):
    images, p = case
    ours = augment.resized_crop(images.float(), p, size)
    theirs = [crop_by_pil(pil(x), one(p, i), size) for i, x in enumerate(images)]
    difference = ours - levels(theirs)
    assert difference.abs().max() <= 2  # Pillow 13 swaps the two passes of some crops
    assert (difference == 0).float().mean() > 0.95
    assert difference.mean().abs() < 0.01


def assert_same_pixels(ours, theirs, share=0.999):
    difference = ours - levels(theirs)
    assert difference.mean().abs() < 0.002
    assert (difference == 0).float().mean() > share


def test_flips_are_pils(case):
    images, _ = case
    n = len(images)
    whole, zero = torch.full((n,), 32), torch.zeros(n)
    left_right = torch.arange(n) % 3 > 0
    upside_down = torch.arange(n) % 2 > 0
    crop = dict(top=zero, left=zero, h=whole, w=whole)
    p = dict(crop, flip=left_right, vertical_flip=upside_down)
    ours = augment.resized_crop(images.float(), p, 32)
    theirs = []
    for x, flip, turn in zip(images[:, :, :32, :32], left_right, upside_down):
        image = pil(x)
        if flip:
            image = TF.hflip(image)
        if turn:
            image = TF.vflip(image)
        theirs.append(image)
    assert_same_pixels(ours, theirs)


@pytest.mark.parametrize('operation', range(4), ids=COLOURS)
def test_each_change_of_colour_is_pils(case, operation):
    images, p = case
    n, name = len(images), COLOURS[operation]
    alone = dict(order=p['order'], hue=torch.zeros(n))
    for factor in COLOURS[:3]:
        alone[factor] = torch.ones(n)
    share, low, high = 0.999, 0.6, 1.4
    if name == 'hue':
        share, low, high = 0.995, -0.1, 0.1
    alone[name] = torch.empty(n).uniform_(low, high, generator=seeded(2))
    ours = augment.color_jitter(images.float(), alone)
    values = alone[name].tolist()
    theirs = [ADJUST[operation](pil(x), value) for x, value in zip(images, values)]
    assert_same_pixels(ours, theirs, share)


def test_hue_saturation_and_value_are_pils():
    grid = torch.arange(0, 256, 5)
    rgb = torch.cartesian_prod(grid, grid, grid).byte()
    rgb = rgb.view(-1, 52, 3)  # (52^3, 3) -> (52^2, 52, 3)
    theirs = np.array(Image.fromarray(rgb.numpy()).convert('HSV'))
    theirs = torch.from_numpy(theirs).float().permute(2, 0, 1)  # -> (3, 52^2, 52)
    hue, chroma, value = augment.rgb_to_hsv(rgb.float().permute(2, 0, 1)[None])
    assert (hue[0] == theirs[0]).float().mean() > 0.99  # PIL rounds in float32, too
    assert torch.equal(value[0], theirs[2])
    torch.testing.assert_close(chroma[0], theirs[1] * theirs[2] / 255)


def test_gray_is_pils(case):
    images, _ = case
    ours = augment.luma(images.float()).expand(-1, 3, -1, -1)  # (n, 1, H, W) -> (n, 3, H, W)
    assert_same_pixels(ours, [TF.rgb_to_grayscale(pil(x), 3) for x in images])


def test_blur_is_opencvs(case):
    images, _ = case
    sigma = torch.empty(len(images)).uniform_(*BLUR_SIGMA, generator=seeded(1))
    ours = augment.gaussian_blur(images.float(), sigma, 3)
    theirs = [blur_by_opencv(pil(x), s, 32) for x, s in zip(images, sigma.tolist())]
    assert_same_pixels(ours, theirs)


@pytest.mark.parametrize('width', [1, 3, 5, 9])
def test_blur_has_opencvs_border_with_any_kernel(width):
    image = photographs(1, 48, 48)
    ours = augment.gaussian_blur(image.float(), torch.tensor([1.3]), width)
    theirs = cv2.GaussianBlur(np.array(pil(image[0])), (width, width), 1.3)
    difference = ours - levels([theirs])
    assert difference.abs().max() <= 1
    assert (difference == 0).float().mean() > 0.999


@pytest.mark.parametrize('size, width', [(16, 1), (20, 3), (32, 3), (40, 5), (64, 7), (96, 9)])
def test_blur_kernel_is_a_tenth_of_the_image_and_odd(size, width):
    assert blur_kernel_size(size) == width


def test_whole_chain_is_pils(case):
    images, p = case
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    ours = 255 * (apply(images, p, 32) * std + mean)
    difference = ours - levels([view_by_pil(pil(x), one(p, i), 32) for i, x in enumerate(images)])
    assert difference.mean().abs() < 0.01
    assert difference.abs().mean() < 0.06
    assert (difference.abs() < 1.01).float().mean() > 0.995


def test_views_are_bytes_that_apply_normalises():
    p = draw(50, 40, 40, seeded(0))
    views = transform(IMAGES, p, 16)
    assert views.dtype == torch.uint8
    assert torch.equal(apply(IMAGES, p, 16), normalize(views))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(normalize(views), (views / 255 - mean) / std)


def test_images_of_another_shape_or_type_are_refused():
    images = torch.rand(2, 3, 8, 8)
    message = r'images must be \(n, 3, H, W\) uint8, in grey levels from 0 to 255, got'
    with pytest.raises(ValueError, match=message):
        apply(images, draw(2, 8, 8, seeded(0)), 4)
    with pytest.raises(ValueError, match=message):
        normalize(images)
    with pytest.raises(ValueError, match=message):
        normalize((255 * images[0]).byte())


def test_compiled_and_eager_views_agree():
    u, p = uniforms(8, seeded(1)), draw(8, 40, 40, seeded(1))
    compiled = torch.compile(random_views, backend='eager', fullgraph=True)
    assert torch.equal(compiled(IMAGES[:8], u, 16), transform(IMAGES[:8], p, 16))


# The same distributions

N = 100_000
FEW = N // 20  # of theirs, which are drawn one by one


def same_distribution(ours, theirs):
    """Kolmogorov-Smirnov at a significance of 1e-5, and means within 4.5 standard errors."""
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    means_agree = abs(ours.mean() - theirs.mean()) <= 4.5 * error + 1e-12
    return means_agree and stats.ks_2samp(ours, theirs, method='asymp').pvalue > 1e-5


def has_share(x, expected):
    """Whether the share of true values is the expected one, within 4.5 standard errors."""
    error = math.sqrt(expected * (1 - expected) / len(x))
    return abs(x.double().mean().item() - expected) < 4.5 * error


@pytest.mark.parametrize('height, width', [(96, 96), (32, 32), (40, 120), (12, 200)])
def test_crops_are_distributed_as_torchvisions(height, width):
    p = draw(N, height, width, seeded(4))
    assert (p['top'] + p['h'] <= height).all()
    assert (p['left'] + p['w'] <= width).all()
    torch.manual_seed(5)
    image = torch.empty(1, height, width)
    drawn = transforms.RandomResizedCrop.get_params
    theirs = np.array([drawn(image, (0.08, 1.0), CROP_RATIO) for _ in range(FEW)])
    top, left, h, w = theirs.T  # (FEW, 4) -> 4 x (FEW,)
    assert same_distribution(p['top'], top)
    assert same_distribution(p['left'], left)
    assert same_distribution(p['h'], h)
    assert same_distribution(p['w'], w)
    assert same_distribution(p['h'] * p['w'], h * w)
    assert same_distribution(p['w'].double() / p['h'].double(), w / h)


@pytest.mark.parametrize(
    'height, width, side, start', [(200, 10, 'h', 'top'), (10, 200, 'w', 'left')]
)
def test_a_crop_that_no_try_finds_is_the_largest_central_one(height, width, side, start):
    p = draw(2000, height, width, seeded(1))
    long = round(10 * 4 / 3)
    fallen_back = (p['h'] * p['w'] == 10 * long) & (p[side] == long)
    assert fallen_back.sum() > 100
    central = p[start][fallen_back] == (200 - long) // 2
    assert central.float().mean() > 0.9  # a try may have found this size elsewhere


def test_branches_and_orders_are_distributed_as_torchvisions():
    p = draw(N, 96, 96, seeded(6))
    assert has_share(p['flip'], 0.5)
    assert has_share(p['gray'], 0.2)
    assert has_share(p['sigma'] > 0, 0.5)
    assert has_share(p['hue'] != 0, 0.8)
    for order in itertools.permutations(range(4)):
        assert has_share((p['order'] == torch.tensor(order)).all(1), 1 / 24)


def test_factors_are_distributed_as_torchvisions():
    p = draw(N, 96, 96, seeded(6))
    jittered = p['hue'] != 0
    torch.manual_seed(7)
    jitter = transforms.ColorJitter(*JITTER)
    ranges = [getattr(jitter, name) for name in COLOURS]
    theirs = []
    for _ in range(FEW):
        _, *factors = jitter.get_params(*ranges)
        theirs.append(factors)
    for name, values in zip(COLOURS, zip(*theirs)):
        assert same_distribution(p[name][jittered], values), name
    for name in COLOURS[:3]:
        assert (p[name][~jittered] == 1).all()
    sigmas = p['sigma'][p['sigma'] > 0]
    assert same_distribution(sigmas, np.random.default_rng(8).uniform(*BLUR_SIGMA, N))


def test_images_and_views_have_parameters_of_their_own():
    generator = seeded(9)
    first, second = draw(N, 96, 96, generator), draw(N, 96, 96, generator)

    def correlation(x, y):
        return torch.corrcoef(torch.stack([x, y]))[0, 1].abs()

    for name in ('top', 'left', 'h', 'flip', 'brightness', 'hue', 'sigma', 'gray'):
        x, y = first[name].double(), second[name].double()
        assert correlation(x, y) < 4.5 / math.sqrt(N), name  # of two views of an image
        assert correlation(x[:-1], x[1:]) < 4.5 / math.sqrt(N), name  # of two images of a batch


def test_both_paths_make_the_same_views_on_average():
    """Brightness, contrast, colour and sharpness of 3,000 views of ten photographs."""
    images = photographs(10, 96, 96).repeat_interleave(150, 0)

    def measures(path):
        views = []
        for (x1, x2), _ in path(images, Batches(1500, 100), 32).epoch(1):
            views += [x1, x2]
        x = normalize(torch.cat(views))  # (3000, 3, 32, 32)
        gray = x.mean(1)
        sharpness = gray.diff(dim=2).abs().mean((1, 2))
        return gray.mean((1, 2)), gray.std((1, 2)), x.std(1).mean((1, 2)), sharpness

    for ours, theirs in zip(measures(DeviceViews), measures(ReferenceViews)):
        assert same_distribution(ours, theirs)


# The recipe


@pytest.mark.parametrize(
    'recipe, changed',
    [
        (dict(crop_min=0.5), ['h', 'left', 'top', 'w']),
        (dict(jitter=0.5), ['brightness', 'contrast', 'hue', 'saturation']),
        (dict(grayscale=0.6), ['gray']),
        (dict(blur=False), ['sigma']),
        (dict(horizontal_flip=0.0), ['flip']),
        (dict(vertical_flip=0.5), ['vertical_flip']),
    ],
    ids=str,
)
def test_each_part_of_the_recipe_changes_itself_alone(recipe, changed):
    u = uniforms(1000, seeded(1))
    before, after = parameters(u, 96, 96), parameters(u, 96, 96, **recipe)
    assert sorted(name for name in before if not torch.equal(before[name], after[name])) == changed


def test_the_recipe_sets_ranges_and_probabilities():
    def drawn(**recipe):
        return draw(N, 96, 96, seeded(1), **recipe)

    p = drawn()
    assert (p['h'] * p['w']).min() / 96**2 < 0.09
    assert not p['vertical_flip'].any()
    p = drawn(crop_min=0.5)
    assert (p['h'] * p['w']).min() / 96**2 > 0.48
    p = drawn(jitter=0.5)
    assert 0.0499 < p['hue'].abs().max() <= 0.05
    assert 0.1999 < (p['brightness'] - 1).abs().max() <= 0.2 + 1e-6
    assert has_share(drawn(grayscale=0.6)['gray'], 0.6)
    assert (drawn(blur=False)['sigma'] == 0).all()


PROBABILITIES = 0.0, 1e-3, 0.1, 0.5, 0.7, 1.0


@pytest.mark.parametrize('horizontal', PROBABILITIES)
@pytest.mark.parametrize('vertical', PROBABILITIES)
def test_the_two_flips_are_independent(horizontal, vertical):
    p = draw(N, 8, 8, seeded(1), horizontal_flip=horizontal, vertical_flip=vertical)
    flip, upside_down = p['flip'], p['vertical_flip']
    for found, share in (
        (flip, horizontal),
        (upside_down, vertical),
        (flip & upside_down, horizontal * vertical),
    ):
        deviation = (share * (1 - share) / N) ** 0.5
        assert abs(found.float().mean().item() - share) <= 5 * deviation


@pytest.mark.parametrize('highest', [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_view_is_turned_for_sure_whatever_its_number(highest):
    """At the ends of [0, p) and [p, 1), where a quotient may be rounded to 1."""
    p = torch.tensor(highest)
    u = torch.stack([torch.zeros(()), p.nextafter(torch.zeros(())), p, 1 - p.new_tensor(2**-24)])
    _, upside_down = flips(u, highest, 1.0)
    assert upside_down.all()


def test_equal_chances_take_the_first_two_bits_of_a_number():
    u = torch.rand(N, generator=seeded(2))
    mirrored, upside_down = flips(u, 0.5, 0.5)
    assert torch.equal(mirrored, u < 0.5)
    assert torch.equal(upside_down, 2 * u % 1 < 0.5)
    assert not torch.cat(flips(u, 0, 0)).any()


def kinds(transform):
    return [type(step).__name__ for step in transform.transforms]


def test_reference_transform_is_the_published_chain_and_deterministic():
    make = reference_transform(32)
    chain = 'RandomResizedCrop RandomHorizontalFlip RandomApply RandomGrayscale GaussianBlur '
    assert kinds(make) == [*chain.split(), 'ToTensor', 'Normalize']
    image = pil(photographs(1, 96, 96)[0])
    torch.manual_seed(3)
    first = make(image)
    torch.manual_seed(3)
    assert torch.equal(make(image), first)
    assert not torch.equal(make(image), first)


def test_reference_transform_without_blur_is_the_same_but_for_the_blur():
    without = [name for name in kinds(reference_transform(32)) if name != 'GaussianBlur']
    assert kinds(reference_transform(32, blur=False)) == without


def test_reference_transform_follows_the_recipe():
    """At its ends: the whole image, its colours made gray, and turned in all four ways."""
    recipe = dict(blur=False, crop_min=1.0, jitter=0.0, grayscale=1.0, vertical_flip=0.5)
    make = transforms.Compose(reference_transform(32, **recipe).transforms[:-2])
    image = pil(photographs(1, 32, 32)[0])
    gray = TF.rgb_to_grayscale(image, 3)
    turned = [gray, TF.hflip(gray), TF.vflip(gray), TF.hflip(TF.vflip(gray))]
    torch.manual_seed(0)
    views = {make(image).tobytes() for _ in range(40)}
    assert views == {x.tobytes() for x in turned}


# Batches of views

PATHS = pytest.mark.parametrize('path', [DeviceViews, ReferenceViews])


def assert_equal_batches(some, others):
    for (views, index), (other_views, other_index) in zip(some, others, strict=True):
        assert torch.equal(index, other_index)
        for x, y in zip(views, other_views, strict=True):
            assert torch.equal(x, y)


def on_rank(rank, world, *args, **kwargs):
    """Batches as this rank sees them."""
    some = Batches(*args, **kwargs)
    some.rank, some.world = rank, world
    return some


@PATHS
def test_views_are_a_function_of_seed_and_epoch_and_step(path):
    def epoch(number, start=0):
        return list(path(IMAGES, Batches(50, 16, 3), 16).epoch(number, start))

    whole = epoch(2)
    assert len(whole) == 3
    for views, _ in whole:
        assert [(x.shape, x.dtype) for x in views] == [((16, 3, 16, 16), torch.uint8)] * 3
    index = torch.cat([index for _, index in whole])
    assert len(index.unique()) == 48  # of 50: the last batch would be smaller
    assert not torch.equal(index, torch.cat([other for _, other in epoch(3)]))
    assert_equal_batches(epoch(2), whole)
    assert_equal_batches(epoch(2, start=1), whole[1:])  # as after a resumption


@PATHS
def test_no_seed_epoch_step_place_or_view_is_seen_as_another_is(path):
    copies = IMAGES[:1].expand(50, -1, -1, -1).contiguous()
    views = []
    for number, seed in ((2, 0), (3, 0), (2, 1)):
        for batch, _ in path(copies, Batches(50, 16, 3, seed), 16).epoch(number):
            views += batch
    views = torch.cat(views).flatten(1)
    assert len(views) == 3 * 3 * 3 * 16
    assert len(views.unique(dim=0)) > 0.98 * len(views)


@pytest.mark.parametrize(
    'path, world, n, last',
    [
        (ReferenceViews, 4, 48, 16),
        (DeviceViews, 4, 48, 16),
        (DeviceViews, 3, 50, 2),  # some ranks have no image
        (DeviceViews, 16, 50, 2),
    ],
)
def test_the_whole_batch_does_not_depend_on_the_number_of_ranks(path, world, n, last):
    def last_batch(rank, world):
        own = on_rank(rank, world, n, 16, drop_last=False)
        *_, (views, index) = path(IMAGES[:n], own, 16).epoch(1)
        rows = torch.stack(views, 1).flatten(1)  # V x (b, 3, 16, 16) -> (b, V 3 16 16)
        return torch.cat([rows, index[:, None]], 1)

    parts = torch.cat([last_batch(rank, world) for rank in range(world)])
    assert len(parts) == last
    assert torch.equal(parts, last_batch(0, 1))


@pytest.fixture
def no_colours(monkeypatch):
    monkeypatch.setattr(augment, 'color_jitter', lambda x, p: x)
    monkeypatch.setattr(transforms.ColorJitter, 'forward', lambda self, image: image)


@PATHS
def test_positives_by_label_are_of_random_images_of_the_class(path, no_colours):
    """Images of one grey level each, which views do not change: a pixel tells the image."""
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 8, 8).contiguous()
    labels = torch.arange(60) % 5  # 12 images a class
    epochs = 200
    if path is ReferenceViews:
        epochs = 30
    views = path(images, Batches(60, 20, 3, labels=labels), 8, recipe=dict(blur=False))
    drawn = []
    for number in range(1, epochs + 1):
        for batch, index in views.epoch(number):
            drawn.append(torch.stack([x[:, 0, 0, 0].long() for x in batch]))  # (3, 20)
            assert torch.equal(drawn[-1][0], index)
    first, second, third = torch.cat(drawn, 1)
    assert torch.equal(labels[second], labels[first])
    assert torch.equal(labels[third], labels[first])
    assert has_share(second == third, 1 / 12)  # each view draws for itself
    assert has_share(torch.cat([second == first, third == first]), 1 / 12)  # itself is possible
    counts = torch.zeros(60, 60)
    counts.index_put_((first, second), torch.ones(()), accumulate=True)
    counts.index_put_((first, third), torch.ones(()), accumulate=True)
    same_class = labels[:, None] == labels
    expected = 2 * epochs / 12
    assert (counts[same_class] - expected).abs().max() < 6 * math.sqrt(expected)


def test_same_class_draws_any_image_of_the_class_whatever_its_size():
    labels = torch.tensor([2, 0, 2, 1, 2, 1])
    drawn = torch.stack([same_class(labels, seeded(i)) for i in range(200)])  # (200, 6)
    for i, label in enumerate(labels):
        of_the_class = (labels == label).nonzero()[:, 0]
        assert torch.equal(drawn[:, i].unique(), of_the_class)


@PATHS
def test_positives_by_label_survive_a_resumption_and_do_not_depend_on_ranks(path):
    labels = torch.arange(48) % 5

    def epoch(start=0, rank=0, world=1):
        own = on_rank(rank, world, 48, 16, 3, labels=labels)
        return list(path(IMAGES[:48], own, 8).epoch(3, start))

    whole = epoch()
    assert_equal_batches(epoch(start=1), whole[1:])
    joined = []
    for (views, index), (other_views, other_index) in zip(epoch(0, 0, 2), epoch(0, 1, 2)):
        both = [torch.cat(pair) for pair in zip(views, other_views)]
        joined.append((both, torch.cat([index, other_index])))
    assert_equal_batches(joined, whole)


@pytest.mark.parametrize('rank, world', [(0, 1), (1, 2)])
def test_views_made_a_few_at_a_time_are_the_same(rank, world, monkeypatch):
    images = photographs(130, 40, 40)
    views = DeviceViews(images, on_rank(rank, world, 130, 130), 16)

    def made(at_once):
        monkeypatch.setattr(batches, 'CPU_IMAGES', at_once)
        return list(views.epoch(1))

    whole = made(1000)
    assert_equal_batches(made(48), whole)
    assert_equal_batches(made(7), whole)


def test_saturation_does_not_depend_on_the_last_bit_of_a_division(monkeypatch):
    """As a GPU's compiler may divide: of grey levels whose quotient is whole."""
    levels = torch.arange(256.0)
    value, smallest = torch.meshgrid(levels, levels, indexing='ij')
    smallest = smallest.minimum(value)
    x = torch.stack([value, smallest, smallest])[None]  # (1, 3, 256, 256)
    expected = augment.rgb_to_hsv(x)
    divide = torch.Tensor.__truediv__
    monkeypatch.setattr(torch.Tensor, '__truediv__', lambda a, b: divide(a, b) * (1 - 1e-7))
    found = augment.rgb_to_hsv(x)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=1e-3)
