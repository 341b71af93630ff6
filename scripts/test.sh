#!/usr/bin/env bash
# Set up an environment and run linter, type checker and tests. Arguments go to pytest:
#
#     bash scripts/test.sh                    # everything but the slow tests
#     bash scripts/test.sh --slow             # everything
#     bash scripts/test.sh tests/test_flow.py
set -euo pipefail
cd "$(dirname "$0")/.."

python="$(bash scripts/setup_env.sh dev)"
"$python" -m ruff check .
"$python" -m basedpyright --pythonpath "$python"
exec "$python" -m pytest "$@"
