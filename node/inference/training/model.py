"""motif's parts: vocabulary, linear latents, transformer, text encoder, sampler. Shapes and constants stand here once.

A latent cell covers 32 x 32 pixels and 4 frames (the first one: 1 frame), so that a clip of 64 x 64 x 17 has
5 x 2 x 2 = 20 tokens of 64 channels. The latents are the principal components of such blocks. They are scaled by the
square root of their spread, not by all of it: what varies most (field, colour, place) keeps the largest share of the
loss and is learned first.
"""

import math
from dataclasses import dataclass

import torch
from diffusers import LTXVideoTransformer3DModel
from transformers import T5Config, T5EncoderModel

import scenes

CELL = 32
CELL_FRAMES = 4
CHANNELS = 64
TOKENS_T = (scenes.FRAMES - 1) // CELL_FRAMES + 1
TOKENS_S = scenes.SIZE // CELL
TOKENS = TOKENS_T * TOKENS_S * TOKENS_S
TEXT_TOKENS = 16

HEADS, HEAD_WIDTH, LAYERS = 6, 32, 4
TEXT_WIDTH = 96

# The scheduler's dynamic shift at TOKENS tokens.
SHIFT_MU = 1.0
STEPS, GUIDANCE = 16, 2.0


def words():
    """The vocabulary, in a fixed order: three marks, then every word of the grammar."""
    of_grammar = {"a", "an"}
    for group in (scenes.OBJECT_COLOURS, scenes.FIELD_COLOURS, scenes.SHAPES, scenes.MOTIONS, scenes.SIZES):
        of_grammar.update(group)
    of_grammar.update(scenes.VERBS + scenes.PLACES + scenes.FIELDS)
    return ["<pad>", "</s>", "<unk>"] + sorted(of_grammar - {""})


VOCABULARY = {word: index for index, word in enumerate(words())}


def tokens(captions):
    """Token ids and mask, [B, TEXT_TOKENS] each; a caption ends with </s> and is filled with <pad>."""
    ids, mask = [], []
    for caption in captions:
        row = [VOCABULARY.get(word, VOCABULARY["<unk>"]) for word in caption.split()][: TEXT_TOKENS - 1]
        row.append(VOCABULARY["</s>"])
        ids.append(row + [VOCABULARY["<pad>"]] * (TEXT_TOKENS - len(row)))
        mask.append([1] * len(row) + [0] * (TEXT_TOKENS - len(row)))
    return torch.tensor(ids), torch.tensor(mask)


def blocks(video):
    """[B, F, 3, H, W] to [B, TOKENS, CELL_FRAMES * 3 * CELL * CELL]; the first frame fills a cell of its own."""
    n = video.shape[0]
    video = torch.cat([video[:, :1].expand(-1, CELL_FRAMES - 1, -1, -1, -1), video], dim=1)
    video = video.reshape(n, TOKENS_T, CELL_FRAMES, 3, TOKENS_S, CELL, TOKENS_S, CELL)
    return video.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(n, TOKENS, -1)


def unblocks(block):
    """The inverse of `blocks`."""
    n = block.shape[0]
    video = block.reshape(n, TOKENS_T, TOKENS_S, TOKENS_S, CELL_FRAMES, 3, CELL, CELL)
    video = video.permute(0, 1, 4, 5, 2, 6, 3, 7).reshape(n, TOKENS_T * CELL_FRAMES, 3, scenes.SIZE, scenes.SIZE)
    return video[:, CELL_FRAMES - 1 :]


@dataclass
class Basis:
    """The linear latents: components [D, CHANNELS] around `centre` [D], pixels in -1 to 1; `mean`, `std` per channel."""

    centre: torch.Tensor
    components: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def fit(cls, video):
        """Principal components of the blocks of [B, F, 3, H, W] in -1 to 1."""
        flat = blocks(video).flatten(0, 1)
        centre = flat.mean(dim=0)
        _, _, components = torch.pca_lowrank(flat, q=CHANNELS, center=True, niter=4)
        raw = (flat - centre) @ components
        spread = raw.std(dim=0)
        std = spread.sqrt()
        std = std * ((spread / std) ** 2).mean().sqrt()
        return cls(centre, components, raw.mean(dim=0), std)

    def encode(self, video):
        """Normalised latents [B, TOKENS, CHANNELS] of [B, F, 3, H, W] in -1 to 1."""
        return ((blocks(video) - self.centre) @ self.components - self.mean) / self.std

    def decode(self, latents):
        """[B, F, 3, H, W] in about -1 to 1."""
        return unblocks((latents * self.std + self.mean) @ self.components.T + self.centre)


class Motif(torch.nn.Module):
    """Transformer and text encoder together, as they are trained."""

    def __init__(self):
        super().__init__()
        self.transformer = LTXVideoTransformer3DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, patch_size=1, patch_size_t=1,
            num_attention_heads=HEADS, attention_head_dim=HEAD_WIDTH, cross_attention_dim=HEADS * HEAD_WIDTH,
            num_layers=LAYERS, caption_channels=TEXT_WIDTH,
        )
        self.text_encoder = T5EncoderModel(T5Config(
            vocab_size=len(VOCABULARY), d_model=TEXT_WIDTH, d_kv=24, d_ff=192, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0,
        ))
        torch.nn.init.zeros_(self.transformer.proj_out.weight)
        torch.nn.init.zeros_(self.transformer.proj_out.bias)

    def forward(self, latents, t, ids, mask):
        """The velocity, noise minus data, at time `t` [B] in 0 to 1. T5 sees no mask, as in the reference pipeline."""
        text = self.text_encoder(input_ids=ids).last_hidden_state
        return self.transformer(
            hidden_states=latents, encoder_hidden_states=text, timestep=t * 1000.0, encoder_attention_mask=mask,
            num_frames=TOKENS_T, height=TOKENS_S, width=TOKENS_S,
            rope_interpolation_scale=(CELL_FRAMES / scenes.FPS, CELL, CELL), return_dict=False,
        )[0]


def shift(t):
    """The scheduler's exponential shift of a time in 0 to 1 towards noise."""
    factor = math.exp(SHIFT_MU)
    return factor * t / (1.0 + (factor - 1.0) * t)


@torch.no_grad()
def sample(model, captions, seed=0, steps=STEPS, guidance=GUIDANCE):
    """Normalised latents for captions, by the pipeline's own sampler."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(len(captions), TOKENS, CHANNELS, generator=noise)
    ids, mask = tokens([""] * len(captions) + list(captions))
    sigmas = [shift(1.0 - k / steps) for k in range(steps)] + [0.0]
    for sigma, following in zip(sigmas, sigmas[1:]):
        t = torch.full((2 * len(captions),), sigma)
        without, with_text = model(torch.cat([x, x]), t, ids, mask).chunk(2)
        x = x + (following - sigma) * (without + guidance * (with_text - without))
    return x
