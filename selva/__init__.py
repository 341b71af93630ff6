"""SelVA LoRA: teach video-to-audio models new sounds."""

__version__ = "0.1.0"
