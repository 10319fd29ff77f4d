"""The shapes of the bench `families` in torch on the CPU, turn by turn with that program; prints one table.

    pip install torch==2.7.1 diffusers==0.36.0 transformers==4.57.6
    cargo bench -p kinoflock-inference --bench families --no-run     # names the program that it has built
    python beside_torch.py PROGRAM [THREADS [ROUNDS [PART OF A NAME]]]

Random weights, f32. Of each case every round takes the least of three runs on either side, one side after the other;
the table has the least of all rounds. Pyramid Flow's authors publish no package: its transformer is Flux's, which it is
built on, without frames before the current one, and its decoder is written out here.
"""

import os
import subprocess
import sys
import time
import warnings

import torch
import torch.nn.functional as F
from torch import nn

warnings.filterwarnings("ignore")
PROGRAM = sys.argv[1]
THREADS = int(sys.argv[2]) if len(sys.argv) > 2 else 2
ROUNDS = int(sys.argv[3]) if len(sys.argv) > 3 else 3
WANTED = sys.argv[4] if len(sys.argv) > 4 else ""
torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
torch.manual_seed(0)

TIME = torch.tensor([500.0])


def gemm():
    layer, x = nn.Linear(2048, 2048, bias=False), torch.randn(1024, 2048)
    return lambda: layer(x)


def conv3d():
    conv, x = nn.Conv3d(128, 128, 3, padding=(0, 1, 1)), torch.randn(1, 128, 9, 64, 64)
    return lambda: conv(torch.cat([x[:, :, :1], x[:, :, :1], x], 2))


def attend():
    q, k, v = (torch.randn(1, 32, 1024, 64) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v)


def rms():
    x, weight = torch.randn(1024, 2048), torch.randn(2048)
    return lambda: F.rms_norm(x, (2048,), weight, 1e-6)


def layer():
    x, weight, bias = torch.randn(1024, 2048), torch.randn(2048), torch.randn(2048)
    return lambda: F.layer_norm(x, (2048,), weight, bias, 1e-6)


def group():
    norm, x = nn.GroupNorm(32, 128, 1e-6), torch.randn(1, 128, 9, 64, 64)
    return lambda: F.silu(norm(x))


def gelu():
    x = torch.randn(1024, 8192)
    return lambda: F.gelu(x, approximate="tanh")


def silu():
    x = torch.randn(1024, 8192)
    return lambda: F.silu(x)


def ltx_transformer():
    from diffusers import LTXVideoTransformer3DModel
    model = LTXVideoTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, cross_attention_dim=512, num_layers=3, caption_channels=512).eval()
    x, text, mask = torch.randn(1, 1280, 128), torch.randn(1, 128, 512), torch.ones(1, 128)
    return lambda: model(
        hidden_states=x, encoder_hidden_states=text, timestep=TIME, encoder_attention_mask=mask, num_frames=5,
        height=16, width=16, rope_interpolation_scale=(8 / 25, 32, 32), return_dict=False)


def ltx_vae():
    from diffusers import AutoencoderKLLTXVideo
    vae = AutoencoderKLLTXVideo(
        block_out_channels=(32, 64, 128, 128), layers_per_block=(1,) * 5, decoder_block_out_channels=(32, 64, 128),
        decoder_layers_per_block=(1,) * 4, decoder_spatio_temporal_scaling=(True,) * 3,
        decoder_inject_noise=(False,) * 4, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
        timestep_conditioning=True).eval()
    z = torch.randn(1, 128, 5, 8, 8)
    return lambda: vae.decode(z, torch.tensor([0.05]), return_dict=False)


def cogvideox_transformer():
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    model = CogVideoXTransformer3DModel(
        num_attention_heads=8, attention_head_dim=64, num_layers=3, text_embed_dim=512, max_text_seq_length=64,
        sample_width=32, sample_height=32, sample_frames=17, use_rotary_positional_embeddings=True).eval()
    rope = get_3d_rotary_pos_embed(64, ((0, 0), (16, 16)), (16, 16), 5)
    x, text = torch.randn(1, 5, 16, 32, 32), torch.randn(1, 64, 512)
    return lambda: model(x, text, TIME, image_rotary_emb=rope, return_dict=False)


