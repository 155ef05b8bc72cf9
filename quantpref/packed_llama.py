"""Llama with LoRA on 4-bit weights, written for one thing: a prefix tree in, statistics of its tokens out.

The model's own modules hold the weights; this is their arithmetic for one packed row of T columns. It gives what
transformers and peft give, to rounding, and is faster: shared tokens are computed once, projections of one input are
one product, the last block and the LM head run only where a token is asked about, and on a GPU each shape that comes
back is replayed as CUDA graphs, so that no launch is waited for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quantpref.attention import Attend, attention_over
from quantpref.kernels import TRITON, Rotate, SwiGLU, add_and_norm, rms_norm, token_statistics, with_room
from quantpref.lora import FlatAdapters, Group, LoRALinear, Scratch

ADAPTED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class TokenStatistics(NamedTuple):
    """Of each asked token, (N,): log-probability and entropy in nats, mean logit, whether it is the likeliest."""

    log_probs: Tensor
    entropy: Tensor
    mean_logits: Tensor
    is_top1: Tensor


@dataclass(frozen=True)
class TreeBatch:
    """A prefix tree as tensors, and what is asked about it.

    ids, positions, end: (T,). columns, tokens: (N,): how likely is this token after this column?
    """

    ids: Tensor
    positions: Tensor
    end: Tensor
    columns: Tensor
    tokens: Tensor

    def to(self, device: torch.device) -> "TreeBatch":
        return TreeBatch(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def rotary_frequencies(config: Any, device: torch.device) -> tuple[Tensor, float]:
    """Radians a position of each half of a head, (D / 2,), and the factor on cosine and sine.

    From the config, since Unsloth puts its own module in the place of transformers'.
    """
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        return ROPE_INIT_FUNCTIONS[kind](config, device)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


class Layer:
    """One decoder block: its modules and what they compute."""

    def __init__(self, block: Any, scratch: Scratch) -> None:
        modules = dict(block.self_attn.named_children()) | dict(block.mlp.named_children())
        self.groups = [Group([modules[name] for name in names], scratch) for names in ADAPTED]
        self.before_attention, self.before_mlp = block.input_layernorm, block.post_attention_layernorm
        self.head_size = block.self_attn.head_dim

    def attention(self, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        read, write = self.groups[0], self.groups[1]
        queries, keys, values = (size // self.head_size for size in read.sizes)
        qkv = LoRALinear.apply(x, read).unflatten(1, (-1, self.head_size))
        q, k, v = Rotate.apply(qkv, *turn, queries + keys).split((queries, keys, values), 1)
        return with_room(attend(q, k, v), write.room)

    def mlp(self, x: Tensor) -> Tensor:
        read, write = self.groups[2], self.groups[3]
        return LoRALinear.apply(SwiGLU.apply(LoRALinear.apply(x, read), write.room), write)


class PackedLlama:
    """A Llama, bare or with peft adapters, as a function of prefix trees; `train` names the adapter that learns."""

    def __init__(self, model: Any, train: str | None = None) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.core: Any = inner.model
        self.head: Tensor = inner.lm_head.weight
        self.device, self.on_gpu = self.head.device, self.head.is_cuda
        self.frequencies, self.turn_scale = rotary_frequencies(inner.config, self.device)
        scratch = Scratch(self.head.dtype, self.head.device)
        self.layers = [Layer(block, scratch) for block in self.core.layers]
        groups = [group for layer in self.layers for group in layer.groups]
        self.adapters = FlatAdapters(groups, self.head.dtype, self.head.device, train)
        self.replays: dict[tuple[int, int], Replay | None] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.on_gpu else None

    def statistics(self, batch: TreeBatch) -> TokenStatistics:
        """Of the adapter in use, without gradient."""
        with torch.no_grad():
            return self._forward(batch)[1]

    def _forward(self, batch: TreeBatch) -> tuple[Tensor, TokenStatistics]:
        """The embeddings, from which a backward pass ends, and the statistics."""
        x = start = self.core.embed_tokens.weight[batch.ids].detach().requires_grad_()
        turn, attend = self._turn(batch.positions), attention_over(batch.end)
        update: Tensor | None = None
        for layer in self.layers:
            x, normed = _norm(x, update, layer.before_attention, layer.groups[0].room)
            attended = layer.attention(normed, turn, attend)
            if layer is self.layers[-1]:  # from here on, only where a token is asked about
                x, attended = x[batch.columns], attended[batch.columns]
            update = LoRALinear.apply(attended, layer.groups[1])
            x, normed = _norm(x, update, layer.before_mlp, layer.groups[2].room)
            update = layer.mlp(normed)
        _, normed = _norm(x, update, self.core.norm, 0)
        logits = normed @ self.head.T
        return start, TokenStatistics(*token_statistics(logits, batch.tokens))

    def _turn(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of each column's rotation, (T, D); the second half repeats the first."""
        angles = (positions[:, None].float() * self.frequencies).repeat(1, 2)
        cos, sin = angles.cos() * self.turn_scale, angles.sin() * self.turn_scale
        return cos.to(self.head.dtype), sin.to(self.head.dtype)

    def frozen(self, adapter: str, batch: TreeBatch) -> TokenStatistics:
        """The same of another adapter of the learning one's rank, by the very kernels that learning runs."""
        with torch.autocast(batch.ids.device.type, enabled=False):
            self.adapters.use(adapter)
            return self.run(batch).forward(batch)

    def run(self, batch: TreeBatch) -> "Eager | Replay":
        """How to run this shape: at once where it is met first or on a CPU, as a captured graph from then on."""
        if not (batch.ids.is_cuda and TRITON):
            return Eager(self._forward)
        shape = (len(batch.ids), len(batch.tokens))
        if shape not in self.replays:
            self.replays[shape] = None  # met once: the functions are compiled now, so that a capture can follow
            return Eager(self._forward)
        replay = self.replays[shape] or Replay(self._forward, batch, self.pool)
        self.replays[shape] = replay
        return replay


