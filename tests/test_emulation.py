"""The emulation of CUDA blocks and threads (csrc/emulation): what it computes, and what it finds wrong, in every order."""

import os
import re
import shutil
import subprocess

import emulated_launches
import pytest
from primitives import ROOT, build, emulated_program

ORDERS = {"fifo": 0, "reverse": 1, "random": 2, "pct": 3}


pytestmark = pytest.mark.skipif(
    not (shutil.which(build.CXX) and build.find_headers() and build.find_pybind11()),
    reason="needs g++, CUDA headers (nvidia-cuda-runtime, nvidia-cuda-crt) and pybind11",
)

RIGHT = ("shuffles", "votes", "indices", "exchange", "copies", "copies_of_nothing", "matrices", "tile",
         "tile_not_swizzled", "products_half", "products_bfloat", "reads_unwritten", "approximations", "ring", "hand_over",
         "left_registers", "refuses_maps")  # fmt: skip
WRONG = ("no_barrier_before", "no_barrier_after", "no_syncwarp", "no_wait", "no_barrier_after_copy", "matrices_too_early",
         "no_mbarrier_wait")  # fmt: skip
# What copies and wgmma read or overwrite too early, which TSAN does not see: wrong in some order, or a sentence.
NOT_RIGHT = ("no_full_wait", "no_empty_wait", "no_expect", "one_parity", "released_early", "no_barrier_after_init",
             "no_store_barrier", "no_store_wait", "no_read_wait", "swapped", "other_step")  # fmt: skip
# What the emulation says of each, whatever the order.
SAID = {
    "past_the_end": r"past_the_end, block \(0, 0, 0\), shared memory is written 0 bytes past the end of sA \(128 bytes\), "
    r"seen at the barrier of cases.cpp:\d+",
    "before_the_start": "bytes before the start of the dynamic shared memory",
    "two_barriers": r"thread \(\d+, 0, 0\), cases.cpp:\d+: __syncthreads meets another one, at cases.cpp:\d+",
    "barrier_in_a_warp": r"deadlock: 16 of warp 0 at __syncthreads \(cases.cpp:\d+\); 16 of warp 0 at __syncwarp \(cases.cpp:",
    "not_in_mask": r"__shfl_xor_sync: lane \d+ calls it and is not in its mask 0000ffff",
    "partial_warp": "a vote: its mask ffffffff names lanes that have exited",
    "lane_left": "__shfl_down_sync waits for lane 20, which exits|names lanes that have exited",
    "lane_leaves": "a vote waits for lane 20, which exits|names lanes that have exited",
    "reads_outside_mask": "lane 0 reads lane 16, which is not in mask 0000ffff",
    "two_shuffles": r"__shfl_\w+_sync with mask ffffffff meets __shfl_\w+_sync",
    "bad_width": "width is 24, must be a power of two",
    "misaligned": r"rt.cuh:\d+: 16 bytes at 0x\w+, an address not aligned to 16",
    "matrix_of_some": r"ldmatrix waits for lane \d+, which exits|ldmatrix: its mask ffffffff names lanes that have exited",
    "matrix_misaligned": "16 bytes at 0x\\w+, an address not aligned to 16",
    "copy_to_global": r"asynchronous copy of 16 bytes to 0x\w+, which is no shared memory",
    "too_much": "sB does not fit: variables of a fixed size have 49152 bytes of shared memory",
    "too_much_asked": "votes: 50000 bytes of dynamic shared memory, 49152 are allowed",
    "empty_grid": r"votes: a grid of \(0, 1, 1\) blocks",
    "ring_expects_more": r"deadlock: 32 of warp 0 at mbarrier.try_wait .* lacks 0 arrivals and 16 bytes",
    "ring_no_products_wait": "wgmma: a thread exits before its products have been waited for",
    "ring_waits_for_fewer": "wgmma: a thread exits before its products have been waited for",
    "ring_writes_accumulator": "wgmma: an accumulator is written before the product has been waited for",
    "ring_no_products_fence": "wgmma: no wgmma.fence since the last group of products",
    "ring_three_warps": "wgmma: not all warps of warpgroup 0 have issued it",
    "ring_no_init_fence": r"no fence.proxy.async since the mbarrier at 0x\w+ was initialised",
    "ring_overwritten": r"the mbarrier at 0x\w+ is overwritten",
    "ring_no_store_fence": "a store reads shared memory that threads have written since the last fence.proxy.async",
    "ring_other_swizzle": "wgmma: an operand at 0x440, which is not in the first row of a pattern of 8 rows of 64 bytes",
    "ring_tile_misaligned": "8192 bytes at 0x480 are no shared memory aligned to 1024",
    "ring_too_many_registers": r"deadlock: 32 of warp 0 at setmaxnreg",
    "left_registers_early": "wgmma: registers of its left operand are written before it has been waited for",
    "other_count": r"barrier 3 of \d+ threads, while others wait there for \d+",
    "large_block": r"blocks of \(1025, 1, 1\) threads",
}


