"""Measure a finished run: losses, choices, answers, judges."""
