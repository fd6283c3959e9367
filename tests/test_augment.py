"""The batched views are PIL's and OpenCV's: the same pixels for the same parameters, the same distribution of them."""

import itertools
import math
import pickle
from argparse import Namespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as TF

from hardneg import augment
from hardneg.augment import (
    BLUR_SIGMA,
    CROP_RATIO,
    JITTER,
    MEAN,
    STD,
    apply,
    blur_kernel_size,
    draw,
    normalize,
    parameters,
    transform,
    uniforms,
)
from hardneg.batches import Batches, DeviceViews, ReferenceViews, random_views, seeded
from hardneg.runtime import UserError
from utils import reference_transform

SIZES = [(32, 32), (96, 96), (72, 120)]
COUNT = 180  # images and parameter sets of each size: 540 together


def photographs(n, height, width, seed=0):
    """(n, 3, height, width) uint8 with a photograph's 1/f spectrum, edges and a little noise; correlated channels."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]).clip(1 / max(height, width))
    spectrum = np.fft.rfft2(rng.standard_normal((n, 4, height, width))) / frequency
    field = np.fft.irfft2(spectrum, (height, width))
    field = field / field.std((2, 3), keepdims=True)
    image = 128 + 45 * (0.7 * field[:, :1] + 0.5 * field[:, 1:])
    image += 60 * (field[:, :1] > 0.7) * rng.uniform(-1, 1, (n, 3, 1, 1)) + rng.normal(0, 3, image.shape)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8))


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


def levels(images):
    """PIL images -> (n, 3, h, w) in grey levels"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float()


def one(p, i):
    return {name: value[i].item() if value.ndim == 1 else value[i].tolist() for name, value in p.items()}


def crop_pil(image, q, size):
    box = [int(q[name]) for name in ('top', 'left', 'h', 'w')]
    image = TF.resized_crop(image, *box, [size, size], TF.InterpolationMode.BILINEAR)
    return TF.hflip(image) if q['flip'] else image


def blur_pil(image, sigma, size):
    if sigma == 0:
        return image
    return Image.fromarray(cv2.GaussianBlur(np.array(image), (blur_kernel_size(size),) * 2, sigma))


OPERATIONS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
NAMES = ('brightness', 'contrast', 'saturation', 'hue')


def chain_pil(image, q, size):
    image = crop_pil(image, q, size)
    for operation in q['order'] if q['hue'] else ():  # a view is jittered, by all four, or not at all
        image = OPERATIONS[operation](image, q[NAMES[operation]])
    if q['gray']:
        image = TF.rgb_to_grayscale(image, 3)
    return blur_pil(image, q['sigma'], size)


@pytest.fixture(scope='module', params=SIZES, ids=str)
def case(request):
    height, width = request.param
    return photographs(COUNT, height, width), draw(COUNT, height, width, seeded(height, width))


@pytest.mark.parametrize('size', [16, 32, 64])
def test_crop_resize_flip_is_pils(case, size):
    images, p = case
    ours = augment.resized_crop(images.float(), p, size)
    difference = ours - levels([crop_pil(pil(x), one(p, i), size) for i, x in enumerate(images)])
    assert difference.abs().max() <= 2  # Pillow 13 takes the two passes of some crops in the other order
    assert (difference == 0).float().mean() > 0.95 and difference.mean().abs() < 0.01


@pytest.mark.parametrize('name', ['brightness', 'contrast', 'saturation', 'hue', 'gray', 'flip', 'blur'])
def test_each_operation_is_pils(case, name):
    images, p = case
    x, n = images.float(), len(images)
    if name == 'flip':
        whole = {'top': torch.zeros(n), 'left': torch.zeros(n), 'h': torch.full((n,), 32), 'w': torch.full((n,), 32)}
        upside_down = torch.arange(n) % 2 == 1
        ours = augment.resized_crop(x, whole | {'flip': torch.ones(n, dtype=torch.bool), 'vertical_flip': upside_down},
                                    32)
        theirs = [TF.hflip(pil(y[:, :32, :32])) for y in images]
        theirs = [TF.vflip(y) if turn else y for y, turn in zip(theirs, upside_down)]
    elif name == 'blur':
        sigma = torch.empty(n).uniform_(*BLUR_SIGMA, generator=seeded(1))
        ours = augment.gaussian_blur(x, sigma, 3)
        theirs = [blur_pil(pil(y), s.item(), 32) for y, s in zip(images, sigma)]
    elif name == 'gray':
        ours = augment.luma(x).expand(-1, 3, -1, -1)
        theirs = [TF.rgb_to_grayscale(pil(y), 3) for y in images]
    else:
        alone = {other: torch.full((n,), float(other != 'hue')) for other in NAMES} | {'order': p['order']}
        low, high = (-0.1, 0.1) if name == 'hue' else (0.6, 1.4)
        alone[name] = torch.empty(n).uniform_(low, high, generator=seeded(2))
        ours = augment.color_jitter(x, alone)
        theirs = [OPERATIONS[NAMES.index(name)](pil(y), alone[name][i].item()) for i, y in enumerate(images)]
    difference = ours - levels(theirs)
    assert difference.mean().abs() < 0.002
    assert (difference == 0).float().mean() > (0.995 if name == 'hue' else 0.999)


