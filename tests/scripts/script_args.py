"""Arguments that the tests of several scripts pass."""

TINY = ["--variant", "tiny_16k", "--device", "cpu"]
