"""Rows of a step, and batches: shapes, selected logits, and packed loss = unpacked loss."""

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from support.tiny import arrow_file, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice

from dsrecipes.data.collate import TOKEN_COUNTS, CausalCollator, PaddingCollator
from dsrecipes.data.encode import IGNORE
from dsrecipes.data.sampler import StepLoader, StepSampler
from dsrecipes.data.sequences import PADDING_ROW, Sequences
from dsrecipes.model import attention


def rows_of_steps(rows, micro, accumulation, world, epoch=0, **kwargs):
    """Return the rows of each optimizer step, over ranks and micro batches."""
    steps = []
    lengths = np.random.default_rng(0).integers(1, 99, size=rows)
    for rank in range(world):
        sampler = StepSampler(lengths, micro, accumulation=accumulation, rank=rank, world=world, seed=7, **kwargs)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) and {len(batch) for batch in batches} == {micro}
        for step in range(len(batches) // accumulation):
            steps += [[]] if len(steps) <= step else []
            steps[step] += [index for batch in batches[step * accumulation : (step + 1) * accumulation] for index in batch]
    return [sorted(step) for step in steps]


@pytest.mark.parametrize("rows", [64, 61, 8, 3])
def test_the_rows_of_a_step_do_not_depend_on_how_they_are_divided(rows):
    reference = rows_of_steps(rows, 8, 1, 1)
    for micro, accumulation, world in ((4, 1, 2), (2, 4, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8), (1, 4, 2)):
        assert rows_of_steps(rows, micro, accumulation, world) == reference
    assert sorted(index for step in reference for index in step if index != PADDING_ROW) == list(range(rows))
    assert all(PADDING_ROW not in step for step in reference[:-1]) and reference[-1].count(PADDING_ROW) == -rows % 8


def test_an_epoch_has_its_own_order():
    orders = [list(rows_of_steps(64, 8, 1, 1, epoch)) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    a, b = (list(StepSampler(np.ones(64), 8, seed=seed)) for seed in (1, 2))
    assert a != b


def test_rows_of_a_micro_batch_are_about_as_long():
    lengths = np.array([9, 1, 8, 2, 7, 3, 6, 4])
    ranks = [list(StepSampler(lengths, 2, accumulation=2, rank=rank, world=2, seed=3)) for rank in (0, 1)]
    assert [[sorted(lengths[batch].tolist()) for batch in batches] for batches in ranks] == [
        [[8, 9], [3, 4]],
        [[6, 7], [1, 2]],
    ]
    # an evaluation sorts all rows, and padding rows come last
    assert StepSampler(lengths[:7], 2, world=2, shuffle=False).order().tolist() == [[0, 2, 4, 6], [5, 3, 1, PADDING_ROW]]


def test_little_padding_and_no_step_for_the_long_ones():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, size=1800).astype(int) + 1
    sampler, means = StepSampler(lengths, 8, accumulation=4, seed=1), []
    padded = sum(len(batch) * lengths[batch].max() for batch in sampler if PADDING_ROW not in batch)
    at_random = sum(8 * lengths[at : at + 8].max() for at in range(0, len(lengths), 8))
    assert padded < 1.15 * lengths.sum() < 0.6 * at_random
    for epoch in range(300):
        sampler.set_epoch(epoch)
        means.append([lengths[step].mean() for step in sampler.order()[:-1]])
    # 300 epochs of 32 rows: the mean of a step's lengths is known to a hundredth, were its rows drawn one by one
    assert np.abs(np.mean(means, axis=0) / lengths.mean() - 1).max() < 0.05


def dataset(lengths, masked=0):
    """Write random ids; the first `masked` of each row are no labels."""
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 500, size=length).tolist() for length in lengths]
    labels = [[*[IGNORE] * min(masked, len(row) - 1), *row[min(masked, len(row) - 1) :]] for row in ids]
    return arrow_file({"input_ids": ids, "labels": labels})


def test_a_resumed_epoch_reads_none_of_the_rows_before(tmp_path):
    class Counting(Sequences):
        read: list[int] = []

        def __getitem__(self, index):
            self.read.append(index)
            return super().__getitem__(index)

    data = Counting(dataset([4] * 40))
    loader = StepLoader(data, batch_sampler=StepSampler(data.lengths, 2), collate_fn=CausalCollator(0, True))
    whole = [batch["input_ids"].tolist() for batch in loader]
    order = list(data.read)
    data.read.clear()
    rest = [batch["input_ids"].tolist() for batch in skip_first_batches(loader, 13)]
    assert data.read == order[26:] and rest == whole[13:] and len(rest) == 7


