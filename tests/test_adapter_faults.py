"""Eight broken adapters, each refused in training, in evaluation and in the notebook."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import ADAPTER, command, evaluate, tiny, train

import train_dpo
from config import ROOT
from quantpref import browse


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished and evaluated run."""
    config = tiny(tmp_path_factory.mktemp("finished"))
    for step in (train, evaluate):
        status, _, err = step(config)
        assert status == 0, err
    return config


def edited(change):
    def edit(folder):
        weights = load_file(folder / ADAPTER)
        change(weights)
        save_file(weights, folder / ADAPTER)

    return edit


def flipped_bit(folder):
    content = bytearray((folder / ADAPTER).read_bytes())
    content[-3] ^= 2
    (folder / ADAPTER).write_bytes(content)


def alpha(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 32}))


def pickled(folder):
    torch.save(load_file(folder / ADAPTER), folder / "adapter_model.bin")
    (folder / ADAPTER).unlink()


FAULTS = {
    "missing tensor": edited(lambda w: w.pop(sorted(w)[3])),
    "extra tensor": edited(lambda w: w.update({"base_model.model.extra.weight": torch.ones(2)})),
    "not finite": edited(lambda w: w[sorted(w)[5]].view(-1)[7].fill_(torch.nan)),
    "zeros": edited(lambda w: [tensor.zero_() for tensor in w.values()]),
    "flipped bit": flipped_bit,
    "edited alpha": alpha,
    "another base of the same shape": None,
    ".bin": pickled,
}


@pytest.fixture(params=FAULTS)
def broken(request, finished, tmp_path):
    """A copy of the run whose SFT adapter has the fault (or whose base is another one)."""
    config = replace(finished, output_dir=tmp_path / "run")
    shutil.copytree(finished.output_dir, config.output_dir)
    if FAULTS[request.param]:
        FAULTS[request.param](config.sft_folder)
        return config
    base = tmp_path / "tiny-llama"
    shutil.copytree(ROOT / "models" / "tiny-llama", base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"].neg_()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return replace(config, base_model=str(base))


def test_refused_in_training(broken, tmp_path):
    """DPO from it, in a folder of its own."""
    config = replace(broken, output_dir=tmp_path / "new", sft_adapter=broken.sft_folder)
    status, _, err = train(config)
    assert status == 2 and str(broken.sft_folder) in err
    assert not list(config.output_dir.rglob("*.safetensors"))


def test_refused_in_evaluation(broken):
    shutil.rmtree(broken.evaluation_folder)
    status, _, err = evaluate(broken)
    assert status == 2 and str(broken.sft_folder) in err
    assert not broken.evaluation_folder.exists()


def test_refused_in_the_notebook(broken):
    run = replace(browse.open_run(broken.output_dir), config=broken)
    with pytest.raises(browse.Stop, match=str(broken.sft_folder)):
        browse.load_arms(run)


def test_refused_where_the_run_is_finished(broken):
    """The same command again does not call a run finished whose adapter is broken."""
    if broken.base_model.startswith(str(ROOT)):
        status, _, err = command(train_dpo.main, broken)
        assert status == 2 and str(broken.sft_folder) in err


@pytest.mark.parametrize("fault", ["missing tensor", "extra tensor", "not finite", "zeros", ".bin"])
def test_without_a_manifest_what_can_be_seen_is_refused_too(finished, tmp_path, fault):
    """An adapter made elsewhere has no hashes: its keys, shapes and numbers must do."""
    foreign = tmp_path / "foreign"
    shutil.copytree(finished.sft_folder, foreign)
    (foreign / "manifest.json").unlink()
    FAULTS[fault](foreign)
    status, _, err = train(replace(finished, output_dir=tmp_path / "new", sft_adapter=foreign))
    assert status == 2 and str(foreign) in err
