"""YAML, flags and Python keywords through one parser: types, choices, unknown keys, origins, the batch equation."""

import subprocess
import sys

import pytest
import yaml

from dsrecipes.config.batch import BATCH_KEYS, divide_batch
from dsrecipes.config.find import find_config, find_recipe, recipe_names, variant_names
from dsrecipes.config.layers import ABOUT_KEYS, layer, parse_flags
from dsrecipes.config.parse import build_config, read_config
from dsrecipes.errors import UserError
from dsrecipes.run import main

from support.tiny import refusal  # isort: skip

BASE = {"recipe": "gpt2_clm", "profile": "starter"}


def from_yaml(tmp_path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: gpt2_clm\nprofile: starter\n" + text)
    return build_config(layer({"config": str(path)}))


def batch_of(config, ranks=1):
    """The batch of a step, with the user's values fixed."""
    values = {key: config.train[key] for key in BATCH_KEYS}
    return divide_batch(values, config.layers.by_user(), ranks)


def from_flags(*argv: str):
    return build_config(layer(parse_flags(["--recipe", "gpt2_clm", "--profile", "starter", *argv])))


@pytest.mark.parametrize("profile", ["full", "starter"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_shipped_yaml_is_loaded(recipe, profile):
    config = build_config(layer({"recipe": recipe, "profile": profile}))
    written = yaml.safe_load(find_recipe(recipe).yaml.read_text())
    wanted = {key: value for key, value in written.items() if key not in ABOUT_KEYS}
    wanted |= written["starter"] if profile == "starter" else {}
    values = {**vars(config.model), **vars(config.data), **config.train}
    assert set(config.given) <= set(wanted) and config.layers.profile == profile
    for key in config.given:
        assert values[key] == wanted[key] and type(values[key]) in (type(wanted[key]), float), key
    for ranks in (1, 2) if profile == "starter" else (1, 2, 4):
        assert batch_of(config, ranks).total >= 1
    assert written["about"] and written["machine"]


@pytest.mark.parametrize("variant", variant_names())
def test_every_shipped_variant_is_loaded(variant):
    config = build_config(layer({"config": variant}))
    written = yaml.safe_load(find_config(variant).read_text())
    assert config.layers.recipe.name == written["recipe"] and config.layers.profile == "full"
    values = {**vars(config.model), **vars(config.data), **config.train}
    for key in set(written) - {"about", "recipe", "profile"}:
        assert values[key] == written[key] and config.given[key].endswith(f"{variant}.yaml")
    assert batch_of(config).total >= 1


def test_the_numbers_of_the_full_profiles():
    alpaca = build_config(layer({"recipe": "alpaca_llama_sft", "profile": "full"})).train
    expected = {
        "global_batch_size": 32,
        "learning_rate": 2e-5,
        "warmup_steps": 100,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    assert {key: alpaca[key] for key in expected} == expected and alpaca["deepspeed"] == "zero3"
    bert = build_config(layer({"recipe": "bert_tmmlu_qa", "profile": "full"}))
    assert (bert.train["num_train_epochs"], bert.train["save_steps"], bert.data.max_length) == (40, 20, 256)
    assert batch_of(bert).total == 32
    qlora = build_config(layer({"recipe": "qlora_zero3", "profile": "full"}))
    model = qlora.model
    assert (model.load_in_4bit, model.bnb_4bit_quant_type, model.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_target_modules) == (16, 32, 0.1, [])
    assert (qlora.data.max_length, qlora.data.validation_split, qlora.train["learning_rate"]) == (512, 0.1, 2e-4)
    assert (qlora.train["num_train_epochs"], qlora.train["deepspeed"]) == (3, "zero3")
    medium = build_config(layer({"config": "gpt2_medium_32gb"}))
    assert batch_of(medium).total == 8 and medium.train["fp16"]


def test_yaml_flags_and_python_give_the_same_values(tmp_path):
    yaml = "learning_rate: 2e-5\nmax_steps: 7\nbf16: true\nlora_target_modules: [q_proj, v_proj]\n"
    yaml += "lr_scheduler_kwargs: {num_cycles: 2}\nmodel_name_or_path: my model\n"
    flags = "--learning_rate 2e-5 --max_steps 7 --bf16 --lora_target_modules q_proj v_proj --lr_scheduler_kwargs".split()
    python = {"learning_rate": 2e-5, "max_steps": 7, "bf16": True, "lora_target_modules": ["q_proj", "v_proj"]}
    python |= {"lr_scheduler_kwargs": {"num_cycles": 2}, "model_name_or_path": "my model"}
    configs = [
        from_yaml(tmp_path, yaml),
        from_flags(*flags, '{"num_cycles": 2}', "--model_name_or_path=my model"),
        build_config(layer({**BASE, **python}, origin="python")),
    ]
    for config in configs:
        assert (config.train["learning_rate"], type(config.train["learning_rate"])) == (2e-5, float)
        assert config.model.lora_target_modules == ["q_proj", "v_proj"]
        assert config.train["lr_scheduler_kwargs"] in ({"num_cycles": 2}, '{"num_cycles": 2}')
    assert configs[0].train == configs[1].train == configs[2].train
    assert configs[0].model == configs[1].model == configs[2].model
    origins = [config.given["learning_rate"] for config in configs]
    assert origins == [str(tmp_path / "mine.yaml"), "flag", "python"]


def test_null_removes_a_key_and_flags_win_over_yaml(tmp_path):
    config = from_yaml(tmp_path, "seed: 3\nglobal_batch_size: null\n")
    assert config.train["global_batch_size"] is None and config.train["seed"] == 3
    path = tmp_path / "mine.yaml"
    assert build_config(layer({"config": str(path), "seed": "4"})).train["seed"] == 4
    assert build_config(layer({"config": str(path), "seed": None})).train["seed"] == 42  # TrainingArguments' own


def test_a_newer_batch_key_replaces_the_other():
    newer = from_flags("--gradient_accumulation_steps", "3")
    assert (newer.train["gradient_accumulation_steps"], newer.train["global_batch_size"]) == (3, None)
    both = from_flags("--gradient_accumulation_steps", "3", "--global_batch_size", "12")
    assert (both.train["gradient_accumulation_steps"], both.train["global_batch_size"]) == (3, 12)


YAML = [
    ("eval_strategy: no", "eval_strategy", "no"), ("eval_strategy: off", "eval_strategy", "no"),
    ("eval_strategy: false", "eval_strategy", "no"), ("eval_strategy: 'no'", "eval_strategy", "no"),
    ("save_strategy: No", "save_strategy", "no"), ("logging_strategy: Off", "logging_strategy", "no"),
    ("deepspeed: no", "deepspeed", "none"), ("deepspeed: off", "deepspeed", "none"), ("report_to: no", "report_to", ["none"]),
    ("report_to: none", "report_to", ["none"]), ("debug: no", "debug", None), ("debug: ''", "debug", None),
    ("time_limit: no", "time_limit", None), ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
    ("bf16: no", "bf16", False), ("bf16: yes", "bf16", True), ("save_only_model: on", "save_only_model", True),
    ("load_best_model_at_end: off", "load_best_model_at_end", False), ("load_best_model_at_end: FALSE", "load_best_model_at_end", False),
    ("greater_is_better: off", "greater_is_better", False), ("packing: off", "packing", False),
    ("learning_rate: 1e-5", "learning_rate", 1e-5), ("learning_rate: 1.e-5", "learning_rate", 1e-5),
    ("max_steps: 1_000", "max_steps", 1000), ("max_steps: 010", "max_steps", 10), ("seed: +3", "seed", 3),
    ("time_limit: 3:50:00", "time_limit", "3:50:00"), ("time_limit: 5400", "time_limit", "5400"),
    ("model_revision: 1.10", "model_revision", "1.10"), ("model_revision: 0123456", "model_revision", "0123456"),
    ("model_revision: 1e10", "model_revision", "1e10"), ("model_revision: on", "model_revision", "on"),
    ("dataset: 2024-01-01", "dataset", "2024-01-01"), ("dataset_config: no", "dataset_config", "no"),
    ("run_name: ~", "run_name", None), ("run_name:", "run_name", None), ("run_name: 'null'", "run_name", "null"),
    ("subjects: [no, 1.10, on]", "subjects", ["no", "1.10", "on"]), ("prompt_style: chat", "prompt_style", "chat"),
    ("lr_scheduler_kwargs: {num_cycles: 1e-1}", "lr_scheduler_kwargs", '{"num_cycles": 0.1}'),
    ("activation_checkpointing_kwargs: {use_reentrant: no}", "activation_checkpointing_kwargs", '{"use_reentrant": false}'),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "value"), YAML, ids=[each[0] for each in YAML])
def test_yaml_is_read_as_the_person_wrote_it(tmp_path, text, key, value):
    config = from_yaml(tmp_path, text + "\n")
    read = {**vars(config.model), **vars(config.data), **config.train}[key]
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_steps: 1:30", ["--max_steps", "'1:30'", "mine.yaml"]),
        ("learning_rate: .inf", ["--learning_rate", "'.inf'"]),
        ("learning_rate: inf", ["--learning_rate", "finite"]),
        ("time_limit: 1:30", ["--time_limit 1:30", "3:50:00", "DSR053"]),
        ("max_steps: 0", ["--max_steps is 0", "-1", "DSR047"]),
        ("lr_scheduler_kwargs: 3", ["--lr_scheduler_kwargs 3", "DSR048"]),
        ("debug: tpu_metrics_debug", ["--debug", "underflow_overflow", "DSR045"]),
        ("save_strategy: best\neval_strategy: no", ["--save_strategy best", "--eval_strategy", "DSR050"]),
    ],
)
def test_yaml_that_means_nothing_is_refused(tmp_path, text, parts):
    with pytest.raises(UserError) as error:
        from_yaml(tmp_path, text + "\n")
    assert all(part in str(error.value) for part in parts), error.value


def test_python_values_are_read_alike():
    values = {"eval_strategy": False, "deepspeed": False, "report_to": ["none"], "bf16": "off", "model_revision": 1.5}
    config = build_config(layer({**BASE, **values}, origin="python"))
    assert (config.train["eval_strategy"], config.train["deepspeed"], config.train["bf16"]) == ("no", "none", False)
    assert config.model.model_revision == "1.5"


def test_a_newer_length_of_the_run_replaces_the_other(tmp_path):
    sft = {"recipe": "alpaca_llama_sft", "profile": "starter"}  # which says max_steps 10
    assert build_config(layer({**sft, "num_train_epochs": "2"})).train["max_steps"] == -1
    assert build_config(layer({**sft, "max_steps": "3"})).train["max_steps"] == 3
    assert build_config(layer({**sft, "max_steps": "3", "num_train_epochs": "2"})).train["max_steps"] == 3


WRONG = [
    ({"learning_rat": "1"}, ["'learning_rat' (flag)", "did you mean learning_rate?", "DSR040"]),
    ({"Max_Steps": "1"}, ["'Max_Steps'", "max_steps"]),
    ({"max_steps": "ten"}, ["--max_steps", "int", "'ten'", "(flag)"]),
    ({"max_steps": "1.5"}, ["--max_steps", "1.5"]),
    ({"learning_rate": "fast"}, ["--learning_rate", "float", "'fast'"]),
    ({"bf16": "maybe"}, ["--bf16", "maybe"]),
    ({"max_length": ["1", "2"]}, ["2"]),
    ({"prompt_style": "stanford"}, ["--prompt_style", "alpaca", "chat"]),
    ({"split": "random"}, ["--split", "pooled", "official"]),
    ({"eval_strategy": "stepps"}, ["--eval_strategy", "'stepps'", "'steps'"]),
    ({"lr_scheduler_type": "cosin"}, ["--lr_scheduler_type", "'cosin'", "'cosine'"]),
    ({"optim": "adamww"}, ["--optim", "adamw"]),
    ({"lr_scheduler_kwargs": "{oops"}, ["lr_scheduler_kwargs"]),
    ({"max_length": "1"}, ["max_length is 1", "DSR047"]),
    ({"validation_split": "1.5"}, ["validation_split is 1.5", "DSR047"]),
    ({"lora_r": "-1"}, ["lora_r is -1"]),
    ({"lora_dropout": "1"}, ["lora_dropout is 1"]),
    ({"load_in_4bit": "true", "from_scratch": "false"}, ["load_in_4bit", "lora_r", "DSR054"]),
    ({"load_in_4bit": "true", "lora_r": "4"}, ["from_scratch", "load_in_4bit", "DSR054"]),
    ({"per_device_train_batch_size": "0"}, ["--per_device_train_batch_size is 0"]),
    ({"num_train_epochs": "-1"}, ["--num_train_epochs is -1"]),
    ({"learning_rate": "-1"}, ["--learning_rate is -1"]),
    ({"global_batch_size": "0"}, ["--global_batch_size"]),
    ({"fp16": "true", "bf16": "true"}, ["--fp16", "--bf16", "DSR051"]),
    ({"logging_steps": "0"}, ["logging_steps"]),
    ({"save_steps": "-3"}, ["save_steps"]),
    ({"eval_strategy": "steps", "eval_steps": "0"}, ["eval_steps"]),
    ({"load_best_model_at_end": "true", "eval_strategy": "no"}, ["--load_best_model_at_end", "--eval_strategy", "DSR050"]),
    ({"train_sampling_strategy": "group_by_length"}, ["--train_sampling_strategy"]),
]


@pytest.mark.parametrize(("values", "parts"), WRONG, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_a_wrong_value_is_one_line_that_names_the_key(values, parts, capfd):
    argv = ["--recipe", "gpt2_clm", "--profile", "starter"]
    for key, value in values.items():
        argv += [f"--{key}", *([value] if isinstance(value, str) else value)]
    message = refusal(main, argv, capfd)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat: 1\n", ["'learning_rat'", "mine.yaml", "learning_rate", "DSR040"]),
        ("max_steps: ten\n", ["--max_steps", "'ten'", "mine.yaml"]),
        ("max_steps: [1, 2]\n", ["2", "max_steps"]),
        ("seed: 1\nmax_steps: 3\nseed: 2\n", ["mine.yaml, line 5", "'seed'", "DSR004"]),
        ("max_steps: {a\n", ["mine.yaml, line", "column"]),
    ],
)
def test_a_wrong_yaml_names_the_file(tmp_path, text, parts, capfd):
    path = tmp_path / "mine.yaml"
    path.write_text("recipe: gpt2_clm\nprofile: starter\n" + text)
    message = refusal(main, ["--config", str(path)], capfd)
    assert all(part in message for part in parts), message


