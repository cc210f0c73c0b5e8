"""One case becomes rows: every provider is checked first, and only what is right is timed."""

import contextlib
import math

import torch

from fastattn import backend, check
from fastattn.benchmarks import timing
from fastattn.models.training import peak_flops

COLUMNS = (
    "op", "shape", "dtype", "pass", "provider", "median_us", "p20_us", "p80_us", "sustained_us", "graph_us", "host_us",
    "predicted_us", "tokens_s", "mfu", "tb_s", "ceiling_share", "tflop_s", "matmul_share", "cycle_share", "speedup", "peak_mb", "error",
    "eager_error", "elements", "N", "sm_mhz", "power_w", "note", "failed",
)  # fmt: skip


def measure(case, device, ceilings, seconds=1.0):
    """The rows of one case, forward then backward: dicts with the keys of COLUMNS, None where a figure does not apply.

    seconds: how long a pass of all providers is sampled for, and how long each then runs back to back on a GPU. A provider that is wrong, refuses or raises gets
    its sentence in `note` and no time; `failed` marks those that are ours and not merely refused.
    """
    torch.manual_seed(0)
    inputs = case.inputs(device)
    calls, rows = {}, {}
    for name, (function, forced) in providers(case, device).items():
        for direction in passes(case, inputs):
            rows[name, direction] = dict.fromkeys(COLUMNS) | {
                "op": case.op, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."),
                "pass": direction, "provider": name, "note": "", "failed": False, "elements": case.elements, "N": case.N,
            }  # fmt: skip
        calls[name] = function, forced
    _check(case, inputs, calls, rows)
    for direction in passes(case, inputs):
        right = {name: calls[name] for name in calls if not rows[name, direction]["note"]}
        timed = {name: rows[name, direction] for name in right}
        if right:
            (_time_on_gpu if timing.is_gpu(device) else _time_on_cpu)(
                case, inputs, right, timed, direction, seconds, device
            )
        for row in timed.values():
            _derive(row, timed.get("eager"), case, ceilings, device)
    return [rows[name, direction] for direction in passes(case, inputs) for name in calls]


def providers(case, device):
    """{name: (function, backend to force)}; a GPU times each of our fused backends and the peers as well."""
    if not timing.is_gpu(device):
        return {name: (case.providers[name], None) for name in ("eager", "fastattn")}
    found = {"eager": (case.providers["eager"], None)}
    found |= {
        f"fastattn {name}": (case.providers["fastattn"], name) for name in backend.ORDER if name != "torch"
    }
    if case.model and (backend.PROVEN or backend.verdict(device)):
        found["fastattn"] = (case.providers["fastattn"], None)
    peers = {n: f for n, f in case.providers.items() if f is not None and n not in ("eager", "fastattn")}
    return found | {name: (function, None) for name, function in peers.items()}


def passes(case, inputs):
    asks = any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
    return ("forward", "backward") if asks and case.backward else ("forward",)


@contextlib.contextmanager
def _under(forced):
    """The backend to force, if any; peers and eager run with none forced."""
    with backend.use_backend(forced) if forced else contextlib.nullcontext():
        yield


def _check(case, inputs, calls, rows):
    """Write each provider's errors into its rows, and the sentence of what is wrong into `note`."""
    part = case.part or (lambda t: t)
    cut = lambda tensors: [part(t).detach() if isinstance(t, torch.Tensor) else t for t in tensors]  # noqa: E731

    def again(dtype=None):
        """The parts as fresh leaves, floating ones in `dtype`."""
        for t, original in zip(cut(inputs), inputs, strict=True):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                t = t.to(dtype or t.dtype).clone().requires_grad_(original.requires_grad)
            yield t

    def seeded(function, tensors, grads):
        torch.manual_seed(1)
        # copies, since some peers write their gradient over the incoming one
        return check.run(function, tuple(tensors), [g if g is None else g.clone() for g in grads], {})

    eager = case.providers["eager"]
    try:
        with torch.no_grad():
            outputs = _tuple(eager(*inputs))
        backward = "backward" in passes(case, inputs)
        full = [torch.randn_like(o) if backward and o.is_floating_point() else None for o in outputs]
        parts = [g if g is None else part(g) for g in full]
        exact = seeded(case.reference, again(torch.float64), parts)
        base = seeded(case.reference if case.random else eager, again(), parts)
    except torch.cuda.OutOfMemoryError:
        _refuse(
            rows.values(), "not checked, so not timed: the float64 reference does not fit into memory", False
        )
        return
    for name, (function, forced) in calls.items():
        mine, ours = (
            [row for (provider, _), row in rows.items() if provider == name],
            name.startswith("fastattn"),
        )
        try:
            with _under(forced):
                got = [cut(tensors) for tensors in seeded(function, inputs, full)]
        except NotImplementedError as e:
            _refuse(mine, f"refused: {e}", False)
        except torch.cuda.OutOfMemoryError:
            _refuse(mine, "out of memory", False)
        except Exception as e:  # a peer may raise anything; the row says what
            _refuse(mine, _first_line(e), ours)
        else:
            if not case.random or forced:
                _compare(mine, name, ours, got, base, exact)


