"""What the launchers of attention and attention_decode, in Triton and in CUDA C++, decide and add up alike on the host."""

import functools
import math

import torch


def bias_pattern(full, kept):
    """Which kernel gives a bias' gradient: "plane" dq stores ds, "loop" sums planes, "cols", "rows" (B, H, S) sums."""
    rows_kept, keys_kept = full[2] == kept[2], full[3] == kept[3]
    if rows_kept and keys_kept:
        return "plane" if list(full[:2]) == list(kept[:2]) else "loop"
    return "cols" if keys_kept else "rows"


def shape_before_broadcasting(bias):
    return [1 if stride == 0 else size for size, stride in zip(bias.shape, bias.stride(), strict=True)]


def bias_gradient(bias):
    """(pattern, dbias, sums) for kernels to fill: dbias as the bias was before broadcasting, or else the sums (B, H, S)."""
    shape = shape_before_broadcasting(bias)
    pattern = bias_pattern(bias.shape, shape)
    if pattern not in ("cols", "rows"):
        return pattern, bias.new_empty(shape), None
    B, H, S_q, S_k = bias.shape
    return pattern, None, bias.new_empty(B, H, S_k if pattern == "cols" else S_q, dtype=torch.float32)


# The second stages: torch's sums have a fixed order, and what they read is small.


def bias_gradient_of(sums, pattern, bias):
    shape = shape_before_broadcasting(bias)
    reduced = [*shape[:2], shape[2] if pattern == "rows" else shape[3]]
    over = [dim for dim, (full, kept) in enumerate(zip(sums.shape, reduced, strict=True)) if kept != full]
    return (sums.sum(over) if over else sums).reshape(shape).to(bias.dtype)


def sinks_gradient_of(shares, sinks):
    """dsinks (H,) from the shares (B, H, tiles) of the tiles of queries."""
    return shares.sum((0, 2)).to(sinks.dtype)


@functools.lru_cache(maxsize=4096)
def choose_splits(blocks, tiles, processors):
    """The fewest shares of `tiles` tiles of keys that leave at most 15 % more of the last wave idle than the best number does.

    Two blocks fit a processor. A share has at least two tiles, or the second kernel would cost more than it saves.
    """
    if not blocks:
        return 1
    most = max(1, min(tiles // 2, 128))
    waves = [blocks * splits / (2 * processors) for splits in range(1, most + 1)]
    busy = [wave / math.ceil(wave) for wave in waves]
    return 1 + next(s for s in range(most) if busy[s] >= 0.85 * max(busy))
