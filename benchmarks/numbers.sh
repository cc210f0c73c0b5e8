#!/usr/bin/env bash
# The numbers of one GPU, each step in under ten minutes and with its table last; run benchmarks/on_gpu.sh first, whose `check` leaves
# the verdict by which models run as they are dispatched.
# Usage: benchmarks/numbers.sh STEP...   steps: rows tune attention tune-attention models host
# OUT=folder (bench-out): a folder a step, LIMIT=seconds (480): after which a step starts nothing more. PYTHON=... chooses the Python.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-bench-out} limit=${LIMIT:-480}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
(($#)) || { sed -n 's/^# Usage: //p' "$0"; exit 2; }
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available() and 'torch sees no GPU')" || exit 1

bench() { timeout --kill-after=5 $((limit + 90)) "$python" -m fastattn.cli bench --limit "$limit" "$@"; }
tune() { timeout --kill-after=5 $((limit + 90)) "$python" -m fastattn.benchmarks.tune --limit "$limit" "$@"; }

failed=0
for step in "$@"; do
    echo "== $step"
    case $step in
        rows) bench --sweep --out "$out/rows" ;;
        tune) tune softmax layer_norm position bias_gelu --out "$out/tune" ;;
        tune-attention) tune attention_decode attention --out "$out/tune-attention" ;;
        attention) bench --op attention --op attention_decode --op linear_cross_entropy --op bias_gelu --quick --out "$out/attention" ;;
        models) bench --op gpt --op bert --op generate --op transformers --quick --out "$out/models" ;;
        host) bench --host --out "$out/host" ;;
        *) echo "no step $step: rows, tune, attention, tune-attention, models or host"; exit 2 ;;
    esac || failed=1
done
exit $failed
