"""What a training run shows and records of its steps."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from quantpref.guards import NonFiniteError


class TrainingLog(TrainerCallback):
    """Progress bar and training_log.jsonl, in which a resumed run has every step once."""

    def __init__(self, title: str, path: Path) -> None:
        self.title, self.path = title, path
        self.file: TextIO | None = None
        self.losses: list[float] = []
        self.times: list[float] = []
        self.progress = Progress(
            TextColumn("{task.description:8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(width=None if sys.stdout.isatty() else 120),  # in a log nothing is cut off
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("w", encoding="utf-8")
        for logs in state.log_history:  # of the steps before a resumed run's checkpoint
            self._write(logs["step"], logs)
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, numbers="")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        row = self._write(state.global_step, kwargs["logs"])
        if row is None:
            return
        self.times.append(time.monotonic())
        numbers = f"loss {row['loss']:.4f}"
        if "rewards/margins" in row:
            numbers += f"  margin {row['rewards/margins']:+.3f}  accuracy {row['rewards/accuracies']:.2f}"
        self.progress.update(self.task, completed=state.global_step, numbers=numbers)

    def _write(self, step: int, logs: dict[str, Any]) -> dict[str, Any] | None:
        """One step's row; None for what transformers logs at the end."""
        if "loss" not in logs:
            return None
        row = {"step": step, **{k: round(v, 8) for k, v in sorted(logs.items()) if isinstance(v, float | int)}}
        bad = {k: v for k, v in row.items() if not math.isfinite(v)}
        if bad:
            raise NonFiniteError(step, bad)
        print(json.dumps(row), file=self.file, flush=True)  # noqa: T201 - to the log, not to the screen
        self.losses.append(row["loss"])
        return row

    def close(self) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()
