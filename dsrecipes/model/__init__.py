"""Tokenizer, weights, 4-bit, LoRA; the only importer of peft and bitsandbytes."""

import logging

# On a CPU with AVX-512 BF16 bitsandbytes warns at import that it lacks a kernel from the hub, which nothing here uses:
# see dsrecipes.model.load.disable_cpu_packing.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
