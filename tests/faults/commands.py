"""The scripts as a user starts them, to be killed at chosen moments."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from config import ROOT
from quantpref.runs import damage, sha256

SHIM = Path(__file__).parent / "shim"
ARMS = ("sft", "dpo")


def environment(**more):
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SHIM)} | more


def command(script, data, out, *more):
    flags = ("--preset", "tiny", "--data", data, "--output-dir", out, "--no-sft-more", *more)
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def train_command(data, out, *more):
    return command("train_dpo.py", data, out, "--save-steps", 3, *more)


def ends(argv, status=0, **more):
    """Run to the end; output, after a look at the exit status and at the one line of an error."""
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=environment(**more))
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr and "FORBIDDEN" not in done.stderr, done.stderr[-3000:]
    if status:
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stdout + done.stderr


def killed(argv, when, **more):
    """Start, and SIGKILL once `when()` is true; whether it was alive then, and what it had said."""
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=environment(**more)
    ) as process:
        while process.poll() is None and not when():
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        said = process.stdout.read()
        return process.wait() == -signal.SIGKILL, said


def steps_logged(out, arm):
    try:
        return len((out / f"{arm}_checkpoints" / "training_log.jsonl").read_bytes().splitlines())
    except FileNotFoundError:
        return 0


def at_a_random_step(out, rng):
    """True a random while after a random step of a random arm."""
    arm, step, rest = rng.choice(ARMS), rng.randrange(21), rng.random() * 0.3
    reached = []

    def when():
        if not reached and steps_logged(out, arm) > step:
            reached.append(time.monotonic() + rest)
        return bool(reached) and time.monotonic() >= reached[0]

    return when


def inside_a_save(out, rng):
    """True a random while after something begins to be written under a temporary name: a checkpoint or an adapter."""
    number, rest = rng.randrange(8), rng.random() * 0.6
    seen, reached = set(), []

    def when():
        seen.update(p.name for where in (".", "*_checkpoints") for p in out.glob(f"{where}/.*.tmp"))
        if not reached and len(seen) > number:
            reached.append(time.monotonic() + rest)
        return bool(reached) and time.monotonic() >= reached[0]

    return when


def adapters(out):
    return {arm: sha256(out / f"llama3_{arm}_4bit_final" / "adapter_model.safetensors") for arm in ARMS}


def final_names_are_whole(out):
    """Whatever stands under a final name is complete; the rest may be there in part under temporary names alone."""
    for folder in (*out.glob("llama3_*_4bit_final"), *out.glob("evaluation")):
        assert damage(folder) is None, damage(folder)
    checkpoints = list(out.glob("*_checkpoints/checkpoint-*"))
    for folder in checkpoints:
        assert damage(folder) is None, damage(folder)
    return len(checkpoints)


def seeded(seed):
    return random.Random(seed)
