"""Inputs of a batch: videos, folders and tables, made into one job per clip."""