def _compare(rows, name, ours, got, base, exact):
    for row, kind, *tensors in zip(rows, ("output", "gradient"), got, base, exact, strict=False):
        numbered = list(enumerate(zip(*tensors, strict=True)))
        row["error"] = max(_error(mine, want) for _, (mine, _, want) in numbered)
        row["eager_error"] = max(_error(theirs, want) for _, (_, theirs, want) in numbered)
        wrong = [sentence for i, triple in numbered if (sentence := check.compare(f"{kind} {i}", *triple))]
        if wrong and name != "eager":
            row["note"], row["failed"] = "; ".join(wrong), ours
    if any(row["failed"] for row in rows):  # one wrong pass makes the other not worth timing
        for row in rows:
            row["note"], row["failed"] = row["note"] or "not timed: the other pass is wrong", True


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _refuse(rows, sentence, failed):
    for row in rows:
        row["note"], row["failed"] = sentence, failed


def _first_line(e):
    return f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}"


def _error(t, exact):
    difference = (t.double() - exact.double()).abs().nan_to_num(0.0, 0.0)  # equal infinities
    return float(difference.detach().max()) if difference.numel() else 0.0


def one_pass(function, forced, inputs, direction, outer):
    """A function of nothing that does one pass. `outer` forces the backend inside each call, for interleaving."""
    if direction == "forward":

        def once():
            with torch.no_grad():
                return function(*inputs)

    else:
        with _under(forced):
            outputs = [o for o in _tuple(function(*inputs)) if o.requires_grad]
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = [torch.randn_like(o) for o in outputs]

        def once():
            return torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    if not (outer and forced):
        return once

    def forcing():
        with backend.use_backend(forced):
            return once()

    return forcing


def _time_on_cpu(case, inputs, calls, rows, direction, seconds, device):
    ready = {name: one_pass(*call, inputs, direction, True) for name, call in calls.items()}
    for name, samples in timing.cpu_times(ready, seconds).items():
        rows[name]["p20_us"], rows[name]["median_us"], rows[name]["p80_us"] = timing.quantiles(samples)


def _time_on_gpu(case, inputs, calls, rows, direction, seconds, device):
    ready = {}
    for name, call in calls.items():
        try:
            ready[name] = one_pass(*call, inputs, direction, True)
            ready[name](), ready[name]()  # some peers cannot go back twice
        except Exception as e:
            rows[name]["note"], rows[name]["failed"] = _first_line(e), name.startswith("fastattn")
            ready.pop(name, None)
    if not ready:
        return
    for name, samples in timing.gpu_times(ready, seconds, device, hide_host=not case.model).items():
        rows[name]["p20_us"], rows[name]["median_us"], rows[name]["p80_us"] = timing.quantiles(samples)
    nbytes = sum(t.numel() * t.element_size() for t in inputs if isinstance(t, torch.Tensor))
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    copies = max(1, min(timing.GRAPH_CALLS, math.ceil(4 * l2 / max(nbytes, 1))))
    rotated = [case.make(device) for _ in range(copies)]
    for name in ready:
        row, (function, forced) = rows[name], calls[name]
        once = one_pass(function, forced, inputs, direction, False)
        with _under(forced):
            row["host_us"] = timing.host_time(once)
            row["sustained_us"], row["sm_mhz"], row["power_w"] = timing.sustained(once, seconds)
            row["peak_mb"] = timing.peak_memory(lambda f=function: _whole(f, inputs, direction)) / 1e6
            try:
                row["graph_us"] = _graph(function, forced, rotated, direction, row["median_us"])
            except Exception as e:  # what cannot be captured is told, not hidden
                torch.cuda.synchronize()
                row["note"] = f"no CUDA graph: {_first_line(e)}"


def _graph(function, forced, rotated, direction, microseconds):
    stream = (
        torch.cuda.Stream()
    )  # autograd runs a backward on the stream of its forward, which must be the captured one
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = [one_pass(function, forced, inputs, direction, False) for inputs in rotated]
    return timing.graph_time(calls, stream, microseconds)


def _whole(function, inputs, direction):
    """The pass from the start, so that its peak memory counts what forward keeps for backward."""
    if direction == "forward":
        with torch.no_grad():
            return function(*inputs)
    outputs = [o for o in _tuple(function(*inputs)) if o.requires_grad]
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])


def _derive(row, eager, case, ceilings, device):
    """Rates, shares of what was measured in this run, what was predicted, and the speed-up over eager (none on a CPU)."""
    if row["median_us"] is None:
        return
    work = case.forward if row["pass"] == "forward" else case.backward
    moved = work.read + work.write
    row["tb_s"] = moved / row["median_us"] / 1e6
    if work.flops:
        row["tflop_s"] = work.flops / row["median_us"] / 1e6
    if case.tokens:
        row["tokens_s"] = case.tokens / row["median_us"] * 1e6
    if not timing.is_gpu(device):
        return
    if work.flops and (peak := peak_flops(device)):
        row["mfu"] = work.flops / row["median_us"] * 1e6 / peak
    if eager and eager["median_us"]:
        row["speedup"] = eager["median_us"] / row["median_us"]
    if work.flops and "matmul" in ceilings:
        row["matmul_share"] = work.flops / row["sustained_us"] / 1e6 / ceilings["matmul"]
    elif ceilings and not work.flops:
        rate = timing.mix_rate(ceilings, work)
        row["ceiling_share"] = row["tb_s"] / rate
        row["predicted_us"] = ceilings["t0_us"] + moved / rate / 1e6
    per_clock = timing.FLOPS_PER_CLOCK.get(torch.cuda.get_device_capability(device))
    if work.flops and per_clock and row["sm_mhz"]:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        fastest = work.flops / (row["sm_mhz"] * processors * per_clock)
        row["cycle_share"] = fastest / row["sustained_us"]
        if row["pass"] == "forward" and (share := case.predicted.get(row["provider"])):
            row["predicted_us"] = fastest / share
