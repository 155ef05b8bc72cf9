"""One process a GPU, as `accelerate launch` starts them: which one am I, and what did the others find?

Every process does the same things in the same order; the first one alone prints and writes.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

_alone = False


def start() -> None:
    """Join the other processes, where there are any."""
    if count() > 1:
        from accelerate import PartialState

        PartialState()
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def count() -> int:
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return 0 if _alone else int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return rank() == 0


def gather(value: Any) -> list[Any]:
    """Everybody's value, by rank."""
    if count() == 1:
        return [value]
    import torch.distributed

    values = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Go on when everybody is here: what the first one wrote stands."""
    gather(None)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What is done inside is not shared with the others, who wait."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False
