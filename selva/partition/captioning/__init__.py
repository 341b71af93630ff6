"""Captions by listening: speech written down by Whisper, and the best of a list of captions by CLAP."""
