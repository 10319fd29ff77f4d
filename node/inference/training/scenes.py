"""The scenes that motif learns from: one coloured shape that drifts over a plain field, and a caption that says so.

Everything about the training data is in this file. A scene is a few numbers (colour, shape, motion, size, place); it is
drawn with antialiased distance fields, and its caption is put together from a small grammar. Nothing is downloaded.

    python scenes.py OUT.png [SEED]     draws sixteen scenes, first to last frame from left to right, captions on stdout
"""

import hashlib
import math
import random
import sys
from dataclasses import dataclass

import torch

SIZE = 64
FRAMES = 17
FPS = 8

# What the words mean, as sRGB. A field has a softer tone of the same word, so that a shape stands out from it.
OBJECT_COLOURS = {
    "red": (222, 38, 38),
    "green": (38, 176, 66),
    "blue": (44, 78, 226),
    "yellow": (244, 216, 48),
    "orange": (244, 132, 30),
    "purple": (146, 50, 186),
    "white": (246, 246, 246),
    "cyan": (52, 206, 214),
}
FIELD_COLOURS = {
    "red": (150, 70, 70),
    "green": (84, 136, 92),
    "blue": (72, 96, 164),
    "yellow": (200, 184, 112),
    "purple": (112, 80, 140),
    "grey": (128, 128, 128),
    "black": (24, 24, 28),
    "white": (212, 212, 206),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SIZES = {"small": 8.0, "": 11.0, "large": 14.0}

VERBS = ("drifts", "moves", "slides", "floats")
PLACES = ("over", "on", "across")
FIELDS = ("field", "background", "ground")


@dataclass(frozen=True)
class Scene:
    """One scene. `phase` is how far the path is shifted from the centre, pixels along and across the motion."""

    colour: str
    shape: str
    motion: str
    field: str
    size: str
    travel: float
    phase: tuple
    verb: str
    place: str
    ground: str

    def caption(self):
        """The caption, as an artist would type it."""
        size = self.size + " " if self.size else ""
        noun = f"{size}{self.colour} {self.shape}"
        article = "an" if noun[0] in "aeiou" else "a"
        return f"{article} {noun} {self.verb} {self.motion} {self.place} a {self.field} {self.ground}"


def held_out(colour, shape, motion):
    """Whether a combination is kept from training: a tenth of them, by hash."""
    if (colour, shape, motion) == ("red", "circle", "left"):
        return False  # the README's example is an ordinary scene
    digest = hashlib.sha256(f"{colour}|{shape}|{motion}".encode()).digest()
    return digest[0] % 10 == 0


def draw_scene(rng, want_held_out=False):
    """A random scene from the training combinations, or from the held-out ones."""
    while True:
        colour, shape, motion = rng.choice(list(OBJECT_COLOURS)), rng.choice(SHAPES), rng.choice(list(MOTIONS))
        field = rng.choice(list(FIELD_COLOURS))
        if field != colour and held_out(colour, shape, motion) == want_held_out:
            break
    return Scene(
        colour, shape, motion, field, rng.choice(list(SIZES)), rng.uniform(20.0, 28.0),
        (rng.uniform(-3.0, 3.0), rng.uniform(-8.0, 8.0)),
        rng.choice(VERBS), rng.choice(PLACES), rng.choice(FIELDS),
    )


def held_out_captions(count=100, seed=2024):
    """The captions on which motif is judged: held-out combinations, none twice."""
    rng, captions = random.Random(seed), []
    while len(captions) < count:
        caption = draw_scene(rng, want_held_out=True).caption()
        if caption not in captions:
            captions.append(caption)
    return captions


def _distance(shape, x, y, r):
    """Signed distance to a shape's edge, pixels; negative inside. `x`, `y`: offsets from its centre."""
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "ring":
        return (torch.hypot(x, y) - 0.8 * r).abs() - 0.3 * r
    if shape == "square":
        half = 0.88 * r
        return torch.maximum(x.abs(), y.abs()) - half
    if shape == "triangle":
        side, shift = math.sqrt(3.0) / 2.0, 0.15 * r
        y = y - shift
        return torch.maximum(side * x.abs() - 0.5 * y, y) - 0.55 * r
    if shape == "star":
        angle = torch.atan2(x, -y)
        sector = 2.0 * math.pi / 5.0
        folded = (torch.remainder(angle + sector / 2.0, sector) - sector / 2.0).abs()
        length = torch.hypot(x, y)
        px, py = length * torch.sin(folded), length * torch.cos(folded)
        outer, inner = 1.25 * r, 0.55 * r
        ex, ey = inner * math.sin(sector / 2.0), inner * math.cos(sector / 2.0)
        nx, ny = outer - ey, ex  # normal of the edge from the tip (0, outer) to (ex, ey)
        norm = math.hypot(nx, ny)
        return (px * nx + (py - outer) * ny) / norm
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def render(scene):
    """The scene's frames, [FRAMES, 3, SIZE, SIZE], 0 to 1."""
    dx, dy = MOTIONS[scene.motion]
    s = torch.linspace(0.0, 1.0, FRAMES)
    eased = 0.5 * s + 0.5 * (3.0 * s**2 - 2.0 * s**3) - 0.5
    along, across = scene.phase
    cx = SIZE / 2 + dx * (eased * scene.travel + along) + dy * across
    cy = SIZE / 2 + dy * (eased * scene.travel + along) + dx * across
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, :] - cx[:, None, None]
    y = grid[None, :, None] - cy[:, None, None]
    cover = (0.5 - _distance(scene.shape, x, y, SIZES[scene.size])).clamp(0.0, 1.0)[:, None]
    paint = torch.tensor(OBJECT_COLOURS[scene.colour])[None, :, None, None] / 255.0
    field = torch.tensor(FIELD_COLOURS[scene.field])[None, :, None, None] / 255.0
    return cover * paint + (1.0 - cover) * field


def main():
    """Draws sixteen scenes into one picture."""
    from PIL import Image

    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    rows = []
    for _ in range(16):
        scene = draw_scene(rng)
        print(scene.caption())
        rows.append(torch.cat(list(render(scene)[::4]), dim=2))
    sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255.0).round().to(torch.uint8)
    Image.fromarray(sheet.numpy()).save(sys.argv[1])


if __name__ == "__main__":
    main()
