"""torch's own sample inputs (ModuleInfo) for every class that fastattn.nn takes over, forced to the Triton backend."""

import pytest
import torch

from conftest import DEVICE
from module_agreement import disagreements
from torch.testing._internal.common_modules import module_db

import fastattn

from fastattn import backend, nn

CLASSES = ("LayerNorm", "RMSNorm", "Softmax", "LogSoftmax", "MultiheadAttention", "TransformerEncoderLayer")

# (class, number of the sample) -> a part of the sentence with which the Triton backend refuses it.
REFUSED: dict[tuple[str, int], str] = {}

# The same in training and evaluation, but for the samples that torch adds in training.
SAMPLES = dict(LayerNorm=7, RMSNorm=6, Softmax=3, LogSoftmax=4, MultiheadAttention=64, TransformerEncoderLayer=39)


def sample_inputs(name):
    cls = getattr(torch.nn, name)
    info = next(info for info in module_db if info.module_cls is cls)
    return info.module_inputs_func(info, DEVICE, torch.float32, requires_grad=True, training=True)


@pytest.mark.parametrize("name", CLASSES)
def test_torchs_samples_agree_natively(name):
    native, broken = 0, []
    samples = sample_inputs(name)
    for i, sample in enumerate(samples):
        made, given = sample.constructor_input, sample.forward_input
        stock = getattr(torch.nn, name)(*made.args, **made.kwargs).to(DEVICE)
        ours = getattr(nn, name)(*made.args, **made.kwargs).to(DEVICE)
        with fastattn.use_backend("triton"):
            before = backend.calls.copy()
            try:
                sentences = disagreements(ours, stock, given.args, given.kwargs)
            except NotImplementedError as refusal:
                assert REFUSED.get((name, i), "not listed") in str(refusal)
                continue
        assert (name, i) not in REFUSED, "listed as refused, but served"
        ran = backend.calls - before
        assert ran and all(by == "triton" for _, by in ran), ran
        native += 1
        broken += [f"{name} sample {i} {made.args} {made.kwargs} {given.kwargs}: {s}" for s in sentences]
    print(f"{name}: {native} of {len(samples)} samples through Triton")
    assert not broken, "\n".join(broken)
    assert len(samples) == SAMPLES[name], "torch's list has changed: look at what is new"
    assert native == len(samples) - sum(refused == name for refused, _ in REFUSED)
