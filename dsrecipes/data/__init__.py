"""Rows to batches: load, formats, encode, pack, prepare, collate."""
