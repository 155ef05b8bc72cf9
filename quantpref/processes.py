"""One process a GPU, as `accelerate launch` starts them: which one am I, and what did the others find?"""

import os
from typing import Any


def start() -> None:
    """Join the other processes, where there are any; each is then to do the same things in the same order."""
    if count() > 1:
        from accelerate import PartialState

        PartialState()


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def gather(value: Any) -> list[Any]:
    """Everybody's value, by rank."""
    if count() == 1:
        return [value]
    import torch.distributed

    values = [None] * count()
    torch.distributed.all_gather_object(values, value)
    return values


def wait() -> None:
    """Go on when everybody is here: what rank 0 has written stands."""
    gather(None)
