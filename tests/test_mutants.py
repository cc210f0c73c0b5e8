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


TILES = """
__device__ void step(const float* from, int n, int row) {
    const T* at = from + swizzled<kD>(row, n / 8);
    float two[2];
    if (n % 2 == 0 && from) two[n & 1] = at[row - 1];
    ptx::cp_async_wait<kSlots - 2>();
    each<true>(s, row, n, [&](float& v, int, int, int, int) { v = 0; });
}
"""


def test_what_is_spoilt_of_attention():
    found = [key.partition(" in ")[0] for _, key, _ in mutants.mutants_of(TILES, attention=True)]
    assert sorted(found) == sorted(
        ["argument row of swizzled", "argument n / 8 of swizzled", "share / 8", "addend + swizzled"]
        + ["if n % 2 == 0 && from", "share % 2", "equal == 0", "bits & 1", "index two[n & 1]"]
        + [
            "index at[row - 1]",
            "addend - 1",
            "sync ptx::cp_async_wait",
            "wait ptx::cp_async_wait<kSlots - 2>()",
        ]
    )


def test_switches_nest(tmp_path):
    """Of two spoilt things that begin or end at the same place, one is inside the other."""
    (tmp_path / "csrc").mkdir()
    some = object.__new__(mutants.Mutants)
    some.folder, some.texts = tmp_path, {"a.cu": "f(h / 8)"}
    some.sites = [("a.cu", 0, "", (6, 7, "(", " >> {m})")), ("a.cu", 0, "", (2, 7, "{m} + (", ")"))]
    some.switch([1, 2])
    text = (tmp_path / "csrc/a.cu").read_text().replace("::emulation::spoilt", "")
    assert text == "f((2) + (h / (8 >> (1))))\n"


def test_survivors_have_reasons_and_exist():
    for file, reasons in mutants.listed().items():
        text = (mutants.ROOT / "csrc" / file).read_text()
        keys = {key for _, key, _ in mutants.mutants_of(text, file in mutants.ATTENTION)}
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
    known = {(file, key) for file, reasons in mutants.listed().items() for key in reasons}
    tried, left = mutants.survivors(tmp_path, SAMPLE, tiers=("plain",), without=known)
    assert len(tried) > 25
    assert not left
