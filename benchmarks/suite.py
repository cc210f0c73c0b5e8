"""What a benchmark file describes. `benchmarks/bench_<op>.py` has `cases(device, quick)`, which yields these; those of row ops
also have `rows(M, N, dtype)`, which yields theirs at one shape of the sweep.

A benchmark file says shapes, baselines and least work; checking, timing and printing are done by the files beside it
(measure.py, timing.py, report.py), for every op alike.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch._functorch.config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclasses.dataclass(frozen=True)
class Work:
    """The least one pass must do: bytes read once and written once, and operations of the tensor cores (0: memory-bound)."""

    read: int
    write: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape.

    providers: name -> function(*inputs) -> tensor or tuple of tensors. "eager" is the baseline of the accuracy rule and
    of the speed-up; "fastattn" is ours, timed once a backend; the others are peers ("compile" and installed packages),
    which only a GPU times. A provider that is None is not installed and gets no row.
    """

    op: str
    shape: str  # as the table prints it, e.g. "M 4096, N 768"
    dtype: torch.dtype
    make: Callable  # (device) -> tuple of inputs; those with requires_grad ask for the backward row
    providers: dict[str, Callable | None]
    reference: Callable  # the same function of the inputs in float64, from fastattn.reference
    forward: Work
    backward: Work | None = None  # None: forward only
    # What backend.ROWS asks of a call: the elements it writes and the length of a row. None: the op has no rows there.
    elements: int | None = None
    N: int | None = None
    tokens: int | None = None  # of a model's pass
    model: bool = (
        False  # of several ops, so that a GPU also times it as each op is dispatched, where that is to ours
    )
    # Where a float64 reference of everything would not fit: tensor -> the part of it that is checked, such that
    # reference(part of each input) is the part of each output, and the same for gradients.
    part: Callable | None = None
    # provider -> the share of the tensor cores' peak that benchmarks/model.py predicts for its forward
    predicted: dict[str, float] = dataclasses.field(default_factory=dict)
    # It draws a dropout mask. Ours must be the reference's draw of the same seed; peers draw others and go unchecked.
    random: bool = False

    def inputs(self, device):
        """What `make` gives; without a backward row nothing asks for a gradient."""
        made = self.make(device)
        if self.backward is None:
            made = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in made)
        return made


# Rows of a GiB read and written, or a million of them where that is less; then what waits for the host, other dtypes, and the ends.
WIDTHS = (4096, 768, 128, 32768, 262144, 1024, 65536, 8192, 512, 16384, 2048, 256, 131072, 3, 64, 1000, 50257)
SMALL = (
    (8192, 768),
    (1, 768),
    (64, 1024),
    (4096, 1024),
    (512, 4096),
    (2048, 4096),
    (1, 262144),
    (1, 3),
    (2**20, 8),
)


def sweep(device):
    """(M, N, dtype) of the row ops, the most telling first, so that a run cut short has lost the least."""
    if device.type == "cpu":
        return [(1, 3, torch.float32), (64, 64, torch.float32)]
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    small = [(*shape, bf16) for shape in SMALL]
    narrow, wide = [[gib(N, dtype) for N in WIDTHS] for dtype in (bf16, fp32)]
    half = [gib(N, fp16) for N in WIDTHS]
    return [
        *narrow[:5],
        *small[:5],
        *narrow[5:9],
        *wide[:5],
        *half[:3],
        *narrow[9:],
        *small[5:],
        *wide[5:],
        *half[3:],
    ]


def gib(N, dtype):
    """(M, N, dtype) of a tensor that takes a GiB to read and write, or of a million rows; M in whole sequences of 512."""
    M = min(2**29 // (N * dtype.itemsize), 2**20)
    return M // 512 * 512 or M, N, dtype


def package(name):
    """An installed module by its dotted name, else None: peers are optional."""
    try:
        return importlib.import_module(name) if importlib.util.find_spec(name.split(".")[0]) else None
    except Exception:  # a peer built for another torch or GPU can fail in any way at import
        return None


def compiled(function):
    """`function` under torch.compile, compiled at its first call."""
    # The backward is timed alone, again and again on one graph: its buffers must survive.
    functorch_config.donated_buffer = False
    return torch.compile(function, fullgraph=True, dynamic=False)


def sdpa_backends(function):
    """`function`, which calls scaled_dot_product_attention, once for each of torch's own implementations by name."""

    def under(backend):
        def call(*inputs):
            with sdpa_kernel(backend):
                return function(*inputs)

        return call

    names = {"sdpa cudnn": "CUDNN_ATTENTION", "sdpa flash": "FLASH_ATTENTION", "sdpa efficient": "EFFICIENT_ATTENTION", "sdpa math": "MATH"}  # fmt: skip
    return {name: under(getattr(SDPBackend, member)) for name, member in names.items()}
