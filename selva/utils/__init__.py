"""Tools without knowledge of models: files, text, logging, progress, plots, devices, processes."""
