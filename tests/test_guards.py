"""What must stop a run stops it at that step, says why in one line, and leaves the last good state."""

import errno
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ADAPTER, adapters, ask_to_stop, at_step, evaluate, tiny, train

from quantpref import guards, outcome
from quantpref.checkpoints import generators, join, set_generators, split
from quantpref.runs import MANIFEST, UserError, damage, one_line_errors, read_json


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """A finished SFT adapter, for runs that only train DPO."""
    config = tiny(tmp_path_factory.mktemp("sft"))
    status, _, err = train(config)
    assert status == 0, err
    return config


def from_sft(sft, tmp_path, **settings):
    return replace(sft, output_dir=tmp_path / "run", sft_adapter=sft.sft_folder, **settings)


def not_a_number(trainer):
    trainer.llama.adapters.flat.grad[0] = float("nan")


def infinite_loss(trainer):
    trainer._tr_loss += float("inf")


@pytest.mark.parametrize(("harm", "found"), [(not_a_number, "grad_norm"), (infinite_loss, "loss")])
def test_dpo_stops_at_the_step_that_is_not_finite(sft, tmp_path, monkeypatch, harm, found):
    config = from_sft(sft, tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 5, harm)
        status, _, err = train(config)
    assert status == 1 and err.startswith("error: step 5: ") and "--fresh" in err
    failed = read_json(config.dpo_folder / "failed.json")
    assert (failed["step"], failed["cause"], failed["kind"]) == (5, "non-finite", "dpo")
    assert failed["numbers"][found] in ("nan", "inf")
    assert [p.name for p in config.dpo_folder.iterdir()] == ["failed.json"]  # nothing marked final
    kept = config.checkpoints_of(config.dpo_folder) / "checkpoint-3"
    saved = join(read_json(kept / "state.json"), load_file(kept / "tensors.safetensors"))
    assert damage(kept) is None and all(weight.isfinite().all() for weight in saved["weights"].values())
    status, _, err = train(config)
    assert status == 1 and "training ended at step 5 on a number that is not finite" in err and "--fresh" in err
    status, out, _ = evaluate(config)
    assert status == 0 and "NOT SUPPORTED" in out and "DPO was unstable" in out and "step 5" in out
    status, out, _ = train(replace(config, fresh=True))
    assert status == 0 and f"{config.dpo_folder} is now {config.dpo_folder}.1" in out
    assert adapters(config)["dpo"] == adapters(sft)["dpo"]


def test_sft_stops_too_and_there_is_nothing_to_compare(tmp_path, monkeypatch):
    config = tiny(tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 1, not_a_number, "sft")
        status, _, err = train(config)
    assert status == 1 and err.startswith("error: step 1: ")
    assert read_json(config.sft_folder / "failed.json")["step"] == 1 and not config.dpo_folder.exists()
    for again in (train, evaluate):
        status, _, err = again(config)
        assert status == 1 and "training ended at step 1 on a number that is not finite" in err


def test_a_loss_that_is_not_finite_at_the_first_step_is_called_so(sft, tmp_path, monkeypatch):
    """And not a wrong reference, although it is not ln 2 either."""
    monkeypatch.setattr(
        "trl.trainer.dpo_trainer.DPOTrainer._compute_loss",
        lambda self, model, inputs, return_outputs: (
            sum(p.sum() for p in self.model.parameters() if p.requires_grad) * torch.nan
        ),
    )
    status, _, err = train(from_sft(sft, tmp_path))
    assert status == 1 and err.startswith("error: step 1: loss nan")


def test_weights_that_overflow_in_the_last_step_never_become_final(sft, tmp_path, monkeypatch):
    """No later loss would tell."""

    def overflow(self, args, state, control, **more):
        if state.global_step == 7:
            next(p for p in more["model"].parameters() if p.requires_grad).data.fill_(torch.inf)

    monkeypatch.setattr("quantpref.interrupts.FinishStep.on_step_end", overflow)
    config = from_sft(sft, tmp_path)
    status, _, err = train(config)
    assert status == 1 and "step 7: weights nan is not finite" in err
    assert [p.name for p in config.dpo_folder.iterdir()] == ["failed.json"]


def raise_out_of_memory(trainer):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def raise_cpu_out_of_memory(trainer):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ...")


