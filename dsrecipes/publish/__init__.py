"""Hand a finished run on: verify, export, reshape, model card."""
