"""Which implementation runs: the only file that decides.

An op's public function checks its arguments and asks `choose` for a backend; its autograd.Function then calls its
launchers through `run`. A launcher is a function of one name in two places, `fastattn.kernels.<op>` (Triton) and
`fastattn.cuda.<op>` (CUDA C++); backend "torch" is the best stock call, written in the op's own file.

Each op says in a sentence why a backend cannot serve a call (`why_not`); the first backend of ORDER with nothing to
say runs. On a GPU an implementation is only the default once it has been seen right on that architecture (PROVEN, or
this machine's own verdict from `fastattn check`); `use_backend` forces one regardless.
"""

import collections
import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import warnings

import torch
from torch.autograd import forward_ad

ORDER = ("cuda", "triton", "torch")
MODULES = {"cuda": "fastattn.cuda.", "triton": "fastattn.kernels.", "torch": "fastattn.ops."}

# (backend, op) -> compute capabilities on which its tests have passed, with the results file that says so.
PROVEN: dict[tuple[str, str], dict[tuple[int, int], str]] = {}

# Who is asked first: the first row that fits a call, by op, dtype, the elements it writes and its row length N (both
# ranges include their ends; None fits everything). `measured` names the results file behind a row. None is a guess that
# stands until a GPU has spoken: small calls wait for the host, where a compiled launch costs 2 us and Triton's 13 to
# 15, and rows beyond 32k columns do not fit into one program's registers.
Row = collections.namedtuple("Row", "ops dtypes elements N order measured")
ROW_OPS = ("softmax", "log_softmax", "scaled_masked_softmax", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "position")  # fmt: skip
# Attention counts q's elements, N is the keys of a row, and their product times 4 the forward's FLOP. 2**30 of them take a GPU
# of 400 TFLOP/s 10 us, less than Triton's launch: a layer of GPT-2 up to 1024 tokens, one of BERT-base up to 8 sequences of
# 128. With few keys reading q, k and v is the work, and 32 MB of q, k, v and o take as long. Larger calls wait for the tensor
# cores: Triton's kernels drive Hopper's by its own instructions, csrc/attention.cu by those of sm_80, at two thirds of the
# rate. Decoding is bound by the memory that holds its cache or else by the host, a launch for each layer and token.
ROWS = (
    Row(ROW_OPS, None, (0, 2**22), None, ("cuda", "triton", "torch"), None),
    Row(ROW_OPS, None, None, (2**15 + 1, 2**62), ("cuda", "triton", "torch"), None),
    Row(ROW_OPS, None, None, None, ("triton", "cuda", "torch"), None),
    Row(("attention",), None, (0, 2**20), (0, 2**10), ("cuda", "triton", "torch"), None),
    Row(("attention",), None, (0, 2**22), (0, 2**7), ("cuda", "triton", "torch"), None),
    Row(("attention",), None, None, None, ("triton", "cuda", "torch"), None),
    Row(("attention_decode",), None, None, None, ("cuda", "triton", "torch"), None),
)

calls: collections.Counter = collections.Counter()  # (op, backend) -> eager calls in this process
why_torch: collections.Counter = collections.Counter()  # (op, reason) -> those that stock torch served
debug = False  # True also checks ids, lengths and offsets that lie on a GPU, which synchronises


class FallbackWarning(UserWarning):
    """A GPU call that no fused backend could serve; the message has each one's reason. Shown once per reason."""


# Module globals, not thread-locals: checkpointing recomputes a forward in autograd's own thread, and Dynamo guards on globals.
_forced = os.environ.get("FASTATTN_BACKEND")
_explaining = False


@contextlib.contextmanager
def use_backend(name):
    """Force `name` ("cuda", "triton", "torch"; None lifts it) for the process; a call it refuses raises NotImplementedError.

    CPU tensors are served for tests: by Triton's interpreter when TRITON_INTERPRET=1 was set before triton was imported,
    and by the emulated build of the CUDA extension.
    """
    if name is not None and name not in ORDER:
        raise ValueError(f"use_backend: got {name!r}, need one of {', '.join(ORDER)}")
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


ON_A_CPU = "CPU tensors take stock torch unless use_backend asks for another"
FORCED = "use_backend asked for it"