@pytest.mark.parametrize("harm", [raise_out_of_memory, raise_cpu_out_of_memory])
def test_exhausted_memory_names_the_one_setting_to_change(sft, tmp_path, monkeypatch, harm):
    config = from_sft(sft, tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 5, harm)
        status, _, err = train(config)
    assert status == 1 and err.startswith("error: training with 8 pair(s) at a time: out of memory (peak ")
    assert "with --per-device-train-batch-size 4 goes on from the last checkpoint" in err
    status, out, _ = train(replace(config, per_device_train_batch_size=4))
    assert status == 0 and "checkpoint-3" in out


def test_other_errors_of_torch_are_not_called_memory(sft, tmp_path, monkeypatch):
    def raise_defect(trainer):
        raise RuntimeError("expected scalar type Float")

    at_step(monkeypatch, 2, raise_defect)
    with pytest.raises(RuntimeError, match="expected scalar"):
        train(from_sft(sft, tmp_path))


def test_the_smaller_batch_divides_the_effective_one():
    assert "size 4 " in guards.smaller_batch(8, 8) and "size 1 " in guards.smaller_batch(2, 8)
    assert "size 3 " in guards.smaller_batch(4, 12) and "--base-model" in guards.smaller_batch(1, 8)


def test_exhausted_memory_in_scoring_is_one_line(sft, monkeypatch, tmp_path):
    monkeypatch.setattr("quantpref.scoring.score", raise_cpu_out_of_memory_in_scoring)
    status, _, err = evaluate(replace(sft, sft_adapter=sft.sft_folder))
    assert status == 1 and err.startswith("error: scoring base: out of memory") and "--base-model" in err


def raise_cpu_out_of_memory_in_scoring(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_too_little_disk_is_said_before_training(sft, tmp_path, monkeypatch):
    config = from_sft(sft, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**20})())
    status, _, err = train(config)
    assert status == 1 and "0.00 GiB free, 0.0" in err and "needed for adapters and checkpoints" in err
    assert not list(config.output_dir.rglob("*"))


def test_disk_is_enough_for_what_is_written(sft, tmp_path, monkeypatch):
    """The prediction against the real folders: one arm's adapter, and three checkpoints."""
    config = from_sft(sft, tmp_path)
    with monkeypatch.context() as patch:
        at_step(patch, 7, ask_to_stop())
        assert train(config)[0] == 143
    two = sum(p.stat().st_size for p in config.checkpoints_of(config.dpo_folder).rglob("*") if p.is_file())
    written = two * 3 / 2 + (sft.dpo_folder / ADAPTER).stat().st_size
    assert written <= guards.disk_gib(155_648, 56, 1) * 2**30 <= written + 4 * 2 * 2**20


# What training must have done, and nothing else


@pytest.mark.parametrize(
    ("part", "said"), [("ref", "the frozen reference moved"), ("norm", "the base's weights moved")]
)
def test_what_should_not_move(sft, tmp_path, monkeypatch, part, said):
    def move(trainer):
        with torch.no_grad():
            next(p for n, p in trainer.model.named_parameters() if part in n and not p.requires_grad).add_(0.01)

    config = from_sft(sft, tmp_path)
    at_step(monkeypatch, 4, move)
    status, _, err = train(config)
    assert status == 1 and said in err, err
    assert not config.dpo_folder.exists()


