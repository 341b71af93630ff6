"""Inspection of a data set: measurements, oddities, near-duplicates, a picture of it."""
