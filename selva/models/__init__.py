"""The networks: generator, video encoders, VAE, vocoder and mel front-end. They know tensors, not files."""
