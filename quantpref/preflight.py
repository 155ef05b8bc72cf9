"""What verify_dpo_setup.py looks at on the machine and of the base: one function a check, before hours are spent."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from config import ROOT, Config


@dataclass(frozen=True)
class Check:
    """One finding: `todo` says what to do about a warning or a failure."""

    status: str  # "ok" | "warn" | "fail"
    name: str
    found: str
    todo: str = ""


def judged(fine: bool, name: str, found: str, todo: str, otherwise: str = "fail") -> Check:
    """A tick, or what to do about it."""
    return Check("ok", name, found) if fine else Check(otherwise, name, found, todo)


def python(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    yield judged(sys.version_info >= (3, 11), "python", version, "install Python 3.11 or later")


def packages(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Installed versions against the pins; another version may work, a missing package cannot."""
    # What stands from "# notebook" on is for the notebook and for working on this project.
    needed = (ROOT / "requirements-cpu.txt").read_text(encoding="utf-8").partition("# notebook")[0]
    pins = re.findall(r"^([\w-]+)==(\S+)", needed, re.MULTILINE)
    missing, other = [], []
    for name, pin in pins:
        try:
            version = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if version != pin:
            other.append(f"{name} {version} (pinned {pin})")
    todo = "pip install -r requirements.txt (with a GPU) or requirements-cpu.txt"
    if missing:
        yield Check("fail", "packages", f"missing: {', '.join(missing)}", todo)
    if other:
        yield Check("warn", "packages", f"not the tested versions: {', '.join(other)}", todo)
    if not missing and not other:
        yield Check("ok", "packages", f"all {len(pins)} as pinned")


