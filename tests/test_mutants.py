"""Every SAMPLE-th spoilt line of the CUDA kernels is caught, or listed with the reason; `make mutants` spoils all."""

import shutil

import mutants
import pytest

from fastattn import cuda

SAMPLE = 16
EXAMPLE = """
namespace {
int host(int n) { return n < 3 ? n : 3; }
__device__ float sum(const float* gX, int N, float v) {
    constexpr int kTwo = 1 < 2 ? 2 : 1;
    SMEM_ARRAY(float, sPart, [32]);
    if (N >= 4) return v;
    for (int n = threadIdx.x; n < N; n += kThreads) v += gX[n * stride];
    if (threadIdx.x % 32 == 0) sPart[threadIdx.x / 32] = __shfl_xor_sync(kAll, v, 1);  // a < b
    __syncthreads();
    return v;
}
}  // namespace
"""


def test_what_is_spoilt():
    found = [key.partition(" in ")[0] for _, key, _ in mutants.mutants_of(EXAMPLE)]
    assert sorted(found) == sorted(
        ["bound >= 4", "bound < N", "step += kThreads", "stride * stride", "share % 32", "equal == 0"]
        + [
            "index sPart[threadIdx.x / 32]",
            "share / 32",
            "shuffle __shfl_xor_sync(kAll, v, 1",
            "sync __syncthreads(",
        ]
    )


def test_survivors_have_reasons_and_exist():
    for file, reasons in mutants.listed().items():
        keys = {key for _, key, _ in mutants.mutants_of((mutants.ROOT / "csrc" / file).read_text())}
        for key, reason in reasons.items():
            assert key in keys, f"{file} has no such line any more: {key}"
            assert reason, f"why does nothing notice {key}?"


@pytest.mark.skipif(
    cuda.not_emulated() is not None or not shutil.which("g++"), reason="no emulated build here"
)
def test_a_sample_is_caught(tmp_path):
    """By the plain build alone: what only a sanitizer sees is listed too, and built by `make mutants`.

    Clean code comes first and stops the run where a call of it is wrong.
    """
    known = mutants.listed()
    tried, left = mutants.survivors(tmp_path, SAMPLE, tiers=("plain",))
    assert len(tried) > 20
    assert not [(file, key) for file, key in left if key not in known.get(file, {})]