def test_python_keywords_are_checked_too():
    from dsrecipes import load_recipe

    for values, part in (
        ({"max_step": 3}, r"'max_step' \(python\) \(did you mean max_steps\?\).*DSR040"),
        ({"max_steps": "ten"}, r"--max_steps.*\(python\)"),
        ({"dataset": None}, "--dataset .*DSR046"),
    ):
        with pytest.raises(UserError, match=part):
            load_recipe("gpt2_clm", **values)


def test_a_finished_run_is_read_without_the_trainer():
    code = (
        "import sys; from dsrecipes.config.layers import layer; from dsrecipes.config.parse import read_config; "
        "config = read_config(layer({'recipe': 'qlora_zero3', 'profile': 'starter', 'use_cpu': 'true'})); "
        "assert config.model.lora_r == 16 and config.train['use_cpu'] is True and config.train['seed'] == 42; "
        "print({'transformers.training_args', 'transformers.trainer', 'peft', 'accelerate'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("set()\n", 0), done.stderr


@pytest.mark.parametrize(
    "flags", [{}, {"seed": "7", "use_cpu": "true"}, {"dataset": "a.json", "columns": "prompt=q", "lora_r": "4"}]
)
def test_a_finished_run_reads_what_training_had(flags):
    layers = layer({"recipe": "alpaca_llama_sft", "profile": "full", **flags})
    trained, finished = build_config(layers), read_config(layers)
    assert (finished.model, finished.data, finished.own) == (trained.model, trained.data, trained.own)
    assert finished.train == {key: trained.train[key] for key in finished.train}


def test_an_edited_config_of_a_finished_run_is_checked():
    for flags, code in (({"sede": "1"}, "DSR040"), ({"max_length": "1"}, "DSR047"), ({"seed": "x"}, "DSR045")):
        with pytest.raises(UserError, match=code):
            read_config(layer({"recipe": "alpaca_llama_sft", "profile": "full", **flags}))
