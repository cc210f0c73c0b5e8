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
def emulated(tmp_path_factory):
    program = primitives.emulated_program(tmp_path_factory.mktemp("primitives"))
    return {name: primitives.words(program, name) for name in primitives.names(program)}


def test_emulation_keeps_to_what_is_written(emulated):
    assert len(emulated) > 10
    for name, found in emulated.items():
        assert primitives.broken(name, found, found) is None, name


def test_emulation_says_what_a_gpu_said(emulated):
    said = primitives.said()
    if said is None:
        pytest.skip("no GPU has been asked yet: python tests/primitives.py --write")
    assert set(said["words"]) == set(emulated)
    for name, found in said["words"].items():
        assert primitives.broken(name, found, emulated[name]) is None, f"{name} on {said['gpu']}"


@pytest.mark.parametrize(
    "name, at, other",
    [("shuffles", 33, 1), ("conversions", 100, 1), ("copies", 500, 1), ("matrices_transposed", 5, 1),
     ("products_half", 192, 1 << 14), ("products_bfloat", 200, 1 << 31), ("powers_of_two_near_0", 1001, 1 << 3),
     ("quotients", 901, 1 << 4)],
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


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_compiles_for_a_gpu(tmp_path):
    assert "matrices" in primitives.names(primitives.gpu_program(tmp_path, "90a"))


@pytest.mark.gpu
def test_gpu_computes_what_is_written(emulated, tmp_path):
    torch = pytest.importorskip("torch")
    major, minor = torch.cuda.get_device_capability()
    program = primitives.gpu_program(tmp_path, f"{major}{minor}" + "a" * (major >= 9))
    for name, found in emulated.items():
        assert primitives.broken(name, primitives.words(program, name), found) is None, name