def choose(op, why_not, *args, N=None, elements=None, inductor_fuses=False, on_a_cpu=ON_A_CPU):
    """The backend for this call. `why_not` maps "cuda" and "triton" to functions of `args` that give a sentence or None.

    `args[0]` is a tensor and says the device and, where the row length N is given, dtype and, unless `elements` does, size
    for ROWS.
    `inductor_fuses`: under torch.compile the stock op is the better choice, because Inductor fuses it into its neighbours.
    """
    forced = _forced
    if _explaining:
        order = _order(op, args[0], N, elements)
        raise _Explained(op, {name: _refusal(op, name, why_not, args) for name in order})
    if forced is not None:
        reason = why_not[forced](*args) if forced in why_not else _not_written(op, forced)
        if reason is not None:
            raise NotImplementedError(f"{op}: backend {forced!r} was asked for and refuses: {reason}")
        chosen, reason = forced, FORCED
    elif args[0].is_cpu or (inductor_fuses and torch.compiler.is_compiling()):
        chosen, reason = "torch", on_a_cpu
    else:
        chosen, reason = _first_willing(op, why_not, args, _order(op, args[0], N, elements))
    if not torch.compiler.is_compiling():
        calls[op, chosen] += 1
        if chosen == "torch":
            why_torch[op, reason] += 1
    return chosen


def leave_to_torch(op, reason, x):
    """`choose` for a call with x that no fused backend can serve, all for one reason, which is the one counted on a CPU too."""
    choose(op, dict.fromkeys(("cuda", "triton"), lambda *_: reason), x, on_a_cpu=reason)


def certain(name, op, x, N=None):
    """Whether a call with x runs on backend `name` if that can serve it, and eagerly, with no mode or autocast on that changes its meaning.

    For the quick ways of ops that small calls wait for; False means nothing. N is the row length, x's last dim by default.
    """
    if _is_compiling():  # before anything that a graph would be guarded by
        return False
    if _forced is None:
        if not x.is_cuda or not x.dim():
            return False
        if _preferred(op, x.dtype, x.numel(), x.shape[-1] if N is None else N)[0] != name:
            return False
        if unproven(op, name, x.device) is not None:
            return False
    elif _forced != name:
        return False
    return not (
        _explaining
        or _dispatch_modes()
        or _autocasting()
        or _profiling()
        or _transform() is not None
        or forward_ad._current_level >= 0
    )


# By short names, since looking them up takes longer than calling them.
_is_compiling, _profiling = torch.compiler.is_compiling, torch.autograd._profiler_enabled
_dispatch_modes, _autocasting = torch._C._len_torch_dispatch_stack, torch._C._is_any_autocast_enabled
_transform = torch._C._functorch.peek_interpreter_stack


def stock_only(op, t):
    """Whether stock torch is certain to run, so that an op may skip what only other backends need."""
    certain = not _explaining and (_forced == "torch" or (_forced is None and t.is_cpu))
    if certain and not torch.compiler.is_compiling():
        calls[op, "torch"] += 1
        why_torch[op, FORCED if _forced else ON_A_CPU] += 1
    return certain


def _order(op, t, N, elements):
    if N is None:
        return ORDER
    elements = t.numel() if elements is None else elements
    return (preferred if torch.compiler.is_compiling() else _preferred)(op, t.dtype, elements, N)


def preferred(op, dtype, elements, N):
    """The backends in the order of the first of ROWS that fits; ORDER where none does."""
    for row in ROWS:
        if (
            op in row.ops
            and (row.dtypes is None or dtype in row.dtypes)
            and (row.elements is None or row.elements[0] <= elements <= row.elements[1])
            and (row.N is None or row.N[0] <= N <= row.N[1])
        ):
            return row.order
    return ORDER


_preferred = functools.lru_cache(maxsize=4096)(preferred)


def _first_willing(op, why_not, args, order):
    reasons = {}
    for name in order:
        reasons[name] = _refusal(op, name, why_not, args)
        if reasons[name] is None:
            break
    if name != "torch" or torch.compiler.is_compiling():
        return name, None
    text = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason)
    if not text:
        return name, "measured: stock torch is the fastest here"
    warnings.warn(f"{op} runs on stock torch ({text})", FallbackWarning, stacklevel=4)
    return name, text


def _refusal(op, name, why_not, args):
    """Why `name` would not be picked for this call, use_backend aside."""
    if name == "torch":
        return None
    if name not in why_not:
        return _not_written(op, name)
    reason = why_not[name](*args)
    if reason is None and args[0].is_cpu:
        return ON_A_CPU
    return unproven(op, name, args[0].device) if reason is None else reason


def _not_written(op, name):
    return None if name == "torch" else f"{op} has no {name} implementation yet"


