"""The rubric, the verdict's form, and what the verdicts of both orders come to."""

import pytest

from dsrecipes.errors import UserError
from dsrecipes.evaluation.verdict import ORDERS, RUBRIC, fill, read_rubric, read_verdict, tally, wilson


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("B is right.\nVERDICT: B", "B"),
        ("VERDICT: TIE\n\n  ", "TIE"),
        ("  VERDICT: A  ", "A"),
        ("VERDICT: A\nSo it is.\nVERDICT: A", "A"),
        ("", None),
        ("A", None),
        ("VERDICT: C", None),
        ("VERDICT: A or B", None),
        ("verdict: a", None),
        ("**VERDICT: A**", None),
        ("The VERDICT: A", None),
        ("VERDICT: A\nI hope this helps.", None),
        ("VERDICT: A\nVERDICT: B", None),
        ("VERDICT: X", None),
    ],
)
def test_a_verdict_is_read_and_never_guessed(reply, verdict):
    assert read_verdict(reply) == verdict


def test_the_shipped_rubric_has_all_its_places():
    text = fill(read_rubric(None), "Why?", "{answer_b} {x}", "Because.")
    assert "Why?" in text and "[Answer A]\n{answer_b} {x}\n" in text and "[Answer B]\nBecause.\n" in text
    assert read_verdict(text) is None


@pytest.mark.parametrize("lost", ["{question}", "{answer_a}", "{answer_b}", "VERDICT:"])
def test_a_rubric_without_a_place_is_refused(tmp_path, lost):
    path = tmp_path / "rubric.txt"
    path.write_text(RUBRIC.read_text().replace(lost, ""))
    with pytest.raises(UserError) as refused:
        read_rubric(str(path))
    assert f"{path}: {lost} is missing" in str(refused.value)


def test_a_rubric_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_rubric(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes("für".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_rubric(str(tmp_path / "latin.txt"))


def judgements(*pairs):
    """Judgements of (verdict with the run first, verdict with the other first)."""
    return [
        {"item": item, "order": order, "verdict": verdict, "requests": 1}
        for item, pair in enumerate(pairs)
        for order, verdict in zip(ORDERS, pair, strict=True)
    ]


@pytest.mark.parametrize(
    ("pair", "kind"),
    [
        (("A", "B"), "wins"), (("B", "A"), "losses"), (("TIE", "TIE"), "ties"), (("A", "A"), "inconsistent"),
        (("B", "B"), "inconsistent"), (("A", "TIE"), "inconsistent"), (("TIE", "A"), "inconsistent"),
        (("A", None), "unparsed"), ((None, "A"), "unparsed"), ((None, None), "unparsed"),
    ],
)  # fmt: skip
def test_a_win_needs_both_orders(pair, kind):
    result = tally(judgements(pair))
    assert {name: result[name] for name in ("wins", "losses", "ties", "inconsistent", "unparsed")} == {
        name: int(name == kind) for name in ("wins", "losses", "ties", "inconsistent", "unparsed")
    }


def test_the_win_rate_leaves_unparsed_pairs_out():
    result = tally(judgements(("A", "B"), ("A", "B"), ("B", "A"), ("TIE", "TIE"), ("A", "A"), (None, "A")))
    assert result["items"] == 6 and result["win_rate"] == 0.6
    assert result["win_rate_95"] == pytest.approx([0.23072, 0.88238], abs=1e-5)  # Wilson of 3 in 5
    assert result["verdicts"] == {"A": 6, "B": 3, "TIE": 2}


def test_no_verdict_gives_no_rate():
    result = tally(judgements((None, None)))
    assert result["win_rate"] is None and result["win_rate_95"] is None


def test_wilson():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
