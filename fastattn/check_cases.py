"""What `fastattn check` runs: every op on every backend in every dtype, forward and backward, against float64.

A case is one call, written once: `call(f, *inputs)` is made with f = fastattn.functional (ours) and with f = Specification
(fastattn.reference behind the same signatures). The rule is that of fastattn/check.py: at most twice the error of the best
stock torch call in the same dtype. Where the draw of a dropout mask is part of the case, stock torch draws another, so the
specification in the same dtype takes its place. Backend "torch" is that yardstick itself: its column asks whether it
computes the right thing, within 4 x the error of the specification in the same dtype.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable

import torch

from fastattn import backend, check, cuda, functional, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Specification:
    """fastattn.reference behind the signatures of fastattn.functional; after the same manual_seed it draws the ops' seed."""

    softmax, log_softmax = reference.softmax, reference.log_softmax
    scaled_masked_softmax = reference.scaled_masked_softmax
    layer_norm, rms_norm, bias_gelu = reference.layer_norm, reference.rms_norm, reference.bias_gelu

    linear_cross_entropy = reference.linear_cross_entropy

    def attention(q, *args, dropout_p=0.0, return_lse=False, return_weights=False, **options):
        o, lse, weights = reference.attention(
            q, *args, dropout_p=dropout_p, seed=backend.draw_seed(q), **options
        )
        result = (o, *((lse,) if return_lse else ()), *((weights,) if return_weights else ()))
        return result if len(result) > 1 else o

    def attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, **options):
        return reference.attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)[0]

    def attention_decode(*args, **options):
        return reference.attention_decode(*args, **options)[0]

    def scaled_dot_product_attention(q, k, v, attn_mask=None, is_causal=False):
        given = {} if attn_mask is None else {"mask" if attn_mask.dtype == torch.bool else "bias": attn_mask}
        return reference.attention(q, k, v, causal=is_causal, **given)[0]

    def add_layer_norm(x, *args, prenorm=False, **options):
        y, r = reference.add_layer_norm(x, *args, seed=backend.draw_seed(x), **options)
        return (y, r) if prenorm else y

    def add_rms_norm(x, *args, prenorm=False, **options):
        y, r = reference.add_rms_norm(x, *args, seed=backend.draw_seed(x), **options)
        return (y, r) if prenorm else y

    def add_positional_encoding(x, *args, **options):
        return reference.add_positional_encoding(x, *args, seed=backend.draw_seed(x), **options)

    def embeddings(ids, table, *args, **options):
        return reference.embeddings(ids, table, *args, seed=backend.draw_seed(table), **options)


@dataclasses.dataclass(frozen=True)
class Case:
    function: str  # of fastattn.functional
    label: str
    make: Callable  # () -> tuple of float32 inputs on the CPU; those of floating dtype are cast and get a gradient
    call: Callable  # (f, *inputs) -> tensor or tuple of tensors
    dropout: bool = False
    backward: bool = True


def _qkv(B=1, H=2, S_q=40, S_k=72, D=32, H_kv=None, D_v=None):
    H_kv, D_v = H_kv or H, D_v or D
    return torch.randn(B, H, S_q, D), torch.randn(B, H_kv, S_k, D), torch.randn(B, H_kv, S_k, D_v)


def _cache(D=32):
    return torch.randn(2, 4, 1, D), torch.randn(2, 2, 80, D), torch.randn(2, 2, 80, D), torch.tensor([80, 37])


def _pages(D=32):
    pages = torch.randn(12, 16, 2, D), torch.randn(12, 16, 2, D)
    return torch.randn(2, 4, 1, D), *pages, torch.tensor([80, 37]), torch.randperm(12)[:10].view(2, 5).int()


def _offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def _mask(*shape):
    return torch.rand(*shape) > 0.3


