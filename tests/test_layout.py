"""The shape of the project: one op, one name, one file in each folder; imports go down the layers only."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "fastattn/ops").glob("*.py") if path.stem != "__init__")

# Top to bottom; a module imports from lower rows, or its own. `fastattn/__init__.py` is a table of contents.
LAYERS = [
    ("cli",),
    ("recipes", "benchmarks", "check_cases"),
    ("integrations", "reroute", "swap", "models"),
    ("nn",),
    ("functional",),
    ("ops",),
    ("backend", "cuda", "check", "interpreter", "sharding"),
    ("kernels", "reference"),
]
LEVEL = {part: level for level, row in enumerate(LAYERS) for part in row}
IMPORTS_NOTHING_OF_OURS = ("reference", "interpreter")


def imported(path):
    """(line, dotted name) of every import in a file, inside functions too; relative ones are spelled out."""
    parent = ("fastattn", *path.relative_to(ROOT / "fastattn").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parent[: len(parent) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def python_files():
    # fastattn/kernels and fastattn/benchmarks are links, which rglob does not follow on every Python.
    for folder in ("fastattn", "fastattn/kernels", "fastattn/benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__pycache__" not in path.parts:
                yield path


@pytest.mark.parametrize("path", sorted(set(python_files())), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    part = path.relative_to(ROOT / "fastattn").parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert part in LEVEL, f"fastattn/{part} is in no layer: give it a row in LAYERS"
    for line, name in imported(path):
        root, *rest = name.split(".")
        if root != "fastattn":
            continue
        if part == "kernels":
            assert rest[0] == "kernels", f"{path}:{line}: kernels/ imports nothing above it, got {name}"
        assert part not in IMPORTS_NOTHING_OF_OURS, (
            f"{path}:{line}: {part} imports nothing of ours, got {name}"
        )
        if rest and rest[0] in LEVEL:
            assert LEVEL[rest[0]] >= LEVEL[part], (
                f"{path}:{line}: {part} is below {rest[0]}, which it imports"
            )


@pytest.mark.parametrize("op", OPS)
def test_one_name_in_each_folder(op):
    needed = [f"kernels/{op}.py", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    missing = [path for path in needed if not (ROOT / path).exists()]
    assert not missing, f"op {op} (fastattn/ops/{op}.py) lacks {', '.join(missing)}"


CUDA_SOURCES = sorted((ROOT / "csrc").rglob("*.cu*"))


# an op's forward and backward may be compiled side by side, as <op>.cu and <op>_backward.cu, and what sm_90 alone has
@pytest.mark.parametrize(
    "op",
    sorted({p.stem.removesuffix("_backward").removesuffix("_sm90") for p in (ROOT / "csrc").glob("*.cu")}),
)
def test_a_cuda_source_has_its_launchers(op):
    needed = [f"csrc/{op}_bindings.cpp", f"fastattn/cuda/{op}.py", f"fastattn/ops/{op}.py"]
    missing = [path for path in needed if not (ROOT / path).exists()]
    assert not missing, f"csrc/{op}.cu lacks {', '.join(missing)}"


@pytest.mark.parametrize("path", CUDA_SOURCES, ids=lambda p: p.name)
def test_what_only_nvcc_understands_has_one_place(path):
    """Launches and shared memory by the macros of rt.cuh, instructions by the functions of ptx.cuh and ptx_sm90.cuh: all else
    runs emulated."""
    text = re.sub(r"//.*", "", path.read_text())
    ptx = ("ptx.cuh", "ptx_sm90.cuh")
    for pattern, places in (("<<<", ("rt.cuh",)), (r"\b__shared__\b", ("rt.cuh",)), (r"\basm\b", ptx)):
        assert path.name in places or not re.search(pattern, text), (
            f"{path.name} has {pattern}: {places[0]} does"
        )
    assert "cooperative_groups" not in text


def test_links():
    for name in ("kernels", "benchmarks"):
        assert (ROOT / "fastattn" / name).resolve() == ROOT / name
        assert not (ROOT / name / "__init__.py").exists(), f"{name}/__init__.py would shadow a PyPI package"
