"""The CUDA kernels in the emulation: the same bits in every order of threads and blocks, nothing for the sanitizers to say."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from emulated_cases import ORDERS, Expectation, cases, some, wrong

from fastattn import cuda

ROOT = pathlib.Path(__file__).parents[1]
FUNCTIONS = sorted({case.function for case in cases()})
pytestmark = pytest.mark.skipif(cuda.not_emulated() is not None, reason=str(cuda.not_emulated()))


@pytest.mark.parametrize("dtype, seed", [("float32", ""), ("bfloat16", " 2")])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_order_gives_the_same_bits(function, dtype, seed):
    orders = [ORDERS[name] for name in ("fifo", "reverse", f"random{seed}", f"pct{seed}")]
    said = []
    for case, of_case in some((function,), 6, getattr(torch, dtype)):
        if "33000" not in case.label:
            said.append(wrong(Expectation(case, of_case), orders))
            assert said[-1] in (None, "refused"), case.label
    if set(said) == {"refused"}:
        pytest.skip(f"{function} is not written in CUDA C++")
    assert said.count(None) > len(said) / 2


def test_another_bit_in_another_order_is_found(monkeypatch):
    expected, orders = Expectation(cases(("softmax",))[0], torch.float32), list(ORDERS.values())[:3]
    results = [expected.exact, expected.exact, [t + 1 for t in expected.exact]]
    monkeypatch.setattr(expected, "ours", lambda backward: results.pop(0))
    assert wrong(expected, orders) == f"order {orders[2]} computes something else"
    results += [[t * 1.01 for t in expected.exact]]
    assert "is above" in wrong(expected, orders)


def emulated_build(folder, flags):
    """An extension built with `flags`, which the installed one is not. What `flags` leave as it is is compiled once."""
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        folder,
        "--build-temp",
        folder.parent / "objects",
    ]
    env = {**os.environ, "FASTATTN_CUDA": "emulated", "CXXFLAGS": flags}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    (extension,) = folder.glob("fastattn/_C_emulated*")
    return extension


def sanitized(folder, flags, libraries, *arguments, **env):
    """Exit status and output of emulated_cases.py with an extension built with `flags`."""
    extension = emulated_build(folder, flags)
    preload = [
        subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
        for name in libraries
    ]
    command = [sys.executable, "tests/emulated_cases.py", "--extension", extension, *arguments]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **env,
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_address_and_undefined_behaviour_sanitizers(tmp_path):
    """Tensors are no larger than they seem: reading past one is an error, and so are a shift or an address of no meaning."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
    code, text = sanitized(
        tmp_path, flags, ("libasan", "libubsan"), "--every", "3", ASAN_OPTIONS="detect_leaks=0"
    )
    assert code == 0 and "cases right" in text, text[-4000:]


def test_thread_sanitizer(tmp_path):
    """Threads of a block that touch the same shared memory, one of them writing, have a barrier in between."""
    arguments = ("--dtype", "bfloat16", "--orders", "reverse", "--every", "5")
    code, text = sanitized(tmp_path, "-fsanitize=thread", ("libtsan", "libubsan"), *arguments)
    assert code == 0 and "cases right" in text and "data race" not in text, text[-4000:]
