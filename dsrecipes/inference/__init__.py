"""What does a finished run's model answer? Prompts, generation, chat."""
