"""Backend "cuda": finds the compiled extension, and says why it cannot serve a call. The launchers are in <op>.py beside this.

`fastattn._C` serves GPU tensors. `fastattn._C_emulated` is the same sources compiled for the CPU, where one fiber runs
each CUDA thread: it serves CPU tensors, for tests (FASTATTN_CUDA=emulated python setup.py build_ext --inplace).
"""

import functools
import importlib

import torch

from fastattn import backend


@functools.cache
def extension(name="_C"):
    """The compiled module, or the reason it cannot be imported, as a sentence."""
    try:
        return importlib.import_module(f"fastattn.{name}")
    except ModuleNotFoundError:
        return "the CUDA extension is not built (reinstall fastattn with nvcc on PATH, or FASTATTN_CUDA=1 to see why not)"
    except ImportError as e:
        return f"the CUDA extension does not load: {e}"


def module(t):
    """The compiled module that serves tensors where t is."""
    return extension("_C_emulated" if t.is_cpu else "_C")


@functools.cache
def sm_count(device):
    """Multiprocessors of a tensor's device: what a persistent grid is sized by."""
    return extension("_C_emulated" if device.type == "cpu" else "_C").sm_count(device.index or 0)


def unavailable():
    """Why this process cannot use the extension on any GPU, or None."""
    return _unavailable()


def not_emulated():
    """Why CPU tensors cannot be served, or None."""
    return _not_emulated()


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


@functools.cache
def _not_emulated():
    if isinstance(extension("_C_emulated"), str):
        return (
            "the tensors are on the CPU, which takes the emulated build of the extension "
            "(FASTATTN_CUDA=emulated python setup.py build_ext --inplace)"
        )
    return None


def _version(number):
    return f"{number // 1000}.{number % 1000 // 10}"


_prepared = set()  # device indices
_ready = {}  # their modules; -1 is the CPU


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
for _constant in (unavailable, not_emulated, device_refusal):
    _constant._dynamo_marked_constant = True


def why_not(*tensors):
    """What every launch needs of its tensors (None entries are skipped; the first one's device counts)."""
    first = tensors[0]
    reason = not_emulated() if first.is_cpu else unavailable()
    if reason is None:
        reason = backend.plain_why_not(*tensors)
    if reason is None and not (first.is_cpu or first.is_cuda):
        reason = f"the tensors are on {first.device}, the extension runs on NVIDIA GPUs"
    return device_why_not(first) if reason is None else reason


def ready(t):
    """The compiled module for tensors where t is, if it is there and its kernels are loaded; else None."""
    index = t.get_device()  # -1 for the CPU
    if index not in _ready:
        if (not_emulated() if t.is_cpu else unavailable()) is None and device_why_not(t) is None:
            _ready[index] = module(t)
    return _ready.get(index)


def device_why_not(t):
    """Why the extension cannot run where t is, if it runs at all; or None."""
    return None if t.is_cpu else device_refusal(t.device.index)


def plain(*tensors):
    """Whether these are plain tensors where an extension is, floating ones of float32 or the first one's dtype (16 or 32 bits).

    That is the usual call, known in 1 us. True means that backend.plain_why_not has nothing to say; False means nothing.
    """
    first = tensors[0]
    if torch.compiler.is_compiling() or (not_emulated() if first.is_cpu else unavailable()) is not None:
        return False
    if backend.transform_why_not() is not None:
        return False
    for t in tensors:
        if t is not None and t.is_neg():
            return False
    return module(first).plain(*tensors)


def warmup(device=None):
    """Load the extension's kernels onto a CUDA device (default: the current one), before its first launch is recorded in
    a CUDA graph. Triton compiles for the shapes it meets: run the model once for that.

    Does nothing without the extension or a GPU; raises RuntimeError where the GPU cannot run the extension.
    """
    if unavailable() is None:
        extension().prepare(
            torch.cuda.current_device() if device is None else torch.device(device).index or 0
        )
