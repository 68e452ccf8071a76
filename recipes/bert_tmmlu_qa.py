"""Chinese BERT on four-way questions of TMMLU+ (ikala/tmmluplus), or any folder of SUBJECT_{dev,val,test}.csv."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes.base import Metrics, RecipeBase
from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.questions import LETTERS, SHARES, pool, question_record
from dsrecipes.data.questions import sources as question_sources
from dsrecipes.data.rows import LocatedRows, Row, located
from dsrecipes.data.sources import MixedSplit, SourceRows
from dsrecipes.data.split import Split
from dsrecipes.data.weights import WEIGHTS, row_weights
from dsrecipes.evaluation.choice_scores import accuracy


class BertTmmluQa(RecipeBase):
    """Multiple choice: question and option as a pair, one score for each of four."""

    auto_class = "AutoModelForMultipleChoice"

    @staticmethod
    def format_row(row: Row) -> dict:
        """{"question", "options" (four), "answer" (0 to 3), "subject", "weight" if given}; columns in any letter case."""
        return question_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Four texts a record; the longer part of a pair is cut where both pass max_length."""
        pairs = [(record["question"], option) for record in records for option in record["options"]]
        encoded = tokenizer(
            [question for question, _ in pairs],
            [option for _, option in pairs],
            truncation="longest_first",
            max_length=options.max_length,
            return_attention_mask=False,
        )
        batch = {name: [flat[i : i + 4] for i in range(0, len(flat), 4)] for name, flat in encoded.items()}
        labels, subjects = [record["answer"] for record in records], [record["subject"] for record in records]
        return batch | {"labels": labels, "subject": subjects, WEIGHTS: row_weights(records)}

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Questions with their subject, pooled and split again, or by the files' own splits."""
        data = self.config.data
        splits: dict[str, list[tuple[str, Row]]] = {name: [] for name in SHARES}
        for name, rows in question_sources(data.dataset, data.subjects, data.columns):
            splits[name] += rows
        if data.eval_dataset:
            splits["validation"] = [
                pair for _, rows in question_sources(data.eval_dataset, data.subjects, data.columns) for pair in rows
            ]
        elif data.split == "pooled":
            splits = pool([pair for rows in splits.values() for pair in rows], self.config.train["seed"])
        return {name: LocatedRows(rows) for name, rows in splits.items() if rows}

    def metrics(self, split: Split | MixedSplit, train: Split | MixedSplit, model_config: PretrainedConfig) -> Metrics:
        """Accuracy over all, per subject and per group, with what guessing reaches."""
        subjects = split.data["subject"][:]
        most = Counter(train.data["labels"][:]).most_common(1)[0][0]

        def compute(prediction: EvalPrediction) -> dict[str, Any]:
            answers = np.argmax(prediction.predictions, axis=-1)
            return accuracy(answers, np.asarray(prediction.label_ids), subjects) | {
                "accuracy_majority": float(np.mean(prediction.label_ids == most)),
                "accuracy_random": 1 / len(LETTERS),
            }

        return compute

    def write_extras(self, folder: Path, sources: Sequence[SourceRows]) -> None:
        """test_qa_data.json: the held-out questions, for asking the trained model."""
        questions = []
        for _, row in (pair for source in sources for pair in located(source.splits.get("test", []))):
            try:
                record = self.format_row(row)
            except ValueError:
                continue  # dropped by --skip_bad_rows
            questions.append(
                {**{k: record[k] for k in ("subject", "question", "options")}, "answer": LETTERS[record["answer"]]}
            )
        text = json.dumps(questions, ensure_ascii=False, indent=1)
        (folder / "test_qa_data.json").write_text(text + "\n", encoding="utf-8")
