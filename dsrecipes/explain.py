"""What does a message mean, and what can be done about it: dsrecipes explain DSR042.

dsrecipes explain             # all ids with their titles
dsrecipes explain dsr42 DSR7  # several, in any spelling
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping

from dsrecipes.errors import UserError
from dsrecipes.io.arguments import CommandParser
from dsrecipes.messages import Message, code_of, layer_of, load_all, load_layer

_LABELS = {"en": ("cause: ", "cure:  "), "zh": ("原因：", "處理：")}
_WIDTH = 80


def language(env: Mapping[str, str]) -> str:
    """Return `zh` where the environment asks for Chinese messages, else `en`.

    The first variable that is set decides, as in locale(7).
    """
    name = next((env[key] for key in ("LC_ALL", "LC_MESSAGES", "LANG") if env.get(key)), "")
    return "zh" if name.startswith("zh") else "en"


def _find(word: str) -> Message:
    """Find the message that `DSR042`, `dsr42`, `[DSR042]` or `42` names (UserError: there is none)."""
    match = re.fullmatch(r"\[?(?:DSR)?0*([0-9]{1,3})\]?", word.strip(), re.IGNORECASE)
    if not match:
        raise UserError("DSR640", f"{word}: not the id of a message; ids look like DSR042, at the end of the message")
    number = int(match[1])
    # only the layer's file is parsed: reading all YAML would take longer than the rest of the command
    layer = layer_of(number)
    message = load_layer(layer).get(code_of(number)) if layer else None
    if message is None:
        closest = min(load_all(), key=lambda code: abs(int(code[3:]) - number))
        raise UserError(
            "DSR640", f"no message has the id {code_of(number)}; the nearest is {closest}. `dsrecipes explain` lists all"
        )
    return message


def _print(message: Message, lang: str) -> None:
    """Print title, cause and cure; Chinese is not wrapped, because it has no spaces to wrap at."""
    text = message.zh if lang == "zh" else message.en
    print(f"{message.code}  {text.title}")
    for label, paragraph in zip(_LABELS[lang], (text.cause, text.cure), strict=True):
        if lang == "zh":
            print(f"  {label}{paragraph}")
        else:
            print(textwrap.fill(label + paragraph, _WIDTH, initial_indent="  ", subsequent_indent=" " * 9))


def main(argv: list[str]) -> int:
    """Run the `explain` command."""
    parser = CommandParser("explain", "Explain messages by the id at their end: the cause, and what to do.")
    parser.add_argument("ids", nargs="*", metavar="ID", help="ids such as DSR042; without one, all ids are listed")
    parser.add_argument("--lang", choices=("en", "zh"), default=language(os.environ), help="language (default: by LANG)")
    args = parser.parse_args(argv)
    if not args.ids:
        for code, message in load_all().items():
            print(f"{code}  {message.zh.title if args.lang == 'zh' else message.en.title}")
        return 0
    # all are looked up before the first is printed, so that an unknown id is not lost below pages of text
    messages = [_find(word) for word in args.ids]
    for index, message in enumerate(messages):
        if index:
            print()
        _print(message, args.lang)
    return 0
