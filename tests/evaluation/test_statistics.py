"""Paired comparison against values worked out by hand."""

import numpy as np
import pytest

from dsrecipes.evaluation.statistics import mcnemar, paired_interval


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        (0, 0, 1.0),  # nothing differs
        (0, 5, 2 / 2**5),  # five heads in a row, either side
        (1, 9, 2 * (1 + 10) / 2**10),
        (9, 1, 2 * (1 + 10) / 2**10),
        (4, 6, 2 * (1 + 10 + 45 + 120 + 210) / 2**10),
        (5, 5, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial(first, second, p):
    assert mcnemar(first, second) == p


def test_mcnemar_holds_for_thousands_of_items():
    assert mcnemar(2000, 2000) == 1.0
    assert 0 < mcnemar(1800, 2200) < 1e-9


def test_the_interval_is_the_normal_one_where_that_holds():
    differences = np.random.default_rng(1).normal(0.3, 1.0, 2000)
    low, high = paired_interval(differences, np.ones(2000))
    half = 1.96 * differences.std() / 2000**0.5
    assert low == pytest.approx(differences.mean() - half, abs=4e-3)
    assert high == pytest.approx(differences.mean() + half, abs=4e-3)


def test_an_item_weighs_by_its_tokens():
    low, high = paired_interval(np.array([3.0, 30.0]), np.array([1, 10]))
    assert (low, high) == (3.0, 3.0)  # 3 nats a token in both, whatever is drawn


def test_the_interval_repeats_with_its_seed_and_covers_what_was_not_there():
    rows = np.random.default_rng(2).normal(0, 1, (200, 60))
    spans = [paired_interval(row, np.ones(60), seed=3, samples=1000) for row in rows]
    assert spans[0] == paired_interval(rows[0], np.ones(60), seed=3, samples=1000)
    assert 0.90 <= np.mean([low <= 0 <= high for low, high in spans]) <= 0.99
