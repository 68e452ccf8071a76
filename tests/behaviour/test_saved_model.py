"""What a run leaves in model/ loads with plain transformers or peft, and answers as the live engine did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.models import STAGES, Runs
from support.rank_cases import probe
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice, AutoTokenizer, BitsAndBytesConfig

from dsrecipes.model.quantization import disable_cpu_packing

pytestmark = pytest.mark.ranks

LOADERS = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMultipleChoice, "alpaca": AutoModelForCausalLM}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LOADERS)
def test_a_model_loads_with_transformers_and_gives_the_live_logits(runs: Runs, name: str, stage: str) -> None:
    run = runs.get(name, stage)
    folder = Path(run["path"], "model")
    model, loading = LOADERS[name].from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    logits = probe(model, name != "bert", model.config.vocab_size)
    np.testing.assert_allclose(logits, run["logits"], rtol=0, atol=1e-5)
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == model.num_parameters(), "tied weights are written once"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_an_adapter_loads_with_peft_and_gives_the_live_logits(runs: Runs, name: str, stage: str) -> None:
    from peft import AutoPeftModelForCausalLM

    run = runs.get(name, stage)
    folder = Path(run["path"], "model")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors and all(tensor.numel() for tensor in tensors.values())
    assert any(tensor.any() for key, tensor in tensors.items() if "lora_B" in key), "nothing was learned"
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_quant_storage=torch.float32,
    )  # fmt: skip
    options = {"quantization_config": four_bit} if name == "qlora" else {}
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    disable_cpu_packing(model)  # else bitsandbytes computes in bf16 where the CPU has AVX-512 BF16
    logits = probe(model, True, model.config.vocab_size)
    np.testing.assert_allclose(logits, run["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [*LOADERS, "lora", "qlora"])
def test_the_model_folder_has_a_tokenizer_and_no_pickle(runs: Runs, name: str, stage: str) -> None:
    folder = Path(runs.get(name, stage)["path"], "model")
    assert not [path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    text = "Read 3 pages."
    assert (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        == AutoTokenizer.from_pretrained(runs.small.recipes[name][1]["model_name_or_path"])(text)["input_ids"]
    )
