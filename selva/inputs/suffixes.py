"""File name endings of sound and video, one list for all that reads files."""

from __future__ import annotations

# Ordered: with several files of one stem the first kind is taken, on every machine and in every run.
AUDIO_SUFFIXES = (
    ".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".m4a", ".aac", ".mka", ".wma",
    ".w64", ".rf64", ".bwf", ".caf", ".aifc", ".au", ".oga", ".m4b", ".weba", ".mp2", ".ac3", ".amr", ".wv", ".ape",
)
VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv",
    ".3gp", ".3g2", ".mts", ".m2ts", ".ogv", ".asf", ".vob", ".mxf",
)

# What lies beside clips and is none: texts, tables, pictures, features. Files that end otherwise are named.
_TEXTS = (".txt", ".tsv", ".csv", ".json", ".jsonl", ".yaml", ".yml", ".md", ".html", ".pdf", ".srt", ".vtt", ".log")
_PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".heic", ".thm", ".xmp", ".aae", ".ini", ".db", ".zip")
_TENSORS = (".npz", ".npy", ".pt", ".pth", ".safetensors")
OTHER_SUFFIXES = (*_TEXTS, *_PICTURES, *_TENSORS)

# What infer.py writes.
OUTPUT_AUDIO_SUFFIXES, OUTPUT_VIDEO_SUFFIXES = (".flac", ".wav"), (".mp4", ".mov", ".mkv", ".m4v")