def test_shapes_labels_and_selected_logits():
    data = dataset([5, 3, 7], masked=2)
    single, packed = Sequences(data), Sequences(data, 8)
    assert len(single) == 3 and [len(packed[i]) for i in range(len(packed))] == [2, 1]
    batch = CausalCollator(pad_id=9, select_logits=True)([packed[0], packed[1], packed[PADDING_ROW]])
    assert "attention_mask" not in batch
    for name in ("input_ids", "position_ids", "logits_to_keep"):
        assert batch[name].shape == (3, 8), name
    assert batch["logits_to_keep"].dtype == torch.bool and batch["labels"].shape == batch["shift_labels"].shape
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch["position_ids"][1].tolist() == list(range(8)) and batch["input_ids"][1, 7] == 9
    # a position is kept where the next token of the same row is a label: never at the end of a row
    assert batch["logits_to_keep"].int().tolist() == [[0, 1, 1, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 0, 0], [0] * 8]
    rows = [single[i][0]["input_ids"].tolist() for i in range(3)]
    assert batch["shift_labels"].tolist() == rows[0][2:] + rows[1][2:] + rows[2][2:]
    assert batch[TOKEN_COUNTS].tolist() == [15, 3]
    plain = CausalCollator(pad_id=9, select_logits=False)([packed[0]])
    assert "logits_to_keep" not in plain and (plain["shift_labels"] != IGNORE).sum() == 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager", attention.PER_EXAMPLE])
@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_packed_loss_is_unpacked_loss_for_every_token(tiny, implementation):
    data = dataset([120, 2, 3, 57, 9, 33, 2, 90, 17, 64, 5, 40], masked=2)
    collate = CausalCollator(pad_id=0, select_logits=True)
    losses = {}
    for name, sequences, how in (("single", Sequences(data), "sdpa"), ("packed", Sequences(data, 128), implementation)):
        model = AutoModelForCausalLM.from_pretrained(tiny(), attn_implementation=how).eval()
        loss_of = {}
        for items in (
            [sequences[i] for i in range(start, min(start + 4, len(sequences)))] for start in range(0, len(sequences), 4)
        ):
            batch = collate(items)
            batch.pop(TOKEN_COUNTS)
            with torch.no_grad():
                out = model(**batch, use_cache=False)
            token_losses = torch.nn.functional.cross_entropy(
                out.logits.view(-1, out.logits.shape[-1]), batch["shift_labels"], reduction="none"
            )
            assert torch.allclose(out.loss, token_losses.mean(), atol=1e-6)
            counts = [
                (tuple(row["input_ids"].tolist()), int((row["labels"][1:] != IGNORE).sum()))
                for item in items
                for row in item
            ]
            for (key, _), row_losses in zip(counts, token_losses.split([count for _, count in counts]), strict=True):
                loss_of[key] = row_losses
        losses[name] = torch.cat([loss_of[key] for key in sorted(loss_of)])
    assert len(Sequences(data, 128)) == 4 and losses["single"].shape == losses["packed"].shape
    assert (losses["single"] - losses["packed"]).abs().max() < 1e-5


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_a_step_of_only_padding_rows_has_no_gradient(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny())
    sequences = Sequences(dataset([5, 9]), 16)
    batch = CausalCollator(0, True)([sequences[PADDING_ROW], sequences[PADDING_ROW]])
    assert batch.pop(TOKEN_COUNTS).tolist() == [0, 0]
    loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(4)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_padding_of_questions_and_of_texts():
    questions = arrow_file(
        {"input_ids": [[[1, 2], [3]], [[4, 5, 6], [7, 8]]], "token_type_ids": [[[0, 1], [0]], [[0, 0, 1], [0, 1]]],
         "labels": [1, 0], "subject": ["a", "b"]}
    )  # fmt: skip
    sequences = Sequences(questions)
    batch = PaddingCollator(pad_id=9)([sequences[0], sequences[1], sequences[PADDING_ROW]])
    assert batch["input_ids"].tolist() == [[[1, 2, 9], [3, 9, 9]], [[4, 5, 6], [7, 8, 9]], [[1, 2, 9], [3, 9, 9]]]
    assert batch["attention_mask"].tolist()[:2] == [[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 0]]]
    assert batch["token_type_ids"].shape == (3, 2, 3) and "subject" not in batch
    assert batch["labels"].tolist() == [1, 0, IGNORE] and batch[TOKEN_COUNTS].tolist() == [8, 2]
    texts = Sequences(arrow_file({"input_ids": [[1, 2], [3]], "labels": [1, 0]}))
    batch = PaddingCollator(pad_id=0)([texts[0], texts[1], texts[PADDING_ROW]])
    assert batch["input_ids"].tolist() == [[1, 2], [3, 0], [1, 2]] and batch["labels"].tolist() == [1, 0, IGNORE]


def test_padding_does_not_change_the_scores():
    from support.tiny import tiny_bert

    model = AutoModelForMultipleChoice.from_pretrained(tiny_bert()).eval()
    draw = np.random.default_rng(0)
    ids = [[draw.integers(5, 2000, size=size).tolist() for size in sizes] for sizes in ((3, 9, 4, 5), (30, 2, 60, 7))]
    data = Sequences(arrow_file({"input_ids": ids, "labels": [0, 3]}))
    collate = PaddingCollator(pad_id=0)
    scores = []
    for items in ([data[0]], [data[1]], [data[0], data[1]]):
        batch = collate(items)
        batch.pop(TOKEN_COUNTS)
        with torch.no_grad():
            scores.append(model(**batch).logits)
    assert torch.allclose(torch.cat(scores[:2]), scores[2], atol=1e-5)
