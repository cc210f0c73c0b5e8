"""Positional encodings and the fused embeddings: the shapes of GPT-2 and BERT, and 1 GiB of traffic."""

import math

import torch
import torch.nn.functional as F

from fastattn import functional, reference
from fastattn.benchmarks.suite import Case, Work, compiled

VOCABULARY, TYPES = 30522, 2  # BERT's


def shapes(device, quick):
    """(B, S, C) of each case."""
    if device.type == "cpu":
        return [(2, 64, 64)] if quick else [(2, 64, 64), (4, 256, 768)]
    return [(32, 512, 768)] if quick else [(32, 512, 768), (8, 1024, 768), (64, 1024, 4096)]


def cases(device, quick):
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    for shape in shapes(device, quick):
        yield sinusoidal(*shape, dtype)
        yield learned(*shape, dtype)
        yield gpt2_embeddings(*shape, dtype)
        yield bert_embeddings(*shape, dtype)


def rows(M, N, dtype):
    """The cases of the sweep at one shape; embeddings at the widths that models have."""
    S = math.gcd(M, 512)
    yield sinusoidal(M // S, S, N, dtype)
    yield learned(M // S, S, N, dtype)
    if 64 <= N <= 4096:
        yield gpt2_embeddings(M // S, S, N, dtype)
        yield bert_embeddings(M // S, S, N, dtype)


def row(op, B, S, C, dtype, **case):
    providers = {"eager": case.pop("eager"), "fastattn": case.pop("ours")}
    providers["compile"] = compiled(providers["eager"])
    return Case(
        op=op, shape=f"B {B}, S {S}, C {C}", dtype=dtype, providers=providers, elements=B * S * C, N=C, **case
    )


def sinusoidal(B, S, C, dtype):
    """The baseline reads a table made beforehand, as models do; ours computes it."""
    tables = {}

    def eager(x):
        if x.device not in tables:
            frequency = torch.exp(torch.arange(0, C, 2) * (-math.log(10000.0) / C))
            angle = torch.arange(S)[:, None] * frequency
            tables[x.device] = torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :C].to(x)
        return x + tables[x.device]

    size = B * S * C * dtype.itemsize
    return row(
        "add_positional_encoding, sinusoidal", B, S, C, dtype,
        make=lambda device: (torch.randn(B, S, C, device=device, dtype=dtype),),
        eager=eager,
        ours=functional.add_positional_encoding,
        reference=reference.add_positional_encoding,
        forward=Work(read=size, write=size),
    )  # fmt: skip


def learned(B, S, C, dtype):
    def make(device):
        x, table = torch.randn(B, S, C, device=device), torch.randn(S, C, device=device)
        return tuple(t.to(dtype).requires_grad_() for t in (x, table))

    rows, table = B * S * C * dtype.itemsize, S * C * dtype.itemsize
    return row(
        "add_positional_encoding, learned", B, S, C, dtype,
        make=make,
        eager=lambda x, table: x + table,
        ours=functional.add_positional_encoding,
        reference=reference.add_positional_encoding,
        forward=Work(read=rows + table, write=rows),
        backward=Work(read=rows, write=rows + table),
    )  # fmt: skip


def embedding_inputs(B, S, C, dtype, *rows):
    def make(device):
        ids = torch.randint(VOCABULARY, (B, S), device=device)
        tables = (torch.randn(*size, device=device).to(dtype).requires_grad_() for size in rows)
        return ids, *tables

    return make


def gpt2_embeddings(B, S, C, dtype):
    M, tables = B * S, (VOCABULARY + S) * C * dtype.itemsize
    return row(
        "embeddings, token + position", B, S, C, dtype,
        make=embedding_inputs(B, S, C, dtype, (VOCABULARY, C), (S, C)),
        eager=lambda ids, token, position: F.embedding(ids, token) + position,
        ours=functional.embeddings,
        reference=reference.embeddings,
        forward=Work(read=(M + S) * C * dtype.itemsize + 8 * M, write=M * C * dtype.itemsize),
        backward=Work(read=M * C * dtype.itemsize + 8 * M, write=tables),
    )  # fmt: skip


def bert_embeddings(B, S, C, dtype):
    M, size = B * S, C * dtype.itemsize

    def named(function):
        def call(ids, token, position, type_, weight, bias):
            return function(ids, token, position, type_table=type_, norm_weight=weight, norm_bias=bias)

        return call

    def eager(ids, token, position, type_, weight, bias):
        types = torch.zeros_like(ids)  # a model's buffer
        y = F.embedding(ids, token) + F.embedding(types, type_) + position
        return F.layer_norm(y, (C,), weight, bias, 1e-12)

    return row(
        "embeddings, BERT", B, S, C, dtype,
        make=embedding_inputs(B, S, C, dtype, (VOCABULARY, C), (S, C), (TYPES, C), (C,), (C,)),
        eager=eager,
        ours=named(functional.embeddings),
        reference=named(reference.embeddings),
        forward=Work(read=(M + S + TYPES + 2) * size + 8 * M, write=M * size),
        backward=Work(read=2 * M * size + 8 * M, write=(VOCABULARY + S + TYPES + 2) * size),
    )  # fmt: skip
