"""Trains motif: first the linear latents, then transformer and text encoder on them, then the VAE that decodes them.

    python train.py basis       RUN              principal components and a corpus of latents
    python train.py transformer RUN MINUTES      transformer and text encoder, resumes
    python train.py vae         RUN MINUTES      decoder refined on clips, encoder set to the components; resumes
    python train.py export      RUN OUT          the pipeline folder, weights in f16
    python train.py judge       RUN [DECODER]    scores on the held-out captions (DECODER: linear or vae)

RUN is a folder for everything that training makes. A run that is cut off goes on from its last checkpoint.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

import torch

import judge
import model
import scenes
import vae

CORPUS = 24_000
BATCH = 32
LEARNING_RATE = 2e-3
WARM_UP_STEPS = 200
CAPTION_DROPOUT = 0.1
CHECKPOINT_SECONDS = 120


def clips(scene_list):
    """[B, F, 3, H, W] in -1 to 1."""
    return torch.stack([scenes.render(scene) for scene in scene_list]) * 2.0 - 1.0


def basis(run):
    """Fits the linear latents and writes the corpus: normalised latents and captions of random scenes."""
    run.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    corpus = [scenes.draw_scene(rng) for _ in range(CORPUS)]
    fitted = model.Basis.fit(clips(corpus[:2500]))
    torch.save(vars(fitted), run / "basis.pt")
    latents = [fitted.encode(clips(corpus[n : n + 500])) for n in range(0, CORPUS, 500)]
    torch.save((torch.cat(latents), [scene.caption() for scene in corpus]), run / "corpus.pt")


def load_basis(run):
    return model.Basis(**torch.load(run / "basis.pt"))


def transformer(run, minutes):
    """Rectified flow on the corpus; the learning rate falls to zero at the end of the time."""
    torch.manual_seed(0)
    data, captions = torch.load(run / "corpus.pt")
    ids, mask = model.tokens(captions)
    empty_ids, empty_mask = model.tokens([""])
    net = model.Motif()
    average = model.Motif()
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step, spent, checkpoint = 0, 0.0, run / "transformer.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
        step, spent = saved["step"], saved["spent"]
        average.load_state_dict(saved["average"])
    else:
        average.load_state_dict(net.state_dict())
    started, saved_at, losses = time.monotonic() - spent, time.monotonic(), []
    while (spent := time.monotonic() - started) < minutes * 60.0:
        rate = min(1.0, (step + 1) / WARM_UP_STEPS) * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * spent / minutes / 60)))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * rate
        chosen = torch.randint(0, len(data), (BATCH,))
        clean, noise = data[chosen], torch.randn(BATCH, *data.shape[1:])
        t = model.shift(torch.sigmoid(1.2 * torch.randn(BATCH)))
        text, text_mask = ids[chosen].clone(), mask[chosen].clone()
        dropped = torch.rand(BATCH) < CAPTION_DROPOUT
        text[dropped], text_mask[dropped] = empty_ids, empty_mask
        noisy = (1.0 - t)[:, None, None] * clean + t[:, None, None] * noise
        loss = (net(noisy, t, text, text_mask) - (noise - clean)).pow(2).mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
        with torch.no_grad():
            decay = min(0.998, 1.0 - 1.0 / (step / 10 + 2))
            torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1.0 - decay)
        losses.append(loss.item())
        if step % 200 == 0:
            print(f"step {step} loss {sum(losses) / len(losses):.4f} after {spent:.0f} s", flush=True)
            losses = []
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            save_transformer(checkpoint, net, average, optimiser, step, spent)
            saved_at = time.monotonic()
    save_transformer(checkpoint, net, average, optimiser, step, spent)


def save_transformer(path, net, average, optimiser, step, spent):
    state = {"net": net.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state | {"step": step, "spent": spent}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load_transformer(run):
    net = model.Motif()
    net.load_state_dict(torch.load(run / "transformer.pt")["average"])
    return net.eval()


def judge_run(run, decoder="linear"):
    """Scores on the held-out captions; `linear` needs no VAE."""
    net, fitted, captions = load_transformer(run), load_basis(run), scenes.held_out_captions()
    latents = model.sample(net, captions)
    if decoder == "linear":
        video = fitted.decode(latents)
    else:
        video = vae.decode(vae.load(run, fitted), fitted, latents)
    judge.report(captions, (video * 0.5 + 0.5).clamp(0.0, 1.0))


def export(run, out):
    """The pipeline folder."""
    import export as folder

    folder.write(load_transformer(run), vae.load(run, load_basis(run)), out)


def main():
    command, run = sys.argv[1], Path(sys.argv[2])
    if command == "basis":
        basis(run)
    elif command == "transformer":
        transformer(run, float(sys.argv[3]))
    elif command == "vae":
        vae.train(run, load_basis(run), float(sys.argv[3]), clips)
    elif command == "judge":
        judge_run(run, *sys.argv[3:4])
    elif command == "export":
        export(run, Path(sys.argv[3]))
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