class _Explained(Exception):
    pass


def explain(function, *args, **kwargs):
    """One line per backend: would it serve this call, and if not, why. Nothing is computed.

    >>> print(fastattn.explain(fastattn.functional.softmax, torch.zeros(2, 3)))
    """
    global _explaining
    _explaining = True
    try:
        function(*args, **kwargs)
    except _Explained as e:
        op, reasons = e.args
    else:
        raise TypeError(
            f"explain: {function!r} made no choice of backend; give it a function of fastattn.functional"
        )
    finally:
        _explaining = False
    lines = [
        f"{op}, {name}: {'refused, ' + reason if reason else 'serves'}" for name, reason in reasons.items()
    ]
    chosen = _forced or next(name for name in reasons if reasons[name] is None)
    return "\n".join([f"{op}: {chosen} runs", *lines])


def unproven(op, name, device):
    """A sentence unless `name` has been seen computing `op` right on this device's architecture."""
    capability = _capability(device)
    if capability in PROVEN.get((name, op), {}) or op in verdict(device).get(name, ()):
        return None
    return (
        f"never seen right on compute capability {capability[0]}.{capability[1]}; "
        f"`fastattn check` verifies this card, use_backend({name!r}) runs it now"
    )


_capability = functools.cache(torch.cuda.get_device_capability)  # which takes a microsecond


def verdict_path():
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "fastattn" / "verdict.json"


@functools.cache
def verdict(device):
    """{backend: [ops]} that `fastattn check` has seen right on this machine's card with these versions."""
    try:
        return json.loads(verdict_path().read_text()).get(verdict_key(device), {})
    except (OSError, ValueError):
        return {}


def verdict_key(device):
    from fastattn import __version__

    triton = importlib.import_module("triton").__version__ if triton_found() else "none"
    return f"{torch.cuda.get_device_name(device)}, fastattn {__version__}, torch {torch.__version__}, triton {triton}"


def triton_found():
    return _find_triton()


def interpreting():
    """Whether triton runs as its interpreter; fixed once triton is imported."""
    return _ask_triton()


_find_triton = functools.cache(lambda: importlib.util.find_spec("triton") is not None)
_ask_triton = functools.cache(lambda: importlib.import_module("triton").knobs.runtime.interpret)
for _constant in (triton_found, interpreting, unproven):
    # Dynamo calls these and keeps the answer; torch.compiler.assume_constant_result, which says so, imports all of Dynamo
    _constant._dynamo_marked_constant = True


TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def transform_why_not():
    """Why no kernel may run now, whatever its tensors, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform (vmap, grad, jvp), which needs stock ops"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is on, which needs stock ops"
    return None


def need_tensors(op, **tensors):
    """TypeError unless each is a tensor."""
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, must be a torch.Tensor")


def need_tensors_or_none(op, **tensors):
    """The same of those that are given."""
    need_tensors(op, **{name: t for name, t in tensors.items() if t is not None})


def plain_why_not(*tensors):
    """What every fused launch needs of its tensors (None entries are skipped; integer and bool ones may have any dtype)."""
    compiling = torch.compiler.is_compiling()
    if not compiling and (reason := transform_why_not()) is not None:
        return reason
    first = tensors[0]
    for t in tensors:
        if t is None:
            continue
        if not (compiling or type(t) in (torch.Tensor, torch.nn.Parameter) or traceable(t)):
            return f"a {type(t).__name__} has no storage of its own that a kernel could read"
        if t.layout != torch.strided or t.is_nested:
            return "a sparse or nested tensor is not one block of strided memory"
        if t.dtype not in TRITON_DTYPES and t.dtype.is_floating_point or t.dtype.is_complex:
            return f"dtype {t.dtype} is not float16, bfloat16 or float32"
        if t.device != first.device:
            return f"tensors on {first.device} and on {t.device}"
        if not compiling and t.is_neg():
            return "a tensor with its negative bit set (a view of a conjugate) does not hold its own values"
    return None


def triton_why_not(*tensors):
    """plain_why_not, and that triton is here and runs on the first tensor's device."""
    if not triton_found():
        return "triton is not installed (pip install triton)"
    reason = plain_why_not(*tensors)
    if reason is not None:
        return reason
    first = tensors[0]
    if first.is_cpu and not interpreting():
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before triton is imported)"
    if not first.is_cpu and interpreting():
        return "Triton is in interpreter mode (TRITON_INTERPRET=1), which serves CPU tensors only"
    if not (first.is_cpu or first.is_cuda):
        return f"device {first.device} is neither a GPU nor the CPU"
    return None


