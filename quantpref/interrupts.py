"""SIGTERM and Ctrl-C while training: finish the step, save, then stop. A second one stops at once."""

import os
import signal
from types import FrameType
from typing import Any, Self

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class FinishStep(TrainerCallback):
    """A callback, and the context in which it takes the signals; `signum` is the one that came, 0 before."""

    signum = 0

    def __enter__(self) -> Self:
        self._before = [signal.signal(which, self._ask) for which in SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in zip(SIGNALS, self._before, strict=True):
            signal.signal(which, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.signum:
            os._exit(128 + signum)  # what is half-written has no final name; the lock dies with the process
        self.signum = signum
        # Not by print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step, with a checkpoint; once more to stop at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._asked(args.device):
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True

    def _asked(self, device: torch.device) -> bool:
        """Whether any process was asked: all must stop after the same step, or they wait for each other forever."""
        if not torch.distributed.is_initialized():
            return bool(self.signum)
        asked = torch.tensor(self.signum, device=device)
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        self.signum = int(asked)
        return bool(self.signum)
