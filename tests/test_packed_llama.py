"""The packed Llama against the model it stands for, one unpacked row at a time through transformers and peft."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from config import PRESETS
from quantpref import attention
from quantpref.comparisons import load
from quantpref.models import Base, attach, load_base, new_adapter, read_adapter
from quantpref.packed_llama import Learner, PackedLlama, TokenStatistics, TreeBatch
from quantpref.prefix_tree import pack
from quantpref.prompts import AnswerSlot, tokenise
from quantpref.scoring import ScoringRows, score

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return tokenise(tokenizer, load(TINY.data)[:8])[0]


@pytest.fixture(scope="module")
def four_bit():
    return load_base(TINY.base_model, None, "transformers")


def plain_base(tokenizer, dtype=torch.float32):
    model = LlamaForCausalLM.from_pretrained(TINY.base_model, dtype=dtype)
    return Base(model, tokenizer, "transformers", "", "", None)


def adapted(base, r=16, alpha=16, seed=1):
    """A model with an adapter that does something: a fresh one has B = 0."""
    model = new_adapter(base, r, alpha, seed)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data += 0.03 * torch.randn(weight.shape, generator=generator)
        if "lora_" in name:
            weight.data = weight.data.float().to(weight.dtype)  # the flat adapter is float32, whatever the base is
    return model


def responses(pairs):
    return [(p.prompt_ids, response) for p in pairs for response in (p.chosen_ids, p.rejected_ids)]


def packed(rows):
    """Rows of (prompt, response) as one tree that is asked about each response token."""
    tree = pack([prompt + response for prompt, response in rows])
    columns = [c for (prompt, _), path in zip(rows, tree.paths, strict=True) for c in path[len(prompt) - 1 : -1]]
    tokens = [token for _, response in rows for token in response]
    return TreeBatch(*map(torch.tensor, (tree.ids, tree.positions, tree.end, columns, tokens)))


def row_by_row(model, rows):
    """What the packed model has to give, from its definition."""
    found = []
    for prompt, response in rows:
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        logs, tokens = logits.log_softmax(-1), torch.tensor(response)
        entropy = -(logs.exp() * logs).sum(-1)
        found.append((logs[range(len(response)), tokens], entropy, logits.mean(-1), logits.argmax(-1) == tokens))
    return TokenStatistics(*map(torch.cat, zip(*found, strict=True)))


def gradients_by_peft(model, rows, weights):
    (row_by_row(model, rows).log_probs * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return gradients


def by_name(model, llama, flat):
    """A flat tensor as peft's matrices, by their names in the model."""
    names = {p: name for name, p in model.named_parameters()}
    matrices = llama.adapters._matrices("default")
    parts = flat.split([m.numel() for m in matrices])
    return {names[m]: part.view(m.shape) for m, part in zip(matrices, parts, strict=True)}


def assert_same_gradients(found, expected, tolerance):
    """Relative to each matrix' largest gradient. In float32 what cancels, in the first queries and keys above all,
    leaves little but rounding, so that float64 is the sharp test."""
    assert found.keys() == expected.keys()
    assert len(found) == 56  # A and B of seven projections in four blocks
    for name, gradient in expected.items():
        difference, size = (found[name] - gradient).abs().max().item(), gradient.abs().max().item()
        assert size > 0, name
        assert difference <= tolerance * size, name


def assert_same_statistics(found, expected, tolerance=1e-3):
    """Entropy, a metric only, is a difference of two numbers of the logits' size: five times the tolerance."""
    for name, times in (("log_probs", 1), ("mean_logits", 1), ("entropy", 5)):
        difference = (getattr(found, name).double() - getattr(expected, name)).abs().max().item()
        assert difference < times * tolerance, (name, difference)
    assert torch.equal(found.is_top1, expected.is_top1)


def test_statistics_equal_those_of_single_rows(tokenizer, pairs):
    model, rows = adapted(plain_base(tokenizer)), responses(pairs)
    llama = PackedLlama(model)
    llama.adapters.use("default")
    batch = packed(rows)
    assert len(batch.ids) < 0.6 * sum(len(prompt + response) for prompt, response in rows)  # there is much to share
    found = llama.statistics(batch)
    assert not found.log_probs.requires_grad
    with torch.no_grad():
        assert_same_statistics(found, row_by_row(model.double(), rows))