def device(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    import torch

    from quantpref.backends import choose_backend

    driver = driver_version()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield judged(torch.cuda.is_bf16_supported(), "device", name, "bf16 is needed: Ampere or later")
        yield Check("ok", "driver", f"{driver or 'unknown'}, CUDA {torch.version.cuda} in torch")
    elif driver:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        todo = "install a torch build with CUDA that this driver supports, or update the driver"
        yield Check("fail", "device", f"a GPU with driver {driver}, which torch (built with {built}) cannot use", todo)
    elif is_folder(config.base_model):
        yield Check("ok", "device", f"no GPU; CPU with {torch.get_num_threads()} threads")
    else:
        yield Check("fail", "device", "no GPU, and this base is too large for a CPU", "use a GPU, or --preset tiny")
    found["backend"] = choose_backend(config.backend)
    yield Check("ok", "backend", found["backend"])


def driver_version() -> str | None:
    """NVIDIA's driver; None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command, no shell
            command, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def is_folder(base_model: str) -> bool:
    """A folder, or meant to be one, as against a hub id."""
    return base_model.startswith(("/", ".", "~")) or Path(base_model).is_dir()


def hub(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Of a base that is no folder here: is it in the cache, or can it be fetched, and by which name for good?"""
    if is_folder(config.base_model):
        found["reachable"] = True  # loading it says what is wrong, where something is
        return
    from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = config.base_model, config.base_revision
    if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        found["reachable"] = True
        yield Check("ok", "hub", f"{name}: in the cache {constants.HF_HUB_CACHE}")
        yield from _pinned(name, revision)
        return
    download = f"on a machine with network: hf download {name}; then --base-model FOLDER here"
    if constants.HF_HUB_OFFLINE:
        yield Check("fail", "hub", f"{name}: not in the cache, and HF_HUB_OFFLINE forbids to fetch it", download)
        return
    try:
        info = HfApi().model_info(name, revision=revision, timeout=15)
    except GatedRepoError:
        todo = f"accept its licence on https://huggingface.co/{name}, then `hf auth login`"
        yield Check("fail", "hub", f"{name}: gated, and this login has no access", todo)
    except RevisionNotFoundError:
        yield Check("fail", "hub", f"{name}: has no revision {revision}", "correct --base-revision")
    except RepositoryNotFoundError:
        todo = "correct --base-model, or log in with `hf auth login` where it is private"
        yield Check("fail", "hub", f"{name}: no such model on {constants.ENDPOINT}", todo)
    except (HTTPError, OSError) as error:
        yield Check("fail", "hub", f"{name}: {constants.ENDPOINT} cannot be reached ({type(error).__name__})", download)
    else:
        if info.gated and not get_token():
            todo = f"accept its licence on https://huggingface.co/{name}, then `hf auth login`"
            yield Check("fail", "hub", f"{name}: gated, and nobody is logged in here", todo)
            return
        found["reachable"] = True
        yield Check("ok", "hub", f"{name}: can be fetched")
        yield from _pinned(name, revision, info.sha)


def _pinned(name: str, revision: str | None, commit: str | None = None) -> Iterator[Check]:
    """Whether everybody who repeats the command gets the same weights."""
    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        yield Check("ok", "revision", f"pinned to {revision}")
        return
    todo = f"give --base-revision {commit or 'COMMIT, as the manifest of a run records it'}"
    yield Check("warn", "revision", f"{name} is not pinned and may change", todo)


def base(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    if "backend" not in found:
        return
    if "reachable" not in found:
        yield Check("fail", "base", "not tried, since it is not here and cannot be fetched", "see above")
        return
    from quantpref import models

    models.quiet()
    found["base"] = loaded = models.load_base(
        config.base_model, config.base_revision, found["backend"], config.max_length
    )
    layers = len(models.LORA_TARGETS) * loaded.model.config.num_hidden_layers
    yield Check(
        "ok", "base", f"{loaded.name}: {layers} projections in 4-bit nf4, {loaded.backend}, {loaded.fingerprint[:12]}"
    )


def memory(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """What training will take of the GPU, at one pair and at all pairs of a step in one pass."""
    import torch

    if "base" not in found or not torch.cuda.is_available():
        return
    from quantpref.models import training_memory_gib

    shape, free = found["base"].model.config, torch.cuda.mem_get_info()[0] / 2**30
    one, all_pairs = (training_memory_gib(shape, config.lora_r, 200 * n) for n in (1, config.effective_batch_size))
    free += training_memory_gib(shape, config.lora_r, 0)  # the base is loaded: its share is taken already
    text = f"about {one:.1f} GiB at one pair of 200 tokens at a time, {all_pairs:.1f} at {config.effective_batch_size}"
    todo = "free the GPU of other work, or take a smaller preset: --preset llama3.2-3b or llama3.2-1b"
    yield judged(one <= 0.95 * free, "memory", f"{text}; {free:.1f} free before the base was loaded", todo)


def disk(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """Room for what training writes, and the right to write there."""
    if "base" not in found:
        return
    from quantpref.guards import disk_gib, free_gib
    from quantpref.models import lora_weights

    arms = 2 + config.sft_more + config.dpo_from_base
    pairs = len(found["data"].split.train) if "data" in found else 0
    needed = disk_gib(lora_weights(found["base"].model.config, config.lora_r), pairs, arms)
    free = free_gib(config.output_dir)
    todo = "free some space, or choose another --output-dir"
    yield judged(free >= needed, "disk", f"{free:.1f} GiB free for {config.output_dir} ({needed:.2f} needed)", todo)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (probe := config.output_dir / ".verify.tmp").touch()
    probe.unlink()


def four_bit(config: Config, found: dict[str, Any]) -> Iterator[Check]:
    """nf4 with double quantisation on this device, against float64 arithmetic of the definition."""
    from quantpref.four_bit import four_bit_error, four_bit_product_error

    error, bound = four_bit_error()
    todo = "bitsandbytes is broken on this device; reinstall the pinned version"
    text = f"nf4 round trip within {error:.2%} of float64's, of each block's maximum (at most {bound:.0%})"
    yield judged(error <= bound, "4-bit", text, todo)
    error, bound = four_bit_product_error()
    text = f"4-bit matrix product within {error:.1e} of float64's, of its largest value (at most {bound:.0e})"
    yield judged(error <= bound, "4-bit kernel", text, todo)
