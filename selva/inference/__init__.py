"""Inference: sound for videos, features or words; one or many, compared or not."""
