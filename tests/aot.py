"""Ahead-of-time compilation of what the launchers ask for, for GPUs that are not there, and what the code then costs.

    python tests/aot.py --update [pytest arguments]      run the tests, rewrite the list of specialisations
    python tests/aot.py --add                            add what the last test run launched to the list, without a run
    python tests/aot.py --budgets                        compile, rewrite budgets and census: after a kernel changed on purpose
    python tests/aot.py --report FILE [--all]            compile, write what each kernel costs to FILE; --all: every listed
                                                         specialisation instead of a choice that covers

A stand-in driver names the target, tensors are fake ones on a GPU that does not exist, and every launch stops where
Triton would compile: what is compiled is exactly what a launch would compile, alignment of pointers and sizes apart,
which is set to both extremes. Runs without TRITON_INTERPRET; one process has one mode.
"""

import argparse
import collections
import contextlib
import fcntl
import hashlib
import importlib
import importlib.metadata
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
import warnings

import torch
from torch._subclasses import FakeTensorMode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [p for p in (str(ROOT), str(ROOT / "tests")) if p not in sys.path]

import launches  # noqa: E402

from fastattn.benchmarks import model  # noqa: E402

BUDGETS = ROOT / "tests" / "data" / "resources.json"
CENSUS = ROOT / "tests" / "data" / "census.json"
PINNED = "3.7.1"  # the triton of constraints.txt, whose numbers the census has
SECOND_TRITON = ROOT / ".triton-3.6"
TARGETS = ("sm_90", "sm_80", "sm_100", "gfx942")
# bytes a block may have; the rows for sm_80 also serve 8.6, 8.9 and 12.0, which have 99 KiB
SHARED_LIMIT = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


def targets():
    from triton.backends.compiler import GPUTarget

    found = {f"sm_{c}": GPUTarget("cuda", c, 32) for c in (80, 90, 100)}
    return found | {"gfx942": GPUTarget("hip", "gfx942", 64)}


