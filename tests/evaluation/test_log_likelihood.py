"""Prompts, tokens and scores of questions put to a causal model; beside the harness itself where it is installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.tiny import ROOT, SHARED, llama_tokenizer, needs_shared, tiny_llama
from tqdm import tqdm

from dsrecipes.errors import UserError
from dsrecipes.evaluation.log_likelihood import context, encode_pair, log_likelihoods, score

SHOT = {"question": "2+2?", "options": ["1", "2", "3", "4"], "answer": 3, "subject": "accounting"}
ASKED = {"question": " 1+1? ", "options": ["1", "2", "3", "4"], "answer": 1, "subject": "accounting"}


def test_prompts_are_the_harness_s():
    assert context(ASKED, [SHOT], "tmmluplus") == (
        "以下為會計學的單選題，請提供正確答案的選項。\n\n"
        "2+2?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: D\n\n"
        "1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    )
    assert context(ASKED | {"subject": "agronomy"}, [], "cmmlu") == (
        "以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n1+1?\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )
    assert context(ASKED | {"subject": "abstract_algebra"}, [], "mmlu").startswith(
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n1+1?\nA. 1"
    )
    assert context(ASKED, [SHOT], "mmlu_continuation").endswith("Question: 2+2?\nAnswer: 4\n\nQuestion: 1+1?\nAnswer:")


def test_braces_in_a_question_stay():
    assert "{x} {0}\nA. {1}" in context(ASKED | {"question": "{x} {0}", "options": ["{1}", "", "", ""]}, [], "mmlu")


def test_a_continuation_takes_the_spaces_before_it():
    tokenizer = llama_tokenizer()
    assert encode_pair("Rain is  ", "wet", tokenizer) == encode_pair("Rain is", "  wet", tokenizer)
    before, after = encode_pair("Rain is", " wet", tokenizer)
    assert before[0] == tokenizer.bos_token_id and tokenizer.decode(after) == " wet"
    assert encode_pair("<s>Rain is", " wet", tokenizer)[0] == before  # one <s>, not two


def whole_text(model, tokenizer, before, after):
    """Log-likelihood by the plain definition: one text at a time, all positions."""
    start, ids = encode_pair(before, after, tokenizer)
    tokens = torch.tensor([(start + ids)[-513:]])
    with torch.no_grad():
        chances = model(tokens[:, :-1]).logits.float().log_softmax(-1)
    return chances[0].gather(1, tokens[0, 1:, None])[-len(ids) :].sum().item()


def test_batches_change_nothing_and_long_prompts_lose_their_beginning():
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama()).eval(), llama_tokenizer()
    texts = ["Rain is", "Snow falls when the air is too cold for rain. Fog" * 2, "a b c d e f g " * 90]
    pairs = [(text, choice) for text in texts for choice in (" A", " B", " a cloud on the ground")]
    expected = [whole_text(model, tokenizer, *pair) for pair in pairs]
    assert len(encode_pair(*pairs[-1], tokenizer)[0]) > 513
    for batch_size in (1, 4):
        assert log_likelihoods(model, tokenizer, pairs, batch_size, tqdm(disable=True)) == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="a choice needs 1 to 512"):
        log_likelihoods(model, tokenizer, [("a", " a b c d" * 300)], 1, tqdm(disable=True))


def test_length_counts_in_characters_or_bytes_and_ties_go_to_the_first():
    record = SHOT | {"options": ["ab", "水水", "abcd", "a"], "answer": 1}
    found = score(record, [-4.0, -5.0, -8.0, -4.0], "mmlu_continuation")
    assert (found["predicted"], found["acc"]) == ("A", 0.0)  # -4 twice
    assert found["predicted_norm"] == "A"  # -2, -2.5, -2, -4
    assert found["acc_bytes"] == 1.0  # -2, -5/6, -2, -4
    letters = score(record, [-4.0, -1.0, -8.0, -4.0], "mmlu")
    assert letters["acc"] == letters["acc_norm"] == letters["acc_bytes"] == 1.0
    assert sum(letters["probabilities"]) == pytest.approx(1)


@needs_shared
@pytest.mark.ranks
@pytest.mark.skipif("LM_EVAL_PYTHON" not in os.environ, reason="LM_EVAL_PYTHON names no environment with lm-eval")
@pytest.mark.parametrize(("form", "shots"), [("tmmluplus", 0), ("tmmluplus", 5), ("mmlu_continuation", 2)])
def test_equal_to_lm_evaluation_harness(form, shots):
    done = subprocess.run(
        [
            sys.executable, ROOT / "benchmarks" / "harness.py", "--python", os.environ["LM_EVAL_PYTHON"],
            "--model", SHARED / "models" / "stories260K", "--dataset", SHARED / "tmmlu", "--form", form,
            "--num_fewshot", str(shots), "--limit", "10", "--subjects", "dentistry", "clinical_psychology",
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["items"] == 20
