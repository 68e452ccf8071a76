"""Answers of a finished run: prompts, generation, chat."""