# fmt: off
CASES = (
    Case("softmax", "(5, 300)", lambda: (torch.randn(5, 300),), lambda f, x: f.softmax(x)),
    Case("softmax", "(3, 20, 7), dim 1", lambda: (8 * torch.randn(3, 20, 7),), lambda f, x: f.softmax(x, 1)),
    Case("log_softmax", "(5, 300)", lambda: (torch.randn(5, 300),), lambda f, x: f.log_softmax(x)),
    Case("scaled_masked_softmax", "mask, causal", lambda: (torch.randn(2, 2, 17, 24), _mask(2, 1, 1, 24)),
         lambda f, x, mask: f.scaled_masked_softmax(x, mask, 0.3, True)),
    Case("layer_norm", "weight, bias", lambda: (torch.randn(9, 300), torch.randn(300), torch.randn(300)),
         lambda f, x, w, b: f.layer_norm(x, (300,), w, b)),
    Case("layer_norm", "two dims, no weight", lambda: (torch.randn(5, 3, 40),), lambda f, x: f.layer_norm(x, (3, 40))),
    Case("rms_norm", "weight", lambda: (torch.randn(9, 300), torch.randn(300)),
         lambda f, x, w: f.rms_norm(x, (300,), w, 1e-6)),
    Case("add_layer_norm", "pre-norm, dropout", lambda: (torch.randn(9, 96), torch.randn(9, 96), torch.randn(96), torch.randn(96)),
         lambda f, x, r, w, b: f.add_layer_norm(x, r, (96,), w, b, dropout_p=0.3, prenorm=True), dropout=True),
    Case("add_layer_norm", "post-norm", lambda: (torch.randn(9, 96), torch.randn(9, 96), torch.randn(96), torch.randn(96)),
         lambda f, x, r, w, b: f.add_layer_norm(x, r, (96,), w, b)),
    Case("add_rms_norm", "pre-norm", lambda: (torch.randn(9, 96), torch.randn(9, 96), torch.randn(96)),
         lambda f, x, r, w: f.add_rms_norm(x, r, (96,), w, 1e-6, prenorm=True)),
    Case("bias_gelu", "erf, bias", lambda: (torch.randn(9, 600), torch.randn(600)), lambda f, x, b: f.bias_gelu(x, b)),
    Case("bias_gelu", "tanh, no bias", lambda: (3 * torch.randn(2, 5, 96),), lambda f, x: f.bias_gelu(x, approximate="tanh")),
    Case("linear_cross_entropy", "mean, ignored", lambda: (torch.randn(12, 32), torch.randn(300, 32), torch.randint(-1, 300, (12,))),
         lambda f, x, w, targets: f.linear_cross_entropy(x, w, targets, ignore_index=-1)),
    Case("linear_cross_entropy", "bias, softcap, a loss each",
         lambda: (torch.randn(3, 4, 32), torch.randn(300, 32), torch.randint(300, (3, 4)), torch.randn(300)),
         lambda f, x, w, targets, b: f.linear_cross_entropy(x, w, targets, bias=b, softcap=5.0, reduction="none")),
    Case("add_positional_encoding", "sinusoidal, scale", lambda: (torch.randn(2, 11, 96),),
         lambda f, x: f.add_positional_encoding(x, offset=3, scale=96**0.5)),
    Case("add_positional_encoding", "table, ids, dropout", lambda: (torch.randn(2, 11, 96), torch.randn(20, 96), torch.randint(20, (2, 11))),
         lambda f, x, table, ids: f.add_positional_encoding(x, table, position_ids=ids, dropout_p=0.2), dropout=True),
    Case("embeddings", "tokens, positions", lambda: (torch.randint(30, (2, 11)), torch.randn(30, 96), torch.randn(20, 96)),
         lambda f, ids, tokens, positions: f.embeddings(ids, tokens, positions)),
    Case("embeddings", "types, norm, dropout",
         lambda: (torch.randint(30, (2, 11)), torch.randn(30, 96), torch.randn(20, 96), torch.randint(2, (2, 11)), torch.randn(2, 96),
                  torch.randn(96), torch.randn(96)),
         lambda f, ids, tokens, positions, types, type_table, w, b: f.embeddings(
             ids, tokens, positions, type_ids=types, type_table=type_table, norm_weight=w, norm_bias=b, padding_idx=0, dropout_p=0.1),
         dropout=True),
    Case("attention", "full", _qkv, lambda f, q, k, v: f.attention(q, k, v)),
    # of head dims that Hopper has a kernel of its own for, more keys than two of its tiles
    Case("attention", "D 64, tiles, GQA", lambda: _qkv(H_kv=1, S_q=140, S_k=300, D=64), lambda f, q, k, v: f.attention(q, k, v), backward=False),
    Case("attention", "D 128, tiles", lambda: _qkv(H=1, S_q=260, S_k=270, D=128), lambda f, q, k, v: f.attention(q, k, v, causal=True, return_lse=True), backward=False),
    Case("attention", "causal, D 80", lambda: _qkv(S_q=72, D=80), lambda f, q, k, v: f.attention(q, k, v, causal=True)),
    Case("attention", "bottom-right, GQA, D_v", lambda: _qkv(H=4, H_kv=2, D_v=48), lambda f, q, k, v: f.attention(q, k, v, causal="bottom_right")),
    Case("attention", "bias (1, 1, S, S)", lambda: (*_qkv(B=2), torch.randn(1, 1, 40, 72)), lambda f, q, k, v, b: f.attention(q, k, v, bias=b)),
    Case("attention", "bias (B, 1, 1, S), mask", lambda: (*_qkv(B=2), torch.randn(2, 1, 1, 72), _mask(1, 2, 40, 72)),
         lambda f, q, k, v, b, m: f.attention(q, k, v, bias=b, mask=m)),
    Case("attention", "lengths, LSE", lambda: (*_qkv(B=2), torch.tensor([40, 13]), torch.tensor([9, 72])),
         lambda f, q, k, v, n, m: f.attention(q, k, v, q_lens=n, kv_lens=m, return_lse=True)),
    Case("attention", "window, softcap", _qkv, lambda f, q, k, v: f.attention(q, k, v, causal="bottom_right", window=(16, None), softcap=5.0)),
    Case("attention", "ALiBi, sinks", lambda: (*_qkv(), torch.rand(2)), lambda f, q, k, v, s: f.attention(q, k, v, causal=True, alibi_slopes=torch.linspace(0.5, 0.1, 2, device=q.device), sinks=s)),
    Case("attention", "dropout", _qkv, lambda f, q, k, v: f.attention(q, k, v, dropout_p=0.25, return_lse=True), dropout=True),
    Case("attention", "weights", _qkv, lambda f, q, k, v: f.attention(q, k, v, causal=True, return_weights=True), backward=False),
    Case("attention_varlen", "causal", lambda: (torch.randn(60, 4, 32), torch.randn(70, 4, 32), torch.randn(70, 4, 32), _offsets(20, 1, 39), _offsets(5, 26, 39)),
         lambda f, q, k, v, a, b: f.attention_varlen(q, k, v, a, b, 39, 39, causal="bottom_right")),
    Case("attention_decode", "cache", _cache, lambda f, *inputs: f.attention_decode(*inputs), backward=False),
    Case("attention_decode", "pages", _pages, lambda f, *inputs: f.attention_decode(*inputs[:4], block_table=inputs[4]), backward=False),
    Case("scaled_dot_product_attention", "bool mask", lambda: (*_qkv(), _mask(40, 72)), lambda f, *inputs: f.scaled_dot_product_attention(*inputs)),
    Case("scaled_dot_product_attention", "causal", _qkv, lambda f, q, k, v: f.scaled_dot_product_attention(q, k, v, is_causal=True)),
)
# fmt: on


