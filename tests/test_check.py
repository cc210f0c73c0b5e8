"""`fastattn check` in several processes: nothing is lost, and a case that hangs or faults is told and left behind."""

import os

import torch

from fastattn import check_cases

WORK = [["torch", i, "float32"] for i in range(5)]
STUB = """
import json, os, sys, time
for name, i, dtype in json.loads(sys.argv[2]):
    if i == 1:
        time.sleep(1000)
    if i == 3:
        sys.exit("Segmentation fault, as it were")
    print(json.dumps(dict(function=str(i), label="", dtype=dtype, backend=name, state="right")), flush=True)
"""


def test_what_hangs_or_faults_is_wrong_and_the_rest_goes_on(tmp_path):
    (tmp_path / "stub.py").write_text(STUB)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    results = list(check_cases.run_apart("cpu", WORK, {"PYTHONPATH": path}, seconds=1, module="stub"))
    assert [r.state for r in results] == ["right", "wrong", "right", "wrong", "right"]
    assert results[1].sentence == "did not end" and results[1].called == ("softmax",)
    assert "status 1: Segmentation fault, as it were" in results[3].sentence


def test_processes_find_what_one_finds():
    device, cases = torch.device("cpu"), check_cases.CASES[:3]
    work = [["torch", i, dtype] for i in range(3) for dtype in ("float32", "float16", "bfloat16")]
    apart = {(r.label, r.function, r.dtype): r for r in check_cases.run_in_processes(device, work)}
    functions = {case.function for case in cases}
    here = [r for r in check_cases.run(device, "torch", functions) if r.label in {c.label for c in cases}]
    for r in here:
        other = apart.pop((r.label, r.function, r.dtype))
        assert (other.state, tuple(other.called)) == (r.state, r.called) == ("right", r.called)
    assert not apart


def test_an_op_that_hung_gets_no_verdict(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check_cases.backend, "verdict_key", lambda device: "this card")
    result = check_cases.Result
    right = result("scaled_dot_product_attention", "", "float32", "triton", "right", called=("attention",))
    other = result("softmax", "", "float32", "triton", "right", called=("softmax",))
    hung = result("attention", "", "float32", "triton", "wrong", "did not end", ("attention",))
    _, ops = check_cases.record(torch.device("cuda"), [right, other, hung])
    assert ops["triton"] == ["softmax"]
