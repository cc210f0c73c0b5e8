"""torch's own sample inputs (ModuleInfo) for every class that fastattn.nn takes over, forced to the Triton backend."""

import pytest
import torch
from conftest import DEVICE
from module_runs import outputs_and_gradients
from torch.testing._internal.common_modules import module_db

import fastattn
from fastattn import backend, nn

CLASSES = ("LayerNorm", "RMSNorm", "Softmax", "LogSoftmax", "MultiheadAttention", "TransformerEncoderLayer",
           "TransformerDecoderLayer", "Transformer")  # fmt: skip

# (class, number of the sample) -> a part of the sentence with which the Triton backend refuses it.
REFUSED: dict[tuple[str, int], str] = {}

# Of these only every n-th sample runs: one has two or four attentions, which take the interpreter a second.
EVERY = dict(TransformerDecoderLayer=4, Transformer=9)

# The same in training and evaluation, but for the samples that torch adds in training.
SAMPLES = dict(
    LayerNorm=7,
    RMSNorm=6,
    Softmax=3,
    LogSoftmax=4,
    MultiheadAttention=64,
    TransformerEncoderLayer=39,
    TransformerDecoderLayer=67,
    Transformer=64,
)


def sample_inputs(name):
    cls = getattr(torch.nn, name)
    info = next(info for info in module_db if info.module_cls is cls)
    return info.module_inputs_func(info, DEVICE, torch.float32, requires_grad=True, training=True)


@pytest.mark.parametrize("name", CLASSES)
def test_torchs_samples_agree_natively(name):
    """The 2 x rule compares rounding, for which a chain of ops over three elements is too few; meaning is what is held here."""
    native = 0
    samples = sample_inputs(name)
    run = range(0, len(samples), EVERY.get(name, 1))
    for i in run:
        sample = samples[i]
        made, (args, kwargs) = (
            sample.constructor_input,
            (sample.forward_input.args, sample.forward_input.kwargs),
        )
        stock = getattr(torch.nn, name)(*made.args, **made.kwargs).to(DEVICE)
        ours = getattr(nn, name)(*made.args, **made.kwargs).to(DEVICE)
        ours.load_state_dict(stock.state_dict())
        before = backend.calls.copy()
        try:
            with fastattn.use_backend("triton"):
                got = outputs_and_gradients(ours, args, kwargs)
        except NotImplementedError as refusal:
            assert REFUSED.get((name, i), "not listed") in str(refusal)
            continue
        torch.testing.assert_close(
            got,
            outputs_and_gradients(stock, args, kwargs),
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, i=i: f"sample {i}: {m}",
        )
        ran = backend.calls - before
        assert ran and all(by == "triton" for _, by in ran), ran
        native += 1
    print(f"{name}: {native} of {len(run)} samples through Triton")
    assert len(samples) == SAMPLES[name], "torch's list has changed: look at what is new"
    assert native == len(run) - sum(refused == name for refused, _ in REFUSED)
