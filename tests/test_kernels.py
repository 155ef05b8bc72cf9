"""One-pass functions against plain formulas, and the GPU's kernels against the CPU's branch."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter
from torch.nn.functional import silu

from quantpref import kernels

ROOT = Path(__file__).resolve().parent.parent


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def all_in_float64(monkeypatch):
    """The functions go to float32 for their sums; here they stay in float64, so that a formula shows to 1e-12."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def norm_by_hand(x, weight, epsilon):
    rows = [[w * v / (sum(u * u for u in row) / len(row) + epsilon) ** 0.5 for v, w in zip(row, weight, strict=True)]
            for row in x.tolist()]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def test_rms_norm(all_in_float64):
    x, weight = random(3, 6), random(6, seed=1)
    out = kernels.rms_norm(x, weight, 1e-5, 2)
    assert torch.allclose(out[:, :6], norm_by_hand(x, weight.tolist(), 1e-5), rtol=1e-12, atol=1e-12)
    assert out[:, 6:].tolist() == [[0, 0]] * 3  # LoRA's room


def test_rms_norm_of_literals():
    # Mean square of (3, 4) is 12.5; with epsilon 3.5 the root is 4.
    out = kernels.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([2.0, 1.0]), 3.5, 1)
    assert out.tolist() == [[1.5, 1.0, 0.0]]


def test_add_and_norm(all_in_float64):
    x, update, weight = random(3, 6), random(3, 6, seed=1), random(6, seed=2)
    stream, normed = kernels.add_and_norm(x, update, weight, 1e-5, 2)
    assert torch.equal(stream, x + update)
    assert torch.allclose(normed[:, :6], norm_by_hand(x + update, weight.tolist(), 1e-5), rtol=1e-12, atol=1e-12)
    assert normed[:, 6:].tolist() == [[0, 0]] * 3


def test_norms_have_the_right_gradient(all_in_float64):
    x, update, weight = random(3, 6).requires_grad_(), random(3, 6, seed=1).requires_grad_(), random(6, seed=2)
    assert torch.autograd.gradcheck(lambda x: kernels.rms_norm(x, weight, 1e-5, 2), x)
    assert torch.autograd.gradcheck(lambda x, u: kernels.add_and_norm(x, u, weight, 1e-5, 2), (x, update))


def test_room_is_zero_and_behind():
    assert kernels.with_room(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2).tolist() == [[1, 2, 0, 0], [3, 4, 0, 0]]


def test_token_statistics(all_in_float64):
    logits = 3 * random(4, 7)
    tokens = torch.tensor([int(logits[0].argmax()), int(logits[1].argmin()), 2, 6])
    log_probs, entropy, mean, is_top1 = kernels.token_statistics(logits, tokens)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    close = functools.partial(torch.allclose, rtol=1e-12, atol=1e-12)
    assert close(log_probs, p[range(4), tokens].log())
    assert close(entropy, -(p * p.log()).sum(1))
    assert close(mean, logits.sum(1) / 7)
    assert is_top1.tolist()[:2] == [True, False]
    assert is_top1.tolist() == [max(row) == row[t] for row, t in zip(logits.tolist(), tokens.tolist(), strict=True)]


def test_token_statistics_of_equal_and_of_large_logits():
    log_probs, entropy, mean, _ = kernels.token_statistics(torch.full((1, 8), 2.0), torch.tensor([3]))
    assert log_probs.item() == pytest.approx(-2.0794415)  # ln 8
    assert entropy.item() == pytest.approx(2.0794415)
    assert mean.item() == 2
    large = torch.tensor([[10_000.0, -10_000.0]])  # exp of them is beyond float32
    log_probs, entropy, mean, is_top1 = kernels.token_statistics(large, torch.tensor([1]))
    assert (log_probs.item(), entropy.item(), mean.item(), is_top1.item()) == (-20_000, 0, 0, False)


def test_only_log_probabilities_carry_a_gradient(all_in_float64):
    logits = random(4, 7).requires_grad_()
    tokens = torch.tensor([0, 3, 6, 3])
    _, *others = kernels.token_statistics(logits, tokens)
    assert not any(value.requires_grad for value in others)
    assert torch.autograd.gradcheck(lambda x: kernels.token_statistics(x, tokens)[0], logits)


def test_rotation_turns_the_first_heads_in_place():
    # Head of size 4: (1, 3) and (2, 4) are its pairs; a quarter turn takes (a, b) to (-b, a).
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]])
    out = kernels.Rotate.apply(x, torch.tensor([[0.0, 1, 0, 1]]), torch.tensor([[1.0, 0, 1, 0]]), 1)
    assert out.tolist() == [[[-3, 2, 1, 4], [1, 2, 3, 4]]]
    assert x.data_ptr() == out.data_ptr()


def test_rotation_has_the_right_gradient():
    angle = random(3, 2, seed=1).repeat(1, 2)
    x = random(3, 5, 4).requires_grad_()
    # In place: not on the leaf itself.
    assert torch.autograd.gradcheck(lambda x: kernels.Rotate.apply(x.clone(), angle.cos(), angle.sin(), 4), x)


