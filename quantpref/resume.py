"""Which checkpoint an interrupted run goes on from. Files only: asked before any library of the base is imported."""

import re
import shutil
from pathlib import Path
from typing import Any

from quantpref.runs import MANIFEST, damage, read_json, set_aside

KEPT = 2  # complete checkpoints; an earlier one stays until the next is whole


def numbered(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, whole or not, the newest first."""
    found = {int(m[1]): p for p in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, and of each newer one what is wrong with it."""
    faults: list[str] = []
    for path in numbered(folder):
        fault = damage(path)
        if fault is None:
            return path, faults
        faults.append(fault)
    return None, faults


def to_resume(folder: Path) -> tuple[Path | None, list[str]]:
    """As `newest`; the damaged ones are renamed, so that training can save under their names again."""
    path, faults = newest(folder)
    for damaged in numbered(folder)[: len(faults)]:
        set_aside(damaged)
    return path, faults


def made_with(checkpoint: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = read_json(checkpoint / MANIFEST)
    return manifest


def remove_checkpoints(folder: Path) -> None:
    """Once the adapter stands complete under its final name; logs in the folder stay."""
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
