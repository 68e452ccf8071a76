"""The run folder: its layout, the console, what is recorded, the curve."""
