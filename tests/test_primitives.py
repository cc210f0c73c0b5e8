"""Single instructions: the emulation against PTX's manual, and against what a GPU said once one has (tests/primitives.py)."""

import shutil

import numpy as np
import primitives
import pytest
from primitives import build

pytestmark = pytest.mark.skipif(
    not (shutil.which(build.CXX) and build.find_headers() and build.find_pybind11()),
    reason="needs g++, CUDA headers (nvidia-cuda-runtime, nvidia-cuda-crt) and pybind11",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return primitives.emulated_program(tmp_path_factory.mktemp("primitives"))


@pytest.fixture(scope="module")
def emulated(program):
    return {name: primitives.words(program, name) for name in primitives.names(program)}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_any_order_computes_it(program, emulated, order):
    for name, needs in primitives.names(program).items():
        if needs:
            assert primitives.broken(name, primitives.words(program, name, order, 1), None) is None, name


def test_emulation_keeps_to_what_is_written(emulated):
    assert len(emulated) > 10
    for name, found in emulated.items():
        assert primitives.broken(name, found, found) is None, name


def test_emulation_says_what_a_gpu_said(emulated):
    said = primitives.said()
    if said is None:
        pytest.skip("no GPU has been asked yet: python tests/primitives.py --write")
    assert {*said["words"], *said["left_out"]} == set(emulated)
    for name, found in said["words"].items():
        assert primitives.broken(name, found, emulated[name]) is None, f"{name} on {said['gpu']}"


@pytest.mark.parametrize(
    "name, at, other",
    [("shuffles", 33, 1), ("conversions", 100, 1), ("copies", 500, 1), ("matrices_transposed", 5, 1),
     ("products_half", 192, 1 << 14), ("products_bfloat", 200, 1 << 31), ("powers_of_two_near_0", 1001, 1 << 3),
     ("quotients", 901, 1 << 4), ("load_64", 250, 1), ("store_128", 1375, 1), ("wgmma_across_32", 700, 1),
     ("wgmma_registers_along", 2047, 1 << 16), ("tiles_across_128", 3, 1), ("mbarriers", 5, 1)],
)  # fmt: skip
def test_another_result_is_noticed(emulated, name, at, other):
    spoilt = emulated[name].copy()
    spoilt[at] ^= np.uint32(other)
    assert primitives.broken(name, spoilt, emulated[name])


def test_operands_in_another_place_are_noticed(emulated):
    for name in primitives.PRODUCTS:
        swapped = emulated[name].reshape(8, 10, 32).copy()
        swapped[:, [1, 2]] = swapped[:, [2, 1]]
        assert primitives.broken(name, swapped.reshape(-1), emulated[name])


def test_what_was_read_otherwise_is_noticed(emulated, monkeypatch):
    """One bit less of a swizzle, a descriptor's two distances swapped, rows and columns of accumulators."""
    right, operand = primitives.swizzled, primitives.operand
    monkeypatch.setattr(primitives, "swizzled", lambda address, row: right(address, max(row // 2, 16)))
    for name in (
        "load_32",
        "load_64",
        "load_128",
        "load_4d",
        "store_128",
        "wgmma_along_128",
        "wgmma_across_64",
    ):
        assert primitives.broken(name, emulated[name], None), name
    monkeypatch.setattr(primitives, "swizzled", right)
    monkeypatch.setattr(primitives, "operand", lambda at, count, row, leading, stride, across:
                        operand(at, count, row, stride, leading, across))  # fmt: skip
    for name in ("wgmma_along_none", "wgmma_across_none", "wgmma_across_64", "wgmma_registers_across"):
        assert primitives.broken(name, emulated[name], None), name


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_compiles_for_a_gpu(tmp_path, arch):
    names = primitives.names(primitives.gpu_program(tmp_path, arch))
    assert "matrices" in names and names["tiles_along_128"] == "sm_90a"


@pytest.mark.gpu
def test_gpu_computes_what_is_written(program, emulated, tmp_path):
    torch = pytest.importorskip("torch")
    major, minor = torch.cuda.get_device_capability()
    arch = f"{major}{minor}" + "a" * (major >= 9)
    on_gpu = primitives.gpu_program(tmp_path, arch)
    for name, needs in primitives.names(program).items():
        if needs in ("", f"sm_{arch}"):
            assert primitives.broken(name, primitives.words(on_gpu, name), emulated[name]) is None, name
