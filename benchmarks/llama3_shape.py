#!/usr/bin/env python3
"""Write a base of Llama 3 8B's shape with random weights, in 4-bit, to measure the real thing without a hub.

    python benchmarks/llama3_shape.py --tokenizer FOLDER --out FOLDER      # needs a GPU with 24 GB

Speed, memory and numerics do not depend on what the weights say. The tokenizer is Llama 3's own.
"""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitsandbytes
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from config import parse_flags
from quantpref.models import Base
from quantpref.runs import UserError, one_line_errors


@dataclass(frozen=True)
class Shape:
    tokenizer: Path
    """Folder with Llama 3's tokenizer."""
    out: Path
    """Folder to write (5.7 GB)."""
    layers: int = 32
    """Decoder blocks; fewer for a quick try."""
    seed: int = 0
    """Seed of the random weights."""


def random_llama3(layers: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """Random weights in bf16, on the GPU."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=128_000,
        eos_token_id=128_001,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def quantise(model: LlamaForCausalLM) -> None:
    """Its projections to nf4 with double quantisation, in place: what loading in 4-bit makes of them."""
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(parent, name, _four_bit(linear))
    model.requires_grad_(False)
    torch.cuda.empty_cache()


def _four_bit(linear: torch.nn.Linear) -> bitsandbytes.nn.Linear4bit:
    sizes = (linear.in_features, linear.out_features)
    settings = {"compress_statistics": True, "quant_type": "nf4"}
    new = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings)
    new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, **settings).cuda()
    return new


def base_in_memory(tokenizer: Path) -> Base:
    """The whole thing without a folder."""
    model = random_llama3()
    quantise(model)
    return Base(model, AutoTokenizer.from_pretrained(tokenizer), "transformers", "", "Llama 3 8B's shape", None)


def main(shape: Shape) -> None:
    if shape.out.exists():
        raise UserError(f"{shape.out}: exists; choose another --out")
    model = random_llama3(shape.layers, shape.seed)
    shape.out.parent.mkdir(parents=True, exist_ok=True)
    sixteen_bit = tempfile.mkdtemp(dir=shape.out.parent)
    try:
        model.save_pretrained(sixteen_bit)
        del model
        torch.cuda.empty_cache()
        quantised = AutoModelForCausalLM.from_pretrained(
            sixteen_bit,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
            dtype=torch.bfloat16,
            device_map={"": 0},
        )
        quantised.save_pretrained(shape.out)
    finally:
        shutil.rmtree(sixteen_bit)
    AutoTokenizer.from_pretrained(shape.tokenizer).save_pretrained(shape.out)
    print(f"wrote {shape.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_flags(Shape, sys.argv[1:], description=__doc__))
