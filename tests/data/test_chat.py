"""Chats as token ids: compared with apply_chat_template for many templates; what templates refuse or leave out."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import replace
from itertools import groupby, product

import pytest
from dsrecipes.recipes.alpaca_llama_sft import AlpacaLlamaSft
from support.tiny import SHARED, STARTER, llama_tokenizer, needs_shared
from transformers import AutoTokenizer, ByT5Tokenizer

from dsrecipes.config.encoding import EncodeOptions
from dsrecipes.data.chat import encode_chats, end_ids
from dsrecipes.data.chat_answers import NEW_IDS, NO_END, REASONING
from dsrecipes.data.chat_fit import UNANSWERED
from dsrecipes.data.chat_template import NO_REASONING, NO_TOOLS
from dsrecipes.data.chunk import Encoding
from dsrecipes.data.encode import IGNORE
from dsrecipes.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALTERNATE = "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
OWN = {
    "chatml": CHATML,
    "header always": CHATML[: CHATML.index("{% if add")],
    "llama 2": (
        "{% for m in messages %}"
        + ALTERNATE
        + "{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'].strip() }} [/INST]"
        "{% else %} {{ m['content'].strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral 0.1": (
        "{{ bos_token }}{% for m in messages %}"
        + ALTERNATE
        + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
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
"""Templates in the style of other model families."""
TEXTS = ["<b>The</b> first", "second one", "水 is third", "Fourth.", "the fifth"]
KEEP = EncodeOptions(4096, "chat")
CALL = {"type": "function", "id": "a1b2c3d4e", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "It.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]  # fmt: skip


def templates() -> dict[str, str]:
    """Return all available templates by name."""
    paths = [*SHARED.glob("chat_templates/*.jinja"), *SHARED.glob("cases/models/*/chat_template.jinja")]
    by_name = {
        path.stem if path.parent.name == "chat_templates" else path.parent.name: path.read_text("utf-8") for path in paths
    }
    for path in SHARED.glob("cases/models/*/tokenizer_config.json"):
        template = json.loads(path.read_text("utf-8")).get("chat_template")
        by_name |= {path.parent.name: template} if template else {}
    return OWN | dict(sorted(by_name.items()))


@functools.cache
def _base(kind: str):
    return llama_tokenizer() if kind == "llama" else AutoTokenizer.from_pretrained(STARTER / "gpt2")


def tokenizer_of(kind: str, template: str, special: bool):
    """Return a tokenizer with this template; the template's markers are special tokens, or plain text."""
    tokenizer = copy.deepcopy(_base(kind))
    tokenizer.chat_template = template
    if special:
        markers = set(re.findall(r"<\|[^<>'{}]+\|>|<｜[^<>']+｜>|<\|?[a-z_]*turn\|?>", template)) - set(
            tokenizer.get_vocab()
        )
        tokenizer.add_special_tokens({"extra_special_tokens": sorted(markers)})
    return tokenizer


def chat(count: int, system: bool = False, reasoning: bool = False) -> list[dict]:
    """Build turns with one answer or more."""
    turns = [{"role": "system", "content": "Be brief."}] if system else []
    for number in range(count):
        turns.append({"role": "user", "content": f"Question {number}?"})
        thought = {"reasoning_content": f"thought {number}"} if reasoning else {}
        turns.append({"role": "assistant", "content": TEXTS[number], **thought})
    return turns


def answers_of(batch: dict) -> list[tuple[list[int], list[int]]]:
    """Return (the ids before an answer, those of the answer) of all sequences, in order."""
    answers = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert [label for label in labels if label != IGNORE] == [
            token for token, label in zip(ids, labels, strict=True) if label != IGNORE
        ]
        start = 0
        for trained, run in groupby(labels, lambda label: label != IGNORE):
            size = len(list(run))
            answers += [(ids[:start], ids[start : start + size])] if trained else []
            start += size
    return answers


