"""Every Triton launch of a test run, and the check that each is in the committed list that ahead-of-time tests compile.

A launch is known by three keys: the kernel with one letter for each argument that is no constexpr (a tensor's dtype, `-` for
None, `.` for a number; numbers outside tuples are left out) and its flags, as in `softmax_fwd_kernel bb MASKED`; the kernel
with its tile, as in `softmax_fwd_kernel | BLOCK_M=4 BLOCK_N=512 num_warps=4`, unless a test gave the tile (`config=`); and the
kernel with each integer argument that is 1, which Triton compiles as a constant.

tests/data/specialisations.json holds calls of launchers that together make all those launches: what is compiled is what a
launcher asks for, shipped tile and all. `python tests/aot.py --add` or `--update` writes it.
"""

import collections
import functools
import importlib
import inspect
import json
import pathlib
import threading
import types

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTE = ROOT / ".pytest_cache" / "launches.json"  # what the last run launched
LIST = ROOT / "tests" / "data" / "specialisations.json"
LETTERS = {
    torch.float16: "h",
    torch.bfloat16: "b",
    torch.float32: "f",
    torch.bool: "?",
    torch.uint8: "u",
    torch.int32: "i",
    torch.int64: "l",
}
DTYPES = {letter: dtype for dtype, letter in LETTERS.items()}

launched = collections.defaultdict(set)  # call of a launcher, as JSON -> keys of its launches
_current = threading.local()


@functools.cache
def parameters(fn):
    """(name, is constexpr) of each parameter of a triton.jit function."""
    return [(p.name, "constexpr" in str(p.annotation)) for p in inspect.signature(fn).parameters.values()]


def leaves(name, value):
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for field, element in zip(names, value, strict=True):
            yield from leaves(f"{name}.{field}", element)
    else:
        yield name, value


def keys_of(fn, args, options):
    """(name, keys) of launching fn (a triton.jit function) with args and options; the name has flags and tile."""
    bound = inspect.signature(fn.fn).bind(*args, **{k: v for k, v in options.items() if k in fn.arg_names})
    bound.apply_defaults()
    kernel, letters, flags, tile, units = fn.fn.__name__, "", [], [], []
    for name, constant in parameters(fn.fn):
        value = bound.arguments[name]
        if constant:
            value = getattr(value, "value", value)
            if value is not False and value is not None:
                is_tile = name.startswith(("BLOCK_", "GROUP_", "num_"))
                (tile if is_tile else flags).append(name if value is True else f"{name}={value}")
            continue
        for leaf, v in leaves(name, value):
            if isinstance(v, torch.Tensor):
                letters += LETTERS[v.dtype]
            elif v is None:
                letters += "-"
            elif leaf != name:
                letters += "."
            if type(v) is int and v == 1:
                units.append(f"{kernel} {leaf}=1")
    tile += [f"{k}={v}" for k, v in options.items() if k not in fn.arg_names and k.startswith("num_")]
    tile = f" | {' '.join(sorted(tile))}"
    flagged = " ".join([kernel, letters, *flags])
    return flagged + tile, [flagged, kernel + tile, *units]


def describe(value):
    if isinstance(value, torch.Tensor):
        return {"tensor": LETTERS[value.dtype], "shape": list(value.shape), "stride": list(value.stride())}
    if isinstance(value, torch.dtype):
        return {"dtype": LETTERS[value]}
    return value


def wrap_launchers(module):
    """Functions of a kernel file note their arguments, so that a launch is known to belong to a call."""
    if not hasattr(module, "triton"):  # what kernel files share and what launches nothing
        return
    for name, function in list(vars(module).items()):
        if (
            isinstance(function, types.FunctionType)
            and function.__module__ == module.__name__
            and name[0] != "_"
        ):
            setattr(module, name, noting(function, f"{module.__name__.rpartition('.')[2]}.{name}"))


def noting(launcher, name):
    signature = inspect.signature(launcher)

    @functools.wraps(launcher)
    def noted(*args, **kwargs):
        if getattr(_current, "call", None):
            return launcher(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        config = bound.arguments.pop("config", None)
        call = [name, *map(describe, bound.arguments.values())]
        _current.call, _current.given_tile = call, config is not None
        try:
            return launcher(*args, **kwargs)
        finally:
            _current.call = None

    return noted


def wrap_interpreter():
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    @functools.wraps(run)
    def noted(self, *args, grid, warmup, **kwargs):
        if self.fn.__module__.startswith("fastattn.kernels."):
            if call := getattr(_current, "call", None):
                _, keys = keys_of(self, args, kwargs)
                launched[json.dumps(call)].update(
                    key for key in keys if not (_current.given_tile and "|" in key)
                )
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    InterpretedFunction.run = noted


def start():
    """Called once, before any test module is imported."""
    wrap_interpreter()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        wrap_launchers(importlib.import_module(f"fastattn.kernels.{path.stem}"))


def merge(note):
    for call, keys in note.items():
        launched[call].update(keys)


def note():
    return {call: sorted(keys) for call, keys in launched.items()}


def missing():
    """Launched keys that no listed call makes."""
    listed = {key for entry in listed_calls() for key in entry["keys"]}
    return sorted({key for keys in launched.values() for key in keys} - listed)


def listed_calls():
    return json.loads(LIST.read_text()) if LIST.exists() else []


# Hooks of pytest; tests/conftest.py imports them. Workers of pytest-xdist hand their notes to the process that started them.


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    merge(getattr(node, "workeroutput", {}).get("launches", {}))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = note()
        return
    if launched:
        NOTE.parent.mkdir(exist_ok=True)
        NOTE.write_text(json.dumps(note()))
    if missing() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    absent = missing()
    if absent:
        terminalreporter.section("launches that no ahead-of-time test compiles", red=True)
        for key in absent[:20]:
            terminalreporter.line(key)
        terminalreporter.line(
            f"{len(absent)} launches are not in {LIST.relative_to(ROOT)}: `python tests/aot.py --add` adds them"
        )
