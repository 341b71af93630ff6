#!/usr/bin/env bash
# Teach the built-in model a sound that it does not know, and hear the difference: make clips of a gong, extract, train,
# generate before and after for new videos, and write one page about it.
#
#     bash scripts/quickstart.sh              # writes quickstart_out/report.html
#     bash scripts/quickstart.sh --fast       # a look at all the steps in about a minute; too short to learn the sound
#
# Needs no downloads beyond the Python packages, which it installs first. Everything else is done by quickstart.py, whose
# options it takes: SOUND=bird or laser teaches another one (make_demo_clips.py --list), OUT=DIR writes elsewhere;
# SELVA_VENV and PYTHON as in setup_env.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    "" | --fast | --sound | --out) ;;
    *) echo "error: unknown option $1; there are --fast, --sound NAME and --out DIR" >&2; exit 2 ;;
esac
python="$(bash scripts/setup_env.sh)"
exec "$python" scripts/quickstart.py "$@"
