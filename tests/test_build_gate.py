"""Every CUDA kernel compiles for every architecture aimed at, and costs no more than is committed.

ptxas reports spills and its "Potential Performance Loss" cases (C7508, C7510, ...) as information, which no -Werror
sees: the gate reads its text. The numbers say what a kernel must at least cost; what it does cost only a GPU says.
"""

import json
import shutil

import cuda_costs
import pytest

pytestmark = [
    pytest.mark.skipif(cuda_costs.NVCC is None, reason="needs nvcc on PATH"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt (binutils)"),
]
WRITE = "if the change is wanted: python tests/cuda_costs.py --write"


@pytest.fixture(scope="module")
def report():
    return cuda_costs.cached_report()


@pytest.fixture(scope="module")
def census(report):
    table = cuda_costs.census_table(report)
    return table or pytest.skip("needs nvdisasm, of the CUDA toolkit or of triton")


def test_everything_compiles_without_a_spill(report):
    assert [(p["source"], p["arch"]) for p in report if not p["kernels"]] == []
    assert {(p["source"], p["arch"]) for p in report} == {(s.name, arch) for s, arch in cuda_costs.sources()}
    found = [f"sm_{p['arch']}: {line}" for p in report for line in p["complaints"]]
    assert not found, "\n".join(found)


def test_single_instructions_lose_nothing(tmp_path):
    """Those of sm_90a among them, of which ptxas would say that it waits in between or ignores setmaxnreg."""
    source = cuda_costs.ROOT / "csrc/emulation/tests/primitives.cu"
    text = cuda_costs.compile_device(source, "90a", tmp_path)
    found = [line for line in cuda_costs.complaints(text) if "C75" in line or "spill" in line.lower()]
    assert "wgmma_shared" in text and not found, "\n".join(found)


def test_gate_bites(tmp_path):
    text = cuda_costs.compile_device(cuda_costs.ROOT / "tests/data/bad_kernel.cu", "90a", tmp_path)
    found = "\n".join(cuda_costs.complaints(text))
    assert "spills" in found and "spill stores" in found
    assert "C7508" in found


def test_resources_are_those_committed(report):
    committed, now = json.loads(cuda_costs.RESOURCES.read_text()), cuda_costs.resource_table(report)
    found = cuda_costs.worse(committed, now) + [f"{k} is gone" for k in committed if k not in now]
    assert not found, "\n".join([*found, WRITE])


def test_code_is_no_longer_than_committed(census):
    found = cuda_costs.worse(json.loads(cuda_costs.CENSUS.read_text()), census)
    assert not found, "\n".join([*found, WRITE])


def test_no_local_memory(report):
    for part in report:
        for kernel, row in part["kernels"].items():
            ops = row["sass"]["all"] if row["sass"] else {}
            assert not [op for op in ops if op.startswith(("LDL", "STL"))], kernel


def test_attention_runs_on_tensor_cores_from_asynchronous_copies(report, census):
    sass = {k: row["sass"]["all"] for p in report for k, row in p["kernels"].items() if row["sass"]}
    tiled = ("attention_fwd_", "attention_bwd_dkdv_", "attention_bwd_dq_", "attention_decode_fwd_")
    checked = [kernel for kernel in sass if kernel.startswith(tiled)]
    assert {kernel.partition("kernel")[0] for kernel in checked} == set(tiled)
    for kernel in checked:
        for kind in ("HMMA.16816.F32", "LDSM.16.M88.4", "LDSM.16.MT88.4", "LDGSTS.E.BYPASS.128"):
            assert any(op.startswith(kind) for op in sass[kernel]), f"{kernel}: no {kind}"


def test_attention_on_sm90_is_wgmma_and_tensor_copies(report, census):
    sass = {k: row["sass"] for p in report for k, row in p["kernels"].items() if row["sass"]}
    checked = {kernel: row for kernel, row in sass.items() if kernel.startswith("attention_sm90_fwd_kernel")}
    assert len(checked) == 4
    for kernel, row in checked.items():
        D = int(kernel.partition(">")[0].split(", ")[1])
        # logits of 128 keys from shared memory, and 128 keys by D columns from registers
        assert row["loop"]["hgmma"] == ({"64x128x16 shared": 8, "64x128x16 register": 8} if D == 128 else
                                        {"64x128x16 shared": 4, "64x64x16 register": 8})  # fmt: skip
        ops = row["loop"]["ops"]
        assert sum(n for op, n in ops.items() if op.startswith("WARPGROUP.DEPBAR")) == 2, kernel
        assert sum(n for op, n in ops.items() if op.startswith("MUFU.EX2")) == 64 + 2, kernel
        assert any(op.startswith("UTMALDG.4D") for op in row["all"]) and "USETMAXREG" in str(row["all"]), (
            kernel
        )


def test_a_step_of_attention_is_the_products_and_copies_of_its_tile(report, census):
    sass = {k: row["sass"] for p in report for k, row in p["kernels"].items() if row["sass"]}
    checked = {kernel: tile for kernel in sass if (tile := cuda_costs.model.portable_tile(kernel))}
    assert checked
    for kernel, tile in checked.items():
        expected = tile.instructions()
        ops = cuda_costs.model.turns(sass[kernel]["step"], "HMMA", expected["HMMA"])
        found = {kind: sum(n for op, n in ops.items() if op.startswith(kind)) for kind in expected}
        if tile.apart:  # copies row by row, in a loop
            assert found.pop("LDGSTS") > 0 and expected.pop("LDGSTS")
        assert found == expected, kernel


def test_vectors_move_in_16_byte_accesses(census, report):
    sass = {k: row["sass"] for p in report for k, row in p["kernels"].items() if row["sass"]}
    checked = [kernel for kernel in census if cuda_costs.vectors(kernel)]
    assert checked
    for kernel in checked:
        for kind in ("LDG", "STG"):
            assert [op for op in sass[kernel]["all"] if op.startswith(kind) and ".128" in op], (
                f"{kernel}: no 16-byte {kind}"
            )


def test_worse_than_committed_is_found():
    before = {"a": {"90a": [100, 0, 0, 0], "wide loads": 0.9}}
    assert not cuda_costs.worse(before, {"a": {"90a": [103, 0, 0, 0], "wide loads": 0.88}})
    for now in ({"90a": [104, 0, 0, 0]}, {"90a": [90, 0, 0, 8]}, {"wide loads": 0.8}, {"80": [10, 0, 0, 0]}):
        assert cuda_costs.worse(before, {"a": now})
    assert cuda_costs.worse(before, {"b": {}})