class Learner(nn.Module):
    """The learning adapter as a module of one parameter: what an optimiser, clipping and DDP have to look at."""

    def __init__(self, llama: PackedLlama) -> None:
        super().__init__()
        assert llama.adapters.flat is not None
        self.llama, self.flat = llama, llama.adapters.flat

    def forward(self, batch: TreeBatch) -> TokenStatistics:
        with torch.autocast(self.flat.device.type, enabled=False):  # the packed model has one dtype, the base's
            return TokenStatistics(*_Learn.apply(self.flat, self.llama, batch))


class _Learn(torch.autograd.Function):
    """Joins TRL's loss, which sees N log-probabilities, to the packed model's own backward pass."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, llama: PackedLlama, batch: TreeBatch) -> tuple[Tensor, ...]:
        llama.adapters.use(llama.adapters.train)
        ctx.llama, ctx.run = llama, llama.run(batch)
        found = ctx.run.forward(batch)
        ctx.mark_non_differentiable(found.entropy, found.mean_logits, found.is_top1)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        ctx.run.backward(grad)
        return ctx.llama.adapters.gradients.to(torch.float32, copy=True), None, None


class Eager:
    """One forward pass, operation by operation, and the backward pass that belongs to it."""

    def __init__(self, forward: Callable[[TreeBatch], tuple[Tensor, TokenStatistics]]) -> None:
        self._forward = forward

    def forward(self, batch: TreeBatch) -> TokenStatistics:
        with torch.enable_grad():
            self.start, self.found = self._forward(batch)
        return TokenStatistics(*(value.detach() for value in self.found))

    def backward(self, grad: Tensor) -> None:
        torch.autograd.grad(self.found.log_probs, self.start, grad)


class Replay:
    """Forward and backward pass of one shape, captured once, then launched as one graph each.

    Shapes share their memory: each backward pass is done with before another shape's forward pass begins.
    """

    def __init__(
        self, forward: Callable[[TreeBatch], tuple[Tensor, TokenStatistics]], batch: TreeBatch, pool: Any
    ) -> None:
        warm_up = Eager(forward)  # compiles what is not yet, since nothing may wait during a capture
        self.grad = torch.zeros(len(batch.tokens), device=batch.ids.device)
        warm_up.forward(batch)
        warm_up.backward(self.grad)
        del warm_up
        torch.cuda.empty_cache()  # what an eager pass took, the graphs' own pool cannot use
        self.batch = TreeBatch(**{name: value.clone() for name, value in vars(batch).items()})
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph, pool=pool), torch.enable_grad():
            start, found = forward(self.batch)
        with torch.cuda.graph(self.backward_graph, pool=pool):
            torch.autograd.grad(found.log_probs, start, self.grad)
        self.found = TokenStatistics(*(value.detach() for value in found))

    def forward(self, batch: TreeBatch) -> TokenStatistics:
        for own, new in zip(vars(self.batch).values(), vars(batch).values(), strict=True):
            own.copy_(new)
        self.forward_graph.replay()
        return TokenStatistics(*(value.clone() for value in self.found))

    def backward(self, grad: Tensor) -> None:
        self.grad.copy_(grad)
        self.backward_graph.replay()


def _norm(x: Tensor, update: Tensor | None, norm: Any, room: int) -> tuple[Tensor, Tensor]:
    """The residual stream after an update, if there is one, and its norm."""
    if update is None:
        return x, rms_norm(x, norm.weight, norm.variance_epsilon, room)
    return add_and_norm(x, update, norm.weight, norm.variance_epsilon, room)
