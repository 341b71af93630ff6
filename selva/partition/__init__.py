"""Partition of long recordings into clips: windows, given segments, the tables about them."""
