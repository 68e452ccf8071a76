"""Four-way exam questions of TMMLU+ (ikala/tmmluplus) with Chinese BERT, or of any folder of SUBJECT_{dev,val,test}.csv.

dsrecipes train bert_tmmlu_qa --dataset FOLDER
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, PretrainedConfig, PreTrainedTokenizerBase

from dsrecipes import EncodeOptions, Metrics, MixedSplit, RecipeBase, Row, SourceRows, Split, row_weights
from dsrecipes.data.questions import LETTERS, SHARES, pool, question_record
from dsrecipes.data.questions import sources as question_sources
from dsrecipes.data.row import LocatedRows, located
from dsrecipes.data.weights import WEIGHTS


class BertTmmluQa(RecipeBase):
    """Multiple choice: each option is paired with its question, and the model scores the four pairs."""

    auto_class = "AutoModelForMultipleChoice"

    @staticmethod
    def format_row(row: Row) -> dict:
        """Return {"question", "options" (four), "answer" (0 to 3), "subject", perhaps "weight"}; columns in any letter case."""
        return question_record(row)

    @staticmethod
    def encode(records: list[dict], tokenizer: PreTrainedTokenizerBase, options: EncodeOptions) -> dict[str, list]:
        """Encode four pairs per record; the longer part of a pair is truncated if both exceed max_length."""
        encoded = tokenizer(
            [record["question"] for record in records for _ in record["options"]],
            [option for record in records for option in record["options"]],
            truncation="longest_first",
            max_length=options.max_length,
            return_attention_mask=False,
        )
        # the tokenizer takes a flat list of pairs: four in a row are one question's
        count = len(LETTERS)
        batch = {name: [flat[i : i + count] for i in range(0, len(flat), count)] for name, flat in encoded.items()}
        return batch | {
            "labels": [record["answer"] for record in records],
            "subject": [record["subject"] for record in records],
            WEIGHTS: row_weights(records),
        }

    def load_rows(self) -> dict[str, Iterable[Row]]:
        """Load questions with their subjects, pooled and split again, or in the files' own splits."""
        data = self.config.data
        splits: dict[str, list[tuple[str, Row]]] = {name: [] for name in SHARES}
        for name, rows in question_sources(data.dataset, data.subjects, data.columns):
            splits[name] += rows
        if data.eval_dataset:
            splits["validation"] = [
                pair for _, rows in question_sources(data.eval_dataset, data.subjects, data.columns) for pair in rows
            ]
        # TMMLU+ has 5 dev questions a subject and most of its questions in test, so its own splits train little
        elif data.split == "pooled":
            splits = pool([pair for rows in splits.values() for pair in rows], self.config.train["seed"])
        return {name: LocatedRows(rows) for name, rows in splits.items() if rows}

    def metrics(self, split: Split | MixedSplit, train: Split | MixedSplit, model_config: PretrainedConfig) -> Metrics:
        """Report accuracy over all, by subject and by group, with the accuracy of guessing."""
        from dsrecipes.evaluation.accuracy import Accuracy

        subjects = split.data["subject"][:]
        most = Counter(train.data["labels"][:]).most_common(1)[0][0]

        def compute(prediction: EvalPrediction) -> dict[str, Any]:
            answers = np.argmax(prediction.predictions, axis=-1)
            figures = Accuracy().compute(predictions=answers, references=prediction.label_ids, subjects=subjects)
            return figures | {
                "accuracy_majority": float(np.mean(prediction.label_ids == most)),
                "accuracy_random": 1 / len(LETTERS),
            }

        return compute

    def write_extras(self, folder: Path, sources: Sequence[SourceRows]) -> None:
        """Write test_qa_data.json: the held-out questions, to ask the trained model."""
        questions = []
        for _, row in (pair for source in sources for pair in located(source.splits.get("test", []))):
            try:
                record = self.format_row(row)
            except ValueError:
                # training has dropped it too, by --skip_bad_rows
                continue
            questions.append(
                {
                    "subject": record["subject"],
                    "question": record["question"],
                    "options": record["options"],
                    "answer": LETTERS[record["answer"]],
                }
            )
        text = json.dumps(questions, ensure_ascii=False, indent=1)
        (folder / "test_qa_data.json").write_text(text + "\n", encoding="utf-8")
