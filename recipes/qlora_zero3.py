"""alpaca_llama_sft with a 4-bit base model and a LoRA adapter under ZeRO-3.

dsrecipes train qlora_zero3 --dataset my.json
"""

from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft


class QloraZero3(AlpacaLlamaSft):
    """The same rows and tokens; the values of qlora_zero3.yaml make the difference: quantization, adapter, ZeRO stage."""
