#!/usr/bin/env bash
# Everything that only a GPU can show, in under ten minutes: single instructions, kernels, tests, speed. The table comes last.
# Usage: benchmarks/on_gpu.sh [primitives] [build] [check] [test] [bench]     (all by default; PYTHON=... chooses the Python)
# A kernel that hangs takes its own process with it and nothing else: each function is checked in one, under a timeout.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
steps=${*:-primitives build check test bench}
deadline=570
failed=()

within() {  # within SECONDS COMMAND...: never past the deadline
    local seconds=$1 left=$((deadline - SECONDS))
    shift
    if ((left < 10)); then
        echo "out of time: $*"
        return 1
    fi
    timeout --kill-after=5 $((seconds < left ? seconds : left)) "$@"
}

"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU')" || exit 1
for step in $steps; do
    echo "== $step, $SECONDS s"
    case $step in
        primitives)
            if ! command -v nvcc >/dev/null; then
                echo "skipped: no nvcc"
                continue
            fi
            within 100 "$python" tests/primitives.py --write || failed+=(primitives) ;;
        build) within 120 "$python" setup.py -q build_ext --inplace || failed+=(build) ;;
        check)
            "$python" -m fastattn.cli info
            for function in $("$python" -c "from fastattn import functional; print(*functional.__all__)"); do
                within 60 "$python" -m fastattn.cli check --op "$function" || failed+=("check $function")
            done
            ((${#failed[@]})) || within 120 "$python" -m fastattn.cli check || failed+=(check) ;;  # writes the verdict
        test)
            if ! "$python" -c "import pytest" 2>/dev/null; then
                echo "skipped: $python has no pytest"
                continue
            fi
            # Kernels first. Most of the time is Triton's compiler, which a core each shortens.
            kernels=(tests/test_{gpu,primitives,attention,attention_decode,softmax,layer_norm,position,bias_gelu,linear_cross_entropy}.py)
            spread=()
            "$python" -c "import xdist" 2>/dev/null && spread=(-n "$(nproc)" --max-worker-restart 40)
            within 240 "$python" -m pytest -q "${spread[@]}" --maxfail 40 "${kernels[@]}" || failed+=("test of kernels")
            within 150 "$python" -m pytest -q "${spread[@]}" --maxfail 40 tests "${kernels[@]/#/--ignore=}" || failed+=(test) ;;
        bench) within 500 "$python" -m fastattn.cli bench --quick --limit $(((deadline - SECONDS) / 2)) || failed+=(bench) ;;
        *) echo "no step $step: primitives, build, check, test or bench"; exit 2 ;;
    esac
done
if ((${#failed[@]})); then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
