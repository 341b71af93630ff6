#!/usr/bin/env python3
# PYTHON_ARGCOMPLETE_OK
"""Teach a video-to-audio model a new sound: train a LoRA adapter on extracted features.

    python train_lora.py --data_dir features/dog --output_dir runs/dog --variant small_16k --selva_dir weights/
    python train_lora.py --data_dir features/demo --output_dir runs/demo --config configs/tiny_new_sound.yaml

Reads <name>.npz and the sound of the same name (extract_features.py writes both). Writes to the output folder:

    adapter_step00500.pt ...    adapters to try, each also a point to resume from (--resume)
    adapter_best.pt             the step with the lowest loss on held-out clips: try this one first
    adapter_final.pt            the last step; the only result where no clips are held out (below five clips)
    sample_step00500.wav/.png   a sound generated at that step, and its spectrogram
    report.html                 the page about the run: whether it worked, sounds, curves; README.md: a model card
    loss_raw.png loss_smoothed.png metrics.jsonl meta.json config.yaml
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

import selva_lora  # noqa: F401 -- ends here if another selva would be imported
from selva import cli
from selva.training.config import RunConfig, check_settings_of_old_run
from selva.weights.find import check_weights

NEEDS = ("generator", "vae", "clip_text")


def build_parser() -> cli.ArgumentParser:
    parser = cli.ArgumentParser(__doc__)
    parser.add_settings(RunConfig)
    parser.add_common()
    return parser


@cli.entry_point
def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    config = cli.config_from(RunConfig, args)
    if not (config.validate_only or config.dry_run):
        check_settings_of_old_run(args.config, config.output_dir, config.resume)
    needs = (*NEEDS, *(["vocoder"] if config.preview or config.sample_prompts or config.eval_every else []))
    check_weights(config.model.variant, config.model.selva_dir, config.model.needs(needs))
    if config.validate_only:
        from selva.training.suggest import advice, free_gpu_memory

        for line in advice(config, free_gpu_memory()):
            print(line)
        print("these settings can be trained with")
        return 0
    from selva.training.train import train  # PyTorch takes seconds to import; mistakes were told before

    result = train(config, cli.saved_settings(args))
    if result.signal is not None:
        return cli.EXIT_INTERRUPTED if result.signal == signal.SIGINT else cli.EXIT_TERMINATED
    if result.adapter is not None:
        print(result.adapter)
    return 0


if __name__ == "__main__":
    cli.leave(main())
