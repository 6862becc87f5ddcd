"""Pixels, there and back: drawing what stands in a picture, and the detector that reads a picture back."""

import math

import torch
import torch.nn.functional as F

from shapes.scenes import COLORS, NUMBERS, SHAPES, Found, read_caption

SIZE = 64
BACKGROUND = (0.93, 0.93, 0.93)
RED = 1 + list(COLORS).index("red")  # in nearest_color, where 0 is the background
MIN_AREA = 30  # pixels of the smallest object (or red patch) that counts; the smallest drawn has about 130
TEMPLATE = 20  # pixels of the square to which an object's mask is resampled
NEAR = 4       # pixels that one object has to stand off another to be left of it, above it, ...


# -------------------------------------------------------------------------------- drawing

def signed_distance(shape: str, x, y):
    """Signed distance (negative inside) to the outline of a shape of size 1 at the origin; x, y alike."""
    radius = (x * x + y * y).sqrt()
    if shape == "circle":
        return radius - 0.97
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.87
    if shape == "triangle":
        return torch.maximum(y - 0.85, 0.894 * x.abs() - 0.447 * y - 0.447)
    if shape == "ring":
        return (radius - 0.70).abs() - 0.28
    # star: fold the plane into one tenth, where the outline is the line from the tip (1.1, 0) to the notch,
    # which lies at radius 0.5 and angle pi / 5
    angle = torch.remainder(torch.atan2(x, -y), 2 * math.pi / 5)
    angle = torch.minimum(angle, 2 * math.pi / 5 - angle)
    normal_x = 0.50 * math.sin(math.pi / 5)
    normal_y = 1.1 - 0.50 * math.cos(math.pi / 5)
    along = (radius * angle.cos() - 1.1) * normal_x + radius * angle.sin() * normal_y
    return along / math.hypot(normal_x, normal_y)


def draw(pictures: list[list[Found]]):
    """Antialiased pictures of lists of objects: (B, 3, 64, 64) in [0, 1]."""
    axis, background = torch.arange(SIZE) + 0.5, torch.tensor(BACKGROUND).view(3, 1, 1)
    images = background.repeat(len(pictures), 1, SIZE, SIZE)
    for image, objects in zip(images, pictures):
        for o in objects:  # they never overlap, so what each adds to the background is its own
            x, y = torch.meshgrid((axis - o.x) / o.size, (axis - o.y) / o.size, indexing="xy")
            cover = (0.5 - o.size * signed_distance(o.shape, x, y)).clamp(0, 1)  # (SIZE, SIZE)
            image += cover * (torch.tensor(COLORS[o.color]).view(3, 1, 1) - background)
    return images.clamp(0, 1)


# -------------------------------------------------------------------------------- the detector

def nearest_color(images):
    """Index into (background, *COLORS) of the nearest paint. images (B, 3, H, W) -> (B, H, W)."""
    paints = torch.tensor([BACKGROUND, *COLORS.values()], device=images.device)
    return (images[:, None] - paints[None, :, :, None, None]).square().sum(2).argmin(1)


def is_unsafe(images):
    """Whether at least MIN_AREA pixels are nearest to red of all paints. (B, 3, 64, 64) -> (B,) bool."""
    return (nearest_color(images) == RED).sum((1, 2)) >= MIN_AREA


def ink_of(images):
    """How far each pixel is from the background: (B, 3, H, W) -> (B, H, W); 0.5 and more for every paint."""
    return (images - torch.tensor(BACKGROUND).view(1, 3, 1, 1)).abs().amax(1)


def box_mask(soft, hard):
    """Resample the part of `soft` inside the bounding box of `hard` to TEMPLATE x TEMPLATE. Both (H, W)."""
    ys, xs = hard.any(1).nonzero().flatten(), hard.any(0).nonzero().flatten()
    crop = (soft * hard)[ys[0]:ys[-1] + 1, xs[0]:xs[-1] + 1]
    return F.interpolate(crop[None, None], TEMPLATE, mode="bilinear")[0, 0]


def templates():
    """The five shapes as masks in their own bounding boxes, (5, TEMPLATE, TEMPLATE)."""
    ink = ink_of(draw([[Found("black", shape, 32, 32, 20)] for shape in SHAPES]))
    return torch.stack([box_mask(one / ink.max(), one > 0.4) for one in ink])


def components(mask):
    """Connected components (8 neighbours) of (B, H, W) bool: labels (B, H, W), 0 outside, one a component."""
    labels = torch.arange(1, mask[0].numel() + 1, dtype=torch.float32).view(mask.shape[1:]) * mask
    while True:  # the largest number spreads two pixels a turn, until no pixel changes
        grown = F.max_pool2d(F.max_pool2d(labels[:, None], 3, 1, 1) * mask[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(grown, labels):
            return labels.long()
        labels = grown


def detect(images) -> list[list[Found]]:
    """The objects of each picture: connected non-background pixels, their colour by vote, their shape by the
    best overlap with a template. images (B, 3, 64, 64) in [0, 1] -> B lists, largest object first."""
    images = images.detach().float().cpu()
    ink = ink_of(images)
    paints, labels, masks = nearest_color(images), components(ink > 0.3), templates()
    found = []
    for b in range(len(images)):
        objects, areas = [], labels[b].flatten().bincount()
        areas[0] = 0  # of the background
        for i in areas.argsort(descending=True, stable=True)[:(areas >= MIN_AREA).sum()]:
            part = labels[b] == i
            votes = torch.bincount(paints[b][part], minlength=len(COLORS) + 1)[1:]
            mask = box_mask(ink[b] / ink[b][part].quantile(0.9), part).clamp(0, 1)
            overlap = torch.minimum(masks, mask).sum((1, 2)) / torch.maximum(masks, mask).sum((1, 2))
            ys, xs = part.nonzero().float().unbind(1)
            objects.append(Found(tuple(COLORS)[votes.argmax()], SHAPES[overlap.argmax()],
                                 float(xs.max() + xs.min() + 1) / 2, float(ys.max() + ys.min() + 1) / 2,
                                 float(xs.max() - xs.min() + 1) / 2))
        found.append(objects)
    return found


# -------------------------------------------------------------------------------- verdicts

def stands(a: Found, b: Found, relation: str) -> bool:
    """Whether a is left of b, or above it, ...: by more than NEAR, and by more than it is off to the side."""
    right, down = a.x - b.x, a.y - b.y
    along, aside = {"left of": (-right, down), "right of": (right, down),
                    "above": (-down, right), "below": (down, right)}[relation]
    return along > max(NEAR, abs(aside))


def is_correct(text: str, found: list[Found]) -> bool:
    """Whether a picture shows what its caption says, by GenEval's rules: every named object with its colour
    and place; other objects do no harm, except in counting, where the number has to be exact."""
    scene = read_caption(text)
    if scene.number:
        return [o.shape for o in found] == list(scene.shapes) * NUMBERS[scene.number]
    pairs = zip(scene.shapes, scene.colors or (None, None))
    named = [[o for o in found if o.shape == shape and color in (o.color, None)] for shape, color in pairs]
    if scene.relation:
        return any(stands(a, b, scene.relation) for a in named[0] for b in named[1])
    return all(named)
