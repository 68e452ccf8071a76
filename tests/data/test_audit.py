"""Checks of rows and batches: packed examples that influence each other, rows without an end or labels, rows of two ranks."""

import pytest
import torch
from support.tiny import arrow_file, sample_of, sequences, tiny_gpt2
from transformers import (
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dsrecipes.data.audit import RankRows, check_ends, check_isolation, check_ranks, packed_sample, unlabelled
from dsrecipes.data.collate import CausalCollator, PaddingCollator
from dsrecipes.data.sequences import Sequences
from dsrecipes.errors import UserError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("select", [True, False])
def test_positions_that_restart_keep_examples_apart(dtype, select):
    models = [
        LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=64)),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)),
    ]
    for model in models:
        sample = sample_of(model.to(dtype), CausalCollator(0, select), dtype == torch.float32)
        assert [[len(row["input_ids"]) for row in rows] for rows in sample.sequences] == [[6, 8]]
        assert check_isolation(model, sample) is None
        packed, apart = sample.answer(packed=True), sample.answer(packed=False)
        assert packed[1].shape == apart[1].shape == (3 + 5, 64)
        two = sample_of(model, CausalCollator(0, select), dtype == torch.float32, batch=4)
        assert [[len(row["input_ids"]) for row in rows] for rows in two.sequences] == [[6, 8], [6]]
        assert check_isolation(model, two) is None and two.answer(packed=True)[1].shape == (3 + 5 + 3, 64)


def test_packing_with_alibi_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.5))
    collate = CausalCollator(0, select_logits=True)

    def without_positions(items):
        batch = collate(items)
        batch.pop("position_ids")
        return batch

    with pytest.raises(UserError, match=r"BloomForCausalLM.*loss .* instead of .*DSR180"):
        check_isolation(model, sample_of(model, without_positions, True))


def test_a_sample_needs_two_examples_in_a_sequence():
    alone = Sequences(arrow_file({"input_ids": [[1] * 9, [1] * 8], "labels": [[1] * 9, [1] * 8]}), 16)
    assert packed_sample(alone, 1, collate=None, forward=None, exact=True) is None
    assert packed_sample(sequences(capacity=None), 1, collate=None, forward=None, exact=True) is None


def test_rows_that_never_end_are_refused():
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny_gpt2()),
        GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=1, n_head=1, n_embd=8)),
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 77]
    for end in (tokenizer.eos_token_id, 77):
        check_ends(sequences(end=end), tokenizer, model)
    with pytest.raises(UserError, match=r"first 5 training rows.*DSR182"):
        check_ends(sequences(end=78), tokenizer, model)


@pytest.mark.parametrize("select", [True, False])
def test_rows_without_a_label_are_found_in_any_sequence(select):
    data, collate = sequences(capacity=None), CausalCollator(0, select)
    for masked in ([], [0], [1], [2], [0, 3], [0, 1, 2, 3]):
        items = [[data[0][0], data[1][0]], [data[2][0]], [data[3][0]]]
        rows = [[0, 1], [2], [3]]
        flat = [row for item in items for row in item]
        for number in masked:
            flat[number]["labels"] = torch.full((len(flat[number]["labels"]),), -100).numpy()
        assert unlabelled(collate(items), rows) == masked
    filled = [[0], []]  # a padding row has no number, and no label
    assert unlabelled(collate([data[0], data[-1]]), filled) == []


def test_answers_without_a_label_are_found():
    columns = {"input_ids": [[1, 2], [3, 4, 5], [6]], "labels": [0, 2, 1]}
    data = Sequences(arrow_file(columns))
    items = [data[0], data[1], data[-1]]
    assert unlabelled(PaddingCollator(0)(items), [[0], [1], []]) == []
    batch = PaddingCollator(0)(items)
    batch["labels"][1] = -100
    assert unlabelled(batch, [[0], [1], []]) == [1]


def test_ranks_must_have_equal_numbers_of_steps_and_different_rows():
    check_ranks([RankRows(6, [0, 1, -1]), RankRows(6, [2, 3, -1])])
    with pytest.raises(UserError, match=r"rank 0 6, rank 1 8.*DSR183"):
        check_ranks([RankRows(6, [0]), RankRows(8, [1])])
    with pytest.raises(UserError, match=r"ranks 0 and 2 .*sequence 4.*DSR184"):
        check_ranks([RankRows(6, [4]), RankRows(6, [1]), RankRows(6, [4])])