def cogvideox_vae():
    from diffusers import AutoencoderKLCogVideoX
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(32, 64, 64, 128), layers_per_block=1).eval()
    z = torch.randn(1, 16, 3, 20, 20)
    return lambda: vae.decode(z, return_dict=False)


def mochi_transformer():
    from diffusers import MochiTransformer3DModel
    model = MochiTransformer3DModel(
        num_attention_heads=4, num_layers=3, pooled_projection_dim=256, text_embed_dim=512).eval()
    x, text, mask = torch.randn(1, 12, 5, 32, 32), torch.randn(1, 64, 512), torch.ones(1, 64, dtype=torch.bool)
    return lambda: model(x, text, TIME, mask, return_dict=False)


def mochi_vae():
    from diffusers import AutoencoderKLMochi
    vae = AutoencoderKLMochi(
        decoder_block_out_channels=(32, 64, 128, 192), layers_per_block=(1, 1, 1, 2, 1),
        encoder_block_out_channels=(32, 32, 32, 32)).eval()
    z = torch.randn(1, 12, 3, 20, 20)
    return lambda: vae.decode(z, return_dict=False)


def pyramid_transformer():
    from diffusers import FluxTransformer2DModel
    model = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=3, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=512, pooled_projection_dim=768, axes_dims_rope=(16, 24, 24)).eval()
    x, text, pooled = torch.randn(1, 1280, 64), torch.randn(1, 64, 512), torch.randn(1, 768)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(40), indexing="ij")
    places = torch.stack([torch.zeros(1280), rows.flatten(), columns.flatten()], 1).float()
    return lambda: model(x, text, pooled, TIME / 1000, places, torch.zeros(64, 3), return_dict=False)


class Causal(nn.Module):
    def __init__(self, before, after, taps=3):
        super().__init__()
        self.pad = (taps // 2,) * 4 + (taps - 1, 0)
        self.conv = nn.Conv3d(before, after, taps)

    def forward(self, x):
        return self.conv(F.pad(x, self.pad))


def of_frames(norm, x):
    """A norm of each frame alone."""
    batch, channels, frames, height, width = x.shape
    x = norm(x.transpose(1, 2).reshape(batch * frames, channels, height, width))
    return x.reshape(batch, frames, channels, height, width).transpose(1, 2)


class Resnet(nn.Module):
    def __init__(self, before, after):
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(32, before, 1e-6), nn.GroupNorm(32, after, 1e-6)])
        self.convs = nn.ModuleList([Causal(before, after), Causal(after, after)])
        self.shortcut = nn.Identity() if before == after else Causal(before, after, 1)

    def forward(self, x):
        inner = x
        for norm, conv in zip(self.norms, self.convs):
            inner = conv(F.silu(of_frames(norm, inner)))
        return self.shortcut(x) + inner


class FrameAttention(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, 1e-6)
        self.parts = nn.ModuleList([nn.Linear(channels, channels) for _ in range(4)])

    def forward(self, x):
        batch, channels, frames, height, width = x.shape
        tokens = of_frames(self.norm, x).permute(0, 2, 3, 4, 1).reshape(batch * frames, 1, height * width, channels)
        query, key, value = (part(tokens) for part in self.parts[:3])
        mixed = self.parts[3](F.scaled_dot_product_attention(query, key, value))
        return x + mixed.reshape(batch, frames, height, width, channels).permute(0, 4, 1, 2, 3)


