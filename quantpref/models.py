"""Load the 4-bit base once, attach adapters strictly, and tell by hash which is which."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from quantpref.backends import Backend
from quantpref.runs import RunError, UserError, sha256

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTISATION = {"bits": 4, "type": "nf4", "double_quantisation": True}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Base:
    """One 4-bit base with its tokenizer; `fingerprint` is the same exactly where the weights are.

    `revision`: the hub's commit that was loaded; None for a folder.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    backend: Backend
    fingerprint: str
    name: str
    revision: str | None

    def manifest(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.revision,
            "fingerprint": self.fingerprint,
            "backend": self.backend,
            "quantisation": QUANTISATION,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as read from a folder: its config, its weights, and the file's SHA-256."""

    folder: Path
    config: LoraConfig
    weights: dict[str, torch.Tensor]
    sha256: str


def device() -> torch.device:
    """This process' GPU, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype() -> torch.dtype:
    """bf16 on a GPU; float32 on a CPU, which computes bf16 slowly and less exactly."""
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def load_16bit(name: str, revision: str | None, four_bit: Base) -> Base:
    """The same base without quantisation, with the 4-bit base's tokenizer: what does quantisation cost?

    Raises:
        UserError: not there, or stored in 4 bits.
    """
    if _stored_quantisation(name, revision) is not None:
        raise UserError(f"base {name}: is stored in 4 bits; give its 16-bit original with --base-model-16bit")
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=compute_dtype(),
        device_map={"": device()},
        attn_implementation="sdpa",
        use_safetensors=True,
        trust_remote_code=False,
    )
    shape, expected = (model.config.hidden_size, model.config.num_hidden_layers), four_bit.model.config
    if shape != (expected.hidden_size, expected.num_hidden_layers):
        raise UserError(f"base {name}: has another shape than {four_bit.name}; it is not the same base")
    model.requires_grad_(False)
    return Base(model, four_bit.tokenizer, "transformers", "", name, revision)


def load_base(name: str, revision: str | None, backend: Backend, max_length: int = 2048) -> Base:
    """Load the base in 4-bit (nf4, double quantisation) from a hub id or a folder, frozen.

    Raises:
        UserError: not there, not reachable, or stored in another quantisation.
        RunError: not every projection came out in 4-bit.
    """
    _check_stored_quantisation(name, revision)
    load = _load_unsloth if backend == "unsloth" else _load_transformers
    try:
        model, tokenizer = load(name, revision, max_length)
    except (OSError, ValueError) as error:
        raise UserError(f"base {name}: cannot be loaded ({_first_line(error)})") from None
    model.requires_grad_(False)
    _forbid_cpu_repacking(model)
    _check_four_bit(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    commit = getattr(model.config, "_commit_hash", None)  # of a hub base: what the revision, if any, led to
    return Base(model, tokenizer, backend, base_fingerprint(model, tokenizer), name, commit)


def _stored_quantisation(name: str, revision: str | None) -> dict[str, Any] | None:
    """The quantisation that the base is stored in; None for one in 16 or 32 bits."""
    if name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"base {name}: no such folder; give a hub id or a folder with --base-model")
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"base {name}: neither a folder here nor reachable on the hub ({_first_line(error)}); download it, or"
            " give another --base-model; `--preset tiny` needs no download"
        ) from None
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else stored.to_dict()


def _check_stored_quantisation(name: str, revision: str | None) -> None:
    stored = _stored_quantisation(name, revision)
    if stored is None:
        return
    found = (stored.get("load_in_4bit"), stored.get("bnb_4bit_quant_type"), stored.get("bnb_4bit_use_double_quant"))
    if found != (True, "nf4", True):
        raise UserError(
            f"base {name}: stored as (4-bit, type, double quantisation) = {found}, but the experiment is on (True,"
            " 'nf4', True); give a base stored so, or in 16 bits"
        )


def _load_transformers(
    name: str, revision: str | None, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    common = {"revision": revision, "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(
        name,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(),
        ),
        dtype=compute_dtype(),
        device_map={"": device()},
        attn_implementation="sdpa",
        use_safetensors=True,
        **common,
    )
    return model, AutoTokenizer.from_pretrained(name, **common)


def _load_unsloth(name: str, revision: str | None, max_length: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        name,
        max_seq_length=max_length,
        dtype=compute_dtype(),
        load_in_4bit=True,
        revision=revision or "main",
        trust_remote_code=False,
        device_map={"": device()},
        use_safetensors=True,
    )
    # It drops attention masks in training, but the shared-prefix rows live by theirs.
    model.model._unsloth_keep_padding_mask = True
    return model, tokenizer


def _forbid_cpu_repacking(model: PreTrainedModel) -> None:
    """bitsandbytes 0.50 repacks weights in place at the first CPU forward in eval mode (AVX512-BF16).

    It drops the double quantisation on the way, and later training gets wrong gradients in silence.
    """
    for module in _four_bit_layers(model):
        module.support_avx512bf16_for_cpu = False


def _four_bit_layers(model: torch.nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _check_four_bit(model: PreTrainedModel) -> None:
    found, expected = len(_four_bit_layers(model)), len(LORA_TARGETS) * model.config.num_hidden_layers
    if found != expected:
        raise RunError(
            f"{found} of {expected} projections are in 4-bit; the base's architecture is not Llama's, or bitsandbytes"
            " did not quantise it"
        )
    for module in _four_bit_layers(model):
        state = module.weight.quant_state
        if state is None or state.quant_type != "nf4" or not state.nested:
            raise RunError("a projection is in 4-bit but not nf4 with double quantisation")


def base_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over every weight, quantisation constant included, and over the tokenizer."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(f"{tokenizer.bos_token_id} {tokenizer.eos_token_id}".encode())
    return digest.hexdigest()


def new_adapter(base: Base, r: int, alpha: int, seed: int) -> PeftModel:
    """The base with a fresh LoRA adapter: B is zero, so it changes nothing yet. Seeded."""
    config = LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=list(LORA_TARGETS), task_type="CAUSAL_LM"
    )
    return _wrap(base, config, "default", seed)


def lora_weights(shape: Any, r: int) -> int:
    """Trainable weights of a rank-r adapter on the seven projections of a Llama of this config."""
    heads = shape.num_attention_heads * shape.head_dim
    key_value = shape.num_key_value_heads * shape.head_dim
    sizes = (
        (shape.hidden_size, heads), (shape.hidden_size, key_value), (shape.hidden_size, key_value),
        (heads, shape.hidden_size), *[(shape.hidden_size, shape.intermediate_size)] * 3,
    )  # fmt: skip
    return shape.num_hidden_layers * r * sum(map(sum, sizes))


def training_memory_gib(shape: Any, r: int, tokens: int) -> float:
    """Predicted peak of training on a GPU, for forward passes of `tokens` packed columns.

    4-bit projections with their constants (0.516 bytes a weight), embeddings and LM head in bf16, the largest group of
    projections de-quantised; the adapter in float32 with gradient and 8-bit moments, and four copies in bf16; what a
    backward pass needs of each column and block in bf16; 12 bytes a logit on 55 % of the columns. Llama 3 8B at 1,408
    columns: 14.2 GiB, where 14.0 were measured (benchmarks/RESULTS.md).
    """
    hidden, width, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    heads, key_value = (n * shape.head_dim for n in (shape.num_attention_heads, shape.num_key_value_heads))
    linear = layers * hidden * (2 * heads + 2 * key_value + 3 * width)
    weights = 0.516 * linear + 2 * 2 * shape.vocab_size * hidden + 2 * 2 * hidden * width
    adapter = lora_weights(shape, r) * (4 + 4 + 2 + 4 * 2)
    kept = 5 * hidden + 4 * heads + 2 * key_value + 3 * width
    activations = tokens * (2 * layers * kept + 0.55 * 12 * shape.vocab_size)
    return (weights + adapter + activations) / 2**30


def attach(base: Base, adapters: Mapping[str, Adapter]) -> PeftModel:
    """The base with the given adapters by name, the first one active, each loaded to the last weight."""
    first, *others = adapters.items()
    model = _wrap(base, first[1].config, first[0], seed=0)
    try:
        for name, adapter in others:
            model.add_adapter(name, adapter.config)
        for name, adapter in adapters.items():
            _fill(model, name, adapter)
    except UserError:
        model.unload()  # the base stays as it was
        raise
    return model


def _wrap(base: Base, config: LoraConfig, name: str, seed: int) -> PeftModel:
    set_seed(seed)
    model = get_peft_model(base.model, config, adapter_name=name)
    if base.backend == "unsloth":
        from unsloth import FastLanguageModel

        model = FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing=False)
    return model


def _fill(model: PeftModel, name: str, adapter: Adapter) -> None:
    expected = {k: v.shape for k, v in get_peft_model_state_dict(model, adapter_name=name).items()}
    found = {k: v.shape for k, v in adapter.weights.items()}
    if expected != found:
        wrong = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
        raise UserError(
            f"{adapter.folder}: {len(wrong)} of its tensors are missing, extra or of another shape (first: {wrong[0]});"
            " it was made for another base or is damaged"
        )
    set_peft_model_state_dict(model, adapter.weights, adapter_name=name)


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter and refuse a broken one: missing files, no LoRA, non-finite or untrained weights."""
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            pickled = any(folder.glob("adapter_model.bin")) if folder.is_dir() else False
            hint = "a .bin file is not read, since pickles can run code" if pickled else "train it with train_dpo.py"
            raise UserError(f"{folder}: {file} is missing; {hint}")
    path = folder / "adapter_model.safetensors"
    try:
        config = LoraConfig.from_pretrained(str(folder))
        weights = load_file(path)
    except Exception as error:  # both libraries raise their own kinds; whatever it is, the folder is unusable
        raise UserError(f"{folder}: not a LoRA adapter ({_first_line(error)})") from None
    _check_lora(folder, config)
    if not all(torch.isfinite(tensor).all() for tensor in weights.values()):
        raise UserError(f"{path}: holds weights that are not finite; train it again")
    if not any(tensor.any() for key, tensor in weights.items() if "lora_B" in key):
        raise UserError(f"{path}: all B matrices are zero, so the adapter does nothing; train it again")
    return Adapter(folder, config, weights, sha256(path))


def _check_lora(folder: Path, config: Any) -> None:
    plain = {"bias": "none", "use_dora": False, "use_rslora": False, "modules_to_save": None, "lora_dropout": 0.0}
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder}: {type(config).__name__} found, a LoRA adapter is needed")
    odd = {k: getattr(config, k) for k, v in plain.items() if getattr(config, k, v) != v}
    if set(config.target_modules or ()) != set(LORA_TARGETS):
        odd["target_modules"] = sorted(config.target_modules or ())
    odd |= {k: v for k in ("rank_pattern", "alpha_pattern") if (v := getattr(config, k, None))}
    if odd:
        raise UserError(
            f"{folder}/adapter_config.json: {odd} differs from plain LoRA without dropout on the seven projections;"
            " both arms must have the same adapter"
        )
    # Dropout and initialisation flags of the file are for training; here it is filled with its weights.
    config.inference_mode = False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def quiet() -> None:
    """Silence the libraries' progress bars and notices; our own lines say what happens."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry without a network is a warning