def check_chat(tokenizer, turns: list[dict], tools: list[dict] | None = None) -> list[str]:
    """Compare a chat with the result of apply_chat_template; return the texts that are learned."""
    batch = encode_chats([{"messages": turns, "tools": tools}], tokenizer, KEEP)
    learned = answers_of(batch)
    indices = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert len(learned) == len(indices), "every answer once"
    texts = []
    for (prompt, answer), index in zip(learned, indices, strict=True):
        before = turns[:index]
        server_ids = tokenizer.apply_chat_template(before, add_generation_prompt=True, tools=tools, return_dict=False)
        text = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False, tools=tools)
        answered = tokenizer.apply_chat_template([*before, turns[index]], tokenize=False, tools=tools)
        decoded = tokenizer.decode(answer)
        ignores = text == tokenizer.apply_chat_template(before, tokenize=False, tools=tools)
        if answered.startswith(text) and not ignores:
            assert prompt == server_ids
        elif ignores:
            assert prompt[: len(server_ids)] == server_ids or tokenizer.decode(prompt).startswith(
                tokenizer.decode(server_ids)
            )
        else:
            assert prompt == server_ids[: len(prompt)], "up to the block that the prompt opens"
        content = turns[index]["content"]
        assert decoded.count(content) == 1 or not content
        assert not re.search(r"Question|Be brief|\bassistant\b(?!.*final)|\buser\b", decoded), decoded
        special = [
            token for token in tokenizer.all_special_tokens if token != tokenizer.bos_token or token == tokenizer.eos_token
        ]
        assert decoded.endswith(tuple(special)), "an end token"
        end = answered.rstrip()
        # the end token that the template writes, or else eos, which encode_chats appends
        last = tokenizer(end, add_special_tokens=False)["input_ids"][-1]
        assert answer[-1] == (last if end.endswith(tuple(special)) else tokenizer.eos_token_id)
        texts.append(decoded)
    if len(batch["input_ids"]) == 1:
        whole = tokenizer.apply_chat_template(turns, tools=tools, return_dict=False)
        ids = batch["input_ids"][0]
        ids = ids if NO_END not in batch["notes"][0] else ids[:-1]
        text = tokenizer.decode(whole)
        rewritten = any(turn["content"] not in text for turn in turns)  # a system text that only a prompt has
        rewritten |= "thought" in tokenizer.decode(ids) and "thought" not in text  # reasoning that the text must hold
        assert rewritten or text.startswith(tokenizer.decode(ids)), "the rendered chat"
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
                prompt = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
                shown = turns[0]["content"] in prompt
            except Exception:
                shown = False
            if not shown:  # a template that refuses system turns, or leaves them out: tested below
                assert system, name
                continue
            try:
                check_chat(tokenizer, turns)
            except AssertionError as error:
                raise AssertionError(f"{name}, {count} answers, system {system}, reasoning {reasoning}: {error}") from error


def encoded(
    template: str, turns: list[dict], options: EncodeOptions = KEEP, kind: str = "gpt2", **more
) -> tuple[str, str, list]:
    """Return (all text, what is learned, notes) of a chat."""
    tokenizer = tokenizer_of(kind, template, True)
    batch = encode_chats([{"messages": turns, **more}], tokenizer, options)
    learned = "|".join(tokenizer.decode(answer) for _, answer in answers_of(batch))
    return "|".join(map(tokenizer.decode, batch["input_ids"])), learned, batch["notes"][0]


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SAID = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n{}<end_of_turn>"


def test_turns_that_a_template_refuses_are_moved_with_a_note():
    """System text, an assistant turn at the beginning, two turns of one role: nothing is lost."""
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    system, again = {"role": "system", "content": "Be Tom."}, {"role": "user", "content": "There?"}
    start = "<|endoftext|>"
    cases = [
        ([system, user, answer], SAID.format("Be Tom.\n\nHi", "Yes"), "Yes<end_of_turn>", "refuses system turns"),
        ([user, again, answer], SAID.format("Hi\n\nThere?", "Yes"), "Yes<end_of_turn>", "two turns of one role"),
        ([answer, user, answer], SAID.format("", "Yes") + "\n" + SAID.format("Hi", "Yes"), "Yes<end_of_turn>", "at the beginning"),
        ([system, answer, user, answer], SAID.format("Be Tom.", "Yes") + "\n" + SAID.format("Hi", "Yes"), "Yes<end_of_turn>", "system"),
        (
            [user, answer, system, user, answer],
            SAID.format("Hi", "Yes") + "\n" + SAID.format("Be Tom.\n\nHi", "Yes"), "Yes<end_of_turn>|Yes<end_of_turn>", "system",
        ),
    ]  # fmt: skip
    for turns, text, learned, note in cases:
        whole, trained, notes = encoded(GEMMA, turns)
        assert whole == start + text and trained == learned and note in notes[0], turns
        assert encoded(CHATML, turns)[2] == [], "a template that accepts them gets them"
    whole, learned, _ = encoded(CHATML, [user, again, answer, answer])
    assert whole.count("<|im_start|>user") == 2 and learned == "Yes<|im_end|>|Yes<|im_end|>"
    with pytest.raises(ValueError, match="turn 3: .* another weight"):
        encoded(GEMMA, [user, answer, answer | {"weight": 0}])


