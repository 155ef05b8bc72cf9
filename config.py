"""The config block: every setting of the experiment, its default, and the reason for that default.

python train_dpo.py --preset tiny                       # a preset
python train_dpo.py --config my.toml --beta 0.3         # presets < --config file < flags
"""

import contextlib
import difflib
import io
import math
import re
import sys
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent
MAX_SEED = 2**32  # numpy's and transformers' limit


@dataclass(frozen=True)
class Config:
    """One experiment: SFT against DPO on one 4-bit base. Every flag goes to all three scripts."""

    # --- what is compared -------------------------------------------------------------------------
    data: Path = ROOT / "data" / "contrastive_rec_train.jsonl"
    """Comparisons, one JSON object a line (data/README.md); split by user into train, validation, test."""
    test_data: Path | None = None
    """Test on this file instead of the test part of --data; refused where rows or users are in training."""
    base_model: str = "unsloth/llama-3-8b-bnb-4bit"
    """Hub id or folder of the base; loaded in 4-bit (nf4, double quantisation) whether stored so or not."""
    base_revision: str | None = None
    """Commit of a hub base, so that everybody has the same weights; None takes the hub's newest."""
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """How the base is loaded; auto is transformers. Training and scoring run through our own model on either."""
    output_dir: Path = Path("outputs")
    """Everything that a run writes stands here; a finished run is never overwritten."""

    # --- the rows ---------------------------------------------------------------------------------
    train_fraction: float = 0.7
    """Share of the users trained on."""
    validation_fraction: float = 0.1
    """Share of the users for temperatures and choices; the rest, 20 % by default, is the test."""
    split: Literal["user", "time"] = "user"
    """Draw the users of each part at random, or cut at two moments, so that training ends before the test begins."""
    split_seed: int = 3407
    """Seed of the split; apart from --seed, so that runs with other seeds share one test set."""
    max_shortcut: float | None = None
    """Refuse data on which a rule that ignores the history is right in more than this share of the test."""
    strict: bool = False
    """Refuse data with any leak that verify names, and, unless --max-shortcut says otherwise, shortcuts above 0.65."""
    response: Literal["reasoned", "verdict"] = "reasoned"
    """Train on the whole sentence, or only up to "Option A."."""
    max_length: int = 2048
    """Tokens of prompt and response; a longer row loses its oldest history films, and that is reported."""

    # --- the adapter ------------------------------------------------------------------------------
    lora_r: int = 16
    """Rank of the LoRA matrices on q, k, v, o, gate, up and down; 16 is 0.52 % of an 8B model."""
    lora_alpha: int = 16
    """Scale of the adapter is alpha / r = 1. Dropout is 0: it would act in SFT and not in DPO."""

    # --- SFT, the baseline ------------------------------------------------------------------------
    sft_adapter: Path | None = None
    """Take the SFT adapter from this folder instead of <output-dir>/llama3_sft_4bit_final."""
    retrain_sft: bool = False
    """Train SFT, and what started from it, again; the finished adapters are renamed, not lost."""
    sft_learning_rate: float = 2e-4
    """Peak learning rate of SFT; QLoRA's usual value."""
    sft_epochs: int = 1
    """Passes of SFT over the training rows."""
    sft_more: bool = False
    """Also train the SFT adapter on for DPO's epochs and learning rate: is a gain only extra training?"""

    # --- DPO --------------------------------------------------------------------------------------
    beta: float = 0.1
    """Strength of the tie to the reference (the SFT adapter); lower lets the policy move further."""
    learning_rate: float = 5e-5
    """Peak learning rate of DPO, linear decay after --warmup-steps."""
    num_train_epochs: int = 3
    """Passes of DPO over the training pairs."""

    dpo_from_base: bool = False
    """Also train DPO from a fresh adapter with the bare base as reference, as arm dpo-from-base."""

    # --- both -------------------------------------------------------------------------------------
    effective_batch_size: int = 8
    """Pairs per optimiser step, over all devices."""
    per_device_train_batch_size: int | Literal["auto"] = "auto"
    """Pairs per forward pass; auto fits the free memory. The result does not depend on it."""
    warmup_steps: int = 5
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """AdamW's decay of the adapter's weights."""
    save_steps: int = 100
    """Steps between checkpoints; the same command goes on from the newest after any interruption."""
    fresh: bool = False
    """Begin anew what is unfinished or failed; its checkpoints are renamed, not lost. Else it goes on from them."""
    seed: int = 3407
    """Seed of the adapter's start, the order of the rows and of the options."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the training curves there; training_log.jsonl is always written."""

    # --- evaluation -------------------------------------------------------------------------------
    show: int = 0
    """Print this many test comparisons with what SFT and DPO chose."""
    adapter: tuple[str, ...] = ()
    """NAME=FOLDER of further adapters to score beside the others, each paired against SFT."""
    precision: tuple[Literal["4bit", "16bit"], ...] = ("4bit",)
    """With 16bit the same adapters are scored on the base in 16 bits too: what does quantisation cost?"""
    base_model_16bit: str | None = None
    """The base in 16 bits, where --base-model is stored in 4; None takes --base-model."""
    runs: tuple[Path, ...] = ()
    """Finished runs of several seeds to aggregate, each evaluated, instead of scoring anything."""

    @property
    def sft_folder(self) -> Path:
        return self.sft_adapter or self.output_dir / "llama3_sft_4bit_final"

    @property
    def dpo_folder(self) -> Path:
        return self.output_dir / "llama3_dpo_4bit_final"

    @property
    def sft_more_folder(self) -> Path:
        return self.output_dir / "llama3_sft_more_4bit_final"

    @property
    def dpo_from_base_folder(self) -> Path:
        return self.output_dir / "llama3_dpo_from_base_4bit_final"

    @property
    def evaluation_folder(self) -> Path:
        return self.output_dir / "evaluation"

    def checkpoints_of(self, adapter: Path) -> Path:
        """llama3_dpo_4bit_final -> dpo_checkpoints, beside it."""
        return adapter.with_name(adapter.name.removeprefix("llama3_").removesuffix("_4bit_final") + "_checkpoints")

    def as_json(self) -> dict[str, Any]:
        """As manifests and results record it: paths as text."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return list(map(plain, value))
            return str(value) if isinstance(value, Path) else value

        return {name: plain(value) for name, value in asdict(self).items()}


PRESETS = {
    # 8 billion weights, 5.7 GB in 4-bit: a 24 GB card.
    "llama3-8b": Config(),
    "llama3.2-3b": Config(base_model="unsloth/Llama-3.2-3B-bnb-4bit"),
    "llama3.2-1b": Config(base_model="unsloth/Llama-3.2-1B-bnb-4bit"),
    # The embedded base: 1 million weights on a laptop, so its learning rates are larger. DPO's was chosen
    # once, by accuracy on the validation users, among 5e-5, 1e-4, 2.5e-4 and 5e-4 (benchmarks/RESULTS.md).
    "tiny": Config(
        base_model=str(ROOT / "models" / "tiny-llama"),
        output_dir=Path("outputs/tiny"),
        sft_learning_rate=2e-3,
        learning_rate=1e-4,
        num_train_epochs=1,
        sft_more=True,
    ),
}


def parse_config(argv: list[str], description: str) -> Config:
    """Presets < `--config` file < flags. Any mistake is one line on stderr and exit status 2."""
    argv, preset = _take_flag(argv, "preset", "llama3-8b")
    if preset not in PRESETS:
        _refuse(f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}")
    argv, file = _take_flag(argv, "config", "")
    default = replace(PRESETS[preset], **(_read_toml(Path(file)) if file else {}))
    intro = (
        f"{description}\n\nBefore all others: --preset {{{','.join(PRESETS)}}} (default llama3-8b), and"
        " --config FILE.toml with any of the settings below, by name."
    )
    config: Config = parse_flags(Config, argv, default=default, description=intro)
    _check_ranges(config)
    return config


def parse_flags(kind: Any, argv: list[str], **options: Any) -> Any:
    """tyro's command line, with its errors folded into one line."""
    import tyro

    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(kind, args=argv, **options)
    except SystemExit as stop:
        if stop.code:
            text = re.sub("[─-╿]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", messages.getvalue()))
            _refuse(" ".join(text.split()))
        raise


