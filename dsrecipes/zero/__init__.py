"""ZeRO JSON: read, check, resolve; and what DeepSpeed needs from the process it runs in."""
