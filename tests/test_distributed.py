"""Two processes on gloo run every check of ranks.py, once for all the tests here."""

import os
import pathlib
import subprocess
import sys

import pytest
import ranks
import torch

from fastattn import reference
from fastattn.integrations import distributed

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{check: "ok" or what went wrong}, said by rank 0."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "ranks.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(part.split(": ", 1) for part in done.stdout.split("\n\0\n") if ": " in part)


@pytest.mark.parametrize("name", ranks.CHECKS)
def test_on_two_ranks(outcomes, name):
    assert outcomes[name] == "ok"


@pytest.mark.parametrize("order", distributed.ORDERS)
@pytest.mark.parametrize("W", [1, 3, 4])
@pytest.mark.parametrize("causal, left, right, sloped", [(True, -1, -1, False), (True, 5, -1, True), (False, 1, 4, True), (True, 0, 0, False)])  # fmt: skip
def test_the_parts_of_any_number_of_ranks_make_the_whole(causal, left, right, sloped, W, order):
    """The ring's plan and merge, without its transport: every rank's rows against every rank's keys."""
    q, k, v = torch.randn(3, 1, 2, 24, 8)
    slopes = torch.rand(2) if sloped else None
    rules = distributed._Rules(causal, left, right, 0.3, 0.0, None, order, slopes, None, None)
    window = tuple(None if w == -1 else w for w in (left, right))
    allowed = reference.attended(24, 24, causal, window)[0]
    where = torch.arange(24).chunk(W if order == "contiguous" else 2 * W)
    held = [torch.cat([where[i] for i in distributed._held(rank, W, order)]) for rank in range(W)]
    pairs, got = 0, torch.zeros_like(q)
    for rank in range(W):
        S = len(held[rank])
        o, lse = torch.zeros(1, 2, S, 8), torch.full((1, 2, S), -torch.inf)
        for source in range(W):
            for r in distributed._work(rank, source, W, S, rules):
                rows, keys = held[rank][r.rows], held[source][r.keys]
                options, shift = distributed._options(r, q[:, :, rows], k[:, :, keys], rules)
                o_i, lse_i, _ = reference.attention(q[:, :, rows], k[:, :, keys], v[:, :, keys], **options)
                o[:, :, r.rows], lse[:, :, r.rows] = distributed.merge(
                    o[:, :, r.rows], lse[:, :, r.rows], o_i, lse_i + shift
                )
                mine = allowed[rows][:, keys]
                assert mine.any(0)[[0, -1]].all() and mine.any(1)[[0, -1]].all()  # no edge could be cut off
                pairs += mine.numel() * (0.5 if r.causal else 1)
        got[:, :, held[rank]] = o
    whole = reference.attention(q, k, v, causal=causal, window=window, alibi_slopes=slopes, scale=0.3)[0]
    torch.testing.assert_close(got, whole)
    if left == right == -1:
        assert pairs == 24 * 24 / 2  # nothing is computed and then masked but on the diagonal


def test_merging_nothing_is_no_nan():
    o, lse = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -torch.inf)
    again = distributed.merge(o, lse, o, lse)
    assert torch.equal(again[0], o) and torch.equal(again[1], lse)
    some = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2)
    for merged in (distributed.merge(o, lse, *some), distributed.merge(*some, o, lse)):
        torch.testing.assert_close(merged, some)


def test_a_process_alone_says_what_is_missing():
    with pytest.raises(RuntimeError, match="init_process_group"):
        distributed.ring_attention(*torch.randn(3, 1, 2, 4, 8))
