"""Which values does a run have? Recipes, YAML, flags and their layers."""
