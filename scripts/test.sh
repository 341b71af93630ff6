#!/usr/bin/env bash
# Set up an environment and run linter, type checker and tests, in a process for each core, four at most. Arguments go
# to pytest:
#
#     bash scripts/test.sh                    # everything but the slow tests
#     bash scripts/test.sh --slow             # everything
#     bash scripts/test.sh -n 0 tests/test_flow.py    # one file, in this process
#     bash scripts/test.sh --portable         # as processors without AVX-512 compute, with one thread and with two
set -euo pipefail
cd "$(dirname "$0")/.."

portable=false
if [ "${1:-}" = --portable ]; then
    portable=true
    shift
fi
python="$(bash scripts/setup_env.sh dev)"
# A file stays in one process, so that what its tests share is made once. In their own order, as the longest tests stand
# alone in their files, and would come last in that of the number of tests.
parallel=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
if [ "$portable" = false ]; then
    "$python" -m ruff check .
    "$python" -m basedpyright --pythonpath "$python"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"    # networks of tests are small: more threads wait for each other
    exec "$python" -m pytest "${parallel[@]}" "$@"
fi
# Each library that multiplies has a switch of its own; on a processor without AVX-512 they change nothing.
export ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
for threads in 1 2; do
    echo "AVX2, $threads thread(s)" >&2
    OMP_NUM_THREADS="$threads" "$python" -m pytest "${parallel[@]}" "$@"
done
