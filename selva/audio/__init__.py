"""Analysis of waveforms: loudness, metrics, silence."""
