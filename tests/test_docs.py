"""Every command in the README and the data card is one that the program would take, and every preset parses."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from config import PRESETS, ROOT, parse_config, parse_flags

DOCUMENTS = ("README.md", "data/README.md", "models/tiny-llama/README.md", "benchmarks/RESULTS.md", "docs/SCALING.md")
SCRIPTS = ("verify_dpo_setup.py", "train_dpo.py", "evaluate_dpo.py")


def commands():
    """`python SCRIPT FLAGS` from code blocks and inline code, loops taken apart, X and B standing for numbers."""
    for name in DOCUMENTS:
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        code = [line for block in blocks for line in block.splitlines()]
        code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in code:
            for part in re.split(r"&&|;|\bdo\b", line):
                if match := re.search(r"(?:^|\s)python (\S+\.py)(.*)", part.split("#")[0]):
                    yield name, match[1], match[2].replace("$s", "1").replace(" X", " 1e-4").replace(" B ", " auto ")


ALL = sorted(set(commands()))


def test_there_are_commands_of_each_script():
    assert {*SCRIPTS, "data/build_contrastive.py", "models/pretrain.py"} <= {script for _, script, _ in ALL}


@pytest.mark.parametrize(("document", "script", "flags"), ALL)
def test_documented_commands_parse(document, script, flags, monkeypatch):
    argv = shlex.split(flags)
    assert (ROOT / script).is_file(), f"{document} names {script}"
    if script in SCRIPTS:
        assert parse_config(argv, "").seed >= 0
    elif script == "data/build_contrastive.py":
        from data.build_contrastive import Ratings, Simulate

        kinds = (
            Annotated[Simulate, tyro.conf.subcommand("simulate")] | Annotated[Ratings, tyro.conf.subcommand("ratings")]
        )
        assert parse_flags(kinds, argv).out
    elif script == "models/pretrain.py":
        from models.pretrain import Pretraining

        assert parse_flags(Pretraining, argv).out
    elif script == "benchmarks/build_scale.py":
        from benchmarks.build_scale import arguments

        assert arguments(argv).folder
    else:
        monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
        options = {"llama3_shape": "Shape", "gpu_training": "Bench", "gpu_scoring": "Bench"}
        name = Path(script).stem
        assert parse_flags(getattr(importlib.import_module(name), options[name]), argv).out


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse(name):
    assert parse_config(["--preset", name], "").base_model == PRESETS[name].base_model


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
