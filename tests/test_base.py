"""A recipe of the user's own, in a file of two methods; and files that are no recipes."""

import contextlib
import io
import json
import math

import pytest
from support.tiny import refusal, tiny_bert, tiny_gpt2, tiny_llama, write_rows
from transformers import AutoModelForSequenceClassification

from dsrecipes import load_recipe
from dsrecipes.errors import UserError
from dsrecipes.publish.verify import verify
from dsrecipes.recipe_class import call_hook
from dsrecipes.run import main
from dsrecipes.runs.log import read_log

MINE = """
from dsrecipes.base import RecipeBase


class Haiku(RecipeBase):
    @staticmethod
    def format_row(row):
        return {"prompt": row["title"] + ":", "answer": row["poem"]}

    @staticmethod
    def encode(records, tokenizer, options):
        from dsrecipes.data.encode import encode_segments

        return encode_segments([[(r["prompt"], False), (r["answer"], True)] for r in records], tokenizer)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "haiku.py").write_text(MINE)
    rows = [{"title": f"Number {n}", "poem": "leaf " * (n % 7 + 1)} for n in range(12)]
    write_rows(tmp_path / "haiku.jsonl", rows)
    return tmp_path / "haiku.py"


def test_two_methods_are_a_recipe(mine, tmp_path, capfd):
    values = {
        "model_name_or_path": tiny_gpt2(), "dataset": str(tmp_path / "haiku.jsonl"), "max_length": 64, "max_steps": 2,
        "per_device_train_batch_size": 2, "deepspeed": "none", "use_cpu": True, "output_dir": str(tmp_path / "run"), "logging_steps": 1,
        "verify_model": False,
    }  # fmt: skip
    result = load_recipe(str(mine), **values).run()
    assert result.step == 2 and len([line for line in read_log(result.path / "log.jsonl") if "loss" in line]) == 2
    out = capfd.readouterr().out
    assert "no validation rows: --validation_split" in out and "⟦" not in out
    # the command line takes it too, and its config.yaml finds it again
    again = ["--config", str(tmp_path / "run"), "--output_dir", str(tmp_path / "again")]
    assert main(again) == 0 and (tmp_path / "again" / "model" / "config.json").is_file()


def test_a_bad_row_of_ones_own_recipe_names_the_field(mine, tmp_path, capfd):
    write_rows(tmp_path / "haiku.jsonl", [{"title": "a", "poem": "b"}, {"title": "a"}])
    argv = [
        "--recipe",
        str(mine),
        "--model_name_or_path",
        tiny_gpt2(),
        "--dataset",
        str(tmp_path / "haiku.jsonl"),
        "--deepspeed=none",
    ]
    message = refusal(main, [*argv, "--use_cpu", "--max_length=64"], capfd)
    assert "haiku.jsonl, line 2: field 'poem' is missing" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("class Broken(:\n", r"broken\.py, line 1: "),
        ("x = 1\n", r"expected one class derived from RecipeBase, found \[\]"),
        (MINE + MINE.replace("Haiku", "Tanka"), r"found \['Haiku', 'Tanka'\]"),
        (MINE.split("    @staticmethod\n    def encode")[0], "Haiku lacks the method encode"),
        (MINE.split("    @staticmethod")[0] + "    pass\n", "Haiku lacks the methods encode, format_row"),
        ("import no_such_module\n", "no_such_module"),
        (MINE + "\n    def metrics(self, split):\n        return None\n", r"Haiku\.metrics is never called"),
        (
            MINE + "\n    def collator(self, model, tokenizer, device):\n        return None\n",
            r"Haiku\.collator is called with \(self, model, tokenizer\), not more.*DSR628",
        ),
        (
            MINE + "\n    def collator(self, *, model, device):\n        return None\n",
            r"Haiku\.collator is called with \(self, model, tokenizer\), not more.*DSR628",
        ),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, problem):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        load_recipe(str(tmp_path / "broken.py"), model_name_or_path="m", dataset="d")
    assert "broken.py" in str(error.value)


def test_a_recipe_written_before_hooks_had_arguments_still_runs(mine, tmp_path):
    (tmp_path / "haiku.py").write_text(
        MINE + "\n    def collator(self):\n        from dsrecipes.data.collate import CausalCollator\n\n"
        "        print('pad', self.tokenizer.eos_token_id, self.model.num_parameters() > 0)\n"
        "        return CausalCollator(self.tokenizer.eos_token_id, True, False)\n\n"
        "    def write_extras(self, folder):\n        (folder / 'mine.txt').write_text('written')\n"
    )
    values = {"model_name_or_path": tiny_gpt2(), "dataset": str(tmp_path / "haiku.jsonl"), "max_length": 64, "max_steps": 1}
    values |= {"deepspeed": "none", "use_cpu": True, "output_dir": str(tmp_path / "run"), "verify_model": False}
    values |= {"packing": False}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        load_recipe(str(mine), **values).run()
    assert "True" in out.getvalue() and (tmp_path / "run" / "mine.txt").read_text() == "written"


def test_a_hook_s_arguments_after_the_star_are_given_by_name(mine):
    mine.write_text(
        MINE + "\n    def collator(self, tokenizer, *, model, own=1):\n        return tokenizer, model, own\n\n"
        "    def write_extras(self, folder, /, *, own=2):\n        return folder, self.sources, own\n"
    )
    recipe = load_recipe(str(mine), model_name_or_path="m", dataset="d")
    assert call_hook(recipe, "collator", model="M", tokenizer="T") == ("T", "M", 1)
    assert call_hook(recipe, "write_extras", folder="F", sources="S") == ("F", "S", 2)


def test_a_recipe_s_own_callbacks_are_called(mine, tmp_path):
    (tmp_path / "haiku.py").write_text(
        MINE + "\n    def callbacks(self):\n        from transformers import TrainerCallback\n\n"
        "        class Count(TrainerCallback):\n            def on_step_end(self, args, state, control, **kwargs):\n"
        "                print('own callback at step', state.global_step)\n\n        return [Count()]\n"
    )
    values = {"model_name_or_path": tiny_gpt2(), "dataset": str(tmp_path / "haiku.jsonl"), "max_length": 64, "max_steps": 2}
    values |= {"deepspeed": "none", "use_cpu": True, "output_dir": str(tmp_path / "run"), "verify_model": False}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        load_recipe(str(mine), **values).run()
    assert "own callback at step 1" in out.getvalue() and "own callback at step 2" in out.getvalue()


def test_model_and_data_have_no_default(mine):
    for missing, values in (("model_name_or_path", {"dataset": "d"}), ("dataset", {"model_name_or_path": "m"})):
        with pytest.raises(UserError, match=f"--{missing} is missing"):
            load_recipe(str(mine), **values)


CLASSIFIER = """
from dsrecipes import RecipeBase

