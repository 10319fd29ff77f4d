"""motif's VAE: the published LTX-Video architecture, begun as the linear latents and refined from there.

Encoder and decoder start as the principal components, laid out over the levels of the architecture in closed form, so
that the very first picture is right and training only sharpens it. Three facts make that possible:

- a residual block whose second convolution is zero is the identity;
- where some channels hold a large constant (the anchor), the channel norm before the last convolution divides by almost
  the same number everywhere, so it is nearly linear;
- silu(x) is nearly x / 2 for the small values that are left.

The encoder stays as it is: the transformer learned its latents. Only the decoder is trained.
"""

import math
import random
import time

import torch
from diffusers import AutoencoderKLLTXVideo

import model
import scenes

WIDTH = 96
ANCHORS = 8
FEATURES = WIDTH - ANCHORS
PATCH = 8
ENCODER_ANCHOR, DECODER_ANCHOR = 3000.0, 40.0
DECODER_LAYERS = (2, 1, 1)

BATCH = 4
LEARNING_RATE = 1.5e-4
# The decoder sees latents with a little noise, as sampled ones have.
LATENT_NOISE = 0.08
CHECKPOINT_SECONDS = 120


def build(fitted, trained=None):
    """The architecture, with the weights `trained`, or with the linear start."""
    vae = AutoencoderKLLTXVideo(
        latent_channels=model.CHANNELS, patch_size=PATCH,
        block_out_channels=(WIDTH, WIDTH), down_block_types=("LTXVideoDownBlock3D",) * 2,
        spatio_temporal_scaling=(True, True), layers_per_block=(0, 0, 0), downsample_type=("conv", "conv"),
        decoder_block_out_channels=(WIDTH, WIDTH), decoder_spatio_temporal_scaling=(True, True),
        decoder_layers_per_block=DECODER_LAYERS, decoder_inject_noise=(False,) * 3,
        upsample_residual=(False, False), upsample_factor=(1, 1), timestep_conditioning=False,
        spatial_compression_ratio=model.CELL, temporal_compression_ratio=model.CELL_FRAMES,
    )
    if trained:
        vae.load_state_dict(trained)
        return vae
    with torch.no_grad():
        start_linear(vae, fitted)
    vae.latents_mean.copy_(fitted.mean)
    vae.latents_std.copy_(fitted.std)
    return vae


def start_linear(vae, fitted):
    """Writes the principal components into encoder and decoder."""
    rng = random.Random(5)
    video = torch.stack([scenes.render(scenes.draw_scene(rng)) for _ in range(600)]) * 2.0 - 1.0
    patches = split(video, 1, PATCH).flatten(0, -2)
    halves = split(video[:, 1:], 2, 2 * PATCH).flatten(0, -2)
    b1 = torch.pca_lowrank(patches[torch.randperm(len(patches))[:60_000]], q=FEATURES, center=False, niter=4)[2]
    b2 = torch.pca_lowrank(halves, q=FEATURES, center=False, niter=4)[2]
    # [parts, values of a part, components]: what each of the 8 parts of a block holds of it.
    b2_parts = parts(b2, 2, 2 * PATCH)
    v_parts = parts(fitted.components, model.CELL_FRAMES, model.CELL)
    centre_parts = parts(fitted.centre[:, None], model.CELL_FRAMES, model.CELL)[..., 0]

    for parameter in list(vae.encoder.parameters()):
        parameter.zero_()
    order = channel_order()
    encoder, decoder = vae.encoder, vae.decoder
    encoder.conv_in.conv.weight[:FEATURES, :, 2, 1, 1] = b1[order].T
    encoder.conv_in.conv.bias[FEATURES:] = 1.0
    first, second = (block.downsamplers[0].conv for block in encoder.down_blocks)
    for part, (t, y, x) in enumerate(corners()):
        # Kernel taps 1 and 2 of a stride-2 convolution cover the two halves of a cell.
        first.weight[:FEATURES, :FEATURES, t + 1, y + 1, x + 1] = b2_parts[part].T @ b1
        second.weight[: model.CHANNELS, :FEATURES, t + 1, y + 1, x + 1] = v_parts[part].T @ b2
    first.bias[FEATURES:] = 1.0
    second.bias[: model.CHANNELS] = -(fitted.components.T @ fitted.centre)
    second.bias[FEATURES:] = ENCODER_ANCHOR
    centre_tap = encoder.conv_out.conv.weight[:, :, 2, 1, 1]
    centre_tap[: model.CHANNELS, : model.CHANNELS] = 2.0 * level(ENCODER_ANCHOR) * torch.eye(model.CHANNELS)
    encoder.conv_out.conv.bias[-1] = -10.0  # log-variance: the encoder is sure

    for convolution in (decoder.conv_in, decoder.conv_out, *(b.upsamplers[0].conv for b in decoder.up_blocks)):
        convolution.conv.weight.zero_()
        convolution.conv.bias.zero_()
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            resnet.conv2.conv.weight.mul_(0.02)
            resnet.conv2.conv.bias.zero_()
    decoder.conv_in.conv.weight[: model.CHANNELS, :, 1, 1, 1] = torch.eye(model.CHANNELS)
    decoder.conv_in.conv.bias[FEATURES:] = DECODER_ANCHOR
    up1, up2 = (block.upsamplers[0].conv.conv for block in decoder.up_blocks)
    for part in range(8):
        up1.weight[part::8][:FEATURES, : model.CHANNELS, 1, 1, 1] = b2.T @ v_parts[part]
        up1.bias[part::8][:FEATURES] = b2.T @ centre_parts[part]
        up1.bias[part::8][FEATURES:] = DECODER_ANCHOR
        up2.weight[part::8][:FEATURES, :FEATURES, 1, 1, 1] = b1.T @ b2_parts[part]
        up2.bias[part::8][FEATURES:] = DECODER_ANCHOR
    decoder.conv_out.conv.weight[:, :FEATURES, 1, 1, 1] = 2.0 * level(DECODER_ANCHOR) * b1[order]