def test_what_should_move(sft, tmp_path, monkeypatch):
    """A layer that no gradient reaches."""
    original = guards.Guards._get_grad_norm

    def without_gradient(self, model, grad_norm=None):
        [flat] = model.parameters()
        flat.grad[: len(flat) // 4] = 0  # the first of four layers
        return original(self, model, grad_norm)

    monkeypatch.setattr(guards.Guards, "_get_grad_norm", without_gradient)
    config = from_sft(sft, tmp_path, weight_decay=0.0)
    status, _, err = train(config)
    assert status == 1 and "14 of 56 adapter matrices did not move" in err
    assert not config.dpo_folder.exists()


def test_an_adapter_that_reads_back_otherwise_is_refused(sft, tmp_path, monkeypatch):
    from quantpref import models

    def another_alpha(folder):
        adapter = models.read_adapter(folder)
        adapter.config.lora_alpha *= 4
        return adapter

    monkeypatch.setattr(outcome, "read_adapter", another_alpha)
    config = from_sft(sft, tmp_path, learning_rate=2e-3)
    status, _, err = train(config)
    assert status == 1 and "read back, the adapter scores up to" in err and not config.dpo_folder.exists()


def test_a_reference_that_is_not_the_start_is_noticed(sft, tmp_path, monkeypatch):
    """Rewards of opposite signs that leave the mean loss near ln 2."""
    original = guards.Guards.log

    def shifted(self, logs, start_time=None):
        if self.made_with["kind"] == "dpo":
            self._metrics["train"]["rewards/chosen"] = [0.02]
        original(self, logs, start_time)

    monkeypatch.setattr(guards.Guards, "log", shifted)
    status, _, err = train(from_sft(sft, tmp_path))
    assert status == 1 and "DPO's rewards before the first step are {'rewards/chosen': 0.02" in err


def test_dpo_that_unlearns_is_said_at_once_and_in_the_verdict(sft, tmp_path):
    config = from_sft(sft, tmp_path, learning_rate=0.2, beta=5.0)
    status, out, err = train(config)
    if status == 0:
        assert read_json(config.dpo_folder / MANIFEST)["last_tenth_mean_loss"] > 0.6932
        assert "unstable" in out
        status, out, _ = evaluate(config)
        assert status == 0 and "NOT SUPPORTED" in out and "above ln 2" in out
    else:
        assert (config.dpo_folder / "failed.json").is_file(), err


# The checkpoint format


def test_any_tree_comes_back_from_json_and_tensors():
    shared = torch.arange(6.0)
    tensors_of_0 = {"step": torch.tensor(3.0), "m": shared, "v": shared.view(2, 3).T, "m8": shared.to(torch.uint8)}
    tree = {
        0: tensors_of_0,
        "groups": [{"betas": (0.9, 0.999), "params": [0, 1], "lr": 1e-4, "none": None, "flag": True, "big": 2**70}],
    }
    plain, tensors = split(tree)
    back = join(json.loads(json.dumps(plain)), tensors)
    assert back.keys() == tree.keys() and back["groups"] == tree["groups"]
    assert type(back["groups"][0]["betas"]) is tuple
    for name, tensor in tree[0].items():
        assert torch.equal(back[0][name], tensor) and back[0][name].dtype == tensor.dtype
    pointers = [t.data_ptr() for t in tensors.values()]
    assert len(set(pointers)) == len(pointers)  # safetensors refuses tensors that share memory
    with pytest.raises(TypeError, match="cannot hold"):
        split({"code": print})


@pytest.mark.parametrize("kind", ["torch", "8-bit"])
def test_an_optimiser_goes_on_from_its_saved_state(kind):
    """The GPU's 8-bit AdamW too: quantised moments, and tables that all of them share."""
    from bitsandbytes.optim import AdamW8bit

    def steps(weights, optimiser, which):
        generator = torch.Generator().manual_seed(3)
        for at in range(6):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            if at in which:
                optimiser.step()

    def begin():
        generator = torch.Generator().manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 128), (10,))]
        return weights, (AdamW8bit if kind == "8-bit" else torch.optim.AdamW)(weights, lr=1e-2)

    straight, optimiser = begin()
    steps(straight, optimiser, range(6))
    weights, optimiser = begin()
    steps(weights, optimiser, range(3))
    plain, tensors = split({"weights": [w.data for w in weights], "optimiser": optimiser.state_dict()})
    saved = join(json.loads(json.dumps(plain)), tensors)
    resumed, optimiser = begin()
    for weight, value in zip(resumed, saved["weights"], strict=True):
        weight.data.copy_(value)
    optimiser.load_state_dict(saved["optimiser"])
    steps(resumed, optimiser, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert (torch.uint8 in {t.dtype for t in tensors.values()}) == (kind == "8-bit")


def test_generators_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()

    draw()
    np.random.standard_normal()  # leaves half of a pair behind
    plain, tensors = split(generators())
    first = draw()
    assert draw() != first
    set_generators(join(json.loads(json.dumps(plain)), tensors))
    assert draw() == first


# Errors of the operating system


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "x", "/y/z"), Exception("Error while serializing: No space left on device (os error 28)")],
)
def test_a_full_disk_is_one_line_whoever_notices_it(capfd, error):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise error
    assert stop.value.code == 1
    assert "No space left on device; is there space" in capfd.readouterr().err


def test_a_users_error_wins_over_what_it_mentions(capfd):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise UserError("line 3: (os error 28)")
    assert stop.value.code == 2
