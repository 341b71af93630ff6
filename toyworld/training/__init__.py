"""Training ``tiny_16k`` from scratch: what ``scripts/train_tiny.py`` does, stage by stage.

    loop.py       the optimiser loop that all stages share: checkpoints, exact resume, averaged weights
    sounds.py     broad synthetic sounds, so that the VAE can code sounds that the world does not make
    codec.py      stage "vae"
"""
