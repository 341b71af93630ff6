"""Data sets that training reads: folders of feature files, MMAudio's memmaps, their cache and their inspection."""
