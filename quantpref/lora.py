"""LoRA on 4-bit weights, as few products as possible, and an adapter as one flat tensor.

Projections that read the same input are one group: one product with their stacked weights, one with their stacked
A matrices. All matrices of an adapter lie in one buffer, by group, all A and then all B, so that casting, averaging
over processes and the optimiser's step are one operation each, not one a matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quantpref.kernels import dequantise


class Scratch:
    """One buffer for de-quantised weights, large enough for any group; the next group overwrites it."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.empty(0, dtype=dtype, device=device)

    def view(self, rows: int, columns: int) -> Tensor:
        if rows * columns > self.buffer.numel():
            self.buffer = torch.empty(rows * columns, dtype=self.buffer.dtype, device=self.buffer.device)
        return self.buffer[: rows * columns].view(rows, columns)


class Group:
    """n projections that read one input: frozen weights stacked (O, I), LoRA's A stacked (n r, I), its B apart (o, r).

    LoRA rides along in the products. Behind the I columns of weights stand those of B, block by block, and behind
    each input x stands x A', in `room` columns, so that one product of width I + room is W x and LoRA's part.
    """

    def __init__(self, modules: Sequence[Any], scratch: Scratch) -> None:
        self.modules, self.scratch = modules, scratch
        self.bases = [getattr(module, "base_layer", module) for module in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.outputs, self.inputs = sum(self.sizes), self.bases[0].in_features
        self.place(scratch.buffer[:0], scratch.buffer[:0], 0, 0.0)

    def matrices(self, adapter: str) -> list[nn.Parameter]:
        """peft's matrices of an adapter, in the order in which they lie flat."""
        return [getattr(module, side)[adapter].weight for side in ("lora_A", "lora_B") for module in self.modules]

    def flat_size(self, rank: int) -> int:
        return rank * (len(self.modules) * self.inputs + self.outputs)

    def place(self, weights: Tensor, gradients: Tensor, rank: int, scale: float) -> None:
        """Read LoRA's matrices from this part of the flat buffers, and write their gradients to that part."""
        self.rank, self.scale, n = rank, scale, len(self.modules)
        self.room = -(-n * rank // 8) * 8  # whole 16-byte pieces, which the fast products want
        self.a, self.b = self._parts(weights)
        self.grad_a, self.grad_b = self._parts(gradients)

    def _parts(self, flat: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A stacked, and each B, as views of this group's part of a flat buffer."""
        n = len(self.modules)
        sizes = [n * self.rank * self.inputs, *(size * self.rank for size in self.sizes)]
        a, *b = flat.split(sizes)
        return a.view(n * self.rank, self.inputs), [
            part.view(size, self.rank) for part, size in zip(b, self.sizes, strict=True)
        ]

    def weight(self) -> Tensor:
        """(O, I + room) in the compute dtype; valid until the next group asks for its own."""
        full = self.scratch.view(self.outputs, self.inputs + self.room)
        for i, (base, rows) in enumerate(zip(self.bases, full.split(self.sizes), strict=True)):
            b = self.b[i] if self.rank else None
            dequantise(base.weight, rows, self.inputs, b, i * self.rank, self.scale)
        return full


class LoRALinear(torch.autograd.Function):
    """y = x W' + scale (x A') B' of x (T, I + room), whose room is filled here -> (T, O).

    The gradients of A and B go straight into the group's buffers. LoRA: arXiv 2106.09685, equation 3. W is
    de-quantised again for the backward pass, not kept: QLoRA, arXiv 2305.14314, equation 5.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(x)
        ctx.group = group
        if group.rank:
            own, low = x.detach().split((group.inputs, group.room), 1)
            torch.mm(own, group.a.T, out=low[:, : len(group.a)])
            low[:, len(group.a) :].zero_()
        return x @ group.weight().T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        group, n = ctx.group, len(ctx.group.a)
        grad_x = grad @ group.weight()
        if not group.rank:
            return grad_x, None
        own, low = x.split((group.inputs, group.room), 1)
        grad_own, grad_low = grad_x.split((group.inputs, group.room), 1)
        torch.mm(grad_low[:, :n].T, own, out=group.grad_a)
        for out, h, grad_b in zip(grad.split(group.sizes, 1), low.split(group.rank, 1), group.grad_b, strict=False):
            torch.addmm(grad_b, out.T, h, beta=0, alpha=group.scale, out=grad_b)
        grad_own.addmm_(grad_low[:, :n], group.a)
        return grad_x, None


class FlatAdapters:
    """The adapters of a model as flat tensors over its groups; one is in use, in the compute dtype.

    `train` names the one that learns: its float32 weights lie in the parameter `flat`, of which peft's matrices
    become views. `gradients` holds what the last backward pass gave, in the compute dtype.
    """

    def __init__(self, groups: Sequence[Group], dtype: torch.dtype, device: torch.device, train: str | None) -> None:
        self.groups, self.dtype, self.device, self.train = groups, dtype, device, train
        self.weights = self.gradients = torch.empty(0, dtype=dtype, device=device)
        self.frozen: dict[str, Tensor] = {}
        self.flat = nn.Parameter(self._gather(train, torch.float32)) if train else None
        if train:
            self.attach()

    def attach(self) -> None:
        """Make peft's matrices of the learning adapter views of `flat`, wherever that lies now."""
        assert self.train is not None and self.flat is not None
        matrices = self._matrices(self.train)
        for matrix, part in zip(matrices, self.flat.data.split([m.numel() for m in matrices]), strict=True):
            matrix.data = part.view(matrix.shape)

    def _matrices(self, adapter: str) -> list[nn.Parameter]:
        return [matrix for group in self.groups for matrix in group.matrices(adapter)]

    def _gather(self, adapter: str, dtype: torch.dtype) -> Tensor:
        return torch.cat([matrix.detach().to(dtype).flatten() for matrix in self._matrices(adapter)])

    def use(self, adapter: str | None) -> None:
        """From now on the model is this adapter on its base; None is the base alone."""
        if adapter is None:
            self._lay_out(0, 0.0)
            return
        first = self.groups[0].modules[0]
        self._lay_out(first.r[adapter], first.scaling[adapter])
        if adapter == self.train and self.flat is not None:
            self.weights.copy_(self.flat.data)
        else:
            if adapter not in self.frozen:
                self.frozen[adapter] = self._gather(adapter, self.dtype)
            self.weights.copy_(self.frozen[adapter])

    def _lay_out(self, rank: int, scale: float) -> None:
        if (rank, scale) == (self.groups[0].rank, self.groups[0].scale):
            return
        sizes = [group.flat_size(rank) for group in self.groups]
        self.weights = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
        self.gradients = torch.zeros_like(self.weights)
        for group, weights, gradients in zip(
            self.groups, self.weights.split(sizes), self.gradients.split(sizes), strict=True
        ):
            group.place(weights, gradients, rank, scale)
