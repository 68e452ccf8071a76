"""Mixtures: exact shares, different rows in each epoch, and the same order on any number of ranks."""

import pickle
from itertools import islice

import numpy as np
import pytest
from support.tiny import arrow_file

from dsrecipes import UserError
from dsrecipes.config.sources import read_sources
from dsrecipes.data.collate import PaddingCollator
from dsrecipes.data.holdout import hold_out_alone
from dsrecipes.data.mixture import JoinedSequences, Mixture, cut_to, draws, rows_by_epoch
from dsrecipes.data.sampler import StepSampler
from dsrecipes.data.sequences import PADDING_ROW, Sequences

AVAILABLE = {"a": 100, "b": 50, "c": 7}


def sources(**shares):
    """Build sources a, b, ... with a share such as {"weight": 2}."""
    return read_sources("dataset", [{"path": name, **share} for name, share in shares.items()])[0]


@pytest.mark.parametrize(
    ("shares", "rows"),
    [
        ({"a": {}, "b": {}, "c": {}}, None),
        ({"a": {"rows": 30}, "b": {}, "c": {"rows": 20}}, {"a": 30, "b": 50, "c": 20}),
        ({"a": {"weight": 1}, "b": {"weight": 1}, "c": {"weight": 1}}, {"a": 53, "b": 52, "c": 52}),
        ({"a": {"weight": 0.7}, "b": {"weight": 0.2}, "c": {"weight": 0.1}}, {"a": 110, "b": 31, "c": 16}),
        ({"a": {"weight": 3}, "b": {}, "c": {"rows": 5}}, {"a": 113, "b": 37, "c": 5}),
        ({"a": {"weight": 9}, "b": {"rows": 1}}, {"a": 100, "b": 1}),
    ],
)
def test_shares_are_exact_within_a_row(shares, rows):
    counts = rows_by_epoch(sources(**shares), AVAILABLE)
    assert counts == rows
    weights = {name: share["weight"] for name, share in shares.items() if "weight" in share}
    if counts and set(weights) == set(shares):
        total = sum(AVAILABLE[name] for name in shares)
        assert sum(counts.values()) == total
        assert all(abs(counts[name] - total * weight / sum(weights.values())) < 1 for name, weight in weights.items())


def test_a_share_of_no_row_is_refused():
    with pytest.raises(UserError, match=r"b: weight 0.001 .* 150 rows .*DSR161"):
        rows_by_epoch(sources(a={"weight": 1}, b={"weight": 0.001}), AVAILABLE)


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (10, 10), (10, 25), (7, 5), (1, 4)])
def test_no_row_is_repeated_before_all_rows_have_occurred(rows, count):
    seen = np.zeros(rows, dtype=int)
    epochs = list(islice(draws(rows, count, (1, 2)), 12))
    for drawn in epochs:
        times = np.bincount(drawn, minlength=rows)
        assert len(drawn) == count and times.max() - times.min() <= 1
        seen += times
        assert seen.max() - seen.min() <= 2  # an epoch may end in the middle of a pass
    assert seen.sum() == 12 * count
    if count % rows:
        assert len({tuple(sorted(drawn)) for drawn in epochs}) > 1 or rows == 1


def parts(capacity=None):
    """Write two sources, the second with a column that the first lacks."""
    draw = np.random.default_rng(3)
    files = {}
    for name, rows in (("a", 40), ("b", 12)):
        ids = [[number] * length for number, length in enumerate(draw.integers(2, 30, size=rows).tolist())]
        extra = {"kind": [1] * rows} if name == "b" else {}
        files[name] = Sequences(arrow_file({"input_ids": ids, "labels": ids} | extra), capacity)
    return files


def mixture(capacity=32, batch=4, **run):
    made = Mixture(parts(), {"a": 17, "b": 30}, capacity, seed=5)
    made.fix_length(batch, run.get("epochs", 6), run.get("max_steps", 0))
    return made


def rows_of(data, epoch):
    """Return the rows of each sequence of an epoch."""
    return [data.rows(data.first_of(epoch) + index) for index in range(len(data))]


