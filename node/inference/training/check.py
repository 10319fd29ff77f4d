"""Runs an exported motif through diffusers' own LTXPipeline: scores on the held-out captions, and a golden for the engine.

    python check.py scores FOLDER [CLIPS]    scores; with CLIPS also the frames there, as judge.py reads them
    python check.py golden FOLDER FILE       noise, latents and frames of one prompt, all computed in f32
    python check.py strip  FOLDER PICTURE    a few captions, first to last frame from left to right
"""

import sys
import time
from pathlib import Path

import torch
from diffusers import LTXPipeline
from PIL import Image
from safetensors.torch import save_file

import judge
import model
import scenes

PROMPT = "a red circle drifts left over a blue field"
GOLDEN_SEED = 7
# The frames that the golden keeps: it is committed, so it must stay small.
GOLDEN_FRAMES = [0, 4, 8, 12, 16]
BATCH = 20


def load(folder):
    """The pipeline in f32 (weights are f16 in the files)."""
    pipeline = LTXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, captions, seed=0, latents=None, output="pt"):
    """[B, F, 3, H, W] in 0 to 1, or packed latents, with motif's defaults; caption n has the seed `seed` + n."""
    return pipeline(
        prompt=list(captions), negative_prompt=[""] * len(captions),
        width=scenes.SIZE, height=scenes.SIZE, num_frames=scenes.FRAMES, frame_rate=scenes.FPS,
        num_inference_steps=model.STEPS, guidance_scale=model.GUIDANCE, max_sequence_length=model.TEXT_TOKENS,
        generator=[torch.Generator().manual_seed(seed + n) for n in range(len(captions))],
        latents=latents, output_type=output,
    ).frames


def scores(folder, clips=None):
    """Prints the scores on the held-out captions and the seconds that a clip took."""
    pipeline, captions = load(folder), scenes.held_out_captions()
    started = time.monotonic()
    videos = torch.cat([
        generate(pipeline, captions[n : n + BATCH], seed=n) for n in range(0, len(captions), BATCH)
    ]).float()
    seconds = (time.monotonic() - started) / len(captions)
    judge.report(captions, videos)
    started = time.monotonic()
    generate(pipeline, captions[:1])
    print(f"{seconds:.2f} s a clip in batches of {BATCH}, {time.monotonic() - started:.2f} s alone, "
          f"{torch.get_num_threads()} threads")
    if clips:
        write_frames(captions, videos, Path(clips))


def write_frames(captions, videos, folder):
    """Frames as PNG with captions.txt."""
    for n, video in enumerate(videos):
        (folder / f"{n:03}").mkdir(parents=True, exist_ok=True)
        for k, frame in enumerate(video):
            picture(frame).save(folder / f"{n:03}" / f"frame-{k:04}.png")
    (folder / "captions.txt").write_text("".join(caption + "\n" for caption in captions))


def picture(frame):
    """[3, H, W] in 0 to 1 as a picture."""
    return Image.fromarray((frame.permute(1, 2, 0) * 255.0).round().clamp(0, 255).to(torch.uint8).numpy())


def golden(folder, file):
    """Writes in.latents and out.latents (packed, [1, tokens, channels]) and some of out.frames ([F, 3, H, W])."""
    pipeline = load(folder)
    noise = torch.randn(1, model.TOKENS, model.CHANNELS, generator=torch.Generator().manual_seed(GOLDEN_SEED))
    latents = generate(pipeline, [PROMPT], latents=noise, output="latent")
    frames = generate(pipeline, [PROMPT], latents=noise)[0].float()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {"in.latents": noise, "out.latents": latents.contiguous(), "out.frames": frames[GOLDEN_FRAMES].contiguous()},
        file,
        metadata={
            "prompt": PROMPT, "negative_prompt": "", "steps": str(model.STEPS), "guidance": str(model.GUIDANCE),
            "fps": str(scenes.FPS), "width": str(scenes.SIZE), "height": str(scenes.SIZE),
            "frames": str(scenes.FRAMES), "frame_indices": ",".join(map(str, GOLDEN_FRAMES)),
            "seed": str(GOLDEN_SEED), "max_sequence_length": str(model.TEXT_TOKENS),
            "made_by": "diffusers 0.36.0 LTXPipeline, f32, weights f16 in the files",
        },
    )


def strip(folder, file):
    """A few captions as rows of frames."""
    captions = [PROMPT] + scenes.held_out_captions()[:11]
    videos = generate(load(folder), captions)
    rows = [torch.cat(list(video[::4]), dim=2) for video in videos]
    picture(torch.cat(rows, dim=1).float()).save(file)
    print("\n".join(captions))


def main():
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    {"scores": scores, "golden": golden, "strip": strip}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
