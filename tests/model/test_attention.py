"""Attention by example: what packed rows, padding, a cache and several plain rows get is what sdpa gives."""

import pytest
import torch
from tiny import sample_of, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM

from dsrecipes.data.collate import CausalCollator
from dsrecipes.model.attention import NAME, attend_by_example, keep_apart


def pair(folder):
    """The same model with transformers' sdpa, and by example."""
    models = [AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval() for _ in range(2)]
    assert attend_by_example(models[1], True) and models[1].config._attn_implementation == NAME
    return models


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_logits_and_gradients_are_those_of_sdpa(tiny):
    models = pair(tiny())
    ids = torch.randint(3, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    packed = torch.cat([torch.arange(n) for n in (20, 7, 13, 1, 19)]).view(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for values in ({}, {"position_ids": packed}, {"attention_mask": mask}):
        logits, gradients = [], []
        for model in models:
            out = model(input_ids=ids, use_cache=False, **values)
            logits.append(out.logits[mask == 1])
            model.zero_grad()
            logits[-1].square().mean().backward()
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        assert torch.allclose(*logits, atol=1e-5) and torch.allclose(*gradients, atol=1e-6), values
    texts = [model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False).tolist() for model in models]
    assert texts[0] == texts[1]


def test_an_attention_that_the_user_named_is_kept():
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    sample = sample_of(model, CausalCollator(0, select_logits=True))
    keep_apart(model, sample, torch.device("cpu"), choose=False)
    assert model.config._attn_implementation == "sdpa"
    keep_apart(model, sample, torch.device("cpu"), choose=True)
    assert model.config._attn_implementation == NAME
    assert attend_by_example(model, False) and model.config._attn_implementation == "sdpa"
    model.config.sliding_window = 8
    assert not attend_by_example(model, True)
