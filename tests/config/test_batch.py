"""Global batch = micro batch x accumulation x ranks: the user's numbers hold, defaults are adjusted."""

import pytest

from dsrecipes.config.batch import ACCUMULATION, MICRO, TOTAL, changed_defaults, divide_batch
from dsrecipes.errors import UserError

DEFAULTS = {TOTAL: 8, MICRO: 4}


@pytest.mark.parametrize(
    ("given", "ranks", "batch"),
    [
        ({}, 1, (4, 2)), ({}, 2, (4, 1)), ({}, 4, (2, 1)), ({}, 8, (1, 1)), ({}, 3, (2, 1)), ({}, 16, (1, 1)),
        ({MICRO: 2}, 1, (2, 4)), ({MICRO: 2}, 2, (2, 2)), ({MICRO: 3}, 1, (3, 3)), ({MICRO: 8}, 2, (8, 1)), ({MICRO: 16}, 1, (16, 1)),
        ({ACCUMULATION: 3}, 2, (4, 3)), ({MICRO: 5, ACCUMULATION: 3}, 2, (5, 3)),
        ({TOTAL: 32}, 2, (4, 4)), ({TOTAL: 6}, 1, (3, 2)), ({TOTAL: 6}, 3, (2, 1)), ({TOTAL: 7}, 7, (1, 1)),
        ({TOTAL: 32, ACCUMULATION: 2}, 2, (8, 2)), ({TOTAL: 32, MICRO: 8}, 2, (8, 2)),
        ({TOTAL: 32, MICRO: 1, ACCUMULATION: 32}, 1, (1, 32)),
    ],
)  # fmt: skip
def test_defaults_give_way(given, ranks, batch):
    values = DEFAULTS | given
    if ACCUMULATION in given and TOTAL not in given:
        values.pop(TOTAL)  # as layers.merged does
    found = divide_batch(values, dict.fromkeys(given, "flag"), ranks)
    assert (found.micro, found.accumulation) == batch
    assert all(found.values()[key] == value for key, value in given.items())
    changed = changed_defaults(values, dict.fromkeys(given, "flag"), found)
    assert bool(changed) == any(found.values()[key] != value for key, value in values.items() if key not in given)


@pytest.mark.parametrize(
    ("given", "ranks", "parts"),
    [
        ({TOTAL: 7}, 2, ["global_batch_size 7 (a.json)", "ranks 2", "a multiple of 2"]),
        (
            {TOTAL: 8, MICRO: 3},
            1,
            ["global_batch_size 8 (a.json) = per_device_train_batch_size 3 (a.json)", "a multiple of 3"],
        ),
        ({TOTAL: 8, ACCUMULATION: 16}, 1, ["gradient_accumulation_steps 16", "a multiple of 16"]),
        ({TOTAL: 32, MICRO: 1, ACCUMULATION: 32}, 2, ["x ranks 2", "global_batch_size would be 64"]),
    ],
)
def test_what_the_user_gave_and_cannot_be_had_shows_the_equation(given, ranks, parts):
    with pytest.raises(UserError) as error:
        divide_batch(DEFAULTS | given, dict.fromkeys(given, "a.json"), ranks)
    assert all(part in str(error.value) for part in parts), error.value