def test_one_column_may_be_asked_about_several_tokens(tokenizer, pairs):
    """As scoring does: how likely is A, how likely is B after the same column?"""
    base = plain_base(tokenizer)
    ids = pairs[0].prompt_ids
    columns, tokens = [len(ids) - 1] * 3 + [4], [7, 300, 7, 9]
    tree = pack([ids])
    found = PackedLlama(base.model).statistics(
        TreeBatch(*map(torch.tensor, (tree.ids, tree.positions, tree.end, columns, tokens)))
    )
    with torch.no_grad():
        logs = base.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert torch.allclose(found.log_probs, logs[columns, tokens], atol=2e-5)


def test_gradients_equal_peft(tokenizer, pairs):
    model, rows = adapted(plain_base(tokenizer)), responses(pairs[:4])
    batch = packed(rows)
    weights = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(3))
    expected = gradients_by_peft(model, rows, weights)
    learner = Learner(PackedLlama(model, train="default"))
    (learner(batch).log_probs * weights).sum().backward()
    assert [name for name, _ in learner.named_parameters()] == ["flat"]
    assert_same_gradients(by_name(model, learner.llama, learner.flat.grad), expected, tolerance=1e-3)
    assert not any(p.grad is not None for p in model.parameters())  # the base learns nothing


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Norms and statistics go to float32 in both implementations; here float64 stays float64."""
    to_float = torch.Tensor.float

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))


def test_gradients_equal_peft_in_float64(tokenizer, pairs, norms_in_float64):
    """Where rounding hides nothing."""
    model, rows = adapted(plain_base(tokenizer, torch.float64)), responses(pairs[:3])
    batch = packed(rows)
    weights = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        statistics = row_by_row(model, rows)
    expected = gradients_by_peft(model, rows, weights)
    learner = Learner(PackedLlama(model, train="default"))
    found = learner(batch)
    assert found.log_probs.dtype == torch.float64
    assert_same_statistics(found, statistics, tolerance=1e-10)
    (found.log_probs * weights).sum().backward()
    gradients = learner.llama.adapters.gradients  # in the compute dtype; what the optimiser gets is float32
    assert_same_gradients(by_name(model, learner.llama, gradients), expected, tolerance=1e-9)
    assert torch.equal(learner.flat.grad, gradients.to(torch.float32))


def test_four_bit_base_equals_its_own_forward(four_bit, pairs):
    model, rows = adapted(four_bit), responses(pairs[:4])
    batch = packed(rows)
    weights = torch.randn(len(batch.tokens), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        statistics = row_by_row(model, rows)
    expected = gradients_by_peft(model, rows, weights)
    learner = Learner(PackedLlama(model, train="default"))
    found = learner(batch)
    (found.log_probs * weights).sum().backward()
    gradients = by_name(model, learner.llama, learner.flat.grad)
    model.unload()
    assert_same_statistics(found, statistics)
    assert_same_gradients(gradients, expected, tolerance=1e-3)


def test_no_adapter_is_the_bare_base(tokenizer, pairs):
    rows = responses(pairs[:2])
    batch = packed(rows)
    base = plain_base(tokenizer)
    with torch.no_grad():
        expected = row_by_row(base.model, rows)
    bare = PackedLlama(base.model)
    assert_same_statistics(bare.statistics(batch), expected)
    bare.adapters.use(None)
    assert_same_statistics(bare.statistics(batch), expected)

    model = adapted(base)
    frozen, learning = PackedLlama(model), PackedLlama(model, train="default")
    for llama in (frozen, learning):
        assert_same_statistics(llama.frozen(None, batch), expected)
        changed = llama.frozen("default", batch)
        assert (changed.log_probs - expected.log_probs).abs().max() > 0.01
        assert_same_statistics(llama.frozen(None, batch), expected)


def test_a_fresh_adapter_is_the_bare_base_to_the_bit(tokenizer, pairs):
    """dpo-from-base: before the first step policy and reference agree exactly, whichever is asked first."""
    batch = packed(responses(pairs[:2]))
    learner = Learner(PackedLlama(new_adapter(plain_base(tokenizer), 16, 16, seed=1), train="default"))
    first, policy = learner.llama.frozen(None, batch), learner(batch)
    again = learner.llama.frozen(None, batch)
    assert torch.equal(policy.log_probs, again.log_probs)
    assert torch.equal(policy.log_probs, first.log_probs)


def test_adapters_of_other_ranks_and_alphas_in_turn(tokenizer, pairs, tmp_path):
    rows = responses(pairs[:2])
    batch, base = packed(rows), plain_base(tokenizer)
    for name, r, alpha in (("wide", 16, 16), ("narrow", 3, 24)):  # ranks that fill whole pieces of 8, and that do not
        model = adapted(base, r, alpha, seed=r)
        model.save_pretrained(tmp_path / name)
        base = Base(model.unload(), tokenizer, "transformers", "", "", None)
    model = attach(base, {name: read_adapter(tmp_path / name) for name in ("wide", "narrow")})
    llama = PackedLlama(model)
    expected = {}
    with torch.no_grad():
        for name in ("wide", "narrow"):
            model.set_adapter(name)
            expected[name] = row_by_row(model, rows)
        with model.disable_adapter():
            expected[None] = row_by_row(model, rows)
    for name in ("wide", "narrow", None, "narrow", "wide", None):
        llama.adapters.use(name)
        assert_same_statistics(llama.statistics(batch), expected[name])
    assert (expected["wide"].log_probs - expected["narrow"].log_probs).abs().max() > 0.01


def test_scores_equal_peft(tokenizer, pairs):
    model = adapted(plain_base(tokenizer))
    slot = AnswerSlot((), 301, 302)
    rows = ScoringRows([p.prompt_ids for p in pairs[:6]], slot, 0)
    llama = PackedLlama(model)
    llama.adapters.use("default")
    with torch.no_grad():
        logs = [model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1) for ids in rows.ids]
    expected_a, expected_b = (
        torch.stack([row[token] for row in logs]).view(2, 3).T for token in (slot.token_a, slot.token_b)
    )
    for columns_per_batch in (None, 1, 400):
        found = score(llama, rows, columns_per_batch)
        assert torch.allclose(torch.from_numpy(found.logp_a), expected_a, atol=2e-5)
        assert torch.allclose(torch.from_numpy(found.logp_b), expected_b, atol=2e-5)


def preference_loss(learner, pairs):
    """Not linear in the log-probabilities, so that pairs must not mix."""
    log_probs = learner(packed(responses(pairs))).log_probs
    sums = [part.sum() for part in log_probs.split([len(response) for _, response in responses(pairs)])]
    return -torch.nn.functional.logsigmoid(torch.stack(sums[::2]) - torch.stack(sums[1::2])).mean()


def test_eight_pairs_at_once_equal_two_times_four(tokenizer, pairs):
    model = adapted(plain_base(tokenizer))
    learner = Learner(PackedLlama(model, train="default"))
    whole = preference_loss(learner, pairs)
    whole.backward()
    expected, learner.flat.grad = learner.flat.grad, None
    losses = []
    for part in (pairs[:4], pairs[4:]):
        loss = preference_loss(learner, part) / 2
        loss.backward()
        losses.append(loss.item())
    assert sum(losses) == pytest.approx(whole.item(), abs=1e-6)
    assert (learner.flat.grad - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


def test_a_gradient_belongs_to_its_own_forward_pass(tokenizer, pairs):
    """The reference runs between the policy's forward and backward pass when its numbers are not known yet."""
    model = adapted(plain_base(tokenizer))
    learner = Learner(PackedLlama(model, train="default"))
    preference_loss(learner, pairs[:2]).backward()
    expected, learner.flat.grad = learner.flat.grad, None
    learner.llama.frozen(None, packed(responses(pairs[2:4])))
    preference_loss(learner, pairs[:2]).backward()
    assert torch.equal(learner.flat.grad, expected)


