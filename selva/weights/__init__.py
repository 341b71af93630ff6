"""Weight files: finding, identifying and loading them. ``assets/`` holds those of tiny_16k."""
