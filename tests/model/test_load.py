"""Models and tokenizers that load, and those that are refused before anything starts."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import SHARED, STARTER, arrow_file, llama_tokenizer, needs_shared, tiny_bert, tiny_gpt2, tiny_llama
from transformers import AutoTokenizer

from dsrecipes.config.schema import ModelConfig
from dsrecipes.data.columns import first_beyond
from dsrecipes.errors import UserError
from dsrecipes.model.checks import check_model
from dsrecipes.model.configuration import load_config
from dsrecipes.model.load import load_model
from dsrecipes.model.task import count_parameters, pad_id
from dsrecipes.model.tokenizer import check_ids, check_vocabulary, load_tokenizer

CAUSAL, CHOICE = "AutoModelForCausalLM", "AutoModelForMultipleChoice"


def options(name, **values):
    return ModelConfig(model_name_or_path=str(name), **values)


def copy_of(folder, tmp_path, **changes):
    """The model's folder with another config.json."""
    path = tmp_path / "model"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.mark.parametrize(
    ("tiny", "auto_class", "fits"),
    [(tiny_gpt2, CAUSAL, True), (tiny_llama, CAUSAL, True), (tiny_bert, CHOICE, True), (tiny_bert, CAUSAL, False),
     (tiny_gpt2, CHOICE, False), (tiny_llama, CHOICE, False)],
)  # fmt: skip
def test_a_model_for_another_task_is_refused(tiny, auto_class, fits):
    if fits:
        assert load_config(options(tiny()), auto_class).model_type in ("gpt2", "llama", "bert")
    else:
        task = "causal language model" if auto_class == CAUSAL else "multiple choice"
        with pytest.raises(UserError, match=rf"{task}.*DSR208"):
            load_config(options(tiny()), auto_class)


def test_a_classifier_is_no_language_model(tmp_path):
    path = copy_of(tiny_llama(), tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UserError, match="LlamaForSequenceClassification.*DSR208"):
        load_config(options(path), CAUSAL)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "cannot be loaded|not a valid JSON"), ('{"model_type": "no_such_type"}', "no_such_type"), ("{}", "model_type|cannot be loaded")],
)  # fmt: skip
def test_a_damaged_config_is_one_line(tmp_path, text, problem):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=problem) as error:
        load_config(options(tmp_path), CAUSAL)
    assert "\n" not in str(error.value)


def test_a_folder_with_damaged_weights_or_none(tmp_path):
    path = copy_of(tiny_gpt2(), tmp_path)
    config = load_config(options(path), CAUSAL)
    (path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError) as error:
        load_model(options(path), config, CAUSAL, torch.float32, 0, False)
    assert "DSR205" in str(error.value) and "\n" not in str(error.value)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors.*DSR205"):
        load_model(options(path), config, CAUSAL, torch.float32, 0, False)


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama, tiny_bert])
def test_a_folder_without_a_tokenizer(tiny, tmp_path):
    path = copy_of(tiny(), tmp_path)
    for file in path.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="DSR213"):
        load_tokenizer(options(path))


def test_weights_of_another_shape(tmp_path):
    path = copy_of(tiny_llama(), tmp_path, intermediate_size=48)
    with pytest.raises(UserError, match="DSR216"):
        load_model(options(path), load_config(options(path), CAUSAL), CAUSAL, torch.float32, 0, False)


def test_hub_names_without_a_network():
    for name in ("gpt2", "meta-llama/Llama-2-7b-hf"):
        with pytest.raises(UserError, match=rf"model {name} .*FOLDER.*DSR206"):
            load_config(options(name), CAUSAL)


def test_more_positions_than_the_model_has():
    config = load_config(options(tiny_gpt2()), CAUSAL)
    check_model(config, options(tiny_gpt2()), 256, 2)
    with pytest.raises(UserError, match=r"--max_length 257: .* has 256 positions.*DSR209"):
        check_model(config, options(tiny_gpt2()), 257, 2)


