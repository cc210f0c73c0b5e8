"""The ways to install: sdist, wheel from the sdist, editable, isolated; with and without nvcc; beside PyPI's `kernels`."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
JUNK = shutil.ignore_patterns(
    ".git",
    ".venv*",
    ".matrix",
    ".triton-*",
    "build",
    "dist",
    "bench-out",
    "*.so",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
)
# Not find_spec: looking for pip as a module makes setuptools' import hook step back from distutils for good.
installed = {dist.name.lower() for dist in importlib.metadata.distributions()}
missing = sorted({"pip", "setuptools"} - installed)
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"the Python that runs the tests has no {', '.join(missing)}"
)


def python(*args, cwd, executable=sys.executable, **env):
    """Standard output and error of a Python process that must succeed, away from this checkout."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FASTATTN")}
    done = subprocess.run([executable, *args], cwd=cwd, env={**clean, **env}, capture_output=True, text=True)
    assert done.returncode == 0, f"python {' '.join(map(str, args))}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources, links kept, so that building writes nothing here."""
    return shutil.copytree(ROOT, tmp_path / "checkout", symlinks=True, ignore=JUNK)


@pytest.fixture
def fresh(tmp_path):
    """The Python of a new venv that also sees the packages of this one (but not what is installed editable), and `kernels`."""
    python("-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    executable = tmp_path / "venv/bin/python"
    site = pathlib.Path(
        python(
            "-c",
            "import sysconfig; print(sysconfig.get_path('purelib'))",
            cwd=tmp_path,
            executable=executable,
        ).strip()
    )
    (site / "this.pth").write_text(sysconfig.get_path("purelib"))
    hub = site / "kernels"
    hub.mkdir()
    (hub / "__init__.py").write_text("FROM = 'PyPI'\n")
    # The real one also takes part in every build that runs beside it.
    (hub / "locking.py").write_text("def write_egg_lockfile(command, basename, filename): pass\n")
    info = site / "kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[egg_info.writers]\nkernels.lock = kernels.locking:write_egg_lockfile\n"
    )
    return executable


IMPORTS = """
import os, sys, torch, kernels, fastattn, fastattn.kernels.common, fastattn.benchmarks.suite
assert kernels.FROM == "PyPI", kernels
here = os.path.dirname(fastattn.__file__)
assert here.startswith(sys.argv[1]), here
y = fastattn.functional.layer_norm(torch.ones(2, 8), (8,))
assert y.shape == (2, 8)
"""


def test_front_end_runs_once_for_code_and_ptx():
    code = "import setup; print(*setup.gencode('softmax.cu', ['80', '90a']), *setup.gencode('attention_sm90.cu', ['80', '90a']))"
    portable = [
        f"-gencode=arch=compute_{v},code={c}" for v, c in ((80, "sm_80"), (90, "sm_90"), (80, "compute_80"))
    ]
    flags = python("-c", code, cwd=ROOT).split()
    assert flags == [*portable, "-gencode=arch=compute_90a,code=sm_90a"]