class PyramidDecoder(nn.Module):
    def __init__(self, widths, layers):
        super().__init__()
        self.start = nn.Sequential(Causal(16, 16, 1), Causal(16, widths[0]))
        self.middle = nn.Sequential(Resnet(widths[0], widths[0]), FrameAttention(widths[0]), Resnet(widths[0], widths[0]))
        self.blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            resnets = [Resnet(before if j == 0 else width, width) for j in range(layers)]
            grows = [Causal(width, 4 * width), Causal(width, 2 * width)] if i + 1 < len(widths) else []
            self.blocks.append(nn.ModuleList([nn.Sequential(*resnets), *grows]))
        self.norm, self.end = nn.GroupNorm(32, widths[-1], 1e-6), Causal(widths[-1], 3)

    def forward(self, z):
        x = self.middle(self.start(z))
        for resnets, *grows in self.blocks:
            x = resnets(x)
            if grows:
                batch, width, frames, height, columns = x.shape
                x = grows[0](x).reshape(batch, width, 2, 2, frames, height, columns)
                x = x.permute(0, 1, 4, 5, 2, 6, 3).reshape(batch, width, frames, 2 * height, 2 * columns)
                x = grows[1](x).reshape(batch, width, 2, frames, 2 * height, 2 * columns)
                x = x.transpose(2, 3).reshape(batch, width, 2 * frames, 2 * height, 2 * columns)[:, :, 1:]
        return self.end(F.silu(of_frames(self.norm, x)))


def pyramid_vae():
    decoder, z = PyramidDecoder((128, 128, 64, 32), 2).eval(), torch.randn(1, 16, 2, 20, 20)
    return lambda: decoder(z)


def wan_transformer():
    from diffusers import WanTransformer3DModel
    model = WanTransformer3DModel(
        num_attention_heads=4, attention_head_dim=128, text_dim=512, ffn_dim=2048, num_layers=3).eval()
    x, text = torch.randn(1, 16, 5, 32, 32), torch.randn(1, 128, 512)
    return lambda: model(x, TIME, text, return_dict=False)


def wan_vae():
    from diffusers import AutoencoderKLWan
    vae, z = AutoencoderKLWan(base_dim=32).eval(), torch.randn(1, 16, 3, 20, 20)
    return lambda: vae.decode(z, return_dict=False)


CASES = {
    "gemm 1024x2048x2048": gemm,
    "conv3d 3x3x3 128 to 128, 9x64x64": conv3d,
    "attention 32 heads x 1024 x 64": attend,
    "rms norm 1024x2048": rms,
    "layer norm 1024x2048": layer,
    "group norm 32 and SiLU, 128 x 9x64x64": group,
    "GELU 1024x8192": gelu,
    "SiLU 1024x8192": silu,
    "LTX-Video transformer": ltx_transformer,
    "LTX-Video VAE decode": ltx_vae,
    "CogVideoX transformer": cogvideox_transformer,
    "CogVideoX VAE decode": cogvideox_vae,
    "Mochi transformer": mochi_transformer,
    "Mochi VAE decode": mochi_vae,
    "Pyramid Flow transformer": pyramid_transformer,
    "Pyramid Flow VAE decode": pyramid_vae,
    "Wan transformer": wan_transformer,
    "Wan VAE decode": wan_vae,
}


def least(run):
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return min(times)


def main():
    environment = dict(os.environ, KINOFLOCK_BESIDE="1", RAYON_NUM_THREADS=str(THREADS))
    here = subprocess.Popen([PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(name):
        here.stdin.write(name + "\n")
        here.stdin.flush()
        return float(here.stdout.readline())

    print(f"| f32, {THREADS} threads, ms | here | torch {torch.__version__} | here / torch |\n|---|---|---|---|", flush=True)
    for name in (name for name in CASES if WANTED in name):
        run = CASES[name]()
        run()
        ours, theirs = [], []
        for _ in range(ROUNDS):
            ours.append(ask(name))
            theirs.append(least(run))
        print(f"| {name} | {min(ours):.1f} | {min(theirs):.1f} | {min(ours) / min(theirs):.2f} |", flush=True)
    here.stdin.close()


main()
