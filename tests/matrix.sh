#!/usr/bin/env bash
# The wider grid, by hand: the test suite under other versions of torch, triton and transformers, each in its own
# folder under .matrix, about 3 GB to download per torch. Usage: tests/matrix.sh PYTHON [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
shift

run() { # name, triton to force over the one that torch asks for (or -), other requirements
  local venv=.matrix/$1 triton=$2
  echo "== $1"
  "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install -q "numpy<2.4" "${@:3}" ".[test,hf]"
  [[ $triton == - ]] || "$venv/bin/python" -m pip install -q --no-deps --force-reinstall "triton==$triton"
  OMP_NUM_THREADS=1 PYTHONPATH=. "$venv/bin/python" -m pytest -q -n 2 "${pytest_args[@]}" || failed+=("$1")
}

pytest_args=("$@") failed=()
run torch-2.11 - "torch==2.11.*" "transformers==5.0.*"
run newest -
run triton-3.6 3.6.0 "torch==2.13.0"
run triton-3.7 3.7.1 "torch==2.13.0"
run triton-3.9 "3.9.*" "torch==2.13.0"
echo "failed: ${failed[*]:-none}"
[[ ${#failed[@]} == 0 ]]
