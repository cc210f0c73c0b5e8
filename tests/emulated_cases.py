"""Calls of the row ops whose bounds, tails and strides a kernel must get right, on the CUDA backend with CPU tensors.

    python tests/emulated_cases.py [--extension FILE.so] [--orders fifo,reverse,random,pct] [OP ...]

runs them against an emulated extension, such as one built with a sanitizer, and fails at the first that is wrong: by the
rule of fastattn/check.py in the first order, and by any other bit in the others.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import math
import pathlib
import sys
from unittest import mock

import attention_cases
import torch

from fastattn import backend, cuda, functional
from fastattn.check import compare, run
from fastattn.check_cases import CASES, Case, Specification
from fastattn.cuda import position

ORDERS = {
    "fifo": (0, 1),
    "reverse": (1, 1),
    "random": (2, 1),
    "random 2": (2, 2),
    "pct": (3, 1),
    "pct 2": (3, 2),
}
OF_ROWS = ("softmax", "log_softmax", "scaled_masked_softmax", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm",
           "add_positional_encoding", "embeddings")  # fmt: skip
OF_ATTENTION = ("attention", "attention_varlen", "attention_decode", "scaled_dot_product_attention")
# rows and columns: tails of a vector, of a warp's share and of a block's; several rows to a block, the last one part empty
SIZES = (
    (5, 1),
    (301, 7),
    (301, 8),
    (70, 9),
    (301, 40),
    (33, 200),
    (5, 513),
    (3, 1024),
    (3, 1537),
    (2, 3000),
    (2, 5000),
    (1, 33000),
)
LAYOUTS = {
    "as is": (lambda M, N: (M, N), lambda x, M, N: x),
    "unaligned": (lambda M, N: (M * N + 1,), lambda x, M, N: x[1:].view(M, N)),
    "every second column": (lambda M, N: (M, 2 * N), lambda x, M, N: x[:, ::2]),
    "wider rows": (lambda M, N: (M, N + 3), lambda x, M, N: x[:, :N]),
    "transposed": (lambda M, N: (N, M), lambda x, M, N: x.t()),
}


def row(function, M, N, layout, others, call, dropout=False):
    """A case: x (M, N) in a layout, and further inputs of the given shapes."""
    shape, view = LAYOUTS[layout]
    return Case(
        function,
        f"({M}, {N}) {layout}",
        lambda: (torch.randn(shape(M, N)), *(torch.randn(o) for o in others)),
        lambda f, x, *rest: call(f, view(x, M, N), *rest),
        dropout,
    )


def norm(name, M, N, layout, **options):
    weights = ((N,),) if "rms" in name else ((N,), (N,))
    if not name.startswith("add_"):
        return row(name, M, N, layout, weights, lambda f, x, *rest: getattr(f, name)(x, (N,), *rest))
    return row(
        name, M, N, layout, ((M, N), *weights),
        lambda f, x, r, *rest: getattr(f, name)(x, r, (N,), *rest, **options), "dropout_p" in options,
    )  # fmt: skip


def positions(M, N, layout, table):
    others = ((M + 2, N),) if table else ()
    return row(
        "add_positional_encoding", M, N, layout, others,
        lambda f, x, *table: f.add_positional_encoding(x, *table, offset=2, scale=1.5, dropout_p=0.25), True,
    )  # fmt: skip


def lookups(M, N, norm):
    def make():
        ids, types = torch.randint(9, (2, M)), torch.randint(2, (2, M))
        weights = (torch.randn(N), torch.randn(N)) if norm else (None, None)
        return ids, torch.randn(9, N), torch.randn(M, N), types, torch.randn(2, N), *weights[: 2 * norm]

    def call(f, ids, tokens, positions, types, type_table, weight=None, bias=None):
        options = dict(
            type_ids=types, type_table=type_table, norm_weight=weight, norm_bias=bias, padding_idx=0
        )
        return f.embeddings(ids, tokens, positions, dropout_p=0.1, **options)

    return Case("embeddings", f"({M}, {N}){' norm' * norm}", make, call, True)


def sized(M, N, layout):
    yield row("softmax", M, N, layout, (), lambda f, x: f.softmax(x))
    yield row("log_softmax", M, N, layout, (), lambda f, x: f.log_softmax(x))
    yield row("softmax", M, N, layout, (), lambda f, x: f.softmax(x, 0))
    if layout == "as is":
        yield from masked(M, N, torch.rand(M, N) > 0.2)
    yield norm("layer_norm", M, N, layout)
    yield norm("add_layer_norm", M, N, layout, prenorm=True, dropout_p=0.25)
    if N < 32768:  # these are the same kernels
        yield norm("rms_norm", M, N, layout)
        yield norm("add_rms_norm", M, N, layout)
    if N % 2 == 0:
        yield positions(M, N, layout, False)
    yield positions(M, N, layout, True)
    if layout == "as is" and N < 2048:
        yield lookups(M, N, False)
        yield lookups(M, N, True)


def masked(M, N, mask, heads=()):
    for causal in (False, True):
        yield Case(
            "scaled_masked_softmax", f"{(*heads, M, N)} as is, mask {tuple(mask.shape)}{', causal' * causal}",
            lambda: (torch.randn(*heads, M, N),),
            lambda f, x, causal=causal: f.scaled_masked_softmax(x, mask, 0.7, causal),
        )  # fmt: skip


def walks(B, S, N):
    """So many rows that a thread has several."""
    label = f"({B}, {S}, {N}) as is"

    def encoded(name, make, **options):
        return Case(
            "add_positional_encoding", f"{label}, {name}", make,
            lambda f, x, *table: f.add_positional_encoding(x.transpose(0, 1) if x.shape[0] == S else x, *table, **options),
            "dropout_p" in options,
        )  # fmt: skip

    def tables():
        return torch.randn(B, S, N), torch.randn(S + 5, N)

    ids = torch.randint(S + 5, (S, B)).t()
    if N % 2 == 0:
        yield encoded("sinusoids", lambda: (torch.randn(B, S, N),), offset=7)
        yield encoded("sinusoids, ids", lambda: (torch.randn(B, S, N),), position_ids=ids, scale=3.0)
    yield encoded("table", tables, offset=5, dropout_p=0.25)
    yield encoded("rows of x apart", lambda: (torch.randn(S, B, N), torch.randn(S, N)))
    yield encoded("ids", tables, position_ids=ids)
    yield encoded("the same ids for all", tables, position_ids=ids[0], dropout_p=0.25)
    yield Case(
        "embeddings", f"{label}, no gradient for the norm",
        lambda: (torch.randint(9, (B, S)), torch.randn(9, N), torch.randn(S + 5, N), torch.randn(N)),
        lambda f, i, tokens, table, w: f.embeddings(i, tokens, table, norm_weight=w.detach()),
    )  # fmt: skip
    for positions in (None, ids, ids[0]):
        for types in (None, torch.randint(2, (B, S))):
            yield Case(
                "embeddings", f"{label}, {positions is not None and tuple(positions.shape)}, {types is not None}",
                lambda: (torch.randint(9, (B, S)), torch.randn(9, N), torch.randn(S + 5, N), torch.randn(2, N), torch.randn(N)),
                lambda f, i, tokens, table, type_table, w, positions=positions, types=types: f.embeddings(
                    i, tokens, table, position_ids=positions, type_ids=types, type_table=type_table, norm_weight=w
                ),
            )  # fmt: skip


def turned(N):
    """Gradients that are strided along the row, and what is large."""
    yield row("softmax", 33, N, "as is", (), lambda f, x: f.softmax(x * 300))
    yield row("log_softmax", 33, N, "as is", (), lambda f, x: f.log_softmax(x * 300))
    first = torch.tensor([0])
    yield row("softmax", 33, N, "as is", (), lambda f, x: f.softmax(x.index_fill(1, first, 900.0)))
    for name in ("softmax", "log_softmax"):
        yield row(name, 33, N, "as is", (), lambda f, x, name=name: getattr(f, name)(x).t())
    yield row("layer_norm", 33, N, "as is", ((N,), (N,)), lambda f, x, *wb: f.layer_norm(x, (N,), *wb).t())
    yield row(
        "add_rms_norm", 33, N, "as is", ((33, N), (N,)),
        lambda f, x, r, w: tuple(t.t() for t in f.add_rms_norm(x, r, (N,), w, prenorm=True)),
    )  # fmt: skip
    yield row(
        "add_positional_encoding",
        33,
        N,
        "as is",
        ((33, N),),
        lambda f, *xt: f.add_positional_encoding(*xt).t(),
    )


def softmax_in(f, x, dim, dtype):
    if f is functional:
        return f.softmax(x, dim, dtype=dtype)
    return f.softmax(x + (x.to(dtype) - x).detach(), dim)  # the specification of a number rounded to dtype


def mixed(N):
    """Other dtypes than x's, and rows whose leading dims do not lie evenly."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for dim in (0, 1):
            yield row(
                "softmax", 33, N, "as is", (), lambda f, x, dtype=dtype, dim=dim: softmax_in(f, x * 30, dim, dtype)
            )  # fmt: skip
    for name, (B, S) in itertools.product(("softmax", "layer_norm", "rms_norm"), ((2, 33), (33, 2))):
        weights = () if name == "softmax" else ((N,),)
        yield Case(
            name, f"({S}, {B}, {N}) from ({B}, {S}, {N})",
            lambda weights=weights, shape=(B, S, N): (torch.randn(shape), *(torch.randn(w) for w in weights)),
            lambda f, x, *w, name=name: getattr(f, name)(x.transpose(0, 1), *([(N,)] if w else []), *w),
        )  # fmt: skip
    yield row(
        "layer_norm", 33, N, "as is", ((N,), (N,)),
        lambda f, x, w, b: f.layer_norm(x, (N,), w.float(), b.float()),
    )  # fmt: skip
    yield row(
        "add_layer_norm",
        33,
        N,
        "as is",
        ((N, 33), (N,)),
        lambda f, x, r, w: f.add_layer_norm(x, r.t(), (N,), w),
    )
    yield row(
        "add_layer_norm", 33, N, "as is", ((33, N), (N,), (N,)),
        lambda f, x, r, w, b: f.add_layer_norm(x, r.float(), (N,), w, b, prenorm=True),
    )  # fmt: skip


