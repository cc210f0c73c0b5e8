"""BERT-base reads a batch half of which is padding: stock torch keeps the padding and masks it, fastattn takes it out."""

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import backend
from fastattn.benchmarks.suite import Case, Work, compiled
from fastattn.models.bert import BERT, SIZES, BERTConfig


def cases(device, quick):
    if device.type == "cpu":
        yield reading("tiny", 8, 64, torch.float32)
        if not quick:
            yield reading("minilm", 8, 128, torch.float32)
    else:
        for B, S in ((32, 512),) if quick else ((1, 128), (8, 128), (32, 512), (64, 512)):
            yield reading("bert-base", B, S, torch.bfloat16)


def reading(size, B, S, dtype):
    """Parameters are inputs like any other, so that the reference has them in float64."""
    config = BERTConfig(**SIZES[size])
    with torch.device("meta"):
        model = BERT(config, pooler=False).eval()
    names = [name for name, _ in model.named_parameters()]
    lens = [S - (S - 1) * i // max(B - 1, 1) for i in range(B)] if B > 1 else [S // 2]  # from S down to 1

    def make(device):
        ids = torch.randint(1, config.vocab_size, (B, S))
        keep = torch.arange(S) < torch.tensor(lens)[:, None]
        made = BERT(config, pooler=False).to(dtype).parameters()
        return tuple(t.detach().to(device) for t in (ids, keep, *made))

    def read(unpad):
        def call(ids, keep, *parameters):
            hidden = functional_call(
                model, dict(zip(names, parameters, strict=True)), (ids, keep), {"unpad": unpad}
            )
            return hidden.masked_fill(~keep[..., None], 0.0)

        return call

    def stock(ids, keep, *parameters):
        with backend.use_backend("torch"):
            return read(unpad=False)(ids, keep, *parameters)

    def naive(*inputs):
        with sdpa_kernel(SDPBackend.MATH):
            return stock(*inputs)

    C, layers, tokens = config.hidden_size, config.num_hidden_layers, sum(lens)
    matrices = layers * (4 * C * C + 2 * C * config.intermediate_size)
    rest = (3 * C + 13 * layers * C) + C * (min(config.vocab_size, tokens) + S)
    return Case(
        op="bert",
        shape=f"{size}, B {B}, S {S}, {tokens} tokens",
        dtype=dtype,
        make=make,
        providers={
            "eager": stock,
            "fastattn": read(unpad=True),
            "naive attention": naive,
            "compile": compiled(stock),
        },
        reference=stock,
        forward=Work(
            read=(matrices + rest) * dtype.itemsize,
            write=B * S * C * dtype.itemsize,
            flops=2 * matrices * tokens + 4 * layers * C * sum(n * n for n in lens),
        ),
    )
