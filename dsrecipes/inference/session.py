"""What one line of a chat does: a command, or something to say to each model."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError, nearest
from dsrecipes.inference.sampling import check_sampling
from dsrecipes.io.paths import user_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


@dataclass(frozen=True)
class Speaker:
    """A model that answers; `adapter` False switches its adapter off, `name` is said where there are two."""

    name: str
    model: PreTrainedModel
    adapter: bool = True


@dataclass
class Terminal:
    """Where lines come from and answers go: `read` is given what to ask with, and gives None at the end."""

    interactive: bool
    read: Callable[[str], str | None]
    write: Callable[[str], None]
    tell: Callable[[str], None]
    """For what is not an answer."""
    labels: bool = False
    """Say which model answers, in a pipe too."""
    stopped: Callable[[], bool] = lambda: False
    """Asked at each token: the answer ends there, and is kept so far."""

    def label(self, name: str) -> str:
        """What stands before an answer: nothing where one model answers a pipe."""
        return f"{name}> " if self.interactive else f"{name}: " if self.labels else ""


class Session(ABC):
    """Lines, one after the other, until `quit` or the end."""

    ask_with = "you> "
    help: dict[str, str] = {
        "/reset": "forget what was said",
        "/save FILE": "write it as JSON to a new file",
        "/help": "this",
        "quit": "leave, as Ctrl-D does; Ctrl-C ends an answer",
    }

    def __init__(self, run: FinishedRun, speakers: list[Speaker], terminal: Terminal) -> None:
        self.run, self.speakers, self.terminal = run, speakers, terminal

    def talk(self) -> None:
        """Take lines; a mistake is told and passed over in a terminal, and ends the command in a pipe.

        Raises:
            UserError: a mistake in a pipe.
        """
        while (line := self.terminal.read(self.ask_with)) is not None:
            line = line.strip()
            if line in ("quit", "/quit"):
                return
            self.hear(line)

    def hear(self, line: str) -> None:
        """One line: a command, or something to say; `talk` without its loop.

        Raises:
            UserError: a mistake in a pipe.
        """
        try:
            if command := _COMMAND.fullmatch(line):
                self._command(command[1], (command[2] or "").strip())
            elif line:
                self.take(line)
        except UserError as error:
            if not self.terminal.interactive:
                raise
            self.terminal.tell(f"error: {error}")

    def _command(self, name: str, argument: str) -> None:
        known = {each.split()[0][1:]: each for each in self.help if each.startswith("/")}
        if name not in known:
            raise UserError(f"unknown command /{name}{nearest(name, known)}; /help lists the commands")
        getattr(self, f"do_{name}")(argument)

    def do_help(self, argument: str) -> None:
        """The commands."""
        self.terminal.tell("\n".join(f"  {name:<18}{what}" for name, what in self.help.items()))

    def do_save(self, argument: str) -> None:
        """Write what was said; nothing is written over."""
        if not argument:
            raise UserError("/save FILE: give a file name")
        path = user_path(argument)
        text = json.dumps(self.record(), ensure_ascii=False, indent=1) + "\n"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError(f"/save {argument}: there is a file of this name; name another") from None
        except OSError as error:
            raise UserError(f"/save {argument}: cannot be written ({error.strerror})") from None
        self.terminal.tell(f"saved to {path}")

    @abstractmethod
    def take(self, line: str) -> None:
        """Something to say to the models."""

    @abstractmethod
    def record(self) -> list[Json]:
        """What was said, for /save."""

    @abstractmethod
    def do_reset(self, argument: str) -> None:
        """Forget what was said."""


class TextSession(Session):
    """Each model answers, or goes on with a text; its words appear as they come."""

    help = Session.help | {
        "/system TEXT": "tell the model how to behave; without TEXT no longer",
        "/params K=V ...": "temperature=0.7 max_new_tokens=100, or another generation setting; alone shows them",
        "/more": "go on with the text (recipes that continue text)",
    }

    def __init__(
        self, run: FinishedRun, speakers: list[Speaker], terminal: Terminal, system: str | None = None,
        settings: Json | None = None,
    ) -> None:  # fmt: skip
        super().__init__(run, speakers, terminal)
        from dsrecipes.inference.conversation import Conversation
        from dsrecipes.inference.prompting import find_asking

        asking = find_asking(run)
        self.ask_with = "text> " if asking.continues else "you> "
        self.conversations = {
            each.name: Conversation(
                run, each.model, asking, each.adapter, settings=dict(settings or {}), keep_cut=terminal.interactive,
                notice=lambda text: terminal.tell(f"({text})"), stopped=lambda: terminal.stopped(),
            )
            for each in speakers
        }  # fmt: skip
        if system:
            self.do_system(system)

    def take(self, line: str) -> None:
        """Say it to each model in turn."""
        self._each(lambda conversation: conversation.say(line, self.terminal.write))

    def do_more(self, argument: str) -> None:
        """Go on with the text."""
        self._each(lambda conversation: conversation.more(self.terminal.write))

    def _each(self, answer: Callable[[Any], str]) -> None:
        for name, conversation in self.conversations.items():
            self.terminal.write(self.terminal.label(name))
            try:
                answer(conversation)
            finally:
                self.terminal.write("\n")

    def do_reset(self, argument: str) -> None:
        """Forget the turns."""
        for conversation in self.conversations.values():
            conversation.reset()

    def do_system(self, argument: str) -> None:
        """A system text, where the recipe's prompts have a place for one."""
        for conversation in self.conversations.values():
            if conversation.asking.field != "messages":
                raise UserError("/system: this recipe's prompts have no place for a system text")
            conversation.system = argument or None

    def do_params(self, argument: str) -> None:
        """Change generation settings, or show them."""
        from dsrecipes.inference.answers import generation_settings

        changes = dict(_setting(word) for word in argument.split())
        for conversation in self.conversations.values():
            settings = conversation.settings | changes
            check_sampling(settings)
            generation_settings(self.run, conversation.model, **settings)
            conversation.settings = settings
        self.terminal.tell("  ".join(f"{name}={value}" for name, value in settings.items()))

    def record(self) -> list[Json]:
        """One object a model; its `messages` are rows that the instruction recipes can read."""
        return [
            {"run": str(self.run.folder.path), "model": name, "settings": each.settings, "messages": each.messages()}
            for name, each in self.conversations.items()
        ]


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UserError(f"/params {word}: write name=value, as in temperature=0.7")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
