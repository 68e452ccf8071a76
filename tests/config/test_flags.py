"""Every flag of transformers.TrainingArguments: what works, what is refused, and what is said to have no effect."""

import dataclasses

import pytest
from support.tiny import SHARED, instructions, needs_shared, refusal, tiny_bert, tiny_gpt2, write_rows
from transformers import TrainingArguments

from dsrecipes.config.checks import best_metric
from dsrecipes.config.flags import FIXED, REMOVED, WORKS, without_effect
from dsrecipes.config.layers import layer
from dsrecipes.config.parse import build_config
from dsrecipes.errors import UserError
from dsrecipes.io.text import read_yaml
from dsrecipes.run import main

BASE = {"recipe": "alpaca_llama_sft", "profile": "full"}
FIELDS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}


def test_every_field_of_training_arguments_is_decided():
    assert FIELDS - WORKS - set(FIXED) == set(), "decide: does it work here, or is it refused?"
    assert (WORKS | set(FIXED)) - FIELDS == set(), "transformers has removed these"
    assert WORKS & set(FIXED) == set() == FIELDS & set(REMOVED)


def other(value):
    """A value that a flag with this one fixed value does not take."""
    if isinstance(value, bool):
        return str(not value).lower()
    return {None: "x", "no": "all", "every_save": "end", "length": "len", 0: "0.1", -1: "0"}[value]


@pytest.mark.parametrize("flag", FIXED)
def test_a_flag_that_would_do_nothing_is_refused(flag):
    value, why = FIXED[flag]
    if flag != "local_rank":  # layers.py drops the one that launchers append
        with pytest.raises(UserError, match=f"--{flag} .*") as error:
            build_config(layer({**BASE, flag: other(value)}))
        assert why in str(error.value) and str(error.value).endswith("(flag) [DSR043]")
    build_config(layer({**BASE, flag: "none" if value is None else value}, origin="python"))  # what is so anyway is harmless


@pytest.mark.parametrize("flag", ["warmup_ratio", "evaluation_strategy", "no_cuda", "group_by_length", "logging_dir"])
def test_what_transformers_has_removed_is_named(flag):
    with pytest.raises(UserError, match="DSR041") as error:
        build_config(layer({**BASE, flag: "true"}))
    assert REMOVED[flag] in str(error.value)


YAMLS = {
    "no_packing: yes": ("packing", False),
    "no_packing: on": ("packing", False),
    "no_packing: 1": ("packing", False),
    "no_packing: no": ("packing", True),
    "report_to: [off]": ("report_to", ["none"]),
    "report_to: [no]": ("report_to", ["none"]),
    "debug: [no]": ("debug", None),
    "optim: sgd\noptim_args: {momentum: 0.9, nesterov: true}": ("optim_args", "momentum=0.9,nesterov=True"),
}


