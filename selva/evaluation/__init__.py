"""Evaluation: how near generated sounds are to recordings, to their videos and to their captions, with error bars."""
