"""What a benchmark file describes: `benchmarks/bench_<op>.py` has `cases(device)`, which yields these. Nothing else times."""

import dataclasses
from collections.abc import Callable

import torch


@dataclasses.dataclass
class Case:
    """One op at one shape: how to make its inputs, who computes it, and the least work it must do."""

    op: str
    shape: str  # as the table prints it, e.g. "M 4096, N 768"
    dtype: torch.dtype
    make: Callable  # (device) -> tuple of inputs; those with requires_grad make the backward rows
    providers: dict[
        str, Callable
    ]  # name -> function(*inputs) -> output; "eager" is the baseline, "fastattn" is ours
    forward_bytes: int  # each input read once, each output written once
    backward_bytes: int = 0
    forward_flops: int = 0  # of the tensor cores; 0 for memory-bound ops
    backward_flops: int = 0
