#!/usr/bin/env bash
# Everything that only a GPU can show: single instructions, kernels, tests, speed. The table of what happened comes last.
# Usage: benchmarks/on_gpu.sh [--out FOLDER] [primitives] [build] [check] [test] [bench]   (all by default; PYTHON=... chooses
# the Python). What it finds is written into FOLDER (gpu-out) as it comes, in at most eight files.
#
# A run ends in under ten minutes. All of it takes more, so where that is the limit of one command, spend three:
#     on_gpu.sh primitives build check      on_gpu.sh test      on_gpu.sh bench
# A kernel that hangs takes its own process with it and nothing else: each primitive has one, `check` gives a case 90 s, its
# compilation included, and goes on in a new process, a test that takes 200 s ends its pytest-xdist worker.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
out=gpu-out
if [[ ${1:-} == --out ]]; then
    out=$2
    shift 2
fi
steps=${*:-primitives build check test bench}
deadline=560
table=()
failed=0
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
exec > >(tee -a "$out/log.txt") 2>&1
tee=$!

within() {  # within SECONDS WHAT COMMAND...: its exit status is in the table; never past the deadline
    local seconds=$1 what=$2 left=$((deadline - SECONDS)) began=$SECONDS status
    shift 2
    if ((left < 10)); then
        table+=("$what: out of time")
        failed=1
        return 1
    fi
    timeout --signal=INT --kill-after=10 $((seconds < left ? seconds : left)) "$@"
    status=$?
    table+=("$what: $( ((status)) && echo "failed, status $status" || echo done), $((SECONDS - began)) s")
    ((status == 0)) || failed=1
    return $status
}

has() { "$python" -c "import $1" 2>/dev/null; }

tests() {  # tests SECONDS WHAT PYTEST-ARGUMENTS...: each test's line goes into tests.txt, failures to the screen as well
    local seconds=$1 what=$2 log=$out/tests.txt first
    shift 2
    first=$(($(wc -l 2>/dev/null <"$log" || echo 0) + 1))
    has pytest_timeout && set -- --timeout 200 --timeout-method thread "$@"
    within "$seconds" "tests of $what" "$python" -m pytest -v --tb=short -rfE --maxfail 60 --junitxml "$out/$what.xml" "$@" \
        >>"$log" 2>&1
    tail -n +"$first" "$log" | grep -E '^(FAILED|ERROR|E  )|crashed while|^=.* (passed|failed|error)' | cut -c1-300 | tail -n 80
}

finish() {
    cp tests/data/primitives.json "${XDG_CACHE_HOME:-$HOME/.cache}/fastattn/verdict.json" "$out" 2>/dev/null
    [[ -f $bench/results.json ]] && tar -czf "$out/bench.tar.gz" -C "$bench" .
    [[ -f $bench/results.json ]] && cp "$bench/results.json" "$out"
    rm -rf "$bench"
    echo "== after $SECONDS s, in $out: $(ls "$out" | tr '\n' ' ')"
    ((${#table[@]})) && printf '%s\n' "${table[@]}"
    exec >&- 2>&-
    wait "$tee"
}

"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU')" || exit 1
bench=$(mktemp -d)
trap finish EXIT
for step in $steps; do
    echo "== $step, $SECONDS s"
    case $step in
        primitives)
            if command -v nvcc >/dev/null; then
                within 150 primitives "$python" tests/primitives.py --write
            else
                table+=("primitives: skipped, no nvcc")
            fi ;;
        build) within 180 build "$python" setup.py -q build_ext --inplace ;;
        check)
            "$python" -m fastattn.cli info
            within 300 check "$python" -m fastattn.cli check ;;
        test)
            if ! has pytest; then
                table+=("test: skipped, $python has no pytest")
                continue
            fi
            # Kernels first. Most of the time is Triton's compiler, which a core each shortens.
            kernels=(tests/test_{gpu,primitives,attention,attention_decode,softmax,layer_norm,position,bias_gelu,linear_cross_entropy,boundary}.py)
            spread=() few=()
            has xdist && spread=(-n "$(nproc)" --max-worker-restart 40) few=(-n 3 --max-worker-restart 20)
            tests 270 kernels "${spread[@]}" "${kernels[@]}"
            tests 110 large "${few[@]}" tests/test_large.py -k "not far_apart"
            tests 80 far_apart "${spread[@]}" tests/test_large.py -k far_apart
            tests 300 others "${spread[@]}" tests "${kernels[@]/#/--ignore=}" --ignore=tests/test_large.py ;;
        bench) within 500 bench "$python" -m fastattn.cli bench --quick --limit $(((deadline - SECONDS) / 2)) --out "$bench" ;;
        *) echo "no step $step: primitives, build, check, test or bench"; exit 2 ;;
    esac
done
exit $failed
