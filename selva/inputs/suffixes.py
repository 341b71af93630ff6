"""File name endings of sound and video, one list for all that reads files."""

from __future__ import annotations

# Ordered: with several files of one stem the first kind is taken, on every machine and in every run.
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".mka", ".wma")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv")

# What infer.py writes.
OUTPUT_AUDIO_SUFFIXES, OUTPUT_VIDEO_SUFFIXES = (".flac", ".wav"), (".mp4", ".mov", ".mkv", ".m4v")
