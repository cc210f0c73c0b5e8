"""Backend "cuda": launchers of the compiled extension `fastattn._C`, and why it cannot serve a call.

The extension reads tensors by itself and launches on torch's current stream; what it writes to is allocated here.
"""

import functools
import importlib

import torch

from fastattn import backend


@functools.cache
def extension():
    """The compiled module, or the reason it cannot be imported, as a sentence."""
    try:
        return importlib.import_module("fastattn._C")
    except ModuleNotFoundError:
        return "the CUDA extension is not built (reinstall fastattn with nvcc on PATH, or FASTATTN_CUDA=1 to see why not)"
    except ImportError as e:
        return f"the CUDA extension does not load: {e}"


def unavailable():
    """Why this process cannot use the extension at all, or None."""
    return _unavailable()


@functools.cache
def _unavailable():
    _C = extension()
    if isinstance(_C, str):
        return _C
    if torch.version.hip:
        return "this torch is built for ROCm and the extension for CUDA"
    driver, needed = _C.driver_version(), _C.runtime_version
    if not driver:
        return "no NVIDIA driver on this machine"
    if driver // 1000 < needed // 1000:
        return f"the driver supports CUDA {_version(driver)} and the extension needs {_version(needed)}: update the driver"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def _version(number):
    return f"{number // 1000}.{number % 1000 // 10}"


_prepared = set()  # device indices


def device_refusal(index):
    """Why the extension cannot run on CUDA device `index`, or None; the first call there loads the kernels."""
    if index not in _prepared:
        try:
            extension().prepare(index)
        except RuntimeError as e:
            return str(e)
        _prepared.add(index)
    return None


# Dynamo, which cannot trace imports, takes their answers as they are. The decorator that sets this mark,
# torch.compiler.assume_constant_result, would import all of Dynamo here: 2 s.
unavailable._dynamo_marked_constant = device_refusal._dynamo_marked_constant = True


def why_not(*tensors):
    """What every launch needs of its tensors (None entries are skipped; the first one's device counts)."""
    reason = unavailable() or backend.plain_why_not(*tensors)
    if reason is not None:
        return reason
    device = tensors[0].device
    if device.type != "cuda":
        return f"the tensors are on {device}, the extension runs on NVIDIA GPUs"
    return device_refusal(device.index)


def warmup(device=None):
    """Load the extension's kernels onto a CUDA device (default: the current one), before its first launch is recorded in
    a CUDA graph. Triton compiles for the shapes it meets: run the model once for that.

    Does nothing without the extension or a GPU; raises RuntimeError where the GPU cannot run the extension.
    """
    if unavailable() is None:
        extension().prepare(
            torch.cuda.current_device() if device is None else torch.device(device).index or 0
        )


def layer_norm_why_not(x, weight, bias, dtype, residual=None):
    """Beyond `why_not`: y in x's dtype; weight and bias of one dtype, x's or float32, and contiguous."""
    reason = why_not(x, weight, bias)
    if reason is not None:
        return reason
    if dtype != x.dtype:
        return f"the result is wanted in {dtype}, only x's own {x.dtype} is written"
    parameters = [t for t in (weight, bias) if t is not None]
    dtypes = {t.dtype for t in parameters}
    if len(dtypes) > 1 or dtypes - {x.dtype, torch.float32}:
        return f"weight and bias are {' and '.join(map(str, dtypes))}, must both be {x.dtype} or both torch.float32"
    if not all(t.is_contiguous() for t in parameters):
        return "weight and bias must be contiguous"
    return None


def layer_norm_fwd(x, weight, bias, eps, rms=False, dtype=None):
    """LayerNorm of the rows of x (..., N), of any strides -> y like x, contiguous, mean (M,), rstd (M,) in fp32.

    rms and dtype are the op's; layer_norm_why_not has refused all but False and x's dtype.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = (
        x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    )  # a copy where the leading dims do not merge
    mean, rstd = x.new_empty((2, rows.shape[0]), dtype=torch.float32).unbind()
    extension().layer_norm_fwd(rows, weight, bias, y.view(rows.shape), mean, rstd, eps)
    return y, mean, rstd
