"""ZeRO JSONs: every shipped one resolves without an `auto`, and a wrong one says what is wrong."""

import json

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig

from dsrecipes.errors import UserError
from dsrecipes.find import find_zero, zero_names
from dsrecipes.zero.resolve import Numbers, check_zero_keys, hidden_size, read_zero, resolve

TRAIN = {
    "max_grad_norm": 1.0, "learning_rate": 2e-5, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0
}  # fmt: skip


def numbers(precision="fp32", given=None, **train):
    return Numbers(2, 4, 2, precision, TRAIN | train, given or {})


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
    check_zero_keys(zero)
    assert zero.stage == int(name[4]) and zero.precision() is None
    assert zero.offloads_optimizer == ("_" in name) and zero.uses_nvme == name.endswith("nvme")
    assert not {"optimizer", "scheduler"} & set(zero.json) and not zero.json["zero_optimization"].get("overlap_comm")
    if zero.stage == 3:
        assert zero.json["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    for precision in ("fp32", "bf16", "fp16"):
        notes = []
        engine = resolve(zero, LlamaConfig(hidden_size=64), numbers(precision), False, notes)
        assert '"auto"' not in json.dumps(engine) and notes == []
        assert (engine["train_batch_size"], engine["train_micro_batch_size_per_gpu"]) == (16, 2)
        assert (engine["gradient_accumulation_steps"], engine["gradient_clipping"]) == (4, 1.0)
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
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, ["bf16.enabled and fp16.enabled", "keep one"]),
        ({"fp16": {"enabled": "true"}, "bf16": {"enabled": "True"}}, ["keep one"]),
    ],
)
def test_a_wrong_json_says_what_is_wrong(tmp_path, config, parts):
    refused(lambda: zero_of(tmp_path, config), str(tmp_path / "mine.json"), *parts)


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"stage": 2, "overlap_com": True}, ["'overlap_com'", "did you mean overlap_comm?"]),
        ({"stage": 2, "reduce_bucket_size": "big"}, ["reduce_bucket_size", "'big'"]),
        ({"stage": 3, "offload_param": {"device": "gpu"}}, ["offload_param.device", "'gpu'"]),
    ],
)
def test_keys_of_zero_are_those_of_deepspeed(tmp_path, section, parts):
    zero = zero_of(tmp_path, {"zero_optimization": section})
    refused(lambda: check_zero_keys(zero), str(zero.path), *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, ["train_micro_batch_size_per_gpu is 3", "per_device_train_batch_size is 2", "16 = micro 2 x accumulation 4 x ranks 2"]),
        ({"train_batch_size": 32}, ["train_batch_size is 32", "global_batch_size is 16", "micro 2 x accumulation 4 x ranks 2"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps is 1", "is 4"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping is 0.5", "max_grad_norm is 1.0 (recipe)"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, ["optimizer.params.lr is 0.001", "learning_rate is 2e-05"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled is True", "fp16 is False"]),
    ],
)  # fmt: skip
def test_a_json_that_contradicts_the_run_shows_both_values(tmp_path, config, parts):
    zero = zero_of(tmp_path, config)
    given = {"max_grad_norm": "recipe"}
    refused(lambda: resolve(zero, GPT2Config(), numbers(given=given), False, []), "mine.json", *parts)


def test_a_json_that_repeats_the_run_is_taken(tmp_path):
    config = {
        "train_batch_size": 16, "gradient_clipping": "1.0", "fp16": {"enabled": "false"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
        "zero_optimization": {"stage": "2"},
    }  # fmt: skip
    engine = resolve(zero_of(tmp_path, config), GPT2Config(), numbers(), False, [])
    assert engine["optimizer"]["params"] == {
        "lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True
    }  # fmt: skip
    assert engine["zero_optimization"]["stage"] == 2 and engine["fp16"]["enabled"] is False


def test_zero3_that_would_leave_no_model_is_mended_and_told(tmp_path):
    zero, notes = zero_of(tmp_path, {"zero_optimization": {"stage": 3}}), []
    engine = resolve(zero, GPT2Config(), numbers(), False, notes)
    assert engine["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert len(notes) == 1 and "mine.json" in notes[0] and "stage3_gather" not in json.dumps(zero.json)


@pytest.mark.parametrize(
    ("model", "width"), [(GPT2Config(n_embd=48), 48), (LlamaConfig(hidden_size=64), 64), (BertConfig(hidden_size=32), 32)]
)
def test_bucket_sizes_follow_the_width(model, width, tmp_path):
    assert hidden_size(model) == width
    section = resolve(read_zero(find_zero("zero3")), model, numbers(), True, [])["zero_optimization"]
    assert section["reduce_bucket_size"] == 1_000_000 and section["stage3_param_persistence_threshold"] == 10 * width
    wide = resolve(read_zero(find_zero("zero3")), LlamaConfig(hidden_size=4096), numbers(), True, [])["zero_optimization"]
    assert wide["reduce_bucket_size"] == 4096**2 and wide["stage3_prefetch_bucket_size"] == int(0.9 * 4096**2)