class Driver:
    """As much of a driver as the way to a compilation asks for."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return str(self.target)  # Triton keeps one cache of compiled kernels for each

    def get_current_stream(self, device=None):
        return 0


@contextlib.contextmanager
def pretended_gpu(target, processors):
    """torch.cuda answers for a GPU of this target, and Triton's driver names it."""
    import triton

    hip = target.backend == "hip"
    capability = (9, 4) if hip else divmod(target.arch, 10)
    properties = types.SimpleNamespace(
        multi_processor_count=processors, major=capability[0], minor=capability[1], warp_size=target.warp_size,
        gcnArchName=str(target.arch), shared_memory_per_block_optin=SHARED_LIMIT["gfx942" if hip else f"sm_{target.arch}"],
    )  # fmt: skip
    replaced = {
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "current_device": lambda: 0,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    before = {name: getattr(torch.cuda, name) for name in replaced}, torch.version.hip
    methods = torch.Tensor.__getitem__, torch.Tensor.contiguous, torch.Tensor.copy_
    try:
        # torch's own enter a device guard, which a CPU build lacks
        torch.Tensor.__getitem__ = basic_index
        torch.Tensor.copy_ = lambda t, source: t
        torch.Tensor.contiguous = lambda t: t if t.is_contiguous() else t.new_empty(t.shape)
        for name, function in replaced.items():
            setattr(torch.cuda, name, function)
        torch.version.hip = "6.0" if hip else None
        triton.runtime.driver.set_active(Driver(target))
        yield
    finally:
        for name, function in before[0].items():
            setattr(torch.cuda, name, function)
        torch.version.hip = before[1]
        torch.Tensor.__getitem__, torch.Tensor.contiguous, torch.Tensor.copy_ = methods


def basic_index(t, key):
    """t[key] for slices, numbers and None."""
    keys = key if isinstance(key, tuple) else (key,)
    dim = 0
    for k in keys:
        if k is Ellipsis:
            dim = t.dim() - sum(other is not None for other in keys[keys.index(k) + 1 :])
        elif k is None:
            t, dim = t.unsqueeze(dim), dim + 1
        elif isinstance(k, slice):
            t, dim = torch.ops.aten.slice(t, dim, k.start, k.stop, k.step or 1), dim + 1
        else:
            t = t.select(dim, k)
    return t


Spec = collections.namedtuple("Spec", "target key alignment fn signature constexprs attrs options shipped")


def collect(calls, target_name, processors, shipped=False):
    """[(keys, Spec)] of every launch that the calls make on the target; alignment as in the call ("given")."""
    from triton.runtime.jit import JITFunction

    target = targets()[target_name]
    found, keys = [], []
    run, compile_ = JITFunction.run, JITFunction._do_compile

    def noted_run(self, *args, grid, warmup, **kwargs):
        keys.append(launches.keys_of(self, args, kwargs))
        self.device_caches.clear()  # or a second launch of the same kernel would pass unseen
        run(self, *args, grid=grid, warmup=True, **kwargs)

    def noted_compile(self, key, signature, device, constexprs, options, attrs, warmup):
        found.append(
            Spec(target_name, keys[-1][0], "given", self, signature, constexprs, attrs, options, shipped)
        )

    JITFunction.run, JITFunction._do_compile = noted_run, noted_compile
    device = torch.device(
        "cuda", list(targets()).index(target_name)
    )  # launchers may remember a device's tables
    made = []
    try:
        with (
            pretended_gpu(target, processors),
            FakeTensorMode(allow_non_fake_inputs=True),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # fake tensors warn that their pointer, 0, was read
            for name, *args in calls:
                module, _, function = name.partition(".")
                first = len(found), len(keys)
                launcher = getattr(importlib.import_module(f"fastattn.kernels.{module}"), function)
                launcher(*(imagine(a, device) for a in args))
                made.append((sorted({k for _, ks in keys[first[1] :] for k in ks}), found[first[0] :]))
    finally:
        JITFunction.run, JITFunction._do_compile = run, compile_
    return made


def imagine(value, device):
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return launches.DTYPES[value["dtype"]]
    return torch.empty_strided(
        value["shape"], value["stride"], dtype=launches.DTYPES[value["tensor"]], device=device
    )


def aligned(spec, to16):
    """The specialisation with every pointer and every integer known to be a multiple of 16, or none of them."""

    def paths(types_, at):
        for i, kind in enumerate(types_):
            if isinstance(kind, tuple):
                yield from paths(kind, (*at, i))
            elif kind.startswith("*") or kind in ("i32", "i64"):
                yield (*at, i)

    left_alone = {p.num for p in spec.fn.params if p.do_not_specialize or p.do_not_specialize_on_alignment}
    found = [p for p in paths(spec.signature.values(), ()) if p[0] not in left_alone]
    attrs = {p: [["tt.divisibility", 16]] for p in found} if to16 else {}
    return spec._replace(alignment="16" if to16 else "1", attrs=attrs)


def features(spec):
    """(kernel, dtype or absence of each argument and constexprs, head dims as padded or not); tiles are the shipped calls'."""
    flagged, _, tile = spec.key.partition(" | ")
    kernel, letters, *words = flagged.split(" ")
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in ("D", "DV", "D_V"):
            words[i] = (
                f"{name} whole"
                if f"BLOCK_{name.replace('_', '')}={value}" in tile.split()
                else f"{name} padded"
            )
    return kernel, [*(f"{i}{c}" for i, c in enumerate(letters)), *words]


def covering(specs):
    """A choice of specs in which every feature that some spec of a kernel has occurs. Greedy, in a fixed order."""
    wanted = [{(kernel, feature) for feature in found} for kernel, found in map(features, specs)]
    open_, chosen = set().union(*wanted), []
    while open_:
        best = max(range(len(specs)), key=lambda i: len(wanted[i] & open_))
        chosen.append(specs[best])
        open_ -= wanted[best]
    return chosen


def unique(specs):
    """One spec for each thing that Triton would compile."""
    seen = {}
    for s in specs:
        seen.setdefault((s.target, s.key, s.alignment, str(s.signature), str(s.constexprs), str(s.attrs)), s)
    return list(seen.values())


def plan(everything, target_names):
    """What the tests compile, how many specialisations there are in all, and listed calls whose launches changed."""
    entries = launches.listed_calls()
    listed = [entry for entry in entries if still_fits(entry["call"])]
    gone = [entry["call"][0] for entry in entries if entry not in listed]
    chosen, total, stale = [], 0, gone
    for target in target_names:
        made = collect([entry["call"] for entry in listed], target, processors=8)
        if target == "sm_90":
            stale = gone + [
                entry["call"][0]
                for entry, (keys, _) in zip(listed, made, strict=True)
                if entry["keys"] != keys
            ]
        made = unique(aligned(s, True) for _, specs in made for s in specs)
        big = [
            s for _, specs in collect(shipped_calls(), target, processors=132, shipped=True) for s in specs
        ]
        total += len(made) + len(big)
        if everything:
            picked = [*big, *made, *(aligned(s, False) for s in made)]
        elif target == "sm_90":
            few = covering(made)
            picked = [*big, *few, *(aligned(s, False) for s in few)]
        else:
            picked = covering([*big, *made])
        chosen += unique(picked)
    return chosen, total, stale


def shipped_calls():
    """Launcher calls at sizes that people run, which reach every row of every tile table; budgets and gates are about these."""
    from fastattn.kernels import layer_norm, linear_cross_entropy, position, softmax

    calls = []
    for letter, D, causal in [("b", 64, 0), ("b", 64, 1), ("b", 128, 0), ("b", 128, 1), ("b", 256, 0), ("b", 256, 1),
                              ("h", 64, 1), ("h", 128, 0), ("f", 64, 0), ("f", 128, 0), ("f", 256, 0)]:  # fmt: skip
        q, lse = tensor(letter, 4, 16, 4096, D), tensor("f", 4, 16, 4096)
        rules = [None] * 9 + [4096, 4096, causal, -1, -1, 0.0, 0.0, D**-0.5, False]
        calls.append(["attention.attention_fwd", q, q, q, *rules])
        calls.append(["attention.attention_bwd", q, None, q, q, q, q, lse, *rules, False, False])
    for letter, D in itertools.product("bf", (64, 128, 256)):
        q, cache, lens = tensor(letter, 16, 32, 1, D), tensor(letter, 16, 8, 8192, D), tensor("i", 16)
        calls.append(["attention_decode.attention_decode_fwd", q, cache, cache, lens, *[None] * 5, -1, -1, 0.0, D**-0.5, 0,
                      False])  # fmt: skip
    for N in widths(layer_norm.FORWARD, layer_norm.BACKWARD):
        x, w, stat = tensor("b", 8192, N), tensor("f", N), tensor("f", 8192)
        calls.append(["layer_norm.layer_norm_fwd", x, w, w, 1e-5, False, True, {"dtype": "b"}])
        calls.append(["layer_norm.layer_norm_bwd", x, x, w, stat, True, True, False])
        calls.append(
            ["layer_norm.add_layer_norm_fwd", x, x, w, w, None, 1e-5, 0.0, False, True, True, {"dtype": "b"}]
        )
    for letter, tanh in (("b", False), ("b", True), ("f", False)):
        x, b = tensor(letter, 8192, 3072), tensor("f", 3072)
        calls.append(["bias_gelu.bias_gelu_fwd", x, b, tanh])
        calls.append(["bias_gelu.bias_gelu_bwd", x, x, b, tanh, True])
    for N in widths(softmax.FORWARD, softmax.BACKWARD):
        x = tensor("b", 8192, N)
        calls.append(["softmax.softmax_fwd", x, -1, False, {"dtype": "b"}])
        calls.append(["softmax.softmax_bwd", x, x, -1, False, {"dtype": "b"}])
    for V in widths(linear_cross_entropy.ROWS):
        head = [tensor("b", 16384, 768), tensor("f", V, 768), None, tensor("l", 16384), None, -100, 0.0]
        for grad in (True, False):
            calls.append(["linear_cross_entropy.linear_cross_entropy_fwd", *head, grad, grad, False])
    for C in widths(position.ADD, position.ADD_BACKWARD):
        x, table = tensor("b", 16, 1024, C), tensor("b", 2048, C)
        for learned in (table, None):
            calls.append(["position.add_positional_encoding_fwd", x, learned, None, None, 0, 1.0, 0.0])
            calls.append(["position.add_positional_encoding_bwd", x, learned, None, None, 0, 1.0, 0.0, True,
                          learned is not None])  # fmt: skip
    for C in widths(position.NORM, position.NORM_BACKWARD)[:-1]:  # wider rows are refused
        ids, dy, w, stat = tensor("l", 16, 512), tensor("b", 16, 512, C), tensor("f", C), tensor("f", 8192)
        tables = [tensor("b", 30522, C), tensor("b", 2, C), tensor("b", 512, C), w, w]
        calls.append(["position.embeddings_fwd", ids, ids, None, *tables, None, 1e-12, 0.0])
        calls.append(["position.embeddings_bwd", dy, ids, ids, None, *tables, stat, stat, None, 0, 0.0, True, True, True,
                      True])  # fmt: skip
    return calls


def tensor(letter, *shape):
    """A contiguous tensor as a call of a launcher notes it."""
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return {"tensor": letter, "shape": list(shape), "stride": stride}


def widths(*tables):
    """A width for each row of tables of (limit, tile), and one beyond the last."""
    limits = {limit for table in tables for limit, _ in table if limit != math.inf}
    return [*sorted(limits), 2 * max(limits)]


def compile_one(spec):
    import triton
    from triton.compiler import ASTSource

    started = time.perf_counter()
    cost = {
        "target": spec.target,
        "key": spec.key,
        "alignment": spec.alignment,
        "shipped": spec.shipped,
    }
    try:
        source = ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs)
        kernel = triton.compile(source, target=targets()[spec.target], options=spec.options.__dict__)
        cost |= resources(kernel)
        if spec.target == "sm_90" and spec.shipped:
            cost |= {"sass": model.census(disassembly(kernel)), "remarks": remarks(kernel)}
    except Exception as e:  # reported: one kernel that does not compile must not hide the others
        cost["error"] = f"{type(e).__name__}: {str(e).strip()[-600:]}"
    return cost | {"seconds": round(time.perf_counter() - started, 2)}


def resources(kernel):
    """registers a thread, bytes of stack a thread (more than 0 is a spill), bytes of shared memory a block, warps a block."""
    warps = kernel.metadata.num_warps
    if "cubin" not in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        registers, stack, shared = map(
            number, ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        )
    else:
        text = tool("cuobjdump", "-res-usage", kernel)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        shared = kernel.metadata.shared
    return {"registers": registers, "stack": stack, "shared": shared, "warps": warps}


def disassembly(kernel):
    return tool("nvdisasm", "-c", kernel)


def tool(name, option, kernel):
    """What one of the binary tools that come with triton says about a compiled kernel."""
    import triton

    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        return subprocess.run(
            [tools / name, option, f.name], capture_output=True, text=True, check=True
        ).stdout


def remarks(kernel):
    """ptxas's notes of lost performance (C7508 to C7519), which are info lines that no flag turns into errors."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(kernel.asm["ptx"])
        f.flush()
        arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])[1]
        command = [
            get_ptxas(kernel.metadata.target.arch).path,
            "-v",
            f"--gpu-name={arch}",
            f.name,
            "-o",
            os.devnull,
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"\(C75\d\d\).*", said)


def run_plan(specs, processes=2):
    """Costs of specs, compiled in `processes` processes, the heavy kernels first."""
    global _specs
    _specs = sorted(specs, key=lambda s: "bwd" not in s.key)
    with multiprocessing.get_context("fork").Pool(
        processes
    ) as pool:  # kernels cannot be pickled; a fork has them
        return list(pool.imap_unordered(compile_nth, range(len(specs)), chunksize=1))


def compile_nth(i):
    return compile_one(_specs[i])


def report(everything=False, target_names=TARGETS, only_shipped=False):
    import triton

    started = time.perf_counter()
    specs, total, stale = plan(everything, target_names)
    if only_shipped:
        specs = [s for s in specs if s.shipped]
    costs = run_plan(specs)
    return {
        "triton": triton.__version__,
        "specialisations": total,
        "shipped only": only_shipped,
        "stale": stale,
        "seconds": round(time.perf_counter() - started, 1),
        "costs": sorted(costs, key=lambda c: (c["target"], c["key"], c["alignment"])),
    }


def cached_report(*arguments, second_triton=None):
    """The report of `python tests/aot.py *arguments`, made once for these kernels however many test processes ask."""
    sources = [
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "tests" / f for f in ("aot.py", "launches.py")),
        launches.LIST,
    ]
    words = [second_triton or importlib.metadata.version("triton"), *arguments]
    digest = hashlib.sha256(repr(words).encode())
    for path in sorted(sources):
        digest.update(path.read_bytes() if path.exists() else b"")
    file = ROOT / ".pytest_cache" / f"aot-{digest.hexdigest()[:16]}.json"
    file.parent.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if second_triton:
        environment["PYTHONPATH"] = os.pathsep.join([str(second_triton), environment.get("PYTHONPATH", "")])
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            command = [sys.executable, __file__, *arguments, "--report", file]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-3000:])
    return json.loads(file.read_text())


def budget_key(cost):
    return f"{cost['key']} @ {cost['alignment']}"


def budgets_of(report):
    """{target: {key: [registers, stack, shared]}}, the largest of each where several specialisations share a key."""
    table = collections.defaultdict(dict)
    for cost in report["costs"]:
        if "error" not in cost:
            spent = [cost["registers"], cost["stack"], cost["shared"]]
            known = table[cost["target"]].get(budget_key(cost), spent)
            table[cost["target"]][budget_key(cost)] = [max(pair) for pair in zip(spent, known, strict=True)]
    return table


def census_of(report):
    """{key: what a static gate watches} of the shipped kernels for sm_90: the hot loop, or the width of memory accesses."""
    table = {}
    for cost in report["costs"]:
        if "sass" not in cost:
            continue
        ops, loop, warps = cost["sass"]["all"], cost["sass"]["loop"], cost["warps"]
        row = {
            "wide loads": model.wide_share(ops, "LDG"),
            "wide stores": model.wide_share(ops, "STG"),
            "warps an SM": warps * model.resident_blocks(cost["registers"], cost["shared"], warps),
        }
        if loop and loop["hgmma"]:
            block_m, block_n = (int(re.search(rf"BLOCK_{d}=(\d+)", cost["key"])[1]) for d in "MN")
            unit, share = model.loop_step(loop, warps).bound()
            row = {
                "instructions an element": sum(loop["ops"].values()) * 32 * warps / (block_m * block_n),
                "hgmma": loop["hgmma"],
                "exp2": loop["ops"].get("MUFU.EX2", 0),
                "waits": loop["ops"].get("WARPGROUP.DEPBAR.LE", 0),
                "tensor share": share,
                "bound": unit,
                "warps an SM": row["warps an SM"],
            }
        table[cost["key"]] = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    return table


def update_budgets():
    """Compiles with this triton, and the shipped rows with the one in .triton-3.6 where it lies; writes both tables."""
    tables = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    reports = [cached_report()]
    if SECOND_TRITON.exists():
        reports.append(cached_report("--shipped", "--targets", "sm_90", second_triton=SECOND_TRITON))
    for made in reports:
        tables[made["triton"]] = budgets_of(made)
        errors = [cost for cost in made["costs"] if "error" in cost]
        print(
            f"triton {made['triton']}: {len(made['costs'])} kernels, {len(errors)} do not compile, {made['seconds']} s"
        )
    lines = []
    for version, targets_ in sorted(tables.items()):
        rows = [
            f"  {json.dumps(target)}: {{\n"
            + ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
            + "\n  }"
            for target, table in sorted(targets_.items())
        ]
        lines.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    rows = [f" {json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(census_of(reports[0]).items())]
    CENSUS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def still_fits(call):
    """Whether the launcher of a listed call is still there and takes as many arguments."""
    module, _, name = call[0].partition(".")
    launcher = getattr(importlib.import_module(f"fastattn.kernels.{module}"), name, None)
    with contextlib.suppress(TypeError, ValueError):
        return bool(inspect.signature(launcher).bind(*call[1:]))
    return False


def update_list(arguments, last_run):
    """The fewest calls (greedily) that make every launch of the tests; after a test run that just ended, those of before too."""
    if not last_run:
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, env=environment)
    note = json.loads(launches.NOTE.read_text()) if launches.NOTE.exists() else {}
    wanted = {key for keys in note.values() for key in keys}
    if not (wanted or last_run):
        sys.exit("the tests launched nothing, so the list stays as it is")
    calls = set(note)
    if last_run:
        calls |= {json.dumps(entry["call"]) for entry in launches.listed_calls()}
    calls = [json.loads(call) for call in sorted(calls)]
    calls = [call for call in calls if still_fits(call)]
    made = [set(keys) for keys, _ in collect(calls, "sm_90", processors=8)]
    if last_run:
        listed = {key for entry in launches.listed_calls() for key in entry["keys"]}
        wanted |= listed & set().union(*made)
    unreached = wanted - set().union(*made)
    for key in sorted(unreached):
        print(f"launched in the tests, but no launcher call makes it: {key}")
    entries, open_ = [], wanted - unreached
    while open_:
        best = max(range(len(calls)), key=lambda i: len(made[i] & open_))
        entries.append({"call": calls[best], "keys": sorted(made[best])})
        open_ -= made[best]
    entries.sort(key=lambda entry: json.dumps(entry["call"]))
    launches.LIST.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n")
    print(f"{launches.LIST.relative_to(ROOT)}: {len(wanted)} keys by {len(entries)} calls")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--add", action="store_true")
    parser.add_argument("--budgets", action="store_true")
    parser.add_argument("--report", metavar="FILE", type=pathlib.Path)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--shipped", action="store_true")
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    options, rest = parser.parse_known_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit("aot.py compiles, so TRITON_INTERPRET must not be set")
    if options.update or options.add:
        update_list(rest, last_run=options.add)
    if options.budgets:
        update_budgets()
    if options.report:
        options.report.write_text(json.dumps(report(options.all, options.targets, options.shipped), indent=1))


if __name__ == "__main__":
    main()
