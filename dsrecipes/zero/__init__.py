"""ZeRO: reading and resolving its JSON, the process that DeepSpeed runs in, and sharded states."""
