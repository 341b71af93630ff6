#!/usr/bin/env bash
# Make (or update) the virtual environment and print the path of its python. Used by quickstart.sh and test.sh.
#
#     bash scripts/setup_env.sh            # .venv in the repository, for use
#     bash scripts/setup_env.sh dev        # with what the tests need
#
# SELVA_VENV=DIR puts the environment elsewhere, PYTHON=python3.12 chooses the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${SELVA_VENV:-$PWD/.venv}"
extras="${1:+[$1]}"
if [ ! -x "$venv/bin/python" ]; then
    interpreter="${PYTHON:-python3}"
    "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $interpreter is $("$interpreter" --version 2>&1), 3.10 or newer is needed; set PYTHON=..." >&2
        exit 1
    }
    echo "making a virtual environment in $venv" >&2
    "$interpreter" -m venv "$venv"
fi
# The stamp remembers which setup.py was installed with which extras, so that a second run starts at once.
wanted="$(cat setup.py pyproject.toml; echo "$extras $PWD")"
if [ "$(cat "$venv/.installed${1:+-$1}" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the package and its dependencies (about 5 GB with CUDA; a few minutes)" >&2
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --editable ".$extras" >&2
    printf '%s\n' "$wanted" > "$venv/.installed${1:+-$1}"
fi
echo "$venv/bin/python"
