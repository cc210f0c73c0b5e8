"""What the CUDA kernels ask of memory, counted in the emulation: no byte twice, no sector in vain, no bank of shared memory twice."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from test_emulated_cases import emulated_build

from fastattn import cuda

ROOT = pathlib.Path(__file__).parents[1]
MOST = {
    "forward": 1.02,
    "backward": 1.05,
}  # times the bytes of the tensors; backward's partial sums are in it
# passes over the banks beyond the first, for each access of a warp to shared memory
CONFLICTS = {
    "layer_norm_bwd_kernel": 0.5
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


def test_banks_of_shared_memory(traffic):
    for op, directions in traffic.items():
        for counts in directions.values():
            for name, kernel in counts["kernels"].items():
                most = CONFLICTS.get(name.partition("<")[0], 0.0)
                assert kernel["shared_conflicts"] <= most * kernel["shared_passes"], (op, name, kernel)