def program(folder, *flags, **more):
    return emulated_program(folder, ROOT / "csrc/emulation/tests/cases.cpp", *flags, **more)


def run(executable, *arguments, **env):
    command = [executable, *map(str, arguments)]
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **env}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return program(tmp_path_factory.mktemp("cases"))


def test_all_cases_are_here():
    text = (ROOT / "csrc/emulation/tests/cases.cpp").read_text()
    listed = re.findall(r'^    (?:\{|of_ring<.*>\()"(\w+)"', text, re.M)
    assert set(listed) == {*RIGHT, *WRONG, *SAID, *(f"ring_{name}" for name in NOT_RIGHT)}


@pytest.mark.parametrize("order", ORDERS)
def test_computes_what_a_gpu_would(cases, order):
    for name in RIGHT:
        for seed in (1, 2):
            assert run(cases, name, ORDERS[order], seed)[1].startswith("right"), (name, seed)


@pytest.mark.parametrize("name", WRONG)
def test_some_order_shows_that_a_barrier_is_missing(cases, name):
    shown = [
        run(cases, name, order, seed)[1].startswith("wrong") for order in ORDERS.values() for seed in (1, 2)
    ]
    assert any(shown)


@pytest.mark.parametrize("name", NOT_RIGHT)
def test_some_order_shows_what_comes_too_early(cases, name):
    runs = [run(cases, f"ring_{name}", order, seed)[1] for order in ORDERS.values() for seed in (1, 2)]
    assert not all(text.startswith("right") for text in runs), runs


@pytest.mark.parametrize("order", ORDERS)
def test_says_what_is_wrong(cases, order):
    for name, sentence in SAID.items():
        code, text = run(cases, name, ORDERS[order], 1)
        assert code == 0 and re.search(sentence, text), text


def test_counts_launches_by_name(cases):
    assert run(cases, "exchange")[1].splitlines()[1:] == ["exchange<true, true, true>: 1"]
    assert run(cases, "empty_grid")[1].splitlines()[1:] == []


def test_a_kernel_that_no_test_ran_is_found():
    names = emulated_launches.kernels()
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    assert "layer_norm_fwd_kernel" in names and len(names) == sources.count("__global__")
    counts = {f"{name}<float, 4>": 1 for name in names[1:]}
    assert emulated_launches.not_run(names, counts) == names[:1]


def test_blocks_may_run_side_by_side(cases):
    assert run(cases, "exchange", OMP_NUM_THREADS="3")[1] == run(cases, "exchange", OMP_NUM_THREADS="1")[1]


def test_conflicts_of_banks_are_counted(tmp_path):
    """Eight lanes take eight pieces of 16 bytes in one pass, or in eight where a tile's rows lie straight below each other."""
    executable = program(
        tmp_path, "-fsanitize=thread", "-DFASTATTN_RECORD", engine_flags=("-DFASTATTN_RECORD",), link_flags=()
    )
    copies, reads = 16 * 8 // 8, 4 * 4
    for name, kernel, conflicts in (
        ("tile", "tile<true>", 0),
        ("tile_not_swizzled", "tile<false>", 7 * reads),
    ):
        assert run(executable, name)[1].splitlines() == [
            "right",
            f"{kernel}: {copies + reads} and {conflicts}",
        ]


def test_address_sanitizer(tmp_path):
    """It sees the engine's fibers as threads that switch, and shared memory as variables of their own."""
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    executable = program(tmp_path, *flags)
    for order in ORDERS.values():
        for name in ("exchange", "ring", "left_registers"):
            assert run(executable, name, order, 1)[1].startswith("right")
        for name in ("past_the_end", "before_the_start"):
            code, text = run(executable, name, order, 1)
            assert code and "AddressSanitizer: use-after-poison" in text and name in text, text


def test_thread_sanitizer(tmp_path):
    """Threads of a block race unless a barrier orders them, whether or not an order shows it; so do its blocks, side by side."""
    executable = program(tmp_path, "-fsanitize=thread", engine_flags=("-DFASTATTN_TSAN",))
    for name in ("exchange", "copies", "hand_over", "ring"):
        for order in ORDERS.values():
            code, text = run(executable, name, order, 1, OMP_NUM_THREADS="1")
            assert code == 0 and text.startswith("right"), text
    for name in WRONG:
        assert "data race" in run(executable, name, ORDERS["reverse"], 1, OMP_NUM_THREADS="1")[1], name
