"""Show run folders as one HTML page; imports no torch."""
