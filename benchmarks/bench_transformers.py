"""transformers' GPT-2 and BERT with random weights, as they are and after fastattn.patch: reading, and a training step without the
optimizer (loss and every parameter's gradient, no dropout). BERT's batch is half padding, which transformers keeps.
"""

import torch
from torch.func import functional_call

import fastattn
from fastattn.benchmarks import bench_bert
from fastattn.benchmarks.suite import Case, Work, compiled, package


def cases(device, quick):
    if package("transformers") is None:
        return
    if device.type == "cpu":
        tiny = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": 0}
        yield gpt2(2, 16, torch.float32, n_layer=1, n_head=2, n_embd=32, **tiny)
        return
    for learns in (True,) if quick else (False, True):
        yield gpt2(8, 1024, torch.bfloat16, learns)
        yield bert(32, 512, torch.bfloat16, learns)
    if not quick:
        yield gpt2(1, 128, torch.bfloat16)
        yield bert(8, 128, torch.bfloat16)


def gpt2(B, S, dtype, learns=False, **sizes):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **sizes)
    C, L = config.n_embd, config.n_layer
    flops = 2 * B * S * (12 * L * C * C + C * config.vocab_size) + 2 * L * C * B * S * S

    def outputs(called, ids, keep):
        return called(input_ids=ids, labels=ids).loss if learns else called(input_ids=ids).logits

    return case(f"gpt2, B {B}, S {S}", GPT2LMHeadModel, config, [S] * B, S, dtype, outputs, learns, flops)


def bert(B, S, dtype, learns=False, **sizes):
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    lens, head = bench_bert.lengths(B, S), config.hidden_size * (config.hidden_size + config.vocab_size)
    flops = bench_bert.products(config, lens) + 2 * head * sum(lens)

    def outputs(called, ids, keep):
        given = {"input_ids": ids, "attention_mask": keep.long()}
        if learns:
            return called(**given, labels=ids.masked_fill(~keep, -100)).loss
        return called(**given).logits.masked_fill(~keep[..., None], 0.0)

    what = f"bert-base, B {B}, S {S}, {sum(lens)} tokens"
    return case(what, BertForMaskedLM, config, lens, S, dtype, outputs, learns, flops)


def case(shape, kind, config, lens, S, dtype, outputs, learns, flops):
    """As bench_bert.case, of a class of transformers; its buffers stay in a model that is made on the first device asked for."""
    models = {}

    def model(device, patched):
        if (device, patched) not in models:
            with device:
                models[device, patched] = kind(config).train(learns)
            if patched:
                fastattn.patch(models[device, patched], strict=True)
        return models[device, patched]

    def make(device):
        parameters = [p.detach().to(dtype).requires_grad_(learns) for p in model(device, False).parameters()]
        ids = torch.randint(1, config.vocab_size, (len(lens), S), device=device)
        return ids, torch.arange(S, device=device) < torch.tensor(lens, device=device)[:, None], *parameters

    def run(patched):
        def call(ids, keep, *parameters):
            module = model(ids.device, patched)
            known = dict(zip((name for name, _ in module.named_parameters()), parameters, strict=True))
            return outputs(lambda **given: functional_call(module, known, (), given), ids, keep)

        return call

    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters()) * dtype.itemsize
    written = dtype.itemsize if learns else len(lens) * S * config.vocab_size * dtype.itemsize
    return Case(
        op="transformers",
        shape=f"{'training, ' if learns else ''}{shape}",
        dtype=dtype,
        make=make,
        providers={"eager": run(False), "fastattn": run(True), "compile": compiled(run(False))},
        reference=run(False),
        forward=Work(read=size, write=written, flops=flops),
        backward=Work(read=2 * size, write=size, flops=2 * flops) if learns else None,
        tokens=sum(lens),
        model=True,
    )
