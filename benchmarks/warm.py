"""Compiles what a run will time, in several processes at once; the compiled kernels of Triton and Inductor stay on disk.

    python -m fastattn.benchmarks.warm '{"device": "cuda:0", "chosen": ["softmax"], "quick": false, "sweep": true}' 3 12

runs each case of share 3 of 12 once, whatever comes of it: measure.py is where a failure is told.
"""

import contextlib
import json
import os
import subprocess
import sys
import time

import torch

from fastattn.benchmarks import measure


def compile_all(device, chosen, quick, sweep, seconds):
    """Run every case once; a sentence on how it went."""
    what = json.dumps({"device": str(device), "chosen": list(chosen), "quick": quick, "sweep": sweep})
    return in_processes(["fastattn.benchmarks.warm", what], seconds)


def in_processes(command, seconds):
    """Run `python -m *command i n` for every share i of n, as many as are useful; a sentence on how it went.

    seconds: how long they may take; what is not compiled then is compiled when it is its turn.
    """
    began = time.perf_counter()
    shares = max(1, min(12, (os.cpu_count() or 2) - 2))
    # each process compiles for itself: Inductor would start as many again
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    processes = [
        subprocess.Popen([*command, str(i), str(shares)], env=environment, **quiet) for i in range(shares)
    ]
    late = failed = 0
    for process in processes:
        try:
            failed += process.wait(max(0.0, began + seconds - time.perf_counter())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            late += 1
    return (
        f"{shares} processes compiled ahead for {time.perf_counter() - began:.0f} s"
        + (f"; {late} were stopped" if late else "")
        + (f"; {failed} failed" if failed else "")
    )


def run_once(case, device):
    torch.manual_seed(0)
    inputs = case.inputs(device)
    for function, forced in measure.providers(case, device).values():
        for direction in measure.passes(case, inputs):
            with contextlib.suppress(Exception):
                measure.one_pass(function, forced, inputs, direction, True)()


def main(what, share, shares):
    from fastattn.benchmarks import run  # which imports this file

    what = json.loads(what)
    device = torch.device(what.pop("device"))
    torch.cuda.set_device(device)
    for case in run.cases_of(device=device, **what)[share::shares]:
        with contextlib.suppress(Exception):
            run_once(case, device)
        torch.cuda.empty_cache()
        torch.compiler.reset()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
