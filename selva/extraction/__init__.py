"""Extraction of clips into feature files and data sets: reading ahead, encoding, writing, the manifest."""
