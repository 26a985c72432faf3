"""Tar shards of (picture, caption) pairs: their names, reading them, walking them, and the index of their samples."""
