"""ZeRO JSONs: every shipped one resolves without an `auto`, and a wrong one says what is wrong."""

import json

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig

from dsrecipes.config.find import find_zero, zero_names
from dsrecipes.config.zero_values import zero_values
from dsrecipes.errors import UserError
from dsrecipes.zero.blocks import check_blocks
from dsrecipes.zero.lint import key_table
from dsrecipes.zero.resolve import TrainerValues, check_with_deepspeed, hidden_size, read_zero, resolve

TRAIN = {
    "max_grad_norm": 1.0, "learning_rate": 2e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0
}  # fmt: skip


def numbers(precision="fp32", **train):
    return TrainerValues(2, 4, 2, precision, TRAIN | train)


def zero_of(tmp_path, config):
    path = tmp_path / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return read_zero(path)


def refused(call, *parts):
    with pytest.raises(UserError) as error:
        call()
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("name", zero_names())
def test_every_shipped_json_is_read_checked_and_resolved(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DSRECIPES_NVME", str(tmp_path / "nvme"))
    zero = read_zero(find_zero(name))
    assert zero.stage == int(name[4]) and not zero_values(zero.path) and not zero.notes
    assert zero.offloads_optimizer == ("_" in name) and zero.uses_nvme == name.endswith("nvme")
    assert not {"optimizer", "scheduler"} & set(zero.json) and not zero.json["zero_optimization"].get("overlap_comm")
    if zero.stage == 3:
        assert zero.json["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    for precision in ("fp32", "bf16", "fp16"):
        notes = []
        engine = resolve(zero, LlamaConfig(hidden_size=64), numbers(precision), notes)
        assert '"auto"' not in json.dumps(engine) and notes == []
        assert (engine["train_batch_size"], engine["train_micro_batch_size_per_gpu"]) == (16, 2)
        assert (engine["gradient_accumulation_steps"], engine["gradient_clipping"]) == (4, 1.0)
        check_with_deepspeed(engine, zero.path)
        assert [engine[each]["enabled"] for each in ("bf16", "fp16")] == [precision == "bf16", precision == "fp16"]
    assert (tmp_path / "nvme").is_dir() == zero.uses_nvme


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ('{"zero_optimization": {"stage": 2},\n}', ["mine.json, line 2, column 1", "not JSON"]),
        ("[1]", ["expected a JSON object"]),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "did you mean zero_optimization?"]),
        ({"zero_optimization": 2}, ["zero_optimization must be an object"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": True}}, ["stage is True"]),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param", "stage 3", "only ZeRO-3"],
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer", "stage is 0"]),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ["offload_param must be an object"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "auto"}}}, ["device is 'auto'", "cpu, nvme or none"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param has no nvme_path"]),
        ('{"fp16": {}, "fp16": {}}', ["key 'fp16' is written twice"]),
        ({"ZeRO_optimization": {}}, ["'ZeRO_optimization'", "did you mean zero_optimization?"]),
        ({"allgather_bucket_size": 1}, ["it belongs to zero_optimization.allgather_bucket_size"]),
        ({"offload_optimizer": {"device": "cpu"}}, ["it belongs to zero_optimization.offload_optimizer"]),
        ({"monitor_config": {}}, ["use tensorboard, wandb"]),
        ({"gradient_accumulation_dtype": "fp32"}, ["use data_types.grad_accum_dtype"]),
        ({"compression_training": {}}, ["removed compression_training"]),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, ["removed zero_optimization.mics_shard_size"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["'overlap_com'", "did you mean overlap_comm?"]),
        ({"zero_optimization": {"stage": 2, "cpu_offload_params": True}}, ["use zero_optimization.offload_param"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, ["'devise'", "did you mean device?"]),
        ({"zero_optimization": {"cpu_offload": True, "offload_optimizer": {}}}, ["are both given; keep zero_optimization.offload"]),
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, ["bfloat16 and bf16 are both given; keep bf16"]),
        ({"fp16": {"enable": True}}, ["'enable'", "did you mean enabled?"]),
        ({"flops_profiler": {"enable": True}}, ["'enable'", "did you mean enabled?"]),
        ({"optimizer": {"type": "AdamW", "param": {}}}, ["optimizer has no key 'param'", "params"]),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, ["use gradient_clipping"]),
        ({"optimizer": {"params": {}}}, ["optimizer must have a type"]),
        ({"fp16": None}, ["fp16 must be an object"]),
        ({"optimizer": {"type": "AdamW", "params": None}}, ["optimizer.params must be an object"]),
        ({"wandb": {"enabled": "true"}}, ["needs the package wandb"]),
        ({"comet": {"enabled": 1}}, ["needs the package comet_ml"]),
        ({"torch_autocast": {"enabled": "yes"}}, ["torch_autocast is not supported"]),
        ({"hybrid_engine": {"enabled": True}}, ["hybrid_engine is not supported"]),
        ({"sequence_parallel_size": 2}, ["sequence_parallel_size 2 is not supported"]),
        ({"tensor_parallel": {"tp": {"tp_size": 2}}}, ["tensor_parallel.tp.tp_size 2 is not supported"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast is not supported", "bf16"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op sum would multiply"]),
        ({"data_types": "fp32"}, ["data_types must be an object"]),
        ({"zero_stage": 3}, ["use zero_optimization.stage"]),
    ],
)  # fmt: skip
def test_a_wrong_json_says_what_is_wrong(tmp_path, config, parts):
    refused(lambda: zero_of(tmp_path, config), str(tmp_path / "mine.json"), *parts)


