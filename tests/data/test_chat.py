"""Which ids a chat becomes: compared with apply_chat_template over all templates at hand, and what they refuse."""

from __future__ import annotations

import functools
import json
import re
from itertools import groupby, product
from pathlib import Path

import pytest
from tiny import SHARED, STARTER, llama_tokenizer, needs_shared
from transformers import AutoTokenizer

from dsrecipes.data.chat import NO_END, NO_REASONING, NO_TOOLS, REASONING, chat_template, encode_chats, end_ids
from dsrecipes.data.encode import IGNORE, EncodeOptions
from dsrecipes.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATE = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
OWN = {
    "chatml": CHATML,
    "header always": re.sub(r"{% if add.*", "", CHATML),
    "llama 2": (
        "{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'].strip() }} [/INST]"
        "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral 0.1": (
        "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %}{{ m['content'] + eos_token + ' ' }}{% endif %}{% endfor %}"
    ),
    "mistral 0.3": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
        "{% endif %}{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {% if loop.last and system is "
        "defined %}{{ system }}\n\n{% endif %}{{ m['content'] }}[/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} {% elif m['role'] == 'user' %}"
        "USER: {{ m['content'] }} {% else %}ASSISTANT: {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
    ),
    "plain text": (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    ),
    "end at the very end": (
        "{% for m in messages %}## {{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}## assistant\n{% else %}{{ eos_token }}{% endif %}"
    ),
}
"""Templates of other families' forms."""
TEXTS = ["<b>The</b> first", "second one", "水 is third", "Fourth.", "the fifth"]
KEEP = EncodeOptions(4096, "chat")
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]  # fmt: skip


def templates() -> dict[str, str]:
    """All that are at hand, by name."""
    paths = [*SHARED.glob("chat_templates/*.jinja"), *SHARED.glob("cases/models/*/chat_template.jinja")]
    found = {path.stem if path.parent.name == "chat_templates" else path.parent.name: path.read_text("utf-8") for path in paths}
    for path in SHARED.glob("cases/models/*/tokenizer_config.json"):
        template = json.loads(path.read_text("utf-8")).get("chat_template")
        found |= {path.parent.name: template} if template else {}
    return OWN | dict(sorted(found.items()))


@functools.cache
def _base(kind: str):
    return llama_tokenizer() if kind == "llama" else AutoTokenizer.from_pretrained(STARTER / "gpt2")


def tokenizer_of(kind: str, template: str, special: bool):
    """A tokenizer with this template, whose markers are tokens of it, or plain text."""
    import copy

    tokenizer = copy.deepcopy(_base(kind))
    tokenizer.chat_template = template
    if special:
        markers = set(re.findall(r"<\|[^<>'{}]+\|>|<｜[^<>']+｜>|<\|?[a-z_]*turn\|?>", template)) - set(tokenizer.get_vocab())
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(markers)})
    return tokenizer


def chat(count: int, system: bool = False, reasoning: bool = False) -> list[dict]:
    """Turns with one answer or more."""
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for number in range(count):
        turns.append({"role": "user", "content": f"Question {number}?"})
        thought = {"reasoning_content": f"thought {number}"} if reasoning else {}
        turns.append({"role": "assistant", "content": TEXTS[number], **thought})
    return turns


def answers_of(batch: dict) -> list[tuple[list[int], list[int]]]:
    """(the ids before an answer, those of the answer) of all sequences, in order."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert [label for label in labels if label != IGNORE] == [
            token for token, label in zip(ids, labels, strict=True) if label != IGNORE
        ]
        start = 0
        for trained, run in groupby(labels, lambda label: label != IGNORE):
            size = len(list(run))
            found += [(ids[:start], ids[start : start + size])] if trained else []
            start += size
    return found


def check_chat(tokenizer, turns: list[dict], tools: list[dict] | None = None) -> list[str]:
    """Compare a chat with what apply_chat_template says alone; returns the texts that are learned."""
    batch = encode_chats([{"messages": turns, "tools": tools}], tokenizer, KEEP)
    learned = answers_of(batch)
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert len(learned) == len(indices), "every answer once"
    texts = []
    for (prompt, answer), index in zip(learned, indices, strict=True):
        before, how = turns[:index], {"tools": tools, "return_dict": False}
        asked = tokenizer.apply_chat_template(before, add_generation_prompt=True, **how)
        text = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False, tools=tools)
        answered = tokenizer.apply_chat_template([*before, turns[index]], tokenize=False, tools=tools)
        decoded = tokenizer.decode(answer)
        ignores = text == tokenizer.apply_chat_template(before, tokenize=False, tools=tools)
        if answered.startswith(text) and not ignores:
            assert prompt == asked
        elif ignores:
            assert prompt[: len(asked)] == asked or tokenizer.decode(prompt).startswith(tokenizer.decode(asked))
        else:
            assert prompt == asked[: len(prompt)], "up to the block that the prompt opens"
        content = turns[index]["content"]
        assert decoded.count(content) == 1 or not content
        assert not re.search(r"Question|Be brief|\bassistant\b(?!.*final)|\buser\b", decoded), decoded
        special = [token for token in tokenizer.all_special_tokens if token != tokenizer.bos_token or token == tokenizer.eos_token]
        assert decoded.endswith(tuple(special)), "an end token"
        end = answered.rstrip()
        written = end.endswith(tuple(special))
        assert (answer[-1] == tokenizer(end, add_special_tokens=False)["input_ids"][-1]) if written else (
            answer[-1] == tokenizer.eos_token_id
        )
        texts.append(decoded)
    if len(batch["input_ids"]) == 1:
        whole = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
        ids = batch["input_ids"][0]
        ids = ids if NO_END not in batch["notes"] else ids[:-1]
        same = ids == whole[: len(ids)]
        assert same or tokenizer.decode(whole).startswith(tokenizer.decode(ids)), "the rendered chat"
    else:
        assert batch["record"] == [0] * len(batch["input_ids"])
    return texts


@needs_shared
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_template_trains_on_what_a_server_sends(kind, special):
    """1, 2 and 5 turns, with system text and reasoning: prompt, answers and end tokens are those of the rendered chat."""
    for name, template in templates().items():
        tokenizer = tokenizer_of(kind, template, special)
        for count, system, reasoning in product((1, 2, 5), (False, True), (False, True)):
            turns = chat(count, system, reasoning)
            try:
                tokenizer.apply_chat_template(turns, tokenize=False)
            except Exception:  # the template's own refusal: of system turns, tested below
                assert system, name
                continue
            try:
                check_chat(tokenizer, turns)
            except AssertionError as error:
                raise AssertionError(f"{name}, {count} answers, system {system}, reasoning {reasoning}: {error}") from error
