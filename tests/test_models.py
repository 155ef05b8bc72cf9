"""The 4-bit base and strict adapters: what loads, what is refused, and that evaluation does not spoil training."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from config import PRESETS
from quantpref.comparisons import load, split_by_user
from quantpref.four_bit import four_bit_error, four_bit_product_error
from quantpref.models import attach, load_base, lora_weights, new_adapter, read_adapter
from quantpref.packed_llama import PackedLlama
from quantpref.prompts import tokenise
from quantpref.runs import RunError, UserError
from quantpref.scoring import ScoringRows, score, scoring_rows

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def base():
    return load_base(TINY.base_model, None, "transformers")


@pytest.fixture(scope="module")
def rows(base):
    return scoring_rows(base.tokenizer, load(TINY.data)[:40], 2048, "reasoned")


@pytest.fixture
def adapter_folder(base, tmp_path):
    """An adapter that does something, as training saves it."""
    model = new_adapter(base, 16, 16, seed=7)
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.02 * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    model.unload()
    return tmp_path / "adapter"


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def test_every_projection_is_in_four_bit(base):
    from bitsandbytes.nn import Linear4bit

    layers = [m for m in base.model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 28
    assert all(m.weight.quant_state.nested and m.weight.quant_state.quant_type == "nf4" for m in layers)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_round_trip_is_within_double_quantisation():
    for measured in (four_bit_error, four_bit_product_error):
        error, bound = measured()
        assert 0 < error < bound


def test_fingerprint_tells_bases_apart(base, tmp_path):
    assert load_base(TINY.base_model, None, "transformers").fingerprint == base.fingerprint
    other = tmp_path / "other"
    shutil.copytree(TINY.base_model, other)
    path = other / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.3.mlp.down_proj.weight"][0] *= 3
    save_file(weights, path, metadata={"format": "pt"})
    assert load_base(str(other), None, "transformers").fingerprint != base.fingerprint


def test_evaluation_does_not_change_training_gradients(base):
    """bitsandbytes repacks 4-bit weights at the first forward in eval mode unless it is told not to."""
    pairs, _ = tokenise(base.tokenizer, load(TINY.data)[:4])
    ids = torch.tensor([p.prompt_ids[:60] for p in pairs])
    model = new_adapter(base, 16, 16, seed=1)

    def gradients():
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss, before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    again, after = gradients()
    model.unload()
    assert again == loss
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert sum(float(g.abs().sum()) for g in before) > 0


def test_lora_weights_of_llama3_8b():
    from transformers import LlamaConfig

    shape = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8)  # fmt: skip
    assert lora_weights(shape, 16) == 41_943_040


def test_a_saved_adapter_scores_as_the_one_in_memory(base, rows, adapter_folder):
    adapter = read_adapter(adapter_folder)
    model = attach(base, {"one": adapter, "two": adapter})
    llama = PackedLlama(model)

    def scores_of(name):
        llama.adapters.use(name)
        return score(llama, rows)

    one, two, bare = map(scores_of, ("one", "two", None))
    model.unload()
    untouched = score(PackedLlama(base.model), rows)
    assert (one.logp_a == two.logp_a).all() and (one.logp_b == two.logp_b).all()
    assert (bare.logp_a == untouched.logp_a).all()
    assert abs(one.margins - bare.margins).max() > 1e-3


def test_scores_do_not_depend_on_batches_or_order(base, rows):
    llama = PackedLlama(base.model)
    together = score(llama, rows)
    one_by_one = score(llama, rows, columns_per_batch=1)
    n = len(rows.ids)
    turned = ScoringRows(rows.ids[::-1], rows.slot, 0)
    backwards = score(llama, turned)
    assert abs(together.margins - one_by_one.margins).max() < 1e-4
    # Row i of the reversed rows is row n-1-i: both the comparisons and the orders are turned round.
    assert abs(together.logp_a.T.ravel() - backwards.logp_a.T.ravel()[::-1]).max() < 1e-4
    assert n == 80


def test_scores_equal_a_single_full_forward(base, rows):
    found = score(PackedLlama(base.model), rows)
    with torch.no_grad():
        logs = base.model(torch.tensor([rows.ids[3]])).logits[0, -1].double().log_softmax(-1)
    assert found.logp_a[3, 0] == pytest.approx(logs[rows.slot.token_a].item(), abs=1e-4)
    assert found.logp_b[3, 0] == pytest.approx(logs[rows.slot.token_b].item(), abs=1e-4)
    assert (found.answer_mass <= 1 + 1e-6).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop(sorted(w)[0]), "missing, extra or of another shape"),
        (lambda w: w.update(extra=torch.ones(2)), "missing, extra or of another shape"),
        (lambda w: w[sorted(w)[0]].fill_(float("nan")), "not finite"),
        (lambda w: [t.zero_() for t in w.values()], "does nothing"),
    ],
)
def test_broken_adapters_are_refused(base, adapter_folder, change, words):
    edit_weights(adapter_folder, change)
    with pytest.raises(UserError, match=words):
        attach(base, {"x": read_adapter(adapter_folder)})
    assert not any(isinstance(m, LoraLayer) for m in base.model.modules())  # the base is as it was


def test_adapters_of_another_kind_are_refused(adapter_folder):
    path = adapter_folder / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_dropout": 0.1}))
    with pytest.raises(UserError, match="lora_dropout"):
        read_adapter(adapter_folder)
    path.write_text("{")
    with pytest.raises(UserError, match="not a LoRA adapter"):
        read_adapter(adapter_folder)
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickles can run code"):
        read_adapter(adapter_folder)


def test_bases_that_cannot_be_used_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_base(str(tmp_path / "nowhere"), None, "transformers")
    stored = tmp_path / "stored"
    shutil.copytree(TINY.base_model, stored)
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4",
                                     "bnb_4bit_use_double_quant": False}  # fmt: skip
    (stored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="fp4"):
        load_base(str(stored), None, "transformers")


def test_a_broken_model_is_noticed(base, rows):
    broken = load_base(TINY.base_model, None, "transformers")
    broken.model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="not finite"):
        score(PackedLlama(broken.model), rows)


def test_training_half_shows_the_preferred_film_first(base):
    from quantpref.training import training_pairs

    train = split_by_user(load(TINY.data), 0.7, 0.1, 3407).train[:101]
    _, counts = training_pairs(base, train, replace(TINY, seed=5))
    assert counts["pairs"] == 101 and counts["preferred_first"] in (50, 51) and counts["shortened"] == 0
