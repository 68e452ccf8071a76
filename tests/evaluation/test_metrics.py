"""ROUGE-L, exact match and calibration against values worked out by hand."""

import pytest

from dsrecipes.evaluation.choice_scores import calibration
from dsrecipes.evaluation.metrics import add_scores, figures_of
from dsrecipes.evaluation.text_scores import rouge_l, words


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.2
        ("the gunman kill police", "police killed the gunman", 0.5),
        ("The cat.", "the CAT", 1.0),
        ("", "something", 0.0),
        ("a b c", "a b c d e", 0.75),  # precision 1, recall 3/5
        ("水的沸點是一百度", "水的沸點是一百", 14 / 15),
        ("用 GPU 算", "用 gpu 來算", 6 / 7),
    ],
)
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(expected)


def test_chinese_counts_by_characters_other_scripts_by_words():
    assert words("GPT-2 很快, привет été カナ") == ["gpt", "2", "很", "快", "привет", "été", "カ", "ナ"]


def test_scored_items_are_averaged():
    items = [{"answer": "Paris.", "reference": "paris."}, {"answer": "a b c", "reference": "a b c d e"}]
    add_scores("answers", items)
    assert figures_of("answers", items) == {"rouge_l": pytest.approx(0.875), "exact_match": 0.5}


def test_calibration_error_weighs_bins_by_their_questions():
    figures = calibration([0.95, 0.92, 1.0, 0.4, 0.35], [True, True, False, False, True])
    # three above 0.9: sure 0.95667, right 2/3; two in (0.3, 0.4]: sure 0.375, right 1/2
    assert figures["calibration_error"] == pytest.approx(3 / 5 * 0.29 + 2 / 5 * 0.125)
    assert [(entry["above"], entry["questions"]) for entry in figures["bins"]] == [(0.3, 2), (0.9, 3)]