def test_images_in_0_to_1_are_refused():
    images = torch.rand(2, 3, 8, 8)
    for refuse in (lambda: apply(images, draw(2, 8, 8, seeded(0)), 4), lambda: normalize(images),
                   lambda: normalize((255 * images[0]).byte())):
        with pytest.raises(ValueError, match=r'images must be \(n, 3, H, W\) uint8, in grey levels from 0 to 255, got'):
            refuse()


def test_views_are_bytes_that_apply_normalises():
    images, p = photographs(4, 40, 40), draw(4, 40, 40, seeded(0))
    views = transform(images, p, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert views.dtype == torch.uint8 and torch.equal(apply(images, p, 16), normalize(views))
    torch.testing.assert_close(normalize(views), (views / 255 - mean) / std)


def test_whole_chain_is_pils(case):
    images, p = case
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    ours = 255 * (apply(images, p, 32) * std + mean)
    difference = ours - levels([chain_pil(pil(x), one(p, i), 32) for i, x in enumerate(images)])
    assert difference.mean().abs() < 0.01 and difference.abs().mean() < 0.06
    assert (difference.abs() < 1.01).float().mean() > 0.995


def test_reference_transform_is_the_chain():
    """The reference pipeline is made of the operations that the chain above calls, and is deterministic."""
    image, size = pil(photographs(1, 96, 96)[0]), 32
    make = reference_transform(size)
    names = [type(t).__name__ for t in make.transforms]
    assert names == ['RandomResizedCrop', 'Flips', 'RandomApply', 'RandomGrayscale', 'GaussianBlur',
                     'ToTensor', 'Normalize']
    torch.manual_seed(3)
    first = make(image)
    torch.manual_seed(3)
    assert torch.equal(make(image), first) and not torch.equal(make(image), first)


def test_both_paths_make_the_same_views_on_average():
    """Brightness, contrast, colour and sharpness of 3,000 views of ten photographs, by either path."""
    images = photographs(10, 96, 96).repeat_interleave(150, 0)
    both = []
    for Views in (DeviceViews, ReferenceViews):
        x = torch.cat([torch.cat(views) for views, _ in Views(images, Batches(1500, 100), 32).epoch(1)])
        x = normalize(x)  # (3000, 3, 32, 32)
        gray, chroma = x.mean(1), x.std(1)
        both.append([gray.mean((1, 2)), gray.std((1, 2)), chroma.mean((1, 2)), gray.diff(dim=2).abs().mean((1, 2))])
    for device, reference in zip(*both):
        assert same_distribution(device, reference)


def same_distribution(ours, theirs):
    """Kolmogorov-Smirnov at a significance of 1e-5 and means within 4.5 standard errors."""
    ours, theirs = (np.asarray(x, dtype=float) for x in (ours, theirs))
    error = math.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
    return stats.ks_2samp(ours, theirs, method='asymp').pvalue > 1e-5 and \
        abs(ours.mean() - theirs.mean()) <= 4.5 * error + 1e-12


N = 100_000


@pytest.mark.parametrize('height, width', [(96, 96), (32, 32), (40, 120), (12, 200)])
def test_crops_are_distributed_as_torchvisions(height, width):
    p = draw(N, height, width, seeded(4))
    assert (p['top'] + p['h'] <= height).all() and (p['left'] + p['w'] <= width).all()
    torch.manual_seed(5)
    image = torch.empty(1, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), CROP_RATIO) for _ in range(N // 20)])
    for i, name in enumerate(('top', 'left', 'h', 'w')):
        assert same_distribution(p[name], theirs[:, i]), name
    assert same_distribution(p['h'] * p['w'], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(p['w'].double() / p['h'].double(), theirs[:, 3] / theirs[:, 2])


def fraction(x, expected):
    return abs(x.double().mean().item() - expected) < 4.5 * math.sqrt(expected * (1 - expected) / len(x))


def test_branches_orders_and_factors_are_distributed_as_torchvisions():
    p = draw(N, 96, 96, seeded(6))
    assert fraction(p['flip'], 0.5) and fraction(p['gray'], 0.2) and fraction(p['sigma'] > 0, 0.5)
    jittered = p['hue'] != 0
    assert fraction(jittered, 0.8)
    orders = (p['order'] * torch.tensor([64, 16, 4, 1])).sum(1)
    for order in itertools.permutations(range(4)):
        assert fraction(orders == sum(o * w for o, w in zip(order, (64, 16, 4, 1))), 1 / 24)
    torch.manual_seed(7)
    jitter = transforms.ColorJitter(*JITTER)
    theirs = [transforms.ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
              for _ in range(N // 20)]
    for i, name in enumerate(NAMES):
        assert same_distribution(p[name][jittered], [factors[i + 1] for factors in theirs]), name
        assert (p[name][~jittered] == (name != 'hue')).all()
    assert same_distribution(p['sigma'][p['sigma'] > 0], np.random.default_rng(8).uniform(*BLUR_SIGMA, N))


def test_images_and_views_have_parameters_of_their_own():
    generator = seeded(9)
    first, second = draw(N, 96, 96, generator), draw(N, 96, 96, generator)
    for name in ('top', 'left', 'h', 'flip', 'brightness', 'hue', 'sigma', 'gray'):
        x, y = first[name].double(), second[name].double()
        for a, b in ((x, y), (x[:-1], x[1:])):  # two views of one image; two images of one batch
            assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 4.5 / math.sqrt(N), name


IMAGES = photographs(50, 40, 40)


@pytest.mark.parametrize('Views', [DeviceViews, ReferenceViews])
def test_views_are_a_function_of_seed_and_epoch_and_step(Views):
    images = IMAGES.clone()

    def epoch(number, start=0, seed=0):
        return list(Views(images, Batches(50, 16, 3, seed), 16).epoch(number, start))

    whole, again = epoch(2), epoch(2)
    assert len(whole) == 3 and [len(views) for views, _ in whole] == [3, 3, 3]
    assert whole[0][0][0].shape == (16, 3, 16, 16) and whole[0][0][0].dtype == torch.uint8
    index = torch.cat([index for _, index in whole])
    assert len(index.unique()) == 48  # drop_last: 2 of 50 are left out
    assert not torch.equal(index, torch.cat([other for _, other in epoch(3)]))  # a shuffle of its own

    def equal(a, b):
        return all(torch.equal(i, j) and all(map(torch.equal, v, w)) for (v, i), (w, j) in zip(a, b, strict=True))

    assert equal(whole, again)
    assert equal(whole[1:], epoch(2, start=1))  # as after a resumption
    images[:] = images[:1].clone()  # copies of one: no seed, epoch, step, place or view sees it as another does
    views = [torch.cat(views) for number, seed in ((2, 0), (3, 0), (2, 1)) for views, _ in epoch(number, 0, seed)]
    views = torch.cat(views)
    assert len(views) == 3 * 3 * 3 * 16 and len(views.flatten(1).unique(dim=0)) > 0.98 * len(views)


@pytest.mark.parametrize('Views, world, images', [(ReferenceViews, 4, 48), (DeviceViews, 4, 48), (DeviceViews, 3, 50),
                                                  (DeviceViews, 16, 50)])
def test_the_whole_batch_does_not_depend_on_the_number_of_ranks(Views, world, images):
    """50 images leave a last batch of 2 (kept for a probe), of which some ranks have no image."""
    def last_batch(**ranks):
        batches = Batches(images, 16, drop_last=images == 48, **ranks)
        *_, (views, index) = Views(IMAGES[:images], batches, 16).epoch(1)
        return torch.cat([torch.stack(views, 1).flatten(1), index[:, None]], 1)

    parts = [last_batch(rank=rank, world=world) for rank in range(world)]
    assert sum(map(len, parts)) == images - (32 if images == 48 else 48)
    assert torch.equal(torch.cat(parts), last_batch())


@pytest.mark.parametrize('Views', [DeviceViews, ReferenceViews])
def test_positives_by_label_are_of_random_images_of_the_class(Views, monkeypatch):
    """Images of one grey level each, views without change: a pixel tells which image a view is of."""
    images = torch.arange(60, dtype=torch.uint8).view(60, 1, 1, 1).expand(60, 3, 8, 8).contiguous()
    labels = torch.arange(60) % 5
    if Views is DeviceViews:
        monkeypatch.setattr(augment, 'color_jitter', lambda x, p: x)
    else:
        monkeypatch.setattr(transforms.ColorJitter, 'forward', lambda self, image: image)

    def epoch(number, start=0, **ranks):
        return list(Views(images, Batches(60, 20, 3, labels=labels, **ranks), 8, blur=False).epoch(number, start))

    seen, same, pairs, epochs = torch.zeros(60, 60), 0, [], 200 if Views is DeviceViews else 30
    for number in range(1, epochs + 1):
        for (x1, *others), index in epoch(number):
            first, *rest = (x[:, 0, 0, 0].long() for x in (x1, *others))
            assert torch.equal(first, index)
            for other in rest:
                assert torch.equal(labels[other], labels[first])
                seen[first, other] += 1
                same += (other == first).sum().item()
            pairs.append(torch.stack(rest))
    assert fraction(torch.cat(pairs, 1)[0] == torch.cat(pairs, 1)[1], 1 / 12)  # each view draws for itself
    n = 120 * epochs
    assert abs(same / n - 1 / 12) < 4.5 * math.sqrt(1 / 12 * 11 / 12 / n)  # itself is possible
    expected, within = 2 * epochs / 12, labels[:, None] == labels  # of each image two draws an epoch from 12
    assert (seen[~within] == 0).all() and (seen[within] - expected).abs().max() < 6 * math.sqrt(expected)
    for (v, i), (w, j) in zip(epoch(3)[1:], epoch(3, 1), strict=True):  # as after a resumption
        assert torch.equal(i, j) and all(map(torch.equal, v, w))
    parts = [epoch(3, rank=rank, world=2) for rank in range(2)]
    for (v, i), (w, j), (whole, index) in zip(*parts, epoch(3), strict=True):
        assert torch.equal(torch.cat([i, j]), index) and torch.equal(torch.cat([v[2], w[2]]), whole[2])


def test_without_blur_nothing_else_changes():
    with_blur, without = (draw(1000, 40, 40, seeded(1), blur=blur) for blur in (True, False))
    assert (without.pop('sigma') == 0).all() and (with_blur.pop('sigma') > 0).any()
    assert all(torch.equal(with_blur[name], without[name]) for name in without)
    names = [[type(t).__name__ for t in reference_transform(32, blur).transforms] for blur in (True, False)]
    assert names[1] == [name for name in names[0] if name != 'GaussianBlur'] != names[0]


@pytest.mark.parametrize('height, width', [(200, 10), (10, 200)])
def test_crop_that_no_try_finds_is_the_central_one(height, width):
    """RandomResizedCrop's fall-back: the largest with an allowed ratio, in the middle."""
    p = draw(2000, height, width, seeded(1))
    long, side = round(10 * 4 / 3), ('h', 'top') if height > width else ('w', 'left')
    whole = (p['h'] * p['w'] == 10 * long)
    assert whole.sum() > 100 and (p[side[1]][whole & (p[side[0]] == long)] == (200 - long) // 2).float().mean() > 0.9


def test_workers_change_nothing():
    alone, two = (ReferenceViews(IMAGES, Batches(50, 16), 16, workers=workers) for workers in (0, 2))
    for epoch in (1, 2):
        for (v, i), (w, j) in zip(alone.epoch(epoch), two.epoch(epoch), strict=True):
            assert torch.equal(v[0], w[0]) and torch.equal(v[1], w[1]) and torch.equal(i, j)


def test_shared_memory_that_is_too_small_for_the_workers_is_named(monkeypatch):
    """2 workers with 2 batches ahead: 4 * 16 images * 2 views * 3 * 8 * 8 bytes are 24,576."""
    for free, fits in ((24_576, True), (24_575, False)):
        monkeypatch.setattr('shutil.disk_usage', lambda path, free=free: Namespace(free=free))
        if fits:
            ReferenceViews(IMAGES, Batches(50, 16), 8, workers=2)
        else:
            with pytest.raises(UserError, match=r'/dev/shm has no room .* --workers 0'):
                ReferenceViews(IMAGES, Batches(50, 16), 8, workers=2)


def test_reference_views_can_be_sent_to_workers_that_are_not_forked():
    views = ReferenceViews(IMAGES, Batches(50, 16), 16).loader.dataset
    assert torch.equal(pickle.loads(pickle.dumps(views))[1, 2, 3][0], views[1, 2, 3][0])


def test_compiled_and_eager_views_agree():
    u, p = uniforms(8, seeded(1)), draw(8, 40, 40, seeded(1))
    compiled = torch.compile(random_views, backend='eager', fullgraph=True)
    assert torch.equal(compiled(IMAGES[:8], u, 16), transform(IMAGES[:8], p, 16))


def test_views_made_a_few_at_a_time_are_the_same():
    """More than 48 images, by which a CPU makes them; on two ranks parts have other ends."""
    images = photographs(130, 40, 40)
    for rank, world in ((0, 1), (1, 2)):
        views, made = DeviceViews(images, Batches(130, 130, rank=rank, world=world), 16), []
        assert views.at_once == 48
        for views.at_once in (None, 48, 7):
            made.append(next(views.epoch(1)))
        (whole, index), *others = made
        assert len(index) == 130 // world
        for other, same in others:
            assert torch.equal(same, index) and all(map(torch.equal, other, whole))


@pytest.mark.parametrize('recipe, changed', [(dict(crop_min=0.5), 'h left top w'),
                                             (dict(jitter=0.5), 'brightness contrast hue saturation'),
                                             (dict(grayscale=0.6), 'gray'), (dict(blur=False), 'sigma'),
                                             (dict(vertical_flip=True), 'vertical_flip')], ids=str)
def test_each_part_of_the_recipe_changes_itself_alone(recipe, changed):
    u = uniforms(N, seeded(1))
    before, after = parameters(u, 96, 96), parameters(u, 96, 96, **recipe)
    assert ' '.join(sorted(name for name in before if not torch.equal(before[name], after[name]))) == changed
    if 'crop_min' in recipe:
        assert (after['h'] * after['w'] / 96**2).min() > 0.48 and (before['h'] * before['w'] / 96**2).min() < 0.09
    elif 'jitter' in recipe:
        assert after['hue'].abs().max() <= 0.05 and (after['brightness'] - 1).abs().max() <= 0.2 + 1e-6
    elif 'grayscale' in recipe:
        assert fraction(after['gray'], 0.6)
    elif 'vertical_flip' in recipe:
        assert not before['vertical_flip'].any()
        assert fraction(after['vertical_flip'], 0.5) and fraction(after['vertical_flip'] & after['flip'], 0.25)


def test_reference_views_follow_the_recipe():
    """At its ends: the whole image, no change of colour but to grey, and half of the views upside down."""
    image, gray = pil(photographs(1, 32, 32)[0]), TF.rgb_to_grayscale(pil(photographs(1, 32, 32)[0]), 3)
    *make, _, _ = reference_transform(32, False, 1.0, 0.0, 1.0, True).transforms
    seen = set()
    torch.manual_seed(0)
    for _ in range(40):
        x = transforms.Compose(make)(image)
        seen.add(next((i for i, turn in enumerate((lambda x: x, TF.hflip, TF.vflip, lambda x: TF.hflip(TF.vflip(x))))
                       if turn(gray).tobytes() == x.tobytes()), 4))
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize('size, width', [(16, 1), (20, 3), (32, 3), (40, 5), (64, 7), (96, 9)])
def test_blur_kernel_is_a_tenth_of_the_image_and_odd(size, width):
    assert blur_kernel_size(size) == width


def test_blur_has_opencvs_border_and_any_kernel():
    image = photographs(1, 48, 48)
    for width in (1, 3, 5, 9):
        ours = augment.gaussian_blur(image.float(), torch.tensor([1.3]), width)
        theirs = cv2.GaussianBlur(image[0].permute(1, 2, 0).numpy(), (width, width), 1.3)
        difference = ours[0].permute(1, 2, 0) - torch.from_numpy(theirs)
        assert difference.abs().max() <= 1 and (difference == 0).float().mean() > 0.999, width
