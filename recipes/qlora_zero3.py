"""alpaca_llama_sft with a 4-bit base and a LoRA adapter under ZeRO-3; the numbers are in the YAML."""

from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft


class QloraZero3(AlpacaLlamaSft):
    """The same rows and tokens; what differs is the model, and how ZeRO divides it."""
