"""What the CUDA kernels ask of memory, counted in the emulation: no byte twice, no sector in vain, no bank of shared memory twice."""

import json
import os
import pathlib
import subprocess
import sys

import emulated_traffic
import pytest
from test_emulated_cases import emulated_build

from fastattn import cuda
from fastattn.benchmarks import model

ROOT = pathlib.Path(__file__).parents[1]
MOST = {
    "forward": 1.02,
    "backward": 1.05,
}  # times the bytes of the tensors; backward's partial sums are in it
# passes over the banks beyond the first, for each access of a warp to shared memory
CONFLICTS = {
    "layer_norm_bwd_kernel": 0.025
}  # sums of 8 neighbouring columns a thread, two vectors 32 bytes apart
pytestmark = pytest.mark.skipif(cuda.not_emulated() is not None, reason=str(cuda.not_emulated()))


@pytest.fixture(scope="module")
def traffic(tmp_path_factory):
    # scalars out of a vector would be counted as loads of their own
    flags = "-fsanitize=thread -fno-tree-sra -DFASTATTN_RECORD"
    extension = emulated_build(tmp_path_factory.mktemp("record"), flags)
    command = [sys.executable, ROOT / "tests/emulated_traffic.py", extension]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)


def test_no_byte_moves_twice(traffic):
    for op, directions in traffic.items():
        for direction, counts in directions.items():
            assert counts["moved"] <= MOST[direction] * counts["least"], (op, direction, counts)
            assert counts["moved"] >= 0.9 * counts["least"], f"{op}, {direction}: not all of it was seen"


def test_no_sector_in_vain(traffic):
    for op, directions in traffic.items():
        for counts in directions.values():
            for name, kernel in counts["kernels"].items():
                assert kernel["sectors"] <= 1.02 * kernel["least_sectors"], (op, name, kernel)


def test_attention_reads_the_other_side_once_a_tile(traffic):
    """By instruction, so that what the caches give again is counted: a block's own rows, and all those of the other side."""
    group, D = emulated_traffic.H // emulated_traffic.H_KV, 64
    row = 2 * D // 32 * emulated_traffic.S * emulated_traffic.H  # sectors of q
    # of all heads: a kernel's own tensors, and the two of the other side that pass by each of its tiles
    needs = {
        "attention_fwd_kernel": (2 * row, 2 * row),
        "attention_bwd_dq_kernel": (3 * row, 2 * row),
        "attention_bwd_dkdv_kernel": (4 * row / group, 2 * row),
    }
    whole, causal = traffic["attention, D = 64"], traffic["attention, D = 64, causal"]
    for direction in whole:
        for name, counts in whole[direction]["kernels"].items():
            if (tile := model.portable_tile(name)) is None:
                continue
            own, others = needs[name.partition("<")[0]]
            walks = emulated_traffic.S // (tile.warps * tile.rows)
            assert counts["sectors"] <= 1.03 * (own + walks * others), (name, counts)
            # what causality excludes is not fetched: of two tiles half of one
            fetched = causal[direction]["kernels"][name]["sectors"]
            assert fetched <= 1.03 * (own + 0.75 * walks * others), (name, fetched)


def test_banks_of_shared_memory(traffic):
    for op, directions in traffic.items():
        for counts in directions.values():
            for name, kernel in counts["kernels"].items():
                most = CONFLICTS.get(name.partition("<")[0], 0.0)
                assert kernel["shared_conflicts"] <= most * kernel["shared_passes"], (op, name, kernel)
