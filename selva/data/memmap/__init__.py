"""MMAudio's packed data sets: reading, writing by many processes, converting."""
