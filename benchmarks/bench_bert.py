"""BERT-base on a batch half of which is padding: stock torch keeps the padding and masks it, fastattn takes it out.

Reading a batch, and training on it as a masked language model without dropout: the loss, then every parameter's gradient.
"""

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import backend
from fastattn.benchmarks.suite import Case, Work, compiled
from fastattn.models.bert import BERT, SIZES, BERTConfig, BERTForMaskedLM

PREDICTED = 7  # every 7th token, about BERT's 15 %


def cases(device, quick):
    if device.type == "cpu":
        yield reading("tiny", 8, 64, torch.float32)
        yield training("tiny", 8, 64, torch.float32)
        if not quick:
            yield reading("minilm", 8, 128, torch.float32)
    else:
        for B, S in ((32, 512),) if quick else ((1, 128), (8, 128), (32, 512), (64, 512)):
            yield reading("bert-base", B, S, torch.bfloat16)
        yield training("bert-base", 32, 512, torch.bfloat16)


def reading(size, B, S, dtype):
    config = BERTConfig(**SIZES[size])

    def outputs(called, ids, keep):
        return called((ids, keep)).masked_fill(~keep[..., None], 0.0)

    lens = lengths(B, S)
    work = Work(
        read=parameters_read(config, lens, S) * dtype.itemsize,
        write=B * S * config.hidden_size * dtype.itemsize,
        flops=products(config, lens),
    )
    return case("", size, lens, S, dtype, lambda: BERT(config, pooler=False), outputs, False, work)


def training(size, B, S, dtype):
    config = BERTConfig(**SIZES[size] | dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))

    def outputs(called, ids, keep):
        chosen = keep & (torch.arange(S, device=ids.device) % PREDICTED == 0)
        return called((ids, keep, ids.masked_fill(~chosen, -100)))[1]

    lens, C = lengths(B, S), config.hidden_size
    head = C * C + config.vocab_size * C
    found = sum(-(-n // PREDICTED) for n in lens)
    weights = (parameters_read(config, lens, S) + head) * dtype.itemsize
    forward = Work(read=weights, write=dtype.itemsize, flops=products(config, lens) + 2 * head * found)
    backward = Work(read=weights, write=weights, flops=2 * forward.flops)
    model = lambda: BERTForMaskedLM(config)  # noqa: E731
    return case("training, ", size, lens, S, dtype, model, outputs, True, forward, backward)


def lengths(B, S):
    """From S down to 1."""
    return [S - (S - 1) * i // max(B - 1, 1) for i in range(B)] if B > 1 else [S // 2]


def matrices(config):
    return config.num_hidden_layers * (
        4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
    )


def parameters_read(config, lens, S):
    """Matrices, biases and norms once, and of the tables a row for each token and position."""
    C = config.hidden_size
    rest = (3 * C + 13 * config.num_hidden_layers * C) + C * (min(config.vocab_size, sum(lens)) + S)
    return matrices(config) + rest


def products(config, lens):
    scores = config.num_hidden_layers * config.hidden_size * sum(n * n for n in lens)
    return 2 * matrices(config) * sum(lens) + 4 * scores


def case(what, size, lens, S, dtype, fresh, outputs, learns, forward, backward=None):
    """Parameters are inputs like any other, so that the reference has them in float64.

    outputs(call, ids, keep): what is compared, where call(arguments) is the model's forward.
    """
    with torch.device("meta"):
        model = fresh().train(learns)
    names = [name for name, _ in model.named_parameters()]

    def make(device):
        ids = torch.randint(1, SIZES[size].get("vocab_size", BERTConfig.vocab_size), (len(lens), S))
        keep = torch.arange(S) < torch.tensor(lens)[:, None]
        with device:
            made = [p.detach().to(dtype).requires_grad_(learns) for p in fresh().parameters()]
        return ids.to(device), keep.to(device), *made

    def run(unpad):
        def call(ids, keep, *parameters):
            known = dict(zip(names, parameters, strict=True))
            return outputs(
                lambda arguments: functional_call(model, known, arguments, {"unpad": unpad}), ids, keep
            )

        return call

    def stock(ids, keep, *parameters):
        with backend.use_backend("torch"):
            return run(unpad=False)(ids, keep, *parameters)

    def naive(*inputs):
        with sdpa_kernel(SDPBackend.MATH):
            return stock(*inputs)

    return Case(
        op="bert",
        shape=f"{what}{size}, B {len(lens)}, S {S}, {sum(lens)} tokens",
        dtype=dtype,
        make=make,
        providers={
            "eager": stock,
            "fastattn": run(unpad=True),
            "naive attention": naive,
            "compile": compiled(stock),
        },
        reference=stock,
        forward=forward,
        backward=backward,
        tokens=sum(lens),
        model=True,
    )
