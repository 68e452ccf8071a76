"""How are files of four-way questions read? Columns, subjects and splits of TMMLU+, CMMLU and MMLU."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

from dsrecipes.data.load import data_files, fetch_csv, load_splits, split_of
from dsrecipes.data.renamed import with_names
from dsrecipes.data.row import Row, located
from dsrecipes.data.shapes import SPLITS
from dsrecipes.data.usage import LowerNames, name_format
from dsrecipes.data.weights import row_weight
from dsrecipes.errors import UserError, nearest
from dsrecipes.io.paths import starter_path, user_path

LETTERS = "ABCD"
SHARES = {"train": 0.70, "validation": 0.25, "test": 0.05}
"""Shares of the splits where all rows are pooled and divided."""
GROUPS = {
    "STEM": """advance_chemistry basic_medical_science computer_science engineering_math junior_chemistry
        junior_math_exam junior_science_exam organic_chemistry pharmacy physics secondary_physics
        statistics_and_machine_learning tve_mathematics tve_natural_sciences""",
    "humanities": """administrative_law anti_money_laundering general_principles_of_law introduction_to_law
        jce_humanities taxation trust_practice""",
    "social_sciences": """chinese_language_and_literature clinical_psychology economics education
        education_(profession_level) educational_psychology geography_of_taiwan human_behavior junior_chinese_exam
        macroeconomics national_protection occupational_therapy_for_psychological_disorders physical_education
        politic_science taiwanese_hokkien three_principles_of_people ttqav2 tve_chinese_language""",
    "other": """accounting agriculture auditing business_management culinary_skills dentistry finance_banking
        financial_analysis fire_science insurance_studies junior_social_studies logic_reasoning management_accounting
        marketing_management mechanical music nautical_science official_document_management optometry pharmacology
        real_estate technical trade traditional_chinese_medicine_clinical_medicine tve_design veterinary_pathology
        veterinary_pharmacology""",
}
"""The 66 subjects of TMMLU+ by group (Tam et al., arXiv:2403.01858; github.com/iKala/ievals, subject list)."""
SUBJECTS = {subject: group for group, names in GROUPS.items() for subject in names.split()}
UNGROUPED = "ungrouped"
"""Group of the subjects of other data."""


def question_record(row: Row) -> dict:
    """Read a row as {"question", "options" (four), "answer" (0 to 3), "subject", "weight" if given}.

    Columns are matched in any letter case.

    Raises:
        ValueError: a field is missing or empty, the answer is not one of the letters, or the weight is no number.
    """
    fields = LowerNames(row)
    question, *options = (_text(fields, name) for name in ("question", "a", "b", "c", "d"))
    # Chinese files also write the letter in its wide form
    letter = unicodedata.normalize("NFKC", _text(fields, "answer")).strip().upper()
    if letter not in tuple(LETTERS):
        raise ValueError(f"field 'answer' must be A, B, C or D, found {fields['answer']!r}")
    if not question.strip():
        raise ValueError("field 'question' is empty")
    name_format(row, "questions")
    return {
        "question": question,
        "options": options,
        "answer": LETTERS.index(letter),
        "subject": str(fields.get("subject", "")),
        **row_weight(fields),
    }


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise ValueError(f"field {name!r} is missing (the row has: {', '.join(fields)})")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field {name!r} must be text, found {type(value).__name__}")
    return str(value)


def wanted_subjects(names: list[str], known: Iterable[str]) -> set[str] | None:
    """Return the subjects of --subjects, names and groups; None for all.

    Raises:
        UserError: a name is neither a subject of the data nor a group.
    """
    if not names:
        return None
    known = set(known)
    chosen: set[str] = set()
    for name in names:
        members = {subject for subject in known if SUBJECTS.get(subject, UNGROUPED) == name}
        if name not in known and not members:
            choices = sorted({*known, *GROUPS})
            raise UserError(
                "DSR132",
                f"--subjects {name}: no such subject or group in the data{nearest(name, choices)}. "
                f"Groups: {', '.join(GROUPS)}; subjects: {', '.join(sorted(known))}",
            )
        chosen |= members or {name}
    return chosen


def sources(
    dataset: str, subjects: list[str], columns: Mapping[str, str] | None = None
) -> Iterable[tuple[str, list[tuple[str, Row]]]]:
    """Yield (split, [(place, row)]) of each file of questions, each row with its subject; a hub data set is downloaded.

    Args:
        dataset: a file, a folder or a hub name.
        subjects: names and groups of those to read; none reads all.
        columns: the file's columns by the names that are read here.
    """
    folder = user_path(starter_path(dataset))
    if not folder.exists():
        # a misspelled subject is refused before the download
        wanted_subjects(subjects, SUBJECTS)
        folder = fetch_csv(dataset)
    files = [folder] if folder.is_file() else data_files(folder)
    if not files:
        load_splits(str(folder))  # raises the message for an empty folder
    by_subject = [(subject_of(path), path) for path in files]
    chosen = wanted_subjects(subjects, {subject for subject, _ in by_subject})
    splits = {path: split_of(path.relative_to(folder) if folder.is_dir() else path) for path in files}
    if "train" not in splits.values():
        # TMMLU+ has no train split: it calls the few example questions of a subject `dev`, and its validation questions `val`
        splits = {path: "train" if _is_dev(path) else split for path, split in splits.items()}
    for subject, path in by_subject:
        if chosen is None or subject in chosen:
            for split, rows in load_splits(str(path)).items():  # a JSON file may hold several
                named = [(place, _with_subject(with_names(row, columns or {}), subject)) for place, row in located(rows)]
                yield (splits[path] or "train") if split == "train" else split, named


def _with_subject(row: Row, subject: str) -> Row:
    row = copy(row)
    row.setdefault("subject", subject)
    return row


def _is_dev(path: Path) -> bool:
    return "dev" in (path.name.split(".")[0].lower().rpartition("_")[2], path.parent.name.lower())


def subject_of(path: Path) -> str:
    """Return the subject in a file's name: physics_test.csv and test/physics.csv are physics."""
    stem = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    # only a name of a split is removed, because subjects have underscores too
    head, _, last = stem.rpartition("_")
    return head if head and last.lower() in SPLITS else stem


def plain(text: str) -> str:
    """Normalize a text so that equal questions compare equal: without letter case, spacing and wide forms."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFKC", text)).casefold()


def pool(rows: list[tuple[str, Row]], seed: int) -> dict[str, list[tuple[str, Row]]]:
    """Divide questions 70/25/5 inside each subject, with a seed; questions that are equal after `plain` stay together.

    Each question is assigned to the split that is furthest below its share, so that the shares hold over all subjects, however
    small.
    """
    repeats: dict[str, list[tuple[str, Row]]] = {}
    for place, row in rows:
        question = next((value for key, value in row.items() if str(key).strip().lower() == "question"), None)
        repeats.setdefault(plain(str(question)), []).append((place, row))
    subjects: dict[str, list[list[tuple[str, Row]]]] = {}
    for same in repeats.values():
        subjects.setdefault(str(same[0][1].get("subject", "")), []).append(same)
    splits: dict[str, list[tuple[str, Row]]] = {name: [] for name in SHARES}
    draw, seen = random.Random(seed), 0
    # in the order of names, so that the order of the files does not change the division
    for subject in sorted(subjects):
        draw.shuffle(subjects[subject])
        for same in subjects[subject]:
            seen += len(same)
            missing = {name: share * seen - len(splits[name]) for name, share in SHARES.items()}
            splits[max(SHARES, key=missing.__getitem__)] += same
    return splits
