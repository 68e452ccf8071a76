"""Which tokens a record becomes and which of them are trained on."""

import pytest
from support.tiny import STARTER, llama_tokenizer
from transformers import AutoTokenizer

from dsrecipes.data.encode import IGNORE, encode_segments, encode_texts


@pytest.fixture(params=["gpt2", "llama"])
def tokenizer(request):
    return AutoTokenizer.from_pretrained(STARTER / "gpt2") if request.param == "gpt2" else llama_tokenizer()


def test_texts_are_labels_and_documents_end_with_eos(tokenizer):
    batch = encode_texts([{"text": "one piece", "end": False}, {"text": " of two"}], tokenizer)
    assert batch["labels"] == batch["input_ids"] and batch["labels"][0] is not batch["input_ids"][0]
    eos = tokenizer.eos_token_id
    assert [ids.count(eos) for ids in batch["input_ids"]] == [0, 1] and batch["input_ids"][1][-1] == eos
    assert tokenizer.decode(batch["input_ids"][0] + batch["input_ids"][1][:-1]) == "one piece of two"
    assert tokenizer.bos_token_id == eos or tokenizer.bos_token_id not in sum(batch["input_ids"], [])


@pytest.mark.parametrize("prompt", ["### Response:", "ends in a space ", "x", "數"])
@pytest.mark.parametrize("answer", ["Yes", " yes", "\nyes", "s and more", "水。"])
def test_the_mask_boundary_is_exact(tokenizer, prompt, answer):
    batch = encode_segments([[(prompt, False), (answer, True)], [("other", False), ("x", True)]], tokenizer)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert labels[start:] == ids[start:] and ids[-1] == tokenizer.eos_token_id and len(ids) == len(labels)
    assert tokenizer.decode(ids[start:-1]) == answer
    assert tokenizer.decode(ids[:start], skip_special_tokens=True) == prompt


def test_llama_has_its_bos_once_and_gpt2_none():
    llama, gpt2 = llama_tokenizer(), AutoTokenizer.from_pretrained(STARTER / "gpt2")
    pair = [("<s>already", False), ("yes", True)], [("plain", False), ("yes", True)]
    for ids in encode_segments(list(pair), llama)["input_ids"]:
        assert ids[0] == llama.bos_token_id and ids.count(llama.bos_token_id) == 1 and ids[-1] == llama.eos_token_id
    ids = encode_segments([pair[1]], gpt2)["input_ids"][0]
    assert ids[0] != gpt2.bos_token_id and ids.count(gpt2.eos_token_id) == 1
