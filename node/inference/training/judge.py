"""Says what a clip shows from its pixels alone, and only then compares with the caption.

    python judge.py DIR      DIR/captions.txt has a caption a line; the clip of line N is DIR/NNN/frame-0000.png and on

The field is the median colour of the border, the object is what differs from it, its colour is the median of the
object's core, its motion is the way of the object's centroid from the first frames to the last ones, its shape is the
best overlap of its mask with a drawn template (below `SHAPE_FLOOR` it has none). Names are the nearest palette entries.
"""

import sys
from collections import Counter
from pathlib import Path

import torch

import scenes

# Colour distance (0 to sqrt 3) from which a pixel is no longer field.
OBJECT_DISTANCE = 0.16
# Fewest pixels of an object in a frame.
OBJECT_PIXELS = 12
# Overlap (intersection over union) with a template from which a mask counts as that shape.
SHAPE_FLOOR = 0.75


def nearest(colour, palette):
    """The palette's name nearest to a colour in 0 to 1."""
    return min(palette, key=lambda name: float(((colour - torch.tensor(palette[name]) / 255.0) ** 2).sum()))


def look(frames):
    """What [F, 3, H, W] frames in 0 to 1 show: a dict of field, colour, motion, shape (None where there is none)."""
    border = torch.cat([frames[:, :, 0], frames[:, :, -1], frames[:, :, :, 0], frames[:, :, :, -1]], dim=2)
    field = border.permute(1, 0, 2).reshape(3, -1).median(dim=1).values
    distance = (frames - field[None, :, None, None]).pow(2).sum(dim=1).sqrt()
    seen = {"field": nearest(field, scenes.FIELD_COLOURS), "colour": None, "motion": None, "shape": None}
    masks = distance > OBJECT_DISTANCE
    if int(masks.sum()) < OBJECT_PIXELS * len(frames) // 2:
        return seen
    core = distance > 0.8 * torch.quantile(distance[masks], 0.9)
    pixels = frames.permute(1, 0, 2, 3)[:, core]
    seen["colour"] = nearest(pixels.median(dim=1).values, scenes.OBJECT_COLOURS)
    seen["motion"] = motion(distance, masks)
    seen["shape"] = shape(masks[len(masks) // 2])
    return seen


def motion(distance, masks):
    """The direction of the centroid's way, from the first third of the frames to the last."""
    h, w = distance.shape[1:]
    ys, xs = torch.arange(h)[None, :, None], torch.arange(w)[None, None, :]
    weight = distance * masks
    mass = weight.sum(dim=(1, 2))
    there = mass > 0
    if int(there.sum()) < 4:
        return None
    x = ((weight * xs).sum(dim=(1, 2))[there] / mass[there]).tolist()
    y = ((weight * ys).sum(dim=(1, 2))[there] / mass[there]).tolist()
    third = max(1, len(x) // 3)
    dx = sum(x[-third:]) / third - sum(x[:third]) / third
    dy = sum(y[-third:]) / third - sum(y[:third]) / third
    if max(abs(dx), abs(dy)) < 2.0:
        return None
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "up" if dy < 0 else "down"


def shape(mask):
    """The shape whose template, of the same area and place, overlaps the mask best."""
    area = float(mask.sum())
    if area < OBJECT_PIXELS:
        return None
    ys, xs = torch.nonzero(mask, as_tuple=True)
    best, name = 0.0, None
    grid = torch.arange(mask.shape[0]) + 0.5
    for candidate in scenes.SHAPES:
        for radius in torch.arange(5.0, 20.0, 0.5).tolist():
            for shift in (-2.0, 0.0, 2.0):
                x = grid[None, :] - float(xs.float().mean()) - 0.5
                y = grid[:, None] - float(ys.float().mean()) - 0.5 + shift
                template = scenes._distance(candidate, x, y, radius) < 0
                union = float((template | mask).sum())
                overlap = float((template & mask).sum()) / union
                if overlap > best:
                    best, name = overlap, candidate
    return name if best >= SHAPE_FLOOR else None


def asked(caption):
    """What a caption of our grammar asks for."""
    words = caption.split()
    before = words[: words.index(next(w for w in words if w in scenes.MOTIONS))]
    return {
        "colour": next(w for w in before if w in scenes.OBJECT_COLOURS),
        "shape": next(w for w in before if w in scenes.SHAPES),
        "motion": next(w for w in words if w in scenes.MOTIONS),
        "field": words[-2],
    }


def score(captions, clips):
    """Shares of right answers per question, and what guessing the most frequent answer would reach."""
    seen = [look(clip) for clip in clips]
    wanted = [asked(caption) for caption in captions]
    result = {}
    for question in ("colour", "field", "motion", "shape"):
        right = sum(s[question] == w[question] for s, w in zip(seen, wanted))
        chance = Counter(w[question] for w in wanted).most_common(1)[0][1]
        result[question] = (right / len(captions), chance / len(captions))
    return result


def report(captions, clips):
    """Prints a line per question."""
    for question, (right, chance) in score(captions, clips).items():
        print(f"{question:8} {100 * right:5.1f} % right   ({100 * chance:4.1f} % by always saying the same)")


def main():
    """Judges a folder of frames."""
    import numpy
    from PIL import Image

    folder = Path(sys.argv[1])
    captions = (folder / "captions.txt").read_text().splitlines()
    clips = []
    for n in range(len(captions)):
        files = sorted((folder / f"{n:03}").glob("frame-*.png"))
        frames = [torch.from_numpy(numpy.array(Image.open(f).convert("RGB"))) for f in files]
        clips.append(torch.stack(frames).permute(0, 3, 1, 2).float() / 255.0)
    report(captions, clips)


if __name__ == "__main__":
    main()
