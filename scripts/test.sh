#!/usr/bin/env bash
# Set up an environment and run linter, type checker and tests. Arguments go to pytest:
#
#     bash scripts/test.sh                    # everything but the slow tests
#     bash scripts/test.sh --slow             # everything
#     bash scripts/test.sh tests/test_flow.py
#     bash scripts/test.sh --portable         # as processors without AVX-512 compute, with one thread and with two
set -euo pipefail
cd "$(dirname "$0")/.."

portable=false
if [ "${1:-}" = --portable ]; then
    portable=true
    shift
fi
python="$(bash scripts/setup_env.sh dev)"
if [ "$portable" = false ]; then
    "$python" -m ruff check .
    "$python" -m basedpyright --pythonpath "$python"
    exec "$python" -m pytest "$@"
fi
# Each library that multiplies has a switch of its own; on a processor without AVX-512 they change nothing.
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
for threads in 1 2; do
    echo "AVX2, $threads thread(s)" >&2
    OMP_NUM_THREADS="$threads" "$python" -m pytest "$@"
done