@pytest.mark.parametrize(
    "config",
    [{"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {"fp16": {"enabled": "true"}, "bf16": {"enabled": "True"}}],
)
def test_two_precisions_are_refused(tmp_path, config):
    refused(lambda: zero_values(zero_of(tmp_path, config).path), "mine.json", "keep one")


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ({"fp16": {"enabled": False}}, {"fp16": False, "bf16": False}),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": "auto"}}, {"fp16": False}),
        ({"bf16": {"enabled": "yes"}, "fp16": {"enabled": 0}}, {"bf16": True, "fp16": False}),
        ({"bfloat16": {"enabled": True}}, {"bf16": True}),
        ({"train_batch_size": "auto", "gradient_clipping": 0}, {"max_grad_norm": 0}),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}, {"optim": "SGD", "learning_rate": 0.1, "optim_args": "momentum=0.9"}),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1, "betas": [0.8, 0.9]}}, "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 2, "warmup_num_steps": 5}}},
         {"optim": "Adam", "learning_rate": 2, "adam_beta1": 0.8, "adam_beta2": 0.9, "lr_scheduler_type": "WarmupLR", "warmup_steps": 5, "optim_args": None, "lr_scheduler_kwargs": None}),
        ({"optimizer": {"type": "AdamW", "params": {"betas": ["auto", "auto"]}}, "scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1}}},
         {"optim": "AdamW", "optim_args": None, "lr_scheduler_type": "OneCycle", "lr_scheduler_kwargs": {"cycle_min_lr": 1},
          "learning_rate": None, "warmup_steps": None, "adam_beta1": None, "adam_beta2": None}),
    ],
)  # fmt: skip
def test_what_a_json_fixes_of_the_run(tmp_path, config, values):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(config))
    assert zero_values(path) == values


@pytest.mark.parametrize(
    ("config", "note"),
    [
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, 'cpu_offload is an old name, read as zero_optimization.offload_optimizer {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}}, "read as zero_optimization.stage3_gather_16bit_weights"),
        ({"activation_checkpointing": {"profile": True}}, "activation_checkpointing has no effect"),
        ({"zero_optimization": {"stage": 2, "zero_quantized_weights": True}}, "zero_quantized_weights has no effect at stage 2"),
        ({"_comment": "mine", "zero_optimization": {"stage": 1, "_comment": "x", "//": 1}}, None),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": None, "cpu_offload": False}}, None),
        ({"tensorboard": {"enabled": True, "output_path": "tb"}}, "tensorboard writes into tb, outside the run folder"),
    ],
)  # fmt: skip
def test_old_names_are_read_and_dead_keys_are_named(tmp_path, config, note):
    zero = zero_of(tmp_path, config)
    assert [note in each for each in zero.notes] == [True] if note else not zero.notes
    assert "cpu_offload" not in zero.json["zero_optimization"]