def test_peft_matrices_are_views_of_the_flat_adapter(tokenizer, pairs, tmp_path):
    model, rows = adapted(plain_base(tokenizer)), responses(pairs[:2])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = Learner(PackedLlama(model, train="default"))
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    assert learner.flat.numel() == sum(p.numel() for name, p in now.items() if "lora_" in name)

    optimizer = torch.optim.AdamW([learner.flat], lr=1e-2, weight_decay=0.0)
    learner(packed(rows)).log_probs.sum().backward()
    optimizer.step()
    moved = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert moved == {name for name in before if "lora_" in name}  # every LoRA matrix, and no base weight

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    flat = by_name(model, learner.llama, learner.flat.detach())
    assert saved.keys() == {name.replace(".default", "") for name in flat}
    assert all(torch.equal(saved[name.replace(".default", "")], part) for name, part in flat.items())
    with torch.no_grad():
        assert_same_statistics(learner(packed(rows)), row_by_row(model, rows))


ROWS = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=6), min_size=1, max_size=8)


def dense(end, q, k, v):
    """One masked softmax over all columns."""
    columns = torch.arange(len(end))
    sees = (columns <= columns[:, None]) & (columns[:, None] < end)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
    return out[0].transpose(0, 1).flatten(1)


@pytest.mark.parametrize("row", [1, 5, 256])
@settings(deadline=None, max_examples=40)
@given(rows=ROWS, multiple=st.integers(1, 7), seed=st.integers(0, 99))
def test_attention_by_subtrees_equals_dense(row, rows, multiple, seed):
    end = torch.tensor(pack(rows, multiple).end)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(len(end), heads, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    above = torch.randn(len(end), 16, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROW", row)
        found = attention.attention_over(end)(q, k, v)
    expected = dense(end, q, k, v)
    assert found.shape == expected.shape == (len(end), 16)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(out, (q, k, v), above) for out in (found, expected)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", [1, 5, 256])
@given(rows=ROWS, multiple=st.integers(1, 7))
def test_subtrees_hold_each_column_once_with_its_path(row, rows, multiple):
    tree = pack(rows, multiple)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROW", row)
        parts = list(attention._parts(tree.end))
    assert sorted(c for _, start, stop in parts for c in range(start, stop)) == list(range(len(tree.ids)))
    for path, start, stop in parts:
        assert path == [k for k in range(start) if start < tree.end[k]]
        chain = all(tree.end[c] >= stop for c in range(start, stop))
        assert stop - start <= row or chain  # longer than a row only where nothing branches


def test_subtrees_of_a_literal_tree(monkeypatch):
    monkeypatch.setattr(attention, "ROW", 2)
    #         [1 2] [5 6] [7]       columns 0 1, 2 3, 4; both go on from the stem
    end = pack([[1, 2, 5, 6], [1, 2, 7]]).end
    queries, keys, sees = attention.subtree_rows(torch.tensor(end))
    rows = {tuple(q): (k, s.int().tolist()) for q, k, s in zip(queries.tolist(), keys.tolist(), sees, strict=True)}
    assert rows == {
        (0, 1): ([0, 1, -1, -1], [[1, 0, 0, 0], [1, 1, 0, 0]]),
        (2, 3): ([0, 1, 2, 3], [[1, 1, 1, 0], [1, 1, 1, 1]]),
        (4, -1): ([0, 1, 4, -1], [[1, 1, 1, 0], [1, 0, 0, 0]]),  # a padding query sees something: no empty softmax
    }


@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_rotation_is_that_of_transformers(kind):
    """Llama 3.2's frequencies are stretched; positions up to a long prompt's."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from quantpref.packed_llama import rotary_frequencies

    parameters = {"rope_type": kind, "rope_theta": 500_000.0}
    if kind == "llama3":
        parameters |= {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        parameters |= {"original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=parameters)
    positions = torch.arange(3000)
    cos, sin = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    frequencies, scale = rotary_frequencies(config, torch.device("cpu"))
    angles = (positions[:, None].float() * frequencies).repeat(1, 2)
    assert torch.allclose(angles.cos() * scale, cos[0], atol=1e-6) and torch.allclose(
        angles.sin() * scale, sin[0], atol=1e-6
    )
