#!/usr/bin/env bash
# The whole way on a small generated set, with the built-in model: make clips, extract, train, generate.
#
#     bash scripts/quickstart.sh              # writes quickstart_out/
#
# Needs no downloads beyond the Python packages. OUT=DIR writes elsewhere; SELVA_VENV and PYTHON as in setup_env.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

python="$(bash scripts/setup_env.sh)"
out="${OUT:-quickstart_out}"
start=$SECONDS
say() { printf '\n== %s\n' "$*"; }

say "1. six short videos of a gong, with sound"
"$python" scripts/make_demo_clips.py --out "$out/clips" --count 6

say "2. extract what the model sees and hears"
"$python" extract_features.py "$out/clips" --output_dir "$out/features" --prompts "$out/clips/prompts.txt" \
    --variant tiny_16k

say "3. train an adapter"
"$python" train_lora.py --data_dir "$out/features" --output_dir "$out/run" --variant tiny_16k \
    --steps 60 --batch_size 4 --warmup_steps 5 --save_every 30 --val_every 30 --rank 8

say "4. generate sound for a new video, before and after"
"$python" scripts/make_demo_clips.py --out "$out/new" --count 1 --seed 7
for name in before after; do
    adapter=()
    [ "$name" = after ] && adapter=(--adapter "$out/run/adapter_final.pt")
    "$python" infer.py --video "$out/new/gong_001.mp4" --prompt "a gong is struck" --variant tiny_16k \
        --clip_features use "${adapter[@]}" --output "$out/$name"
done

say "done in $((SECONDS - start)) s; listen to $out/before and $out/after, look at $out/run"
echo "The built-in tiny_16k has untrained weights for now: this shows that every part works, not how it sounds."
