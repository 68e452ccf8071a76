"""The starter profiles as they come: bundled files fit together, and their runs begin."""

import pytest
from support.tiny import STARTER
from transformers import AutoConfig, AutoTokenizer

from dsrecipes.config.find import recipe_names
from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.data.load import load_splits
from dsrecipes.io.paths import starter_path
from dsrecipes.run import main


def test_the_tokenizers_know_the_bundled_text():
    gpt2, prose = AutoTokenizer.from_pretrained(STARTER / "gpt2"), (STARTER / "data" / "prose.txt").read_text("utf-8")
    assert gpt2.decode(gpt2(prose)["input_ids"]) == prose
    bert = AutoTokenizer.from_pretrained(STARTER / "bert")
    rows = [row for split in load_splits(str(STARTER / "data" / "tmmlu")).values() for row in split]
    ids = [token for row in rows for token in bert(row["question"] + row["A"] + row["B"] + row["C"] + row["D"])["input_ids"]]
    assert ids.count(bert.unk_token_id) / len(ids) < 0.01
    for name, tokenizer in (("gpt2", gpt2), ("bert", bert)):
        assert AutoConfig.from_pretrained(STARTER / name).vocab_size == len(tokenizer)


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_starter_profile_asks_for_nothing_from_the_hub(recipe):
    config = build_config(layer({"recipe": recipe, "profile": "starter"}))
    assert config.data.dataset.startswith("starter:") and starter_path(config.data.dataset)
    name = config.model.model_name_or_path
    assert name.startswith("starter:") or name == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("recipe", "parts"), [("gpt2_clm", ["left over", "DeepSpeed ZeRO-2"]), ("bert_tmmlu_qa", ["label:", "test:"])]
)
def test_a_starter_run_begins(recipe, parts, capfd):
    assert main(["--recipe", recipe, "--profile", "starter", "--use_cpu", "--dry_run"]) == 0
    out = capfd.readouterr().out
    assert all(part in out for part in ["first example", "parameters", "sequences a step", *parts]), out
