"""What a GPU should do in one pass: de-quantise nf4, and the small functions between matrix products.

Everything here also runs on a CPU, by bitsandbytes and plain PyTorch; the GPU's versions give the same numbers.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    import triton

    from quantpref.triton_kernels import nf4_kernel, rotate_kernel, swiglu_gradient_kernel, swiglu_kernel


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled to few kernels where its first argument is on a GPU; one compilation for all lengths."""
    compiled = torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        return (compiled if TRITON and arguments[0].is_cuda else function)(*arguments)

    return run


@fused
def rms_norm(x: Tensor, weight: Tensor, epsilon: float, room: int) -> Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467), in float32 as transformers does; (T, d + room).

    The room behind each row is LoRA's (lora.py).
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return pad(weight * wide.to(x.dtype), (0, room))


@fused
def add_and_norm(x: Tensor, update: Tensor, weight: Tensor, epsilon: float, room: int) -> tuple[Tensor, Tensor]:
    """The residual stream after an update, and its norm, which the next projections read."""
    x = x + update
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return x, pad(weight * wide.to(x.dtype), (0, room))


@fused
def with_room(x: Tensor, room: int) -> Tensor:
    """(T, d) -> (T, d + room), in one pass."""
    return pad(x, (0, room))


class Rotate(torch.autograd.Function):
    """Rotary positions, arXiv 2104.09864, in place, of the first `heads` of (T, heads + others, D); cos, sin (T, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.mark_dirty(x)
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        return _rotate(x, cos, sin, heads)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad.contiguous(), cos, -sin, ctx.heads), None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    if x.is_cuda and TRITON:
        rotate_kernel[(len(x), triton.cdiv(heads, 8))](x, cos, sin, x.stride(0), heads, HALF=x.size(2) // 2, HEADS=8)
    else:
        left, right = x[:, :heads].chunk(2, dim=-1)
        turned = torch.cat((-right, left), dim=-1) * sin[:, None]
        x[:, :heads].mul_(cos[:, None]).add_(turned)
    return x


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of (T, 2 F) -> (T, F + room) (arXiv 2002.05202); the room is LoRA's."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, room: int) -> Tensor:
        ctx.save_for_backward(gate_up)
        width = gate_up.size(1) // 2
        out = gate_up.new_empty(len(gate_up), width + room)
        if gate_up.is_cuda and TRITON:
            _launch_swiglu(swiglu_kernel, gate_up, out)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            torch.mul(silu(gate), up, out=out[:, :width])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        if gate_up.is_cuda and TRITON:
            out = torch.empty_like(gate_up)
            _launch_swiglu(swiglu_gradient_kernel, gate_up, grad, out)
            return out, None
        gate, up = gate_up.chunk(2, dim=-1)
        grad, sigmoid = grad[:, : gate.size(1)], gate.sigmoid()
        return torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), dim=-1), None


@fused
def token_statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What TRL's losses and metrics ask about N tokens, from logits (N, V); all results (N,).

    log-probability in nats, which carries the gradient; entropy in nats; mean logit; is the token the likeliest?
    """
    logits = logits.float()
    normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    with torch.no_grad():
        entropy = normaliser - ((logits - normaliser[:, None]).exp() * logits).sum(-1)
        return log_probs, entropy, logits.mean(-1), logits.argmax(-1) == tokens


def dequantise(weight: Tensor, out: Tensor, columns: int, lora_b: Tensor | None, first: int, scale: float) -> None:
    """Write a weight (O, I), in 4-bit nf4 or plain, and LoRA's B (O, r) behind it, into `out` (O, I + room).

    B, scaled, takes the columns from `I + first` on; the rest of the room becomes zero.
    """
    state = getattr(weight, "quant_state", None)
    if state is not None and weight.is_cuda and TRITON and state.nested and state.blocksize == 64:
        _dequantise_nf4(weight, state, out, columns, lora_b, first, scale)
        return
    if state is None:
        out[:, :columns].copy_(weight)
    else:
        from bitsandbytes.functional import dequantize_4bit

        out[:, :columns].copy_(dequantize_4bit(weight.data, state))
    if lora_b is not None:
        out[:, columns:].zero_()
        torch.mul(lora_b, scale, out=out[:, columns + first : columns + first + lora_b.size(1)])


def _launch_swiglu(kernel: Any, gate_up: Tensor, narrow: Tensor, *wide: Tensor) -> None:
    """`narrow` is (T, F + room), and only its first F columns are touched."""
    width, block = gate_up.size(1) // 2, 2048
    kernel[(len(gate_up), triton.cdiv(width, block))](gate_up, narrow, *wide, width, narrow.stride(0), BLOCK=block)


def _dequantise_nf4(
    weight: Tensor, state: Any, out: Tensor, columns: int, lora_b: Tensor | None, first: int, scale: float
) -> None:
    """bitsandbytes' own values to the bit, in one launch where it takes three, written where they are wanted."""
    scales, elements = state.state2, out.size(0) * columns
    block = next(b for b in (1024, 512, 256, 128, 64, 32, 16, 8) if columns % (2 * b) == 0)
    room = out.size(1) - columns if lora_b is not None else 0
    nf4_kernel[(elements // (2 * block),)](
        weight.data, state.absmax, scales.code, scales.absmax, state.offset, state.code, out, columns, out.stride(0),
        out if lora_b is None else lora_b, 0 if lora_b is None else lora_b.size(1), first, scale, room,
        BLOCK=block, ROOM=triton.next_power_of_2(room) if room else 0,
        enable_fp_fusion=False,  # a fused multiply-add would round otherwise than bitsandbytes
    )  # fmt: skip