@dataclasses.dataclass
class Result:
    function: str
    label: str
    dtype: str
    backend: str
    state: str  # "right", "refused", "wrong" or "uncompared"
    sentence: str = ""
    called: tuple = ()  # the ops, as fastattn.backend counts them, that `backend` computed


def explained(device):
    """{public function: (the op as backend.py counts it, {backend: "serves" or "refused, why"})}, by its first case."""
    return {name: _explained(name, device) for name in functional.__all__}


def _explained(name, device):
    case = next(case for case in CASES if case.function == name)
    inputs = [t.to(device) for t in case.make()]
    said = backend.explain(lambda *inputs: case.call(functional, *inputs), *inputs)
    lines = [line.partition(": ") for line in said.splitlines()[1:]]
    return lines[0][0].partition(", ")[0], {of.partition(", ")[2]: sentence for of, _, sentence in lines}


def run(device, name, functions=None):
    """A Result for each case and dtype on backend `name`. On a CPU the caller has put Triton into its interpreter."""
    for case in CASES:
        if functions is None or case.function in functions:
            for dtype in DTYPES:
                yield _one(case, dtype, torch.device(device), name)


def broken_rules(case, name, inputs, grad_outputs=None):
    """What check.check says of the case with these inputs, as they lie, on backend `name`, which may refuse them."""

    def seeded(f, forced):
        def call(*inputs):
            torch.manual_seed(1)
            with backend.use_backend(forced):
                return case.call(f, *inputs)

        return call

    stock = seeded(functional, "torch") if name != "torch" and not case.dropout else None
    ours, specification = seeded(functional, name), seeded(Specification, None)
    return check.check(ours, specification, inputs, baseline=stock, grad_outputs=grad_outputs)


def _one(case, dtype, device, name):
    def placed(t):
        t = t.to(device, dtype) if t.is_floating_point() else t.to(device)
        return t.requires_grad_(case.backward and t.is_floating_point())

    result = Result(case.function, case.label, str(dtype).removeprefix("torch."), name, "right")
    torch.manual_seed(0)
    inputs = [placed(t) for t in case.make()]
    if name == "torch" and case.dropout:
        result.state, result.sentence = (
            "uncompared",
            "stock torch draws its own dropout mask, which has no reference",
        )
        return result
    before = backend.calls.copy()
    try:
        wrong = broken_rules(case, name, inputs)
    except NotImplementedError as e:
        result.state, result.sentence = "refused", str(e)
    except Exception as e:  # the table says what broke, for every case
        result.state, result.sentence = "wrong", f"{type(e).__name__}: {e}"
    else:
        if wrong:
            result.state, result.sentence = "wrong", "; ".join(wrong)
    result.called = tuple(
        op for op, used in backend.calls if used == name and backend.calls[op, used] > before[op, used]
    )
    return result