@pytest.mark.parametrize("capacity", [None, 32])
def test_every_epoch_has_the_same_number_of_sequences(capacity):
    data = mixture(capacity)
    drawn = []
    for epoch in (0, 1, 2, 5, 1):  # back to an earlier one, as in a resumed run
        bins = rows_of(data, epoch)
        rows = sorted(row for sequence in bins for row in sequence)
        assert sum(row < 40 for row in rows) == 17 and len(set(rows[:17])) == 17 and len(rows) == 47
        assert {rows.count(row) for row in range(40, 52)} == {2, 3}
        assert all(bins) and data.lengths_of(epoch).tolist() == [
            int(data.row_lengths()[sequence].sum()) for sequence in bins
        ]
        assert capacity is None or data.lengths_of(epoch).max() <= capacity
        drawn.append(rows)
    assert drawn[1] == drawn[4] and len({tuple(rows) for rows in drawn}) == 4
    assert len(data) == 47 if capacity is None else len(data) % 4 == 0


def test_the_length_of_a_run_in_steps_decides_which_epochs_count():
    most = max(len(mixture()._packed(epoch)[1]) for epoch in range(6))
    assert len(mixture(batch=1)) == most == len(mixture(batch=1, max_steps=most * 6))
    assert len(mixture(batch=1, epochs=1)) == len(mixture(batch=1, max_steps=2)) <= most


def test_sequences_are_cut_to_a_number():
    assert cut_to(np.array([1, 5, 7]), 5).tolist() == [1, 3, 5, 6, 7]
    assert cut_to(np.array([6]), 6).tolist() == [1, 2, 3, 4, 5, 6]
    assert cut_to(np.array([2, 3]), 2).tolist() == [2, 3]


def test_the_rows_of_a_step_are_the_same_on_any_shape_and_in_a_data_worker():
    orders = []
    for micro, accumulation, world in ((1, 4, 1), (2, 2, 1), (4, 1, 1), (1, 2, 2), (1, 1, 4)):
        data = pickle.loads(pickle.dumps(mixture()))
        steps = []
        for epoch in (0, 3):
            ranks = []
            for rank in range(world):
                sampler = StepSampler(
                    data.lengths, micro, accumulation=accumulation, rank=rank, world=world, seed=1, data=data
                )
                sampler.set_epoch(epoch)
                ranks.append(np.array(list(sampler)).reshape(-1, accumulation * micro))
            steps += [sorted(step) for step in np.concatenate(ranks, axis=1).tolist()]
        assert all(PADDING_ROW not in step for step in steps)
        orders.append([[data.rows(index) for index in step] for step in steps])
        assert [[row["input_ids"][0] for row in data[index]] for index in steps[-1]] == [
            [row if row < 40 else row - 40 for row in rows] for rows in orders[-1][-1]
        ]
    assert all(order == orders[0] for order in orders)


def test_joined_sources_know_their_files():
    files = parts(capacity=32)
    joined = pickle.loads(pickle.dumps(JoinedSequences(files)))
    assert len(joined) == sum(map(len, files.values())) and joined.counts == {}
    assert sorted(row for index in range(len(joined)) for row in joined.rows(index)) == list(range(52))
    assert [joined.rows(index) for index in range(len(files["a"]))] == [files["a"].rows(i) for i in range(len(files["a"]))]
    assert joined.by_file([0, 41, 39]) == [(files["a"].path, [0, 39]), (files["b"].path, [1])]
    assert [sorted(row) for row in joined.examples([39, 40])] == [["input_ids", "labels"], ["input_ids", "kind", "labels"]]
    assert joined.lengths.tolist() == [*files["a"].lengths, *files["b"].lengths]
    assert joined[PADDING_ROW][0]["labels"].tolist() == [-100]


def test_a_source_without_weights_next_to_one_with_weights():
    columns = {"input_ids": [[1, 2], [3]], "labels": [[1.0, 0.0], [0.0, 1.0]]}  # several labels a row
    files = {name: Sequences(arrow_file(columns | {"weights": [weight, 1.0]})) for name, weight in (("a", 1.0), ("b", 2.0))}
    batch = PaddingCollator(0)([JoinedSequences(files)[index] for index in range(4)])
    assert batch["weights"].tolist() == [1, 1, 2, 1]


def test_equal_rows_of_several_sources_are_held_out_together():
    keys = np.random.default_rng(0).integers(0, 2**64, size=2000, dtype=np.uint64)
    first, second = hold_out_alone(keys[:1500], 0.1, 3), hold_out_alone(keys[1000:], 0.1, 3)
    assert (first[1000:] == second[:500]).all() and 120 < first.sum() < 180
    assert (hold_out_alone(keys[:1500], 0.1, 4) != first).any()
    counts = [hold_out_alone(keys[:n], share, 3).sum() for n, share in ((0, 0.5), (1, 0.5), (2, 1e-9), (2, 0.999))]
    assert counts == [0, 0, 1, 1]
