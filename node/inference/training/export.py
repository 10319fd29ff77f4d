"""Writes motif as a pipeline folder that diffusers' LTXPipeline and this engine load: f16 weights, configs, tokenizer."""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import model
import scenes


def write(net, vae, out):
    """The whole folder at `out`, from a `model.Motif` and its VAE."""
    out = Path(out)
    for name in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_weights(net.transformer, out / "transformer" / "diffusion_pytorch_model.safetensors")
    net.transformer.save_config(out / "transformer")
    write_weights(vae, out / "vae" / "diffusion_pytorch_model.safetensors")
    vae.save_config(out / "vae")
    write_text_encoder(net.text_encoder, out / "text_encoder")
    write_tokenizer(out / "tokenizer")
    scheduler().save_config(out / "scheduler")
    write_json(out / "model_index.json", {
        "_class_name": "LTXPipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "LTXVideoTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLLTXVideo"],
    })
    write_json(out / "kinoflock.json", {"defaults": {
        "width": scenes.SIZE, "height": scenes.SIZE, "frames": scenes.FRAMES, "fps": scenes.FPS,
        "steps": model.STEPS, "guidance": model.GUIDANCE,
    }})


def write_weights(module, path, leave_out=()):
    """A module's tensors in f16."""
    state = {k: v.detach().half().contiguous() for k, v in module.state_dict().items() if k not in leave_out}
    save_file(state, path, metadata={"format": "pt"})


def write_text_encoder(text_encoder, folder):
    """The text encoder. What it does not know, it reads as "a": present in every caption and without meaning."""
    with torch.no_grad():
        table = text_encoder.shared.weight
        table[model.VOCABULARY["<unk>"]] = table[model.VOCABULARY["a"]]
    write_weights(text_encoder, folder / "model.safetensors", leave_out=("encoder.embed_tokens.weight",))
    text_encoder.config.architectures = ["T5EncoderModel"]
    text_encoder.config.save_pretrained(folder)


def write_tokenizer(folder):
    """One token a word, lower case, punctuation dropped, </s> at the end."""
    tokenizer = Tokenizer(models.WordLevel(model.VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed"),
    ])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", model.VOCABULARY["</s>"])]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5TokenizerFast", "model_max_length": model.TEXT_TOKENS, "extra_ids": 0,
        "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
    })


def scheduler():
    """Dynamic shift with the same mu for every number of tokens, as in training."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=model.SHIFT_MU, max_shift=model.SHIFT_MU,
        base_image_seq_len=1024, max_image_seq_len=4096,
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")