def test_wheel_from_sdist(checkout, fresh, tmp_path):
    pypi = str(fresh.parents[1] / "lib")  # `kernels` is there while building, too
    site = next(pathlib.Path(pypi).glob("python*/site-packages"))
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    python("-c", code, tmp_path, cwd=checkout, PYTHONPATH=str(site))
    (sdist,) = tmp_path.glob("fastattn-*.tar.gz")

    options = ("--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path)
    wish = {"FASTATTN_CUDA": "1" if NVCC else "0", "FASTATTN_CUDA_ARCHS": "90a"}
    python("-m", "pip", "wheel", *options, sdist, cwd=tmp_path, PYTHONPATH=str(site), **wish)
    (wheel,) = tmp_path.glob("fastattn-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for path in (ROOT / "fastattn").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names
    for folder in ("kernels", "benchmarks"):
        assert {f"fastattn/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")} <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastattn"}

    install = ("--python", fresh, "install", "-q", "--no-deps", "--no-index", wheel)
    python("-m", "pip", *install, cwd=tmp_path)
    python("-c", IMPORTS, str(fresh.parents[1]), cwd=tmp_path, executable=fresh)
    # In the root of the checkout too, `kernels` is the package of that name: ours has no __init__.py.
    python("-c", "import kernels; assert kernels.FROM == 'PyPI', kernels", cwd=ROOT, executable=fresh)

    if NVCC:
        describe = (
            "import torch; from fastattn import _C; assert _C.archs == '90a'; _C.describe(torch.ones(2))"
        )
        python("-c", describe, cwd=tmp_path, executable=fresh)
        (extension,) = pathlib.Path(pypi).rglob("_C.*.so")
        assert extension.stat().st_size < 20 * 2**20  # one architecture has 31 uncompressed
        if shutil.which("readelf"):
            needed = subprocess.run(
                ["readelf", "-d", extension], capture_output=True, text=True, check=True
            ).stdout
            assert "NEEDED" in needed
            for library in ("libtorch", "libc10", "libcudart", "libcuda.", "RPATH", "RUNPATH"):
                assert library not in needed, needed


def test_editable_without_cuda(checkout, fresh, tmp_path):
    install = (
        "--python",
        fresh,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-e",
        checkout,
    )
    python("-m", "pip", *install, cwd=tmp_path, FASTATTN_CUDA="0")
    python("-c", IMPORTS, str(checkout), cwd=tmp_path, executable=fresh)


def test_isolated(checkout, tmp_path):
    try:
        options = ("--no-deps", "--wheel-dir", tmp_path)
        python("-m", "pip", "wheel", *options, checkout, cwd=tmp_path, FASTATTN_CUDA="0", PIP_RETRIES="0")
    except AssertionError as e:
        if "No matching distribution found for" in str(e):
            pytest.skip("no package index to take the build tools from")
        raise
    assert list(tmp_path.glob("fastattn-*-none-any.whl"))


def test_build_says_what_is_missing(checkout):
    def setup(**env):
        done = subprocess.run(
            [sys.executable, "setup.py", "--version"],
            cwd=checkout,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    code, text = setup(CUDA_HOME="/nowhere", FASTATTN_CUDA="auto")
    assert code == 0 and "nvcc (on PATH or in CUDA_HOME) not found: built without the CUDA extension" in text
    code, text = setup(CUDA_HOME="/nowhere", FASTATTN_CUDA="1")
    assert code != 0 and "FASTATTN_CUDA=1, but nvcc (on PATH or in CUDA_HOME) not found" in text
    code, text = setup(FASTATTN_CUDA="0")
    assert code == 0 and "FASTATTN_CUDA=0: built without the CUDA extension" in text
    code, text = setup(FASTATTN_CUDA="yes")
    assert code != 0 and "it takes auto, 0, 1 or emulated" in text


def test_import_without_triton_extension_or_gpu(tmp_path):
    code = """
import sys
sys.modules["triton"] = sys.modules["fastattn._C"] = sys.modules["fastattn._C_emulated"] = None
import torch, fastattn
x = torch.ones(2, 8)
assert torch.equal(fastattn.functional.layer_norm(x, (8,)), torch.nn.functional.layer_norm(x, (8,)))
print(fastattn.explain(fastattn.functional.layer_norm, x, (8,)))
"""
    text = python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    assert "cuda: refused, the tensors are on the CPU, which takes the emulated build" in text
    assert "triton: refused, triton is not installed" in text


def test_import_loads_no_kernels(tmp_path):
    """Kernels and the extension are loaded at first use, and nothing slow that torch itself leaves out is loaded."""
    lazy = (
        "('fastattn.kernels.', 'fastattn._C', 'torch._dynamo', 'torch._inductor', 'torch.distributed.tensor')"
    )
    host = "fastattn.kernels.attention_host"  # has no kernel
    code = f"import sys, fastattn; print([m for m in sys.modules if m.startswith({lazy}) and m != {host!r}])"
    assert python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).splitlines()[-1] == "[]"
