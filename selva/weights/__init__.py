"""Weight files: where they lie, what they are known by, and loading them. ``assets/`` holds those of tiny_16k."""
