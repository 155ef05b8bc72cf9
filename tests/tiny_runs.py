"""Short runs of the tiny preset inside the test's own process: what the scripts' `main` does, without new starts."""

import io
import os
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import evaluate_dpo
import train_dpo
from config import PRESETS, Config
from quantpref.comparisons import save
from quantpref.runs import one_line_errors, sha256
from quantpref.simulate import simulate

ADAPTER = "adapter_model.safetensors"
ARMS = ("sft", "dpo")


def tiny(folder: Path, people: int = 80, **settings: object) -> Config:
    """Settings for `people` simulated people, 70 % of them trained on; SFT and DPO, a checkpoint every 3 steps."""
    data = folder / "people.jsonl"
    if not data.exists():
        save(data, simulate(people, seed=11).comparisons)
    return replace(
        PRESETS["tiny"], **{"data": data, "output_dir": folder / "run", "sft_more": False, "save_steps": 3} | settings
    )


def command(main, config: Config) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script with this config; what it says of an error is one line."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            with one_line_errors():
                main(config)
        except SystemExit as stop:
            status = int(stop.code or 0)
    if status:
        assert err.getvalue().rpartition("error: ")[2].count("\n") == 1, err.getvalue()
    return status, out.getvalue(), err.getvalue()


def train(config: Config) -> tuple[int, str, str]:
    return command(train_dpo.main, config)


def evaluate(config: Config) -> tuple[int, str, str]:
    return command(evaluate_dpo.main, config)


def adapters(config: Config) -> dict[str, str]:
    """SHA-256 of the finished adapters' weights."""
    folders = {"sft": config.sft_folder, "dpo": config.dpo_folder}
    return {arm: sha256(folder / ADAPTER) for arm, folder in folders.items() if (folder / ADAPTER).is_file()}


def at_step(monkeypatch, step: int, act, kind: str = "dpo") -> None:
    """Have `act(trainer)` called right after the backward pass of step `step` of arm `kind`."""
    from transformers import Trainer

    original = Trainer._clip_grad_norm

    def acting(self, model):
        if self.state.global_step + 1 == step and self.made_with["kind"] == kind:
            act(self)
        return original(self, model)

    monkeypatch.setattr(Trainer, "_clip_grad_norm", acting)


def ask_to_stop(signum: int = signal.SIGTERM):
    return lambda trainer: os.kill(os.getpid(), signum)
