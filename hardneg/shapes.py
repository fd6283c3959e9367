"""Ten classes of drawn images: a data set that needs no files.

The class is the outline. Place, scale, brightness, contrast and saturation differ widely from image
to image, so that an untrained encoder's neighbours are of any class. These are what the views vary.
All images have one hue: it survives the views, and an encoder would learn it instead.
"""

import cv2
import numpy as np
import torch


def draw(n, size=32, seed=0):
    """Images (n, 3, size, size) uint8, labels (n,), and the names of the ten classes."""
    rng = np.random.default_rng(seed)
    outlines = _outlines()
    rings = list(outlines.values())
    labels = rng.integers(len(rings), size=n)
    images = np.stack([_draw(rings[label], size, rng) for label in labels])
    return torch.from_numpy(images), torch.from_numpy(labels), list(outlines)


def _outlines():
    """The shapes by name, as rings of points in about [-1, 1], filled by the even-odd rule."""
    angle = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    arm = np.array([[-1, 1], [-1, 3], [1, 3], [1, 1]]) / 3
    quarter_turn = np.array([[0, 1], [-1, 0]])
    arms = [arm @ np.linalg.matrix_power(quarter_turn, turns) for turns in (0, 3, 2, 1)]
    inner_edge = circle[52:7:-1] * [0.62, 0.8] + [0.5, 0]
    third = 1 / 3
    arrow = [[-1, -third], [0, -third], [0, -1], [1, 0], [0, 1], [0, third], [-1, third]]
    stripes = []
    for y in (-1, -0.2, 0.6):
        stripes.append(np.array([[-1, y], [1, y], [1, y + 0.4], [-1, y + 0.4]]))
    heart_y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
    return {
        'disk': [circle],
        'ring': [circle, 0.55 * circle],
        'square': [0.85 * square],
        'triangle': [1.15 * circle[[5, 25, 45]]],
        'star': [circle[3::6] * np.array([1.15, 0.42] * 5)[:, None]],
        'plus': [np.concatenate(arms)],
        'crescent': [np.concatenate([circle[8:53], inner_edge]) - [0.2, 0]],
        'arrow': [np.array(arrow)],
        'stripes': stripes,
        'heart': [np.stack([np.sin(angle) ** 3, -heart_y / 16], 1)],
    }


def _draw(rings, size, rng):
    """(3, size, size) uint8: the rings filled with an orange, on a ground darker or brighter."""
    value = rng.uniform(0.25, 1)
    saturation = rng.uniform(0.2, 1)
    colour = 255 * value * (1 - saturation * np.array([0, 0.55, 1]))
    level = rng.uniform(0, 255)
    while abs(level - colour.mean()) < 40:
        level = rng.uniform(0, 255)
    ground = level * np.array([1, 0.95, 0.9])
    radius = size * rng.uniform(0.15, 0.45)
    centre = rng.uniform(radius, size - radius, 2)
    points = []
    for ring in rings:
        # four times as large, in fillPoly's units of 1/16 pixel
        points.append(np.rint(64 * (radius * ring + centre)).astype(np.int32))
    mask = cv2.fillPoly(np.zeros((4 * size, 4 * size), np.uint8), points, 255, shift=4)
    mask = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)[..., None] / 255
    image = mask * colour + (1 - mask) * ground  # (size, size, 3)
    return image.clip(0, 255).astype(np.uint8).transpose(2, 0, 1)  # -> (3, size, size)
