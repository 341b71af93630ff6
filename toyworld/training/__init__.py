"""Training ``tiny_16k`` from scratch, stage by stage, for ``scripts/train_tiny.py``.

    stages.py     StageRunner: the stages, what each needs and leaves behind; Recipe: how much of everything
    loop.py       the optimiser loop that all stages share: checkpoints, exact resume, averaged weights
    codec.py      stages "vae", "decoder" and "vocoder"
    encoders.py   stages "sync" and "clip"
    generator.py  stages "generator" and "finetune", and the encoded scenes that they are trained on
    scenes.py     scenes rendered once and kept on disk
    prompts.py    wordings, words that name nothing, and no words at all
"""
