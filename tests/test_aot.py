"""Every kernel compiled ahead of time for GPUs that are not there: legality, registers, spills, shared memory.

What is compiled, in at most five minutes: for sm_90 the shipped tiles at sizes that people run (aot.shipped_calls), and of
the listed specialisations (tests/launches.py) a choice in which every flag, dtype and absent argument of each kernel
occurs, with pointers and sizes multiples of 16 and with none; for sm_80, sm_100 and gfx942 one such choice of both. That is
a sixth of what the list and the four targets make: combinations of flags are not all compiled here, nor any two together.
`python tests/aot.py --report FILE --all` compiles every one.
"""

import json

import aot
import pytest

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def report():
    return aot.cached_report()


@pytest.fixture(scope="module")
def older_report():
    if not (aot.SECOND_TRITON / "triton").exists():
        pytest.skip("no .triton-3.6 (`make test` installs triton 3.6.0 there)")
    return aot.cached_report("--shipped", "--targets", "sm_90", second_triton=aot.SECOND_TRITON)


def sentences(costs, wrong):
    return "\n".join(f"{c['target']} {aot.budget_key(c)}: {wrong(c)}" for c in costs)


def over_budget(report):
    """A sentence for each kernel that costs over 3 % more than committed, or of which nothing is."""
    tables = json.loads(aot.BUDGETS.read_text()).get(report["triton"])
    if tables is None:
        pytest.skip(f"no budgets for triton {report['triton']}")
    whole = set(tables) == set(aot.TARGETS)  # of other versions only the shipped tiles are committed
    found = []
    for target, spent in aot.budgets_of(report).items():
        for key, row in spent.items():
            budget = tables.get(target, {}).get(key)
            if budget is None and not (whole or report["shipped only"]):
                continue
            if budget is None or any(now > 1.03 * before for now, before in zip(row, budget, strict=True)):
                found.append(f"{target} {key}: registers, stack, shared memory {row}, budget {budget}")
    return found


def test_list_is_what_the_launchers_do(report):
    assert not report["stale"], (
        f"{report['stale']} launch other kernels than listed: python tests/aot.py --update"
    )


def test_everything_compiles(report):
    failed = [c for c in report["costs"] if "error" in c]
    assert report["costs"] and not failed, sentences(failed, lambda c: c["error"])


def test_nothing_spills_on_hopper(report):
    """At the shipped tiles. Without 16-byte alignment some do, where a load takes a register for each element: see the budgets."""
    here = [c for c in report["costs"] if c["target"] == "sm_90" and c["alignment"] != "1"]
    spilled = [c for c in here if c.get("stack")]
    assert here and not spilled, sentences(spilled, lambda c: f"{c['stack']} bytes of stack")


def test_shared_memory_fits(report):
    fat = [c for c in report["costs"] if c.get("shared", 0) > aot.SHARED_LIMIT[c["target"]]]
    assert not fat, sentences(
        fat, lambda c: f"{c['shared']} bytes, {aot.SHARED_LIMIT[c['target']]} there are"
    )


def test_within_budgets(report):
    found = over_budget(report)
    assert not found, "\n".join(
        [*found, "if the change is wanted: python tests/aot.py --budgets, and look at the diff"]
    )


def test_older_triton_compiles_without_spills(older_report):
    failed = [c for c in older_report["costs"] if "error" in c or c["stack"]]
    assert older_report["costs"] and not failed, sentences(failed, lambda c: c.get("error", "spills"))


def test_older_triton_within_budgets(older_report):
    found = over_budget(older_report)
    assert not found, "\n".join(found)