def test_prequantized_models(tmp_path):
    path = copy_of(tiny_llama(), tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    config = load_config(options(path), CAUSAL)
    with pytest.raises(UserError, match=r"\(gptq\), which ZeRO-3 cannot shard.*--load_in_4bit true.*zero2 \[DSR210\]"):
        check_model(config, options(path, lora_r=8), 64, 3)
    with pytest.raises(UserError, match=r"\(gptq\).*--lora_r 16.*DSR210"):
        check_model(config, options(path), 64, 2)
    assert check_model(config, options(path, lora_r=8), 64, 2) is None


def test_tokenizers_without_a_pad_token():
    llama = load_tokenizer(options(tiny_llama()))
    assert llama.pad_token_id is None and pad_id(llama) == llama.eos_token_id == 2
    assert pad_id(AutoTokenizer.from_pretrained(STARTER / "bert")) == 0


def test_a_tokenizer_of_another_model_is_refused():
    config = load_config(options(tiny_llama()), CAUSAL)
    assert check_vocabulary(llama_tokenizer(), config) is None
    with pytest.raises(UserError, match="2048 tokens, the model has 600.*DSR214"):
        check_vocabulary(AutoTokenizer.from_pretrained(STARTER / "gpt2"), config)


def test_a_padding_token_beyond_the_embedding_is_replaced_and_an_end_token_is_refused():
    config = load_config(options(tiny_llama()), CAUSAL)
    tokenizer = copy.deepcopy(llama_tokenizer())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert check_vocabulary(tokenizer, config) == (
        "padding token '[PAD]' (id 600) has no row in the embedding (600 rows): '</s>' (id 2) pads instead"
    )
    assert pad_id(tokenizer) == 2
    check_ids([1, 599], tokenizer, 600)
    with pytest.raises(ValueError, match=r"token '\[PAD\]' has id 600, .* 600 rows \(ids 0 to 599\)"):
        check_ids([1, 600], tokenizer, 600)
    tokenizer.eos_token = "[PAD]"
    with pytest.raises(UserError, match=r"\(eos_token\).*DSR214"):
        check_vocabulary(tokenizer, config)


def test_the_first_row_beyond_the_embedding_is_found():
    flat = arrow_file({"input_ids": [[1, 2], [], [3, 9, 12]], "labels": [[1, 2], [], [3, 9, 12]]})
    nested = arrow_file({"input_ids": [[[1], [2, 3]], [[4], [5, 7]]], "labels": [0, 1]})
    assert first_beyond(flat, "input_ids", 9) == (2, 9) and first_beyond(flat, "input_ids", 13) is None
    assert first_beyond(nested, "input_ids", 7) == (1, 7) and first_beyond(nested, "input_ids", 8) is None


def test_random_weights_are_drawn_once_from_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRECIPES_CACHE", str(tmp_path))
    scratch = options(STARTER / "bert", from_scratch=True)
    config = load_config(scratch, CHOICE)
    models = [load_model(scratch, config, CHOICE, torch.float32, seed, False) for seed in (1, 1, 2)]
    weights = [model.state_dict()["bert.encoder.layer.0.output.dense.weight"] for model in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert len(list((tmp_path / "models").glob("random-*/config.json"))) == 2


def test_a_new_head_is_drawn_from_the_seed(tmp_path):
    path = copy_of(tiny_bert(), tmp_path, architectures=["BertModel"])
    weights = {k: v for k, v in load_file(path / "model.safetensors").items() if not k.startswith("classifier")}
    from safetensors.torch import save_file

    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    config = load_config(options(path), CHOICE)
    heads = [load_model(options(path), config, CHOICE, torch.float32, seed, False).classifier for seed in (1, 1, 2)]
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    assert 0.005 < heads[0].weight.std() < 0.05 and not heads[0].bias.any()


@needs_shared
def test_a_real_pretrained_llama_loads():
    name = SHARED / "models" / "stories260K"
    config = load_config(options(name), CAUSAL)
    model = load_model(options(name), config, CAUSAL, torch.float32, 0, False)
    assert count_parameters(model) == (260_032, 0)
    assert load_tokenizer(options(name))("Once")["input_ids"][0] == 1


def test_weights_with_a_hole_are_refused(tmp_path):
    path = copy_of(tiny_llama(), tmp_path)
    weights = load_file(path / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.1." not in k}, path / "model.safetensors", {"format": "pt"})
    given = options(path)
    with pytest.raises(UserError, match=r"9 weights .*\(model\.layers\.1\..*DSR216"):
        load_model(given, load_config(given, CAUSAL), CAUSAL, torch.float32, 1, False)


def test_a_new_head_is_drawn_alike_and_an_adapter_keeps_it(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForMultipleChoice, BertModel

    path = copy_of(tiny_bert(), tmp_path)
    BertModel.from_pretrained(path).save_pretrained(path)  # an encoder without a head
    given = options(path, lora_r=2)
    tuned, again = (load_model(given, load_config(given, CHOICE), CHOICE, torch.float32, 1, False).eval() for _ in "ab")
    ids = torch.arange(5, 17).view(1, 4, 3)
    tuned.save_pretrained(tmp_path / "adapter")
    base = AutoModelForMultipleChoice.from_pretrained(path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (tuned, again, loaded)]
    assert torch.equal(logits[0], logits[1]) and torch.allclose(logits[0], logits[2], atol=1e-6)
