"""How good is a finished run? Losses, choices, answers, labels, judges."""