def last_block_why_not(x):
    """Why Triton's kernels that walk along long rows cannot serve x, or None: up to 2^31 they count columns in 32 bits."""
    if x.numel() > 2**31 - 2**14:
        for size in x.shape:
            if 2**31 - 2**14 < size < 2**31:
                return f"a dim of {size} ends so little below 2^31 that the block after its last passes it: cut it"
    return None


def traceable(t):
    """Tensors that stand for plain ones while a graph is recorded."""
    from torch._subclasses import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, (FakeTensor, FunctionalTensor))


def in_parts(t):
    """Whether t is a DTensor, told by name: the import of the class takes a second."""
    return type(t).__name__ == "DTensor"


def on_parts(call, tensors, names, split, outputs, **options):
    """sharding.on_parts, whose module is imported with the first DTensor."""
    from fastattn import sharding

    return sharding.on_parts(call, tensors, names, split, outputs, **options)


def run(name, backend, op, *args):
    """Call launcher `name` of `op`: directly in plain eager, else as torch.ops.fastattn.<name>, which modes can see."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or type(args[0]) not in (torch.Tensor, torch.nn.Parameter)
        or torch.autograd._profiler_enabled()
    ):
        return getattr(torch.ops.fastattn, name)(*args, backend)
    return launcher(name, backend, op)(*args)


@functools.cache
def launcher(name, backend, op):
    if backend == "triton" and interpreting():
        importlib.import_module("fastattn.interpreter")  # else bfloat16 is silently wrong
    module = MODULES[backend] + op
    return getattr(importlib.import_module(module), name)


_library = torch.library.Library("fastattn", "DEF")


def define(op, schema, fake):
    """Register a launcher as torch.ops.fastattn.<name>; `schema` ends in `str backend`, `fake` gives outputs from metadata."""
    name = schema.partition("(")[0]
    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, lambda *args: launcher(name, args[-1], op)(*args[:-1]), key)
    torch.library.register_fake(f"fastattn::{name}", fake, lib=_library)


def readable(t):
    """Whether a tensor's values may be checked: on the CPU, or anywhere under `debug`, and only while nothing records a graph or transforms it."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return (t.is_cpu or debug) and type(t) is torch.Tensor


def distinct(*tensors):
    """The tensors, a repeated one as a view of itself: Dynamo refuses an autograd.Function that gets one tensor twice."""
    seen = []
    for t in tensors:
        seen.append(t.view_as(t) if t is not None and any(t is s for s in seen) else t)
    return seen


def draw_seed(t):
    """Seed and offset of a dropout mask, an int64 tensor (2,) on t's device, from torch's generator.

    Drawn by a stock op outside ours: a recomputation, a CUDA graph and the compiler's partitioner then keep one mask.
    """
    return torch.randint(0, 2**63 - 1, (2,), device=t.device)


def autocast_devices(op):
    """Device types on which autocast widens the torch op of this name ("softmax.int") to fp32, as its dispatcher knows."""
    return frozenset(
        device
        for device in ("cpu", "cuda")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{op}", f"Autocast{device.upper()}")
    )


def autocast_dtype(devices, x):
    """The dtype in which torch's op returns its result for x: fp32 under an autocast that widens it, else x's own."""
    if devices and (device := x.device.type) in devices:
        if torch.is_autocast_enabled(device) and x.dtype in TRITON_DTYPES:
            return torch.float32
    return x.dtype


def needs_grad(*tensors):
    if torch.is_grad_enabled():
        for t in tensors:  # any() over a generator takes twice the time
            if t is not None and t.requires_grad:
                return True
    return False


def wants_double_backward():
    """Inside a backward that was called with create_graph=True, whose own operations must be differentiable."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def composite_backward(function, inputs, grads):
    """Gradients of `function(*inputs)` by autograd over stock ops, themselves differentiable under create_graph; None where none is needed."""
    wanted = [i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():  # a backward that is not itself differentiated runs without it
        # Views, so that an input computed from another one (or by this very op) does not send its gradient on to it.
        inputs = [t.view_as(t) if i in wanted else t for i, t in enumerate(inputs)]
        with torch._C.DisableTorchFunction():  # else `accelerated` would bring the very op back
            outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    result = [None] * len(inputs)
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [inputs[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=create_graph,
        allow_unused=True,
    )
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result
