"""The reference's times for `kinoflockd bench --compare`: diffusers as it comes, and with torch.compile.

Reads a job as JSON from its input and answers a line of JSON for each way: {"way", "step_s", "decode_s"}. A step has
guidance: LTX-Video's is one batch of two, Wan's two passes, as diffusers' pipelines do it. Each time is the least of the
job's runs after one that does not count (with torch.compile that one compiles).
"""

import json
import sys
import time
import warnings

warnings.filterwarnings("ignore")
try:
    import torch
    import diffusers
except ImportError as error:
    sys.exit(f"{error}: the reference needs it; pip install torch==2.7.1 diffusers==0.36.0 transformers==4.57.6")

JOB = json.load(sys.stdin)
DEVICE = torch.device(JOB["device"])
DTYPE = getattr(torch, JOB["dtype"])
WIDTH, HEIGHT, FRAMES = JOB["width"], JOB["height"], JOB["frames"]
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    sys.exit(f"this torch ({torch.__version__}) finds no CUDA device")
torch.set_grad_enabled(False)
torch.manual_seed(0)


def wait():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def least(run):
    times = []
    for _ in range(JOB["runs"] + 1):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def made(kind, config, dtype=DTYPE):
    with DEVICE:
        return kind(**config).to(dtype).eval()


def randn(*shape, dtype=DTYPE):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def ltx():
    frames, rows, columns = (FRAMES - 1) // 8 + 1, HEIGHT // 32, WIDTH // 32
    model = made(diffusers.LTXVideoTransformer3DModel, JOB["transformer"])
    x, tokens = randn(2, frames * rows * columns, 128), JOB["text_tokens"]
    text, mask = randn(2, tokens, JOB["transformer"]["caption_channels"]), torch.ones(2, tokens, device=DEVICE)
    timestep = torch.full((2,), 500.0, device=DEVICE)

    def step(model):
        model(hidden_states=x, encoder_hidden_states=text, timestep=timestep, encoder_attention_mask=mask,
              num_frames=frames, height=rows, width=columns, rope_interpolation_scale=(8 / JOB["fps"], 32, 32),
              return_dict=False)

    z, temb = randn(1, 128, frames, rows, columns), torch.tensor([0.05], device=DEVICE, dtype=DTYPE)
    vae = made(diffusers.AutoencoderKLLTXVideo, JOB["vae"])
    return model, step, vae, lambda decode: decode(z, temb, return_dict=False)


def wan():
    frames, rows, columns = (FRAMES - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8
    model = made(diffusers.WanTransformer3DModel, JOB["transformer"])
    x, timestep = randn(1, 16, frames, rows, columns), torch.full((1,), 500.0, device=DEVICE)
    text = randn(1, JOB["text_tokens"], JOB["transformer"]["text_dim"])

    def step(model):
        model(x, timestep, text, return_dict=False)
        model(x, timestep, text, return_dict=False)

    z = randn(1, 16, frames, rows, columns, dtype=torch.float32)
    vae = made(diffusers.AutoencoderKLWan, JOB["vae"], torch.float32)
    return model, step, vae, lambda decode: decode(z, return_dict=False)


def main():
    model, step, vae, decode = {"ltx": ltx, "wan": wan}[JOB["family"]]()
    for way in ("eager", "compile") if JOB["compile"] else ("eager",):
        network = model
        if way == "compile":
            network = torch.compile(model)
            vae.decoder.forward = torch.compile(vae.decoder.forward)
        row = {"way": way, "step_s": least(lambda: step(network)), "decode_s": least(lambda: decode(vae.decode))}
        print(json.dumps(row | {"torch": torch.__version__, "diffusers": diffusers.__version__}), flush=True)


main()
