"""Attention over a prefix tree: column k is seen from column q where k <= q < end[k].

On a GPU by FlexAttention (arXiv 2412.05496), which skips blocks that nobody sees; elsewhere by PyTorch's own
attention on small subtrees, each a row with the keys of its path from the root in front.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from quantpref.kernels import TRITON

ROW = 256  # columns of a subtree that is not cut up further: a pair, or comparisons that share a film
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (T, heads, D), k and v (T, key heads, D) -> (T, heads * D)."""


def attention_over(end: Tensor) -> Attend:
    """Attention for one tree, from its `end` (T,); made once, used by every layer."""
    return _by_blocks(end) if end.is_cuda and TRITON else _by_subtrees(end)


# Tiles of the backward pass, for rows that are short: 0.162 ms where the default takes 0.182, on an H100.
TILES = {f"bwd_BLOCK_{name}": 64 for name in ("M1", "N1", "M2", "N2")} | {"bwd_num_warps": 4, "bwd_num_stages": 2}


@functools.cache
def _flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # one for each length
    return torch.compile(flex_attention, dynamic=False)  # compiled for all lengths at once it takes twice as long


def _by_blocks(end: Tensor) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < end[k])

    mask = create_block_mask(sees, None, None, len(end), len(end), device=end.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Each query head has its own copy of its keys: of shared ones, too few programs sum up the gradient.
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), 1) for x in (k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = _flex_attention()(q, k, v, block_mask=mask, kernel_options=TILES)
        return out[0].transpose(0, 1).flatten(1)

    return attend


def _by_subtrees(end: Tensor) -> Attend:
    queries, keys, sees = subtree_rows(end)
    place = torch.empty_like(end)
    real = queries >= 0
    place[queries[real]] = torch.arange(queries.numel(), device=end.device)[real.flatten()]
    q_index, k_index = queries.clamp(min=0).flatten(), keys.clamp(min=0).flatten()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide_q = q[q_index].unflatten(0, queries.shape).transpose(1, 2)
        wide_k, wide_v = (x[k_index].unflatten(0, keys.shape).transpose(1, 2) for x in (k, v))
        out = scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=sees[:, None], enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[place].flatten(1)

    return attend


def subtree_rows(end: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A tree as R attention rows: columns of queries (R, Q) and keys (R, K), -1 for padding, and who sees whom."""
    parts = list(_parts(end.tolist()))

    def padded(rows: list[list[int]]) -> Tensor:
        tensors = [torch.tensor(row) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=-1).to(end.device)

    queries = padded([list(range(start, stop)) for _, start, stop in parts])
    keys = padded([[*path, *range(start, stop)] for path, start, stop in parts])
    q, k = queries[:, :, None], keys[:, None, :]
    sees = (k >= 0) & (k <= q) & (q < end[k])
    sees[..., 0] |= ~sees.any(-1)  # a padding query sees something, so that its softmax is not empty
    return queries, keys, sees


def _parts(end: list[int]) -> Iterator[tuple[list[int], int, int]]:
    """The tree cut into (path from the root, first column, last + 1): whole subtrees of up to ROW columns.

    What is larger becomes the stem above its first branching, and the subtrees below.
    """
    todo: list[tuple[list[int], int, int]] = [([], 0, len(end))]
    while todo:
        path, at, stop = todo.pop()
        while at < stop:
            below = end[at]
            if below - at <= ROW:
                yield path, at, below
            else:
                branch = next((c for c in range(at, below) if end[c] < below), below)
                yield path, at, branch
                todo.append(([*path, *range(at, branch)], branch, below))
            at = below
