"""The config block: every setting of the experiment, its default, and the reason for that default.

python train_dpo.py --preset tiny                       # a preset
python train_dpo.py --config my.toml --beta 0.3         # presets < --config file < flags
"""

import contextlib
import difflib
import io
import re
import sys
import tomllib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

ROOT = Path(__file__).resolve().parent


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
    """How the base is loaded; auto takes Unsloth where a GPU and the package are there."""
    output_dir: Path = Path("outputs")
    """Everything that a run writes stands here; a finished run is never overwritten."""

    # --- the rows ---------------------------------------------------------------------------------
    train_fraction: float = 0.7
    """Share of the users trained on."""
    validation_fraction: float = 0.1
    """Share of the users for temperatures and choices; the rest, 20 % by default, is the test."""
    split_seed: int = 3407
    """Seed of the split; apart from --seed, so that runs with other seeds share one test set."""
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
    """Train the SFT baseline even where one is finished; it needs an --output-dir without one."""
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
    """Steps between checkpoints."""
    seed: int = 3407
    """Seed of the adapter's start, the order of the rows and of the options."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the training curves there; training_log.jsonl is always written."""

    # --- evaluation -------------------------------------------------------------------------------
    show: int = 0
    """Print this many test comparisons with what SFT and DPO chose."""

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
    def evaluation_folder(self) -> Path:
        return self.output_dir / "evaluation"

    def as_json(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}


PRESETS = {
    # 8 billion weights, 5.7 GB in 4-bit: a 24 GB card.
    "llama3-8b": Config(),
    "llama3.2-3b": Config(base_model="unsloth/Llama-3.2-3B-bnb-4bit"),
    "llama3.2-1b": Config(base_model="unsloth/Llama-3.2-1B-bnb-4bit"),
    # The embedded base: 1 million weights on a laptop, so its learning rates are larger. DPO's was chosen
    # once, on the validation users, among 5e-4, 1e-3 and 2e-3 (benchmarks/RESULTS.md).
    "tiny": Config(
        base_model=str(ROOT / "models" / "tiny-llama"),
        output_dir=Path("outputs/tiny"),
        sft_learning_rate=2e-3,
        learning_rate=5e-4,
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
    types = {field.name: field.type for field in fields(Config)}
    for name, value in values.items():
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            _refuse(f"{path}: unknown setting {name!r}{hint}")
        expected = type(getattr(PRESETS["llama3-8b"], name))
        if expected is float and type(value) is int:
            values[name] = float(value)
        elif isinstance(value, str) and "Path" in str(types[name]):
            values[name] = Path(value)
        elif expected in (int, float, bool) and type(value) is not expected:
            _refuse(f"{path}: {name} must be {expected.__name__}, found {value!r}")
    return values


def _check_ranges(config: Config) -> None:
    """All wrong values in one message."""
    wrong = [
        f"--{name.replace('_', '-')} must be above 0, found {getattr(config, name)}"
        for name in (
            "train_fraction", "validation_fraction", "max_length", "lora_r", "lora_alpha", "sft_learning_rate",
            "sft_epochs", "beta", "learning_rate", "num_train_epochs", "effective_batch_size", "save_steps",
        )
        if not getattr(config, name) > 0
    ]  # fmt: skip
    if not config.train_fraction + config.validation_fraction < 1:
        wrong.append("--train-fraction and --validation-fraction must leave a test part: their sum is 1 or more")
    micro = config.per_device_train_batch_size
    if isinstance(micro, int) and (micro < 1 or config.effective_batch_size % micro):
        wrong.append(f"--per-device-train-batch-size {micro} must divide --effective-batch-size")
    wrong += [
        f"--{name.replace('_', '-')} must be 0 or more, found {getattr(config, name)}"
        for name in ("warmup_steps", "weight_decay", "show", "seed", "split_seed")
        if not getattr(config, name) >= 0
    ]
    if wrong:
        _refuse("; ".join(wrong))


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
