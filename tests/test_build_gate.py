"""Every CUDA source compiles for every architecture aimed at without a warning, a spill or a lost optimisation.

ptxas reports spills and its "Potential Performance Loss" cases (C7508, C7510, ...) as information, which no -Werror
sees: the gate reads its text.
"""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc on PATH")

ARCHS = ("80", "90a", "100a", "120")
ONLY = {"_sm90.cu": ("90a",)}
CASES = [
    (source.name, arch)
    for source in sorted((ROOT / "csrc").glob("*.cu"))
    for arch in next((archs for suffix, archs in ONLY.items() if source.name.endswith(suffix)), ARCHS)
]


def ptxas_text(source, arch, folder):
    command = [NVCC, "-std=c++17", "-O3", f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v"]
    command += ["-Werror", "all-warnings", "-Xcompiler=-fPIC,-Wall,-Wextra,-Werror"]
    done = subprocess.run([*command, "-c", source, "-o", folder / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def complaints(text):
    """The kernels that spill or keep an array in local memory, and ptxas's remarks on lost performance."""
    bad, kernel = [], "?"
    for line in text.splitlines():
        kernel = (re.search(r"Function properties for (\S+)", line) or (None, kernel))[1]
        if re.search(r"\b[1-9]\d* bytes (stack frame|spill)", line):
            bad.append(f"{kernel}: {line.strip()}")
        if re.search(r"\(C75\d\d\)", line):
            bad.append(line.strip())
    return bad


@pytest.mark.parametrize("name, arch", CASES)
def test_gate(name, arch, tmp_path):
    text = ptxas_text(ROOT / "csrc" / name, arch, tmp_path)
    assert "Compiling entry function" in text, f"{name} has no kernel for sm_{arch}"
    assert not complaints(text), "\n".join(complaints(text))


def test_gate_bites(tmp_path):
    found = "\n".join(complaints(ptxas_text(ROOT / "tests/data/bad_kernel.cu", "90a", tmp_path)))
    assert "spills" in found and "spill stores" in found
    assert "C7508" in found
