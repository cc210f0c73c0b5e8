"""torch's own sample inputs for softmax, log_softmax, layer_norm and rms_norm, all served by the fused backend itself."""

import functools

import pytest
import torch
from conftest import DEVICE
from torch.testing._internal.common_methods_invocations import op_db

from fastattn import functional, use_backend
from fastattn.check import check

FUNCTIONS = {
    "softmax": functional.softmax,
    "log_softmax": functional.log_softmax,
    "nn.functional.layer_norm": functional.layer_norm,
    "nn.functional.rms_norm": functional.rms_norm,
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def cases():
    for info in op_db:
        if info.name in FUNCTIONS:
            for dtype in DTYPES:
                yield pytest.param(info, dtype, id=f"{info.name} {info.variant_test_name} {dtype}")


def broken_rules(info, sample, name):
    """check() of a backend's result and gradients for one sample, stock torch in the same dtype beside it."""
    options = {k: v for k, v in sample.kwargs.items() if not isinstance(v, torch.Tensor)}
    named = [k for k in sample.kwargs if k not in options]
    inputs = [sample.input, *sample.args, *(sample.kwargs[k] for k in named)]
    given = len(inputs) - len(named)

    def call(function, *values, **options):
        return function(*values[:given], **dict(zip(named, values[given:], strict=True)), **options)

    def ours(*values):
        with use_backend(name):
            return call(FUNCTIONS[info.name], *values, **options)

    exact = {k: v for k, v in options.items() if k != "dtype"}
    if info.name.endswith("rms_norm"):
        exact.setdefault("eps", torch.finfo(torch.float32).eps)  # torch's default depends on the dtype
    stock = functools.partial(call, info.op)
    return check(
        ours, functools.partial(stock, **exact), inputs, baseline=functools.partial(stock, **options)
    )


@pytest.mark.parametrize("info, dtype", list(cases()))
def test_samples_agree(info, dtype, fused):
    samples = list(info.sample_inputs(DEVICE, dtype, requires_grad=True))
    assert samples
    for sample in samples:
        if sample.kwargs.get("dtype") == torch.float64:  # a result that no kernel writes
            ours, wanted = (
                f(sample.input, *sample.args, **sample.kwargs) for f in (FUNCTIONS[info.name], info.op)
            )
            assert torch.equal(ours, wanted)
        else:
            assert not broken_rules(info, sample, fused), sample


ERRORS = [info for info in op_db if info.name in FUNCTIONS and info.error_inputs_func]


@pytest.mark.parametrize("info", ERRORS, ids=lambda info: info.name)
def test_errors_are_torchs(info):
    for wrong in info.error_inputs(DEVICE):
        sample = wrong.sample_input
        with pytest.raises(wrong.error_type, match=wrong.error_regex):
            FUNCTIONS[info.name](sample.input, *sample.args, **sample.kwargs)
