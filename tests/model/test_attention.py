"""Attention by example: what packed rows, padding, a cache and several plain rows get is what sdpa gives."""

import numpy as np
import pytest
import torch
import transformers.integrations.flash_attention as integration
import transformers.modeling_flash_attention_utils as modeling
from tiny import sample_of, tiny_gpt2, tiny_llama
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from dsrecipes.data.audit import check_isolation
from dsrecipes.data.collate import COUNTS, CausalCollator
from dsrecipes.errors import UserError
from dsrecipes.model.attention import NAME, attend_by_example, keep_apart, takes_segments


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


def _flash(query, key, value, causal=True, softmax_scale=None, dropout_p=0.0, window_size=(-1, -1), **kwargs):
    """What flash_attn_func computes of (batch, length, heads, head size): each row is one example."""
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    out = scaled_dot_product_attention(
        query, key, value, is_causal=causal, scale=softmax_scale, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2)


def _flash_varlen(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=True, **kwargs):
    """What flash_attn_varlen_func computes of (tokens, heads, head size): attention inside each segment."""
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(query)
    lengths = cu_seqlens_q.diff().tolist()
    assert max(lengths) == max_seqlen_q == max_seqlen_k
    parts = zip(*(states.split(lengths) for states in (query, key, value)), strict=True)
    return torch.cat([_flash(*(states[None] for states in part), causal=causal, **kwargs)[0] for part in parts])


@pytest.fixture
def flash(monkeypatch):
    """Flash attention as transformers calls it, computed by torch's: no kernel of it runs on a CPU."""
    functions = (_flash, _flash_varlen, None, modeling._pad_input, modeling._unpad_input)
    processed = modeling._lazy_define_process_function(_flash_varlen)
    monkeypatch.setattr(integration, "get_target_dtype", lambda *_: None)  # kernels have no fp32, which is exact here
    monkeypatch.setattr(modeling, "lazy_import_flash_attention", lambda *_, **__: (functions, (processed, None)))

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        model.config._attn_implementation = "flash_attention_2"
        return model

    return load


def _items(lengths):
    """Sequences of examples of these lengths."""
    draw = np.random.default_rng(0)
    texts = [[draw.integers(3, 500, length) for length in each] for each in lengths]
    return [[{"input_ids": ids, "labels": ids} for ids in each] for each in texts]


def _logits(model, batch):
    with torch.no_grad():
        return model(**{name: each for name, each in batch.items() if name != COUNTS}, use_cache=False).logits


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_flash_attention_keeps_the_examples_of_a_micro_batch_apart(tiny, flash):
    sdpa = AutoModelForCausalLM.from_pretrained(tiny(), attn_implementation="sdpa").eval()
    model = flash(tiny())
    assert takes_segments(model) and not takes_segments(sdpa)
    plain, told = CausalCollator(0, True), CausalCollator(0, True, flash=True)
    for lengths in ([(5, 9, 2)], [(5, 9), (3, 4)], [(4, 4), (4, 4)], [(5, 6), (16,), (2, 3, 4), (7,)], [(9,), (4,)]):
        items = _items(lengths)
        expected = _logits(sdpa, plain(items))
        assert torch.allclose(_logits(model, told(items)), expected, atol=1e-5), lengths
        leaks = len(lengths) > 1 and any(len(each) > 1 for each in lengths)
        assert (_logits(model, plain(items)) - expected).abs().max().gt(1e-3) == leaks, lengths


def test_the_check_refuses_flash_attention_that_is_not_told_where_examples_begin(flash):
    model = flash(tiny_llama())
    plain, told = CausalCollator(0, True), CausalCollator(0, True, flash=True)
    check_isolation(model, sample_of(model, told, batch=4))
    check_isolation(model, sample_of(model, plain, batch=1))  # transformers reads the position ids of a single row
    with pytest.raises(UserError, match=r"packing leaks.*--attn_implementation sdpa.*cu_seq_lens_q"):
        check_isolation(model, sample_of(model, plain, batch=2))
    forward = model.forward
    model.forward = lambda input_ids, position_ids, labels=None: forward(input_ids, position_ids=position_ids)
    assert not takes_segments(model)  # a model with code of its own that knows no further arguments


def test_what_the_check_compares_is_a_batch_with_padding(flash):
    sample = sample_of(flash(tiny_llama()), CausalCollator(0, True, flash=True), batch=2)
    assert [[len(row["input_ids"]) for row in rows] for rows in sample.sequences] == [[6, 8], [6]]
    assert sample.collate(sample.sequences)["cu_seq_lens_q"].tolist() == [0, 6, 14, 28]
