"""The GPU's own kernels, in Triton; kernels.py holds what they compute in PyTorch, launches them, and says of what.

Tests run them interpreted, on the CPU.
"""

import triton
import triton.language as tl


@triton.jit
def nf4_kernel(
    packed, scale8, scale_code, scale_of_scales, offset, code, out, columns, stride,
    lora_b, rank, first, scale, room, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Two weights a byte, the first in the high half; a scale for 64 weights, itself one of 256 codes."""
    start = tl.program_id(0).to(tl.int64) * 2 * BLOCK
    row = start // columns  # a block lies within one row
    at = start // 2 + tl.arange(0, BLOCK)
    byte = tl.load(packed + at).to(tl.int32)
    coded = tl.load(scale8 + at // 32).to(tl.int32)
    block_scale = tl.load(scale_code + coded) * tl.load(scale_of_scales + at // (32 * 256)) + tl.load(offset)
    both = tl.interleave(tl.load(code + (byte >> 4)) * block_scale, tl.load(code + (byte & 15)) * block_scale)
    to = out + row * stride + (start - row * columns)
    tl.store(to + tl.arange(0, 2 * BLOCK), both.to(out.dtype.element_ty))
    if ROOM > 0 and start % columns == 0:
        place = tl.arange(0, ROOM)
        own = (place >= first) & (place < first + rank)
        b = tl.load(lora_b + row * rank + place - first, mask=own, other=0).to(tl.float32) * scale
        tl.store(out + row * stride + columns + place, b.to(out.dtype.element_ty), mask=place < room)


@triton.jit
def rotate_kernel(x, cos, sin, stride, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head, at = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    here, turn, inside = x + token * stride + head * 2 * HALF + at, token * 2 * HALF + at, head < heads
    left = tl.load(here, mask=inside).to(tl.float32)
    right = tl.load(here + HALF, mask=inside).to(tl.float32)
    c, s = tl.load(cos + turn).to(tl.float32), tl.load(sin + turn).to(tl.float32)
    tl.store(here, (left * c - right * s).to(x.dtype.element_ty), mask=inside)
    tl.store(here + HALF, (right * c + left * s).to(x.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_kernel(gate_up, out, width, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside).to(tl.float32)
    tl.store(out + row * stride + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_gradient_kernel(gate_up, grad, out, width, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, first = at < width, row * 2 * width + at
    gate = tl.load(gate_up + first, mask=inside).to(tl.float32)
    up = tl.load(gate_up + first + width, mask=inside).to(tl.float32)
    above = tl.load(grad + row * stride + at, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    to_gate = above * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(out + first, to_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + first + width, (above * gate * sigmoid).to(out.dtype.element_ty), mask=inside)