class Mood(RecipeBase):
    auto_class = "AutoModelForSequenceClassification"

    @staticmethod
    def format_row(row):
        return {"text": row["text"], "label": int(row["label"])}

    @staticmethod
    def encode(records, tokenizer, options):
        ids = tokenizer([r["text"] for r in records], truncation=True, max_length=options.max_length)["input_ids"]
        return {"input_ids": ids, "labels": [r["label"] for r in records]}
"""


@pytest.mark.parametrize("model", [tiny_bert, tiny_llama])
def test_a_classifier_of_three_classes_is_two_methods(tmp_path, model):
    (tmp_path / "mood.py").write_text(CLASSIFIER)
    rows = [{"text": "word " * (1 + n % 5), "label": n % 3} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = load_recipe(
        str(tmp_path / "mood.py"), model_name_or_path=model(), dataset=str(tmp_path / "rows.jsonl"), max_length=64,
        max_steps=2, per_device_train_batch_size=5, per_device_eval_batch_size=3, validation_split=0.2, save_steps=1,
        output_dir=str(tmp_path / "run"), verify_model=False,
    ).run()  # fmt: skip
    saved = AutoModelForSequenceClassification.from_pretrained(result.path / "model")
    assert verify(str(result.path))["largest_difference"] < 1e-5
    assert saved.config.num_labels == 3 and math.isfinite(result.metrics["eval_loss"])