def level(anchor):
    """What the channel norm divides by, where the anchor rules."""
    return anchor * math.sqrt(ANCHORS / WIDTH)


def corners():
    """The 8 parts of a block in the order of the upsampler's channels: time, row, column."""
    return [(t, y, x) for t in (0, 1) for y in (0, 1) for x in (0, 1)]


def split(video, frames, size):
    """[B, F, 3, H, W] to [B, ..., frames * 3 * size * size] blocks."""
    n, f, _, h, w = video.shape
    video = video.reshape(n, f // frames, frames, 3, h // size, size, w // size, size)
    return video.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(n, -1, frames * 3 * size * size)


def parts(matrix, frames, size):
    """Rows of `matrix` are a block [frames, 3, size, size]; splits them into its 8 corners: [8, values, columns]."""
    half_t, half = frames // 2, size // 2
    block = matrix.reshape(2, half_t, 3, 2, half, 2, half, -1)
    return block.permute(0, 3, 5, 1, 2, 4, 6, 7).reshape(8, half_t * 3 * half * half, -1)


def channel_order():
    """Index of our [3, row, column] value for each channel of the reference's patches: colour, column, row."""
    index = torch.arange(3 * PATCH * PATCH).reshape(3, PATCH, PATCH)
    return index.permute(0, 2, 1).reshape(-1)


def decode(vae, fitted, latents):
    """[B, F, 3, H, W] in -1 to 1 of normalised latents [B, TOKENS, CHANNELS], as the pipeline does it."""
    raw = latents * fitted.std + fitted.mean
    raw = raw.reshape(-1, model.TOKENS_T, model.TOKENS_S, model.TOKENS_S, model.CHANNELS).permute(0, 4, 1, 2, 3)
    return vae.decode(raw, return_dict=False)[0].permute(0, 2, 1, 3, 4)


def train(run, fitted, minutes, clips):
    """Sharpens the decoder on fresh clips; the learning rate falls to zero at the end of the time."""
    torch.manual_seed(0)
    step, spent, checkpoint = 0, 0.0, run / "vae.pt"
    saved = torch.load(checkpoint) if checkpoint.exists() else {}
    vae = build(fitted, saved.get("vae"))
    optimiser = torch.optim.AdamW(vae.decoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    if saved:
        optimiser.load_state_dict(saved["optimiser"])
        step, spent = saved["step"], saved["spent"]
    rng = random.Random(11 + step)
    started, saved_at, errors = time.monotonic() - spent, time.monotonic(), []
    while (spent := time.monotonic() - started) < minutes * 60.0:
        falling = 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * spent / minutes / 60))
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 50) * falling
        video = clips([scenes.draw_scene(rng) for _ in range(BATCH)])
        latents = fitted.encode(video)
        made = decode(vae, fitted, latents + LATENT_NOISE * torch.rand(BATCH, 1, 1) * torch.randn_like(latents))
        error = (made - video).pow(2).mean()
        loss = (made - video).abs().mean() + 2.0 * error
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimiser.step()
        step += 1
        errors.append(error.item() / 4.0)
        if step % 50 == 0 or step == 1:
            decibel = -10.0 * math.log10(sum(errors) / len(errors))
            print(f"step {step} psnr {decibel:.2f} dB after {spent:.0f} s", flush=True)
            errors = []
        if time.monotonic() - saved_at > CHECKPOINT_SECONDS:
            save(checkpoint, vae, optimiser, step, spent)
            saved_at = time.monotonic()
    save(checkpoint, vae, optimiser, step, spent)


def save(path, vae, optimiser, step, spent):
    state = {"vae": vae.state_dict(), "optimiser": optimiser.state_dict(), "step": step, "spent": spent}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def load(run, fitted):
    """The trained VAE, or the linear start where nothing was trained yet."""
    checkpoint = run / "vae.pt"
    return build(fitted, torch.load(checkpoint)["vae"] if checkpoint.exists() else None).eval()
