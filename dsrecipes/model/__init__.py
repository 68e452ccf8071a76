"""Tokenizer, weights, 4-bit, LoRA; the only importer of peft and bitsandbytes."""