def cases(functions=()):
    """Every case, the small ones first."""
    torch.manual_seed(0)
    found = [c for M, N in SIZES[:9] for c in sized(M, N, "as is")]
    layouts = [((M, N), layout) for M, N in ((301, 8), (33, 200), (5, 513)) for layout in list(LAYOUTS)[1:]]
    found += [c for size, layout in layouts for c in sized(*size, layout)]
    found += [c for N in (40, 513, 1024) for c in mixed(N)]
    found += [c for N in (8, 9, 200, 513) for c in turned(N)]
    found += [
        c for B, S, N in ((17, 3, 40), (17, 3, 513), (17, 3, 200), (2, 33, 200)) for c in walks(B, S, N)
    ]
    found += [c for M, N in ((33, 40), (5, 513)) for c in masked(M, N, torch.rand(2, 1, 1, N) > 0.5, (2, 3))]
    found += [c for M, N in ((33, 40), (260, 513)) for c in masked(M, N, torch.rand(M, 1) > 0.1)]
    found += [c for M, N in SIZES[9:] for c in sized(M, N, "as is")]
    found += [dataclasses.replace(c, label=f"check: {c.label}") for c in CASES]
    found += attention_cases.cases()
    return [c for c in found if c.function in (functions or OF_ROWS + OF_ATTENTION)]


