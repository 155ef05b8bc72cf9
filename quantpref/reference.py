"""The frozen reference's log-probabilities on disk, for later runs that would compute the same numbers again.

The same to the last bit they are only for the same pairs in the same batches on the same device, and step 0's loss of
ln 2 rests on the last bit; so all of that is in the file's name, as a hash.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantpref.runs import atomic_file

NAME = "reference_log_probs"


def reference_file(folder: Path, identity: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:32]}.safetensors"


def read_reference(path: Path, pairs: int) -> Tensor | None:
    """(pairs, 2) in nats; None where there is no such file or it is not whole, and then they are computed again."""
    try:
        found = load_file(path)[NAME]
    except (OSError, SafetensorError, KeyError):
        return None
    return found if found.shape == (pairs, 2) and bool(found.isfinite().all()) else None


def write_reference(path: Path, reference: Tensor) -> None:
    with atomic_file(path) as temporary:
        save_file({NAME: reference.contiguous()}, temporary)


def unknown(pairs: int) -> Tensor:
    return torch.full((pairs, 2), torch.nan)
