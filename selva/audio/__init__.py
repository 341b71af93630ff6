"""Analysis of waveforms: loudness, metrics, silence. Knows no files."""