def run_interpreted(functions=None):
    """The same for Triton on a machine with no GPU: its interpreter, which needs a process of its own."""
    work = _work(["triton"], functions)
    yield from run_apart("cpu", work, {"TRITON_INTERPRET": "1"}, math.inf)


def _work(backends, functions):
    """[backend, number of a case, dtype] of each result."""
    chosen = [i for i, case in enumerate(CASES) if functions is None or case.function in functions]
    return [
        [name, i, str(dtype).removeprefix("torch.")] for name in backends for i in chosen for dtype in DTYPES
    ]


SECONDS = 90  # for one case, most of which are the compiler's; a kernel that takes longer hangs


def run_in_processes(device, work):
    """A Result for each of `work`, as they come, from several processes: the cores share what is to be compiled, and a
    kernel that hangs or faults is the end of its own process.
    """
    shares = max(1, min(14, (os.cpu_count() or 2) - 1, len(work) // 4))
    found = queue.SimpleQueue()

    def share(i):
        try:
            for result in run_apart(device, work[i::shares]):
                found.put(result)
        except Exception as e:
            found.put(e)

    threads = [threading.Thread(target=share, args=(i,), daemon=True) for i in range(shares)]
    for thread in threads:
        thread.start()
    for _ in work:
        result = found.get()
        if isinstance(result, Exception):
            raise result
        yield result


def run_apart(device, work, environment=None, seconds=None, module="fastattn.check_cases"):
    """A Result for each of `work`, from a process; what ends or outlasts it is wrong, and another goes on with the rest."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {})
    while work:
        command = [sys.executable, "-m", module, str(device), json.dumps(work)]
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=said, text=True, env=environment
            ) as process,
        ):
            for line in _lines(process, SECONDS if seconds is None else seconds):
                yield Result(**json.loads(line))
                work = work[1:]
            late = process.poll() is None
            process.kill()
            process.wait()
            said.seek(0)
            last = (said.read().strip().splitlines() or [""])[-1]
        if work:
            name, i, dtype = work[0]
            sentence = (
                "did not end" if late else f"its process ended with status {process.returncode}: {last}"
            )
            op = _explained(CASES[i].function, "cpu")[0]
            yield Result(CASES[i].function, CASES[i].label, dtype, name, "wrong", sentence, (op,))
            work = work[1:]


def _lines(process, seconds):
    """The lines that a process prints, until it ends or has said nothing for so long."""
    lines = queue.SimpleQueue()

    def read():
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        yield from iter(lambda: lines.get(timeout=None if seconds == math.inf else seconds), None)
        process.wait()


def check_all(device, functions, shown):
    """([Result], [why a backend was left out]) of every backend that exists here; `shown(results, total)` may show progress."""
    backends, skipped = ["torch"], []
    if backend.triton_found():
        backends.append("triton")
    else:
        skipped.append("triton: not installed (pip install triton)")
    reason = cuda.not_emulated() if device.type == "cpu" else cuda.unavailable()
    if reason is None:
        backends.append("cuda")
    else:
        skipped.append(f"cuda: {reason}")
    work = _work(backends, functions)
    if device.type == "cpu":
        columns = {name: functools.partial(run, device, name, functions) for name in backends}
        columns["triton"] = functools.partial(run_interpreted, functions)
        found = (result for name in backends for result in columns[name]())
    else:
        found = run_in_processes(device, work)
    order = {(name, CASES[i].function, CASES[i].label, dtype): at for at, (name, i, dtype) in enumerate(work)}
    results = list(shown(found, len(work)))
    return sorted(results, key=lambda r: order[r.backend, r.function, r.label, r.dtype]), skipped


def record(device, results):
    """Write this card's verdict: for each backend, the ops that were right in every case of a whole run that called them."""
    path, key = backend.verdict_path(), backend.verdict_key(device)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    ops = {}
    for name in ("cuda", "triton"):
        mine = [r for r in results if r.backend == name]
        wrong = {op for r in mine if r.state == "wrong" for op in r.called}
        ops[name] = sorted({op for r in mine for op in r.called} - wrong)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {key: ops}, indent=1))
    backend.verdict.cache_clear()
    return path, ops


if __name__ == "__main__":
    place = torch.device(sys.argv[1])
    if place.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        importlib.import_module("fastattn.interpreter")  # repairs bf16

    warnings.simplefilter("ignore")
    for named, number, of in json.loads(sys.argv[2]):
        found = _one(CASES[number], getattr(torch, of), place, named)
        print(json.dumps(dataclasses.asdict(found)), flush=True)
