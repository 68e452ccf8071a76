"""Attention by example: what packed rows, padding, a cache and several plain rows get is what sdpa gives."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support.flash import flash_attention
from support.models import Small
from support.rank_pool import Ranks
from support.tiny import sample_of, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from dsrecipes.data.audit import check_isolation
from dsrecipes.data.collate import TOKEN_COUNTS, CausalCollator
from dsrecipes.errors import UserError
from dsrecipes.model.attention import PER_EXAMPLE, accepts_segments, isolate_examples, set_per_example_attention


def pair(folder):
    """The same model with transformers' sdpa, and by example."""
    models = [AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval() for _ in range(2)]
    assert set_per_example_attention(models[1], True) and models[1].config._attn_implementation == PER_EXAMPLE
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
    isolate_examples(model, sample, torch.device("cpu"), choose=False)
    assert model.config._attn_implementation == "sdpa"
    isolate_examples(model, sample, torch.device("cpu"), choose=True)
    assert model.config._attn_implementation == PER_EXAMPLE
    assert set_per_example_attention(model, False) and model.config._attn_implementation == "sdpa"
    model.config.sliding_window = 8
    assert not set_per_example_attention(model, True)


@pytest.fixture
def flash() -> Iterator[Callable[[str], PreTrainedModel]]:
    """Loads a model whose attention is flash attention, as transformers calls it."""
    with flash_attention() as switch_on:
        yield lambda folder: switch_on(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval())


def _items(lengths):
    """Sequences of examples of these lengths."""
    draw = np.random.default_rng(0)
    texts = [[draw.integers(3, 500, length) for length in row] for row in lengths]
    return [[{"input_ids": ids, "labels": ids} for ids in row] for row in texts]


def _logits(model, batch):
    with torch.no_grad():
        return model(**{name: value for name, value in batch.items() if name != TOKEN_COUNTS}, use_cache=False).logits


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_flash_attention_keeps_the_examples_of_a_micro_batch_apart(tiny, flash):
    sdpa = AutoModelForCausalLM.from_pretrained(tiny(), attn_implementation="sdpa").eval()
    model = flash(tiny())
    assert accepts_segments(model) and not accepts_segments(sdpa)
    plain, with_segments = CausalCollator(0, True), CausalCollator(0, True, flash=True)
    for lengths in ([(5, 9, 2)], [(5, 9), (3, 4)], [(4, 4), (4, 4)], [(5, 6), (16,), (2, 3, 4), (7,)], [(9,), (4,)]):
        items = _items(lengths)
        expected = _logits(sdpa, plain(items))
        assert torch.allclose(_logits(model, with_segments(items)), expected, atol=1e-5), lengths
        leaks = len(lengths) > 1 and any(len(row) > 1 for row in lengths)
        assert (_logits(model, plain(items)) - expected).abs().max().gt(1e-3) == leaks, lengths


def test_the_check_refuses_flash_attention_without_the_boundaries_of_examples(flash):
    model = flash(tiny_llama())
    plain, with_segments = CausalCollator(0, True), CausalCollator(0, True, flash=True)
    check_isolation(model, sample_of(model, with_segments, batch=4))
    check_isolation(model, sample_of(model, plain, batch=1))  # transformers reads the position ids of a single row
    with pytest.raises(UserError, match=r"packing leaks.*--attn_implementation sdpa.*cu_seq_lens_q"):
        check_isolation(model, sample_of(model, plain, batch=2))
    forward = model.forward
    model.forward = lambda input_ids, position_ids, labels=None: forward(input_ids, position_ids=position_ids)
    assert not accepts_segments(model)  # a model with code of its own that knows no further arguments


def test_what_the_check_compares_is_a_batch_with_padding(flash):
    sample = sample_of(flash(tiny_llama()), CausalCollator(0, True, flash=True), batch=2)
    assert [[len(row["input_ids"]) for row in rows] for rows in sample.sequences] == [[6, 8], [6]]
    assert sample.collate(sample.sequences)["cu_seq_lens_q"].tolist() == [0, 6, 14, 28]


@pytest.mark.ranks
def test_a_run_with_flash_attention_has_the_losses_of_sdpa(one_rank: Ranks, small: Small, tmp_path):
    changed = {"max_steps": 2, "eval_steps": 2, "per_device_train_batch_size": 4, "lora_dropout": 0.0}
    losses = []
    for case, attention in (("train", "sdpa"), ("train_with_flash", None)):
        values = small.values("lora", **changed, attn_implementation=attention, output_dir=str(tmp_path / case))
        log = one_rank.run(case, **values)[0]["log"]
        losses.append([line[key] for line in log for key in ("loss", "grad_norm", "eval_loss") if key in line])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[0]) == 5
