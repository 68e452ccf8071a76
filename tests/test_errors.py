"""Words of messages."""

import re
from pathlib import Path

import pytest

import dsrecipes
from dsrecipes.errors import plural


@pytest.mark.parametrize(
    ("count", "noun", "words"),
    [
        (0, "row", "0 rows"), (1, "row", "1 row"), (2, "bad row", "2 bad rows"), (1200, "token", "1,200 tokens"),
        (1.0, "epoch", "1 epoch"), (0.5, "epoch", "0.5 epochs"), (8.0, "epoch", "8 epochs"), (1, "loss", "1 loss"),
        (0, "loss", "0 losses"), (1000, "step", "1,000 steps"),
    ],
)  # fmt: skip
def test_a_count_and_its_noun(count, noun, words):
    assert plural(count, noun) == words


def test_no_text_is_multiplied_by_a_truth_value():
    multiplied = re.compile(r"""['"] \* ?(\(|not|bool|[a-z_]+( |$))|['"]s['"] if""")
    found = [
        f"{path.name}: {line.strip()}"
        for path in Path(dsrecipes.__file__).parent.rglob("*.py")
        for line in path.read_text("utf-8").splitlines()
        if multiplied.search(line)
    ]
    assert not found, "use dsrecipes.errors.plural"
