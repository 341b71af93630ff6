#!/usr/bin/env bash
# Teach the built-in model a sound that it does not know, and hear the difference: make clips of a gong, extract, train,
# generate before and after for new videos, and write one page about it.
#
#     bash scripts/quickstart.sh              # writes quickstart_out/report.html
#     bash scripts/quickstart.sh --fast       # a look at all the steps in about a minute; too short to learn the sound
#
# Needs no downloads beyond the Python packages. SOUND=bird or laser teaches another one (make_demo_clips.py --list),
# OUT=DIR writes elsewhere; SELVA_VENV and PYTHON as in setup_env.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

clips=16 new=3 look="" options=(--config configs/tiny_new_sound.yaml)
case "${1:-}" in
    "") ;;
    --fast)
        clips=6 new=1 look=_fast
        options+=(--steps 30 --batch_size 4 --save_every 30 --val_every 15 --log_every 5 --preserve "a bell rings")
        ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    *) echo "error: unknown option $1; there is only --fast" >&2; exit 2 ;;
esac

python="$(bash scripts/setup_env.sh)"
out="${OUT:-quickstart_out}" sound="${SOUND:-gong}"
work="$out/$sound$look" # of its own, so that another sound or another number of clips does not mix with it
mkdir -p "$work"
: > "$work/commands.txt"
start=$SECONDS
say() { printf '\n== %s   [%d s]\n' "$*" "$((SECONDS - start))"; }
run() { # every step is shown, noted for the page, and run
    echo "python $*" | tee -a "$work/commands.txt"
    "$python" "$@"
}

say "1 of 5: $clips short videos of something the model does not know: $sound"
run scripts/make_demo_clips.py --sound "$sound" --count "$clips" --out "$work/clips"

say "2 of 5: extract what the model sees and hears"
run extract_features.py "$work/clips" --output_dir "$work/features" --prompts "$work/clips/prompts.txt" --variant tiny_16k

say "3 of 5: train an adapter"
run train_lora.py "${options[@]}" --data_dir "$work/features" --output_dir "$work/run"

say "4 of 5: sound for $new new video(s), before and after"
run scripts/make_demo_clips.py --sound "$sound" --count "$new" --seed 7 --out "$work/new"
for name in before after; do
    adapter=()
    [ "$name" = after ] && adapter=(--adapter "$work/run/adapter_final.pt")
    run infer.py "$work/new" --prompts "$work/new/prompts.txt" --variant tiny_16k --clip_features use \
        ${adapter[@]+"${adapter[@]}"} --output "$work/$name"
done

say "5 of 5: one page about it"
"$python" scripts/make_report.py --run "$work/run" --before "$work/before" --after "$work/after" --true "$work/new" \
    --title "tiny_16k learns a new sound: $sound" --commands "$work/commands.txt" --output "$out/report.html"

say "done"
echo "Open $out/report.html in a browser; $work/run/report.html is the page of the training itself."