@pytest.mark.parametrize("text", YAMLS)
def test_a_yaml_may_spell_a_value_in_several_ways(text, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    key, value = YAMLS[text]
    config = build_config(layer({**BASE, "config": str(tmp_path / "c.yaml")}))
    assert {**vars(config.data), **config.train}[key] == value


REFUSED = {
    "the best of no evaluation": (
        {"load_best_model_at_end": True, "eval_strategy": "no", "save_strategy": "no"},
        "--load_best_model_at_end true needs evaluations",
    ),
    "the best of other steps": (
        {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "epoch"},
        "[DSR052]",
    ),
    "negative noise": ({"neftune_noise_alpha": -1}, "--neftune_noise_alpha is -1.0: give 0 or more"),
    "no target": ({"lora_r": 4, "lora_target_modules": ""}, "[DSR055]"),
    "a list of no targets": ({"lora_r": 4, "lora_target_modules": "[]"}, "[DSR055]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_that_do_not_go_together_are_refused(name):
    values, message = REFUSED[name]
    with pytest.raises(UserError) as error:
        build_config(layer({**BASE, **values}))
    assert message in str(error.value)


def test_torch_compile_false_prevails_over_its_options():
    values = {"torch_compile_backend": "eager", "torch_compile_mode": "default"}
    for switch, backend in (({"torch_compile": False}, None), ({}, "eager"), ({"torch_compile": True}, "eager")):
        config = build_config(layer({**BASE, **values, **switch}))
        assert config.train["torch_compile_backend"] == backend


IDLE = {
    "torch_compile_backend": {"torch_compile": False, "torch_compile_backend": "eager"},
    "model_revision": {"model_name_or_path": "/tmp", "model_revision": "v2"},
    "eval_steps": {"eval_strategy": "no", "eval_steps": 5},
    "save_steps": {"save_strategy": "epoch", "save_steps": 5},
    "logging_steps": {"logging_strategy": "epoch", "logging_steps": 5},
    "eval_delay": {"eval_strategy": "no", "eval_delay": 2},
    "num_train_epochs": {"max_steps": 5, "num_train_epochs": 2},
    "warmup_steps": {"lr_scheduler_type": "constant", "warmup_steps": 5},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "run_name": {"run_name": "mine"},
    "project": {"project": "mine", "report_to": "wandb"},
    "metric_for_best_model": {"metric_for_best_model": "loss"},
    "greater_is_better": {"greater_is_better": False},
    "save_total_limit": {"save_strategy": "no", "save_total_limit": 2},
    "activation_checkpointing_kwargs": {"activation_checkpointing": False, "activation_checkpointing_kwargs": {"a": 1}},
    "optim_target_modules": {"optim_target_modules": "all-linear"},
    "ddp_bucket_cap_mb": {"ddp_bucket_cap_mb": 3},
    "lora_alpha": {"lora_alpha": 4},
    "bnb_4bit_quant_type": {"bnb_4bit_quant_type": "fp4"},
}


@pytest.mark.parametrize("flag", IDLE)
def test_a_value_that_another_makes_idle_is_said(flag):
    config = build_config(layer({**BASE, **IDLE[flag]}, origin="python"))
    lines = without_effect({**vars(config.model), **vars(config.data), **config.train}, config.own, zero=True)
    assert [line for line in lines if line.startswith(f"{flag} has no effect: ") and line.endswith("(python) [DSR065]")], (
        lines
    )


@pytest.mark.parametrize("profile", ["full", "starter"])
def test_a_recipe_alone_gets_no_remark(profile):
    config = build_config(layer({"recipe": "qlora_zero3", "profile": profile}))
    assert without_effect({**vars(config.model), **vars(config.data), **config.train}, config.own, zero=True) == []


BEST = [
    ({"metric_for_best_model": "perplexity"}, ("perplexity", False, None)),
    ({"metric_for_best_model": "eval_loss"}, ("eval_loss", False, None)),
    ({"metric_for_best_model": "accuracy"}, ("accuracy", True, None)),
    ({"metric_for_best_model": "accuracy", "greater_is_better": False}, ("accuracy", False, None)),
    ({"early_stopping_patience": 2}, ("loss", False, None)),
    ({"lr_scheduler_type": "greedy", "metric_for_best_model": "accuracy"}, ("accuracy", True, '{"mode": "max"}')),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ("loss", False, None)),
    ({}, (None, None, None)),
]


@pytest.mark.parametrize(("values", "expected"), BEST)
def test_which_evaluation_is_the_best(values, expected):
    assert tuple(best_metric(build_config(layer({**BASE, **values})).train).values()) == expected


EVALUATED = {"eval_strategy": "steps", "eval_steps": "1", "validation_split": "0.3"}
BROKEN = {
    "a tracker without its package": ({"report_to": "wandb"}, ["--report_to wandb", "pip install wandb"]),
    "mlflow": ({"report_to": "mlflow"}, ["--report_to mlflow", "pip install mlflow"]),
    "neptune": ({"report_to": "neptune"}, ["--report_to neptune", "pip install neptune"]),
    "dagshub": ({"report_to": "dagshub"}, ["--report_to dagshub", "pip install dagshub mlflow"]),
    "last_epoch": ({"lr_scheduler_kwargs": '{"last_epoch": 3}'}, ["--lr_scheduler_kwargs: leave out last_epoch"]),
    "a name too long": ({"output_dir": "x" * 300}, ["--output_dir x", "File name too long"]),
    "a folder of the kernel": ({"output_dir": "/proc/x"}, ["--output_dir /proc/x", "/proc stores no files"]),
    "an unknown tracker": ({"report_to": "wandbb"}, ["--report_to wandbb", "did you mean wandb?", "mlflow"]),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": "attn"}, ["--optim galore_adamw", "galore_torch"]),
    "lomo": ({"optim": "lomo"}, ["--optim lomo", "lomo"]),
    "schedule-free": ({"optim": "schedule_free_adamw"}, ["--optim schedule_free_adamw", "schedulefree"]),
    "torchao": ({"optim": "adamw_torch_8bit"}, ["--optim adamw_torch_8bit", "torchao"]),
    "torchdistx": ({"optim": "adamw_anyprecision"}, ["--optim adamw_anyprecision", "torchdistx"]),
    "an NPU's": ({"optim": "adamw_torch_npu_fused"}, ["--optim adamw_torch_npu_fused", "torch_npu"]),
    "adagrad under ZeRO": ({"optim": "adagrad", "deepspeed": "zero1"}, ["--optim adagrad", "ZeRO-1", "zero0"]),
    "malformed arguments": ({"optim": "sgd", "optim_args": "momentum"}, ["--optim_args momentum", "NAME=VALUE"]),
    "an unread argument": ({"optim": "sgd", "optim_args": "momentun=0.9"}, ["--optim_args", "sgd does not read 'momentun'"]),
    "an argument of another": ({"optim": "adamw_torch", "optim_args": "momentum=0.9"}, ["adamw_torch does not read"]),
    "an argument that is no number": ({"optim": "sgd", "optim_args": "momentum=x"}, ["--optim_args momentum=x", "'x'"]),
    "no min_lr": ({"lr_scheduler_type": "cosine_with_min_lr"}, ["--lr_scheduler_type cosine_with_min_lr", "min_lr"]),
    "no num_decay_steps": ({"lr_scheduler_type": "warmup_stable_decay"}, ["warmup_stable_decay", "num_decay_steps"]),
    "an unknown key": ({"lr_scheduler_kwargs": '{"num_cycle": 2}'}, ["--lr_scheduler_kwargs", "'num_cycle'"]),
    "a value of another type": (
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"power": "x"}'}, ["--lr_scheduler_kwargs", "str"],
    ),
    "a division by zero at the last step": (
        {"lr_scheduler_type": "polynomial", "warmup_steps": "2"}, ["polynomial", "2 steps, 2 of them warm-up", "zero"],
    ),
    "plateau without rows": ({**EVALUATED, "validation_split": "0", "lr_scheduler_type": "reduce_lr_on_plateau"}, ["no validation rows"]),
    "patience without rows": ({**EVALUATED, "validation_split": "0", "early_stopping_patience": "2"}, ["no validation rows"]),
    "an unknown figure": (
        {**EVALUATED, "metric_for_best_model": "perplexty", "early_stopping_patience": "2"},
        ["--metric_for_best_model perplexty", "did you mean perplexity?", "loss"],
    ),
    "Liger": ({"use_liger_kernel": "true"}, ["--use_liger_kernel true", "logits"]),
    "the hub": ({"push_to_hub": "true"}, ["--push_to_hub true", "dsrecipes export", "hf upload"]),
    "do_train": ({"do_train": "false"}, ["--do_train false", "dsrecipes evaluate"]),
    "an unknown compiler": ({"torch_compile_backend": "foo"}, ["--torch_compile", "foo"]),
    "a checkpointing option": (
        {"activation_checkpointing": "true", "activation_checkpointing_kwargs": '{"use_reentrantt": true}'}, ["use_reentrantt"],
    ),
    "workers that persist, of none": ({"dataloader_persistent_workers": "true"}, ["--dataloader_", "num_workers"]),
    "no flash attention": ({"attn_implementation": "flash_attention_2"}, ["--attn_implementation flash_attention_2", "FlashAttention2"]),
    "unknown attention": ({"attn_implementation": "sdpaa"}, ["--attn_implementation sdpaa", "did you mean sdpa?", "eager"]),
    "a LoRA scale of zero": ({"lora_r": 4, "lora_alpha": 0}, ["lora_alpha is 0"]),
}  # fmt: skip


def flags(tmp_path, **changes: object) -> list[str]:
    """A command line that would train two steps."""
    values = {
        "recipe": "alpaca_llama_sft", "profile": "starter", "use_cpu": True, "model_name_or_path": tiny_gpt2(), "lora_r": 0,
        "dataset": write_rows(tmp_path / "rows.jsonl", instructions(12)), "prompt_style": "alpaca", "max_length": 128,
        "max_steps": 2, "deepspeed": "none", "output_dir": tmp_path / "run", "verify_model": False, "warmup_steps": 1,
    } | changes  # fmt: skip
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_built_is_refused_before_weights_are_loaded(name, tmp_path, capfd):
    changes, parts = BROKEN[name]
    message = refusal(main, flags(tmp_path, **changes), capfd)
    assert all(part in message for part in parts), message
    assert not (tmp_path / "run").exists()


REMARKS = {
    "adafactor under ZeRO": ({"optim": "adafactor", "deepspeed": "zero2"}, "optim adafactor updates matrices or blocks"),
    "adafactor": ({"optim": "adafactor"}, None),
    "lion": ({"optim": "lion_32bit", "deepspeed": "zero2"}, None),
    "8 bits": ({"optim": "paged_adamw_8bit"}, None),
    "sgd": ({"optim": "sgd", "adam_beta1": 0.8, "optim_args": "momentum=0.9, nesterov=true"}, "adam_beta1 has no effect: optim is sgd (flag)"),
    "adamw": ({"optim": "adamw_torch", "adam_beta1": 0.8}, None),
    "a long warm-up": ({"warmup_steps": 5}, "the warm-up takes 5 steps and the run 2"),
    "a stable schedule": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 1}'}, None,
    ),
    "a decay that is cut off": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 5}'},
        "1 steps of warm-up, 0 stable and 5 of decay are more than the run's 2",
    ),
    "neftune": ({"neftune_noise_alpha": 5}, "NEFTune scales its noise"),
    "all trackers": ({"report_to": "all"}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", REMARKS)
def test_what_is_built_is_said_where_it_has_another_effect(name, tmp_path, capfd):
    changes, remark = REMARKS[name]
    assert main([*flags(tmp_path, **changes), "--dry_run"]) == 0
    usual = ("validation rows", "AVX-512")
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note")]
    notes = [line for line in lines if not any(part in line for part in usual)]
    assert len(notes) == bool(remark) and all(str(remark) in note for note in notes), notes


OWN_METRICS = """
from dsrecipes.recipes.bert_tmmlu_qa import BertTmmluQa

class Mine(BertTmmluQa):
    def metrics(self, split, train, model_config):
        def compute(prediction):
            assert prediction.predictions.any()
            return {"right": 1.0}
        return compute
"""


def test_an_unknown_figure_of_a_recipe(tmp_path, capfd):
    changes = {
        "recipe": "bert_tmmlu_qa", "model_name_or_path": tiny_bert(), "dataset": "starter:data/tmmlu", "max_length": 48,
        "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "max_steps": 1,
        "metric_for_best_model": "acuracy",
    }  # fmt: skip
    message = refusal(main, flags(tmp_path, **changes), capfd)
    assert "--metric_for_best_model acuracy" in message and "did you mean accuracy?" in message
    assert not (tmp_path / "run").exists()
    # metrics that take no prediction of zeros are known at the first evaluation; its checkpoint is saved
    (tmp_path / "mine.py").write_text(OWN_METRICS)
    message = refusal(main, flags(tmp_path, **(changes | {"recipe": tmp_path / "mine.py", "profile": "auto"})), capfd)
    assert "eval_right" in message and (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "model.safetensors").is_file()


WHOLE = {
    "plain": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "debug": "underflow_overflow",
    },
    "zero2": {"optim": "adafactor", "lr_scheduler_type": "greedy", "full_determinism": True, "report_to": "tensorboard"},
    "zero3": {"optim": "ademamix", "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
}


@pytest.mark.ranks
@pytest.mark.parametrize("engine", WHOLE)
def test_unusual_flags_train_on_a_real_engine(engine, one_rank, small, tmp_path):
    case = small.values(
        "gpt2", deepspeed=engine.replace("plain", "none"), output_dir=str(tmp_path / "run"), max_steps=2, eval_steps=2,
        load_best_model_at_end=True, save_steps=2, global_batch_size=1, metric_for_best_model="perplexity", **WHOLE[engine],
    )  # fmt: skip
    facts = one_rank.run("train", **case)[0]
    assert facts["step"] == 2 and facts["engine"] == ("DeepSpeedEngine" if engine != "plain" else facts["engine"])
    assert read_yaml(tmp_path / "run" / "config.yaml")["optim"] == WHOLE[engine]["optim"]
    folders = {path.name for path in (tmp_path / "run").iterdir()}
    assert "runs" not in folders  # of Trainer's own TensorBoard


@pytest.mark.ranks
def test_the_best_of_the_checkpoints_that_were_saved_as_the_best(one_rank, small, tmp_path):
    case = small.values(
        "gpt2", output_dir=str(tmp_path / "run"), max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="best",
        load_best_model_at_end=True, greater_is_better=True, metric_for_best_model="loss", learning_rate=1e-2,
        global_batch_size=1,
    )  # fmt: skip
    facts = one_rank.run("train", **case)[0]
    losses = {line["step"]: line["eval_loss"] for line in facts["log"] if "eval_loss" in line}
    saved = {int(path.name[11:]) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    best = max(losses, key=losses.__getitem__)
    assert best in saved and best < 4, losses
    assert facts["metrics"]["eval_loss"] == pytest.approx(losses[best], rel=1e-5)


@needs_shared
def test_a_yaml_of_others(monkeypatch, tmp_path):
    path = SHARED / "cases" / "y_eval_no.yaml"
    values = build_config(layer({"config": str(path)})).train
    assert (values["eval_strategy"], values["save_strategy"], values["bf16"]) == ("no", "no", False)
