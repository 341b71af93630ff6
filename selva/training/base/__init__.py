"""Training of the base model: the whole generator from memmaps, on one device or many machines."""
