"""The suite's cases under pytest-benchmark, for its history and comparisons:

    pytest benchmarks/test_speed.py --benchmark-group-by=group [--benchmark-autosave | --benchmark-compare]

Wall time of one forward call that ends in a synchronisation. Device times, checked results and backward passes are what
`fastattn bench` measures.
"""

import importlib

import pytest
import torch

from fastattn.benchmarks.run import OPS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = [
    case
    for op in OPS
    for case in importlib.import_module(f"fastattn.benchmarks.bench_{op}").cases(DEVICE, True)
]


@pytest.mark.parametrize("provider", ["eager", "fastattn"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.shape}")
def test_forward(benchmark, case, provider):
    inputs, function = case.make(DEVICE), case.providers[provider]
    benchmark.group = f"{case.op}, {case.shape}"

    @torch.no_grad()
    def call():
        function(*inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