def test_swiglu_and_its_gradient():
    gate_up = random(3, 10).requires_grad_()
    gate, up = gate_up.detach().chunk(2, 1)
    assert torch.allclose(kernels.SwiGLU.apply(gate_up, 4)[:, :5], gate / (1 + (-gate).exp()) * up, rtol=1e-12)
    assert kernels.SwiGLU.apply(gate_up, 4).shape == (3, 9)
    # The room is the next projection's to fill; what arrives for it must not change anything.
    assert torch.autograd.gradcheck(lambda x: kernels.SwiGLU.apply(x, 4)[:, :5], gate_up)
    (grad,) = torch.autograd.grad(kernels.SwiGLU.apply(gate_up, 4), gate_up, random(3, 9, seed=1))
    (expected,) = torch.autograd.grad(silu(gate_up[:, :5]) * gate_up[:, 5:], gate_up, random(3, 9, seed=1)[:, :5])
    assert torch.allclose(grad, expected, rtol=1e-12, atol=1e-12)


def test_plain_weights_are_copied_with_lora_behind():
    weight = Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    out = torch.full((2, 6), 7.0)
    kernels.dequantise(weight.data, out, 2, torch.tensor([[1.0], [2.0]]), first=1, scale=0.5)
    assert out.tolist() == [[1, 2, 0, 0.5, 0, 0], [3, 4, 0, 1, 0, 0]]
    bare = torch.full((2, 2), 7.0)
    kernels.dequantise(weight.data, bare, 2, None, first=0, scale=0.0)
    assert bare.tolist() == [[1, 2], [3, 4]]


# The GPU's kernels, interpreted: Triton reads the variable when it is imported, so in a program of its own.
# It prints the largest absolute difference of each kernel from the CPU's branch of the same function.
INTERPRETED = """
import json
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch.nn.functional import silu
from quantpref import kernels, triton_kernels

torch.manual_seed(0)
found = {}


def report(name, x, y):
    assert x.shape == y.shape and x.isfinite().all() and y.isfinite().all(), name
    found[name] = float((x - y).abs().max())


# The interpreter is slow: 56 rows of 320 are just beyond one scale of scales, which holds for 16384 weights.
for rows, columns, places in ((56, 320, (8,)), (6, 192, (0, 8, 20))):
    packed, state = quantize_4bit(torch.randn(rows, columns), quant_type="nf4", compress_statistics=True)
    weight, b = torch.nn.Parameter(packed, requires_grad=False), torch.randn(rows, 4)
    weight.quant_state = state
    expected = torch.zeros(rows, columns + 24)
    expected[:, :columns] = dequantize_4bit(packed, state)
    bare = torch.full((rows, columns), 7.0)
    kernels._dequantise_nf4(weight, state, bare, columns, None, 0, 0.0)
    report(f"nf4 {columns}", bare, expected[:, :columns])
    for first in places:
        group = torch.full((3 * rows, columns + 24), 7.0)  # a projection is some rows of its group's buffer
        above, wide, below = group.chunk(3)
        cpu = wide.clone()
        kernels._dequantise_nf4(weight, state, wide, columns, b, first, 0.5)
        kernels.dequantise(weight, cpu, columns, b, first, 0.5)
        expected[:, columns:] = 0
        expected[:, columns + first : columns + first + 4] = 0.5 * b
        report(f"nf4 {columns}, LoRA at {first}", wide, expected)
        assert (above == 7).all() and (below == 7).all()
        report(f"nf4 {columns}, LoRA at {first}, CPU", cpu, expected)

angle = torch.randn(5, 16).repeat(1, 2)
for heads, others in ((4, 2), (8, 2), (11, 3)):  # a program turns 8 heads
    x = torch.randn(5, heads + others, 32)
    ours, cpu = x.clone(), kernels._rotate(x.clone(), angle.cos(), angle.sin(), heads)
    grid = (5, -(-heads // 8))
    triton_kernels.rotate_kernel[grid](ours, angle.cos(), angle.sin(), ours.stride(0), heads, HALF=16, HEADS=8)
    report(f"rotate {heads}", ours, cpu)
    assert torch.equal(ours[:, heads:], x[:, heads:])

for width in (60, 2051):  # a program does 2048 columns
    gate_up = torch.randn(3, 2 * width, requires_grad=True)
    out = torch.full((3, width + 8), 7.0)
    kernels._launch_swiglu(triton_kernels.swiglu_kernel, gate_up.detach(), out)
    cpu = kernels.SwiGLU.apply(gate_up, 8)
    report(f"swiglu {width}", out[:, :width], cpu[:, :width].detach())
    assert (out[:, width:] == 7).all()  # the room is left alone
    above, ours = torch.randn(3, width + 8), torch.full((3, 2 * width), 7.0)
    kernels._launch_swiglu(triton_kernels.swiglu_gradient_kernel, gate_up.detach(), above, ours)
    (branch,) = torch.autograd.grad(cpu, gate_up, above)
    gate, up = gate_up.chunk(2, 1)
    (autograd,) = torch.autograd.grad(silu(gate) * up, gate_up, above[:, :width])
    report(f"swiglu gradient {width}, CPU", ours, branch)
    report(f"swiglu gradient {width}, autograd", ours, autograd)
print(json.dumps(found))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the GPU's kernels are Triton programs")
def test_kernels_equal_the_cpu_branch():
    run = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    weights = {name: difference for name, difference in found.items() if name.startswith("nf4")}
    assert len(weights) == 10 and len(found) == 19
    assert not any(weights.values()), weights  # bitsandbytes' values to the bit, zeros and B where they belong
    assert max(found.values()) < 2e-6, found