def some(functions=(), every=1, dtype=torch.float32):
    """The cases of row ops in `dtype`; of attention's every so-many-th, in one of its two dtypes and the other in turn."""
    found = cases(functions)
    yield from ((c, dtype) for c in found if c.function in OF_ROWS)
    two = (torch.float16, torch.bfloat16)
    halves = itertools.cycle(two[::-1] if dtype == torch.bfloat16 else two)
    yield from zip([c for c in found if c.function in OF_ATTENTION][::every], halves, strict=False)


def inputs_of(case, dtype):
    torch.manual_seed(0)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in case.make()]
    return [t.requires_grad_(case.backward and t.is_floating_point()) for t in inputs]


class Expectation:
    """What a case has to give: the specification's outputs and gradients, and those of the best stock call."""

    def __init__(self, case, dtype):
        self.case, self.inputs = case, inputs_of(case, dtype)
        exact = [t.detach().double() if t.is_floating_point() else t for t in self.inputs]
        exact = [t.requires_grad_(case.backward and t.is_floating_point()) for t in exact]
        outputs = self.call(Specification, None, exact)
        self.grads = [torch.randn(t.shape).to(dtype) for t in outputs]
        self.exact = self.all_of(outputs, exact)
        base = (Specification, None) if case.dropout else (functional, "torch")
        self.base = self.all_of(self.call(*base, self.inputs), self.inputs)

    def call(self, f, forced, inputs):
        torch.manual_seed(1)
        with backend.use_backend(forced):
            outputs = self.case.call(f, *inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def all_of(self, outputs, inputs):
        return [t for part in run(lambda *_: outputs, inputs, self.grads, {}) for t in part]

    def ours(self, backward=True):
        """Outputs and gradients, or the outputs alone."""
        # Few blocks, so that threads walk; and more of them than warps that add up what they leave, or less.
        lanes = dict(ADD=1, ADD_BACKWARD=1, NORM_BACKWARD=[(math.inf, 7)])
        blocks = 4 if self.inputs[0].dtype == torch.float32 else 11
        with (
            mock.patch.multiple(position, **lanes),
            mock.patch.object(cuda, "sm_count", lambda device: blocks),
            empty_is_nan(),
        ):
            outputs = self.call(functional, "cuda", self.inputs)
            return self.all_of(outputs, self.inputs) if backward else list(outputs)

    def broken(self, ours):
        """A sentence if ours break the rule, else None."""
        rows = zip(ours, self.base, self.exact, strict=False)
        found = (
            compare(f"result {i}", torch.zeros_like(exact) if our is None else our, base, exact)
            for i, (our, base, exact) in enumerate(rows)
            if exact is not None
        )
        return next(filter(None, found), None)


@contextlib.contextmanager
def empty_is_nan():
    """What nobody writes is not by chance what the call before left there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def same(a, b):
    pairs = [(s, t) for s, t in zip(a, b, strict=True) if s is not None]
    return all(torch.equal(s.nan_to_num(), t.nan_to_num()) for s, t in pairs)


def wrong(expected, orders, backward=True):
    """The first thing that is wrong with a case, its backward or not, or None; "refused" is what the backend says of a call it cannot serve."""
    module, first = cuda.extension("_C_emulated"), None
    try:
        for order in orders:
            module.schedule(*order)
            ours = expected.ours(backward)
            if first is None and (found := expected.broken(ours)):
                return found
            if first is not None and not same(ours, first):
                return f"order {order} computes something else"
            first = ours
    except NotImplementedError:
        return "refused"
    except RuntimeError as e:
        return str(e)
    finally:
        module.schedule(0)
    return None


def load(path):
    """An emulated extension from a file of any folder, in place of the installed one."""
    spec = importlib.util.spec_from_file_location("fastattn._C_emulated", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cuda.extension.cache_clear()
    return module


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--extension", type=pathlib.Path)
    parser.add_argument("--orders", default="fifo")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--every", type=int, default=1, help="of attention's cases")
    parser.add_argument("functions", nargs="*")
    asked = parser.parse_args()
    if asked.extension:
        load(asked.extension)
    orders = [ORDERS[name] for name in asked.orders.split(",")]
    said = collections.Counter()
    for case, dtype in some(asked.functions, asked.every, getattr(torch, asked.dtype)):
        found = wrong(Expectation(case, dtype), orders)
        if found not in (None, "refused"):
            raise SystemExit(f"{case.function} {case.label}: {found}")
        said[found or "right"] += 1
    print(f"{said['right']} cases right, {said['refused']} refused")


if __name__ == "__main__":
    main()
