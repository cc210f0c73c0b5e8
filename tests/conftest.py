"""Kernels run in Triton's interpreter where no GPU is, outputs start as NaN, and every test draws the same numbers."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import types
import unittest

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its helpers bind at import

if (
    importlib.util.find_spec("expecttest") is None
):  # torch's samples come with classes that inherit from it, no more
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase

import emulated_launches
import pytest

from fastattn import backend, cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cuda":  # what a call takes when nobody asks must not hang on what this machine has seen
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="fastattn-tests-")
    backend.PROVEN.clear()

if DEVICE == "cpu":
    import launches
    from launches import (  # noqa: F401
        pytest_sessionfinish,
        pytest_terminal_summary,
        pytest_testnodedown,
    )

    import fastattn.interpreter  # noqa: F401

    launches.start()


def pytest_configure(config):
    config.pluginmanager.register(emulated_launches)


@pytest.fixture
def device():
    return DEVICE


def on_device():
    """A context in which what is made without naming a device lies where the kernels run."""
    return torch.device(DEVICE) if DEVICE == "cuda" else contextlib.nullcontext()


@pytest.fixture(params=["triton", "cuda"])
def fused(request):
    """Each fused backend: on CPU tensors Triton's interpreter and the emulated build of the CUDA sources."""
    return present(request.param)


def present(backend):
    """The name of a backend, which skips a test where it cannot be here."""
    reason = backend == "cuda" and (cuda.not_emulated() if DEVICE == "cpu" else cuda.unavailable())
    if reason:
        pytest.skip(reason)
    return backend


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unwritten_memory_is_nan():
    """torch.empty is filled with NaN (the largest value for integers), so that an output nobody wrote fails its test."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fault_ends_the_process():
    """After a kernel's fault every later call of its process fails: pytest-xdist blames this test and goes on in a new one."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            print(e, file=sys.__stderr__, flush=True)
            os._exit(70)


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if item.get_closest_marker("gpu") and DEVICE == "cpu":
            item.add_marker(skip)
