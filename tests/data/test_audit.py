"""Packing is refused for a model that looks across examples."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dsrecipes.data.audit import check_isolation
from dsrecipes.errors import UserError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_restart_keep_examples_apart(dtype):
    models = [
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    ]
    for model in models:
        assert check_isolation(model.to(dtype), torch.device("cpu")) is None


def test_alibi_does_not_and_the_flag_is_named():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5)
    with pytest.raises(UserError, match=r"packing leaks in a BloomForCausalLM.*--packing false"):
        check_isolation(BloomForCausalLM(config), torch.device("cpu"))
