"""What was asked for: recipes, YAML, flags and their layers."""
