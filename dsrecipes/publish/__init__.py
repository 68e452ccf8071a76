"""Is a finished run ready to be passed on? verify, export, reshape, and the model card."""
