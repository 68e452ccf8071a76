"""Files, paths, text and the console: nothing here knows what a run is."""