def test_a_left_over_auto_is_deepspeeds_default_with_a_note(tmp_path):
    zero, notes = zero_of(tmp_path, {
        "fp16": {"loss_scale": "auto"}, "optimizer": {"type": "AdamW", "params": {"lr": "auto", "fused": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": "auto", "reduce_bucket_size": "auto"},
    }), []  # fmt: skip
    engine = resolve(zero, GPT2Config(), numbers(), notes)
    assert json.dumps(engine).count('"auto"') == 1 == engine["scheduler"]["params"].pop("warmup_num_steps").count("auto")
    assert len(notes) == 1
    assert all(key in notes[0] for key in ("fp16.loss_scale", "optimizer.params.fused", "zero_optimization.overlap_comm"))


def test_the_key_table_is_what_the_installed_deepspeed_reads():
    import deepspeed
    from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
    from deepspeed.runtime import config
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    table = key_table(deepspeed.__version__)
    assert table["deepspeed"] == "0.19.8" == deepspeed.__version__, "make a table of this version"
    strict = {
        "zero_optimization": DeepSpeedZeroConfig, "fp16": DeepSpeedFP16Config, "bf16": DeepSpeedBF16Config, "wandb": WandbConfig,
        "csv_monitor": CSVConfig, "comet": CometConfig, "tensorboard": TensorBoardConfig, "compile": config.CompileConfig,
    }  # fmt: skip
    for name, model in strict.items():
        fields = model.model_fields
        known = set(fields) | {field.alias for field in fields.values() if field.alias}
        assert set(table["sections"][name]) == known, name
        assert name in table["strict"]
    removed = {key for key in table["removed"] if "." not in key} - {"pld"}
    assert removed == set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert {key for key in table["removed"] if "." in key} == {
        f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS
    }


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, ["zero_optimization.reduce_bucket_size", "'big'"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, ["offload_param.device", "'gpu'"]),
        ({"zero_optimization": {"stage": 3, "sub_group_size": 0.5}}, ["sub_group_size", "0.5"]),
        ({"communication_data_type": "float16"}, ["communication_data_type", "fp16"]),
        ({"fp16": {"loss_scale": "big"}}, ["fp16.loss_scale", "'big'"]),
        ({"comms_logger": {"enabled": "maybe"}}, ["enabled", "'maybe'"]),
    ],
)  # fmt: skip
def test_what_deepspeed_refuses_is_one_message(tmp_path, config, parts):
    zero = zero_of(tmp_path, config)
    engine = resolve(zero, GPT2Config(), numbers(), [])
    refused(lambda: check_with_deepspeed(engine, zero.path), str(zero.path), *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"optimizer": {"type": "AdmW"}}, ["optimizer AdmW", "did you mean AdamW?"]),
        ({"optimizer": {"type": "Lion"}}, ["Lion needs a GPU"]),
        ({"optimizer": {"type": "FusedLamb"}}, ["no such optimizer"]),
        ({"optimizer": {"type": "lamb"}}, ["lamb needs a GPU"]),
        ({"optimizer": {"type": "MuAdam"}}, ["needs the package mup"]),
        ({"optimizer": {"type": "zerooneadam"}}, ["was removed from DeepSpeed"]),
        ({"optimizer": {"type": "SGD"}, "zero_optimization": {"stage": 1}}, ["zero_allow_untested_optimizer"]),
        ({"optimizer": {"type": "AdamW", "params": {"momentum": 1}}}, ["cannot be built", "momentum"]),
        ({"optimizer": {"type": "AdamW", "params": {"foreach": True, "fused": True}}}, ["cannot be built"]),
        ({"scheduler": {"type": "WarmupRL"}}, ["no such scheduler", "did you mean WarmupLR?"]),
        ({"scheduler": {"type": "StepLR", "params": {"step_size": 1}}}, ["one of torch's", "--lr_scheduler_type"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, ["cannot be built", "warmup_steps"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 0}}}, ["warmup_num_steps is 0", "DSR268"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "many"}}}, ["warmup_num_steps is 'many'", "DSR268"]),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_num_steps": "4"}}}, ["is '4'", "DSR268"]),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "100"}}}, ["total_num_steps is '100'", "DSR268"]),
        ({"scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": None}}}, ["total_num_steps is None", "DSR268"]),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "cubic"}}}, ["warmup_type is 'cubic'"]),
        ({"scheduler": {"type": "OneCycle"}}, ["cannot be built", "cycle_min_lr"]),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 10.5}}}, ["total_num_steps is 10.5"]),
        ({"optimizer": {"type": "Adagrad"}, "zero_optimization": {"stage": 1}}, ["Adagrad under ZeRO-1", "scheduler block"]),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_built_are_refused_before_weights_are_loaded(tmp_path, config, parts):
    zero = zero_of(tmp_path, config)
    engine = resolve(zero, GPT2Config(), numbers(), [])
    refused(lambda: check_blocks(engine, zero.path, False), str(zero.path), *parts)


def test_the_runs_values_are_filled_in(tmp_path):
    config = {
        "train_batch_size": 16, "gradient_clipping": 1.0, "fp16": {"enabled": "false"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
        "zero_optimization": {"stage": "2"},
    }  # fmt: skip
    engine = resolve(zero_of(tmp_path, config), GPT2Config(), numbers(), [])
    assert engine["optimizer"]["params"] == {
        "lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True
    }  # fmt: skip
    assert engine["zero_optimization"]["stage"] == 2 and engine["fp16"]["enabled"] is False


def test_zero3_that_would_leave_no_model_is_changed_with_a_note(tmp_path):
    zero, notes = zero_of(tmp_path, {"zero_optimization": {"stage": 3}}), []
    engine = resolve(zero, GPT2Config(), numbers(), notes)
    assert engine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert len(notes) == 1 and "mine.json" in notes[0] and "stage3_gather" not in json.dumps(zero.json)


@pytest.mark.parametrize(
    ("model", "width"), [(GPT2Config(n_embd=48), 48), (LlamaConfig(hidden_size=64), 64), (BertConfig(hidden_size=32), 32)]
)
def test_bucket_sizes_follow_the_width(model, width, tmp_path):
    assert hidden_size(model) == width
    section = resolve(read_zero(find_zero("zero3")), model, numbers(), [])["zero_optimization"]
    assert section["reduce_bucket_size"] == 1_000_000 and section["stage3_param_persistence_threshold"] == 10 * width
    wide = resolve(read_zero(find_zero("zero3")), LlamaConfig(hidden_size=4096), numbers(), [])["zero_optimization"]
    assert wide["reduce_bucket_size"] == 4096**2 and wide["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)
