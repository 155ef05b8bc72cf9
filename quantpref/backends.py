"""Which library runs the base. Asked before any other import of transformers: Unsloth patches it."""

import importlib.util
import logging
import os
from typing import Literal

from quantpref.runs import UserError

Backend = Literal["unsloth", "transformers"]


def choose_backend(wanted: Literal["auto", "unsloth", "transformers"]) -> Backend:
    """Resolve `--backend` and import Unsloth where it is chosen.

    Raises:
        UserError: Unsloth was asked for by name and cannot run here.
    """
    import torch

    # On a CPU bitsandbytes tells everybody that a kernel from the hub is missing; it works without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if wanted != "unsloth":  # our own model trains and scores on either, and an adapter stays with its backend
        return "transformers"
    if not (torch.cuda.is_available() and importlib.util.find_spec("unsloth")):
        missing = "the package" if torch.cuda.is_available() else "a GPU"
        raise UserError(f"--backend unsloth needs {missing}; use --backend auto or transformers")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it reports usage to its makers otherwise
    # TRL's own trainers first: Unsloth swaps them for copies that ask the model for its loss in another way.
    import quantpref.shared_prefix  # isort: skip  # noqa: F401
    import unsloth  # isort: skip  # noqa: F401

    return "unsloth"
