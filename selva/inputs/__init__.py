"""From videos, folders and tables to one job per clip."""
