"""Every CUDA kernel that a test run launched in the emulation, and the check that a run of all tests leaves none out.

A pytest plugin, which tests/conftest.py registers. Workers of pytest-xdist hand their counts to the process that started
them.
"""

import collections
import pathlib
import re

import pytest

from fastattn import cuda

SOURCES = pathlib.Path(__file__).parents[1] / "csrc"
counted = collections.Counter()  # launches of each instantiation, such as softmax_fwd_kernel<float, 4>


def kernels():
    """The name of every kernel in csrc/*.cu."""
    text = "".join(re.sub(r"//.*", "", path.read_text()) for path in sorted(SOURCES.glob("*.cu")))
    text = re.sub(r"__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)", "", text)
    return re.findall(r"__global__\s+void\s+(\w+)\s*\(", text)


def not_run(names, counts):
    return sorted(set(names) - {name.partition("<")[0] for name in counts})


def everything_was_asked_for(config):
    selected = config.option.keyword or config.option.markexpr or config.getoption("deselect", None)
    paths = config.args_source != pytest.Config.ArgsSource.ARGS
    return paths and not selected and not config.getoption("lf", False)


def missing(config):
    if cuda.not_emulated() or not everything_was_asked_for(config):
        return []
    return not_run(kernels(), counted)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    counted.update(getattr(node, "workeroutput", {}).get("emulated", {}))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    module = cuda.extension("_C_emulated")
    if not isinstance(module, str):
        counted.update(module.launches())
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["emulated"] = dict(counted)
    elif missing(session.config) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if counted:
        ran = {name.partition("<")[0] for name in counted}
        terminalreporter.line(
            f"emulation: {len(ran)} CUDA kernels in {len(counted)} instantiations, {counted.total()} launches"
        )
    if absent := missing(config):
        terminalreporter.section("CUDA kernels that no test ran in the emulation", red=True)
        terminalreporter.line(", ".join(absent))