def _take_flag(argv: list[str], name: str, default: str) -> tuple[list[str], str]:
    """Remove `--name VALUE` or `--name=VALUE`, the last one counting, since the rest depends on it."""
    rest, value, flag = [], default, f"--{name}"
    arguments = iter(argv)
    for argument in arguments:
        if argument == flag:
            found = next(arguments, None)
            if found is None:
                _refuse(f"{flag} needs a value")
            value = found
        elif argument.startswith(f"{flag}="):
            value = argument.removeprefix(f"{flag}=")
        else:
            rest.append(argument)
    return rest, value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _refuse(f"{path}: cannot be read as TOML ({error})")
    types: dict[str, Any] = {field.name: field.type for field in fields(Config)}
    for name, value in values.items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            _refuse(f"{path}: unknown setting {name!r}{hint}")
        try:
            values[name] = _from_toml(value, types[name])
        except TypeError:
            _refuse(f"{path}: {name} must be {_kind_name(types[name])}, found {value!r}")
    return values


def _from_toml(value: Any, kind: Any) -> Any:
    """A TOML value as a field of this type; TypeError where it is of another. TOML has no paths and no None."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_from_toml(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is Literal and isinstance(value, str) and value in get_args(kind):
        return value
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            with contextlib.suppress(TypeError):
                return _from_toml(value, member)
    # A bool is an int to isinstance, not to us; a whole number is fine where a fraction is asked for.
    if type(value) in {float: (int, float), Path: (str,)}.get(kind, (kind,)):
        return kind(value)
    raise TypeError


def _kind_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a list, each {_kind_name(get_args(kind)[0])}"
    if members := get_args(kind):
        return " or ".join(_kind_name(member) for member in members if member is not type(None))
    return {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "a text")


def _check_ranges(config: Config) -> None:
    """All wrong values in one message."""
    wrong = [
        f"--{name.replace('_', '-')} must be above 0 and finite, found {getattr(config, name)}"
        for name in (
            "train_fraction", "validation_fraction", "max_length", "lora_r", "lora_alpha", "sft_learning_rate",
            "sft_epochs", "beta", "learning_rate", "num_train_epochs", "effective_batch_size", "save_steps",
        )
        if not 0 < getattr(config, name) < math.inf
    ]  # fmt: skip
    if config.max_shortcut is not None and not 0.5 <= config.max_shortcut <= 1:
        wrong.append(f"--max-shortcut must be from 0.5 to 1, found {config.max_shortcut}")
    wrong += [
        f"--{name.replace('_', '-')}: this locale cannot spell {ascii(text)}; set LC_ALL=C.UTF-8, or use plain letters"
        for name, value in config.as_json().items()
        for text in (value if isinstance(value, list) else [value])
        if isinstance(text, str) and re.search("[\ud800-\udfff]", text)  # what stands for undecoded bytes
    ]
    if not config.train_fraction + config.validation_fraction < 1:
        wrong.append("--train-fraction and --validation-fraction must leave a test part: their sum is 1 or more")
    micro = config.per_device_train_batch_size
    if isinstance(micro, int) and (micro < 1 or config.effective_batch_size % micro):
        wrong.append(f"--per-device-train-batch-size {micro} must divide --effective-batch-size")
    wrong += [
        f"--{name.replace('_', '-')} must be 0 or more and below {limit}, found {getattr(config, name)}"
        for name, limit in (
            ("warmup_steps", math.inf), ("weight_decay", math.inf), ("show", math.inf),
            ("seed", MAX_SEED), ("split_seed", MAX_SEED),
        )
        if not 0 <= getattr(config, name) < limit
    ]  # fmt: skip
    if wrong:
        _refuse("; ".join(wrong))


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