def test_unusual_templates():
    """A header after the last answer too; contents only as parts; answers that end with a special token of their own."""
    turns = chat(2)
    whole, learned, notes = encoded(CHATML, turns)
    always = CHATML[: CHATML.index("{% if add")] + "{{ '<|im_start|>assistant\n' }}"
    parts = CHATML.replace("{{ m['content'] }}", "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
    for template in (always, parts):
        assert encoded(template, turns) == (whole, learned, notes)
    bare = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    template = bare + "{% if false %}<|user|>{% endif %}"
    own = [turns[0], {"role": "assistant", "content": "is <|user|>"}]
    assert encoded(template, own)[1] == "is <|user|><|endoftext|>", "the template writes no end token"
    own = [turns[0], {"role": "assistant", "content": "is <|endoftext|>"}]
    assert encoded(template, own)[1] == "is <|endoftext|>", "but eos is not repeated"


def test_a_tool_result_that_is_written_differently_at_the_end():
    """Hermes: a line break after a result that is not the last; the prompt of the answer is that of inference."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
        "{{ m['content'] }}{{ '\n' if m['role'] == 'tool' and not loop.last }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4 degrees"},
        {"role": "assistant", "content": "Cold."},
    ]
    batch = encode_chats([{"messages": turns}], (tokenizer := tokenizer_of("gpt2", template, True)), KEEP)
    prompt, answer = answers_of(batch)[1]
    assert prompt == tokenizer.apply_chat_template(turns[:3], add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(answer) == "Cold.<|im_end|>" and "degrees<|im_end|>" in tokenizer.decode(prompt)


def test_reasoning_is_kept_or_dropped():
    turns = chat(2, reasoning=True)
    text, learned, notes = encoded(THINKING, turns)
    assert learned.count("<think>") == 2 and text.count("thought 0") == text.count("thought 1") == 1 and notes == [REASONING]
    dropped = encoded(THINKING, turns, EncodeOptions(4096, "chat", reasoning="drop"))
    assert "thought" not in dropped[0] and dropped[2] == []
    assert encoded(CHATML, turns)[2] == [NO_REASONING] and "thought" not in encoded(CHATML, turns)[0]
    inline = [turns[0], {"role": "assistant", "content": "<think>thought</think>\n4"}]
    assert encoded(CHATML, inline)[1] == "<think>thought</think>\n4<|im_end|>"
    assert encoded(CHATML, inline, EncodeOptions(4096, "chat", reasoning="drop"))[1] == "4<|im_end|>"


@needs_shared
def test_a_template_that_reads_reasoning_in_the_text_gets_it_there():
    _, learned, notes = encoded(templates()["tok_qwen3"], chat(1, reasoning=True))
    assert learned == f"<think>\nthought 0\n</think>\n\n{TEXTS[0]}<|im_end|>" and notes == [REASONING]


@needs_shared
def test_tools_calls_and_results():
    """Calls are learned completely, results never; a template without a form for calls refuses the row."""
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "4 degrees", "tool_call_id": "a1b2c3d4e", "name": "weather"},
        {"role": "assistant", "content": "It is cold."},
    ]
    shown = 0
    for name, template in templates().items():
        try:
            text, learned, notes = encoded(template, turns, tools=TOOLS)
        except ValueError:
            continue  # no form for tools, or a call without an id
        shown += 1
        assert learned.count("It is cold.") == 1 and learned.count("Oslo") == 1, name
        assert "4 degrees" not in learned and "4 degrees" in text, name
        assert NO_TOOLS in notes or text.count("weather") > learned.count("weather"), name
    assert shown >= 12
    with pytest.raises(ValueError, match="turn 2: the chat template does not show all tool_calls"):
        encoded(CHATML, turns)
    with pytest.raises(ValueError, match="no system role .*the chat has tool calls"):
        encoded(GEMMA, [{"role": "system", "content": "Be brief."}, *turns])
    as_text = copy.deepcopy(turns)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Oslo"}'
    assert encoded(templates()["qwen3"], as_text) == encoded(templates()["qwen3"], turns)


def test_calls_without_an_id_are_numbered_where_the_template_needs_ids():
    """Mistral's: results have the ids of their calls, whatever order and ids the file has."""
    show = "{% if x.id is not defined or x.id|length != 9 %}{{ raise_exception('ids of 9') }}{% endif %}{{ x.id }} {{ x.function|tojson }}"
    template = CHATML.replace(
        "{{ m['content'] }}",
        "{% for x in m.tool_calls or [] %}" + show + "{% endfor %}{{ m.tool_call_id }} {{ m['content'] }}",
    )
    bare = {key: value for key, value in CALL.items() if key != "id"}
    user, end = {"role": "user", "content": "?"}, {"role": "assistant", "content": "Cold."}
    for calls, results, ids in (
        ([bare, bare], [{}, {}], ["000000001", "000000002"]),
        (
            [bare | {"id": "call_1"}, CALL],
            [{"tool_call_id": CALL["id"]}, {"tool_call_id": "call_1"}],
            [CALL["id"], "000000001"],
        ),
    ):
        tools = [{"role": "tool", "content": "4"} | more for more in results]
        turns = [user, {"role": "assistant", "content": "", "tool_calls": calls}, *tools, end]
        text, _, notes = encoded(template, turns)
        assert re.findall(r"tool\n(\w+) 4", text.split("|<|im_start|>user")[-1]) == ids and notes == [NEW_IDS]
    assert NEW_IDS not in encoded(template, [user, {"role": "assistant", "content": "", "tool_calls": [CALL]}])[2]


def test_turns_after_the_last_answer_are_noted():
    turns = chat(1) + chat(1)[:1]
    assert encoded(CHATML, turns)[2] == [UNANSWERED] and encoded(CHATML, chat(1))[2] == []
    assert encoded(CHATML, turns)[:2] == encoded(CHATML, chat(1))[:2]
    batch = AlpacaLlamaSft.encode(
        [{"messages": turns}], tokenizer_of("gpt2", CHATML, True), replace(KEEP, prompt_style="alpaca")
    )
    assert batch["notes"] == [[UNANSWERED]]


def test_generation_stops_at_what_answers_end_with():
    for template, end in ((CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>"), (OWN["zephyr"], "<|endoftext|>")):
        tokenizer = tokenizer_of("gpt2", template, True)
        assert tokenizer.convert_ids_to_tokens(end_ids(tokenizer)) == [end]


def test_templates_without_an_answer_to_find():
    tokenizer = copy.deepcopy(_base("gpt2"))
    with pytest.raises(UserError, match="DSR140"):
        encode_chats([{"messages": chat(1)}], tokenizer, KEEP)
    for template, message in (
        (
            "{% for m in messages %}{{ m['content'] if messages|length == 1 else m['content']|upper }}{% endfor %}",
            "turn 2: the chat template does not show the text",
        ),
        ("{{ raise_exception('no chats') }}", "no chats"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}",
            "does not show the text",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            encoded(template, chat(1))
    with pytest.raises(ValueError, match="no answer to learn"):
        encoded(CHATML, chat(1)[:1])


def test_a_tokenizer_without_offsets():
    """Where the ids of a prefix of the text are a prefix of its ids, the result is the same as with offsets."""
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokenizer.chat_template = OWN["zephyr"]
    assert check_chat(tokenizer, chat(2)) == [f"{text}</s>" for text in TEXTS[:2]]


def test_rows_become_sequences_with_their_places_and_notes():
    row = {"messages": chat(2)}
    encoding = Encoding(AlpacaLlamaSft, tokenizer_of("gpt2", OWN["plain text"], True), KEEP, False)
    chunk = encoding([("a.jsonl, line 1", row), ("a.jsonl, line 2", row)])
    assert chunk.record.tolist() == [0, 0, 1, 1] and chunk.notes == {NO_END: [0, 1]}
    assert chunk.subset(chunk.record[::2] == 1).notes == {NO_END: [1]}
