"""Cause and cure of every message, by id: one YAML file a layer, read by `dsrecipes explain` and by the documentation."""
