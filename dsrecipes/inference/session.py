"""What does one line of a chat do? It is a command, or something to say to each model."""

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
    from dsrecipes.inference.finished import FinishedRun

Json = dict[str, Any]
_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?")


@dataclass(frozen=True)
class Speaker:
    """A model that answers."""

    name: str
    """Shown where there are two."""
    model: Any
    adapter: bool = True
    """False switches the adapter of a LoRA run off."""


@dataclass
class Terminal:
    """Where lines come from and answers go: a person's terminal, a pipe, a web page or a test."""

    interactive: bool
    """A person reads: mistakes are reported and the chat continues."""
    read: Callable[[str], str | None]
    """Takes what to prompt with; returns None at the end."""
    write: Callable[[str], None]
    """For answers, piece by piece."""
    tell: Callable[[str], None]
    """For messages that are not answers."""
    labels: bool = False
    """Name the model that answers, in a pipe too."""
    stopped: Callable[[], bool] = lambda: False
    """Called at each token; True ends the answer and keeps what was generated."""

    def label(self, name: str) -> str:
        """Text before an answer: none where one model answers a pipe."""
        if self.interactive:
            return f"{name}> "
        return f"{name}: " if self.labels else ""


class Session(ABC):
    """A loop over lines until `quit` or the end; each subclass serves one kind of model."""

    ask_with = "you> "
    help: dict[str, str] = {
        "/reset": "forget the conversation",
        "/save FILE": "write it as JSON to a new file",
        "/help": "show this list",
        "quit": "leave, as Ctrl-D does; Ctrl-C ends an answer",
    }

    def __init__(self, run: FinishedRun, speakers: list[Speaker], terminal: Terminal) -> None:
        self.run, self.speakers, self.terminal = run, speakers, terminal

    def talk(self) -> None:
        """Take lines; a mistake is reported in a terminal, and ends the command in a pipe, so that a script notices.

        Raises:
            UserError: a mistake in a pipe.
        """
        while (line := self.terminal.read(self.ask_with)) is not None:
            line = line.strip()
            if line in ("quit", "/quit"):
                return
            self.hear(line)

    def hear(self, line: str) -> None:
        """Take one line: a command, or something to say.

        Raises:
            UserError: a mistake in a pipe.
        """
        try:
            # A text that begins with a slash, such as a path, is not a command.
            command = _COMMAND.fullmatch(line)
            if command:
                self._command(command[1], (command[2] or "").strip())
            elif line:
                self.take(line)
        except UserError as error:
            if not self.terminal.interactive:
                raise
            self.terminal.tell(f"error: {error}")

    def _command(self, name: str, argument: str) -> None:
        known = [usage.split()[0][1:] for usage in self.help if usage.startswith("/")]
        if name not in known:
            raise UserError("DSR445", f"unknown command /{name}{nearest(name, known)}; /help lists the commands")
        getattr(self, f"do_{name}")(argument)

    def do_help(self, argument: str) -> None:
        """List the commands."""
        self.terminal.tell("\n".join(f"  {usage:<18}{effect}" for usage, effect in self.help.items()))

    def do_save(self, argument: str) -> None:
        """Write the conversation to a new file."""
        if not argument:
            raise UserError("DSR446", "/save FILE: give a file name")
        path = user_path(argument)
        text = json.dumps(self.record(), ensure_ascii=False, indent=1) + "\n"
        try:
            # x: an existing file is never overwritten.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UserError("DSR446", f"/save {argument}: there is a file of this name; name another") from None
        except OSError as error:
            raise UserError("DSR446", f"/save {argument}: cannot be written ({error.strerror})") from None
        self.terminal.tell(f"saved to {path}")

    @abstractmethod
    def take(self, line: str) -> None:
        """Say a line to the models."""

    @abstractmethod
    def record(self) -> list[Json]:
        """The conversation, for /save."""

    @abstractmethod
    def do_reset(self, argument: str) -> None:
        """Forget the conversation."""


class TextSession(Session):
    """Each model answers or continues a text; its words appear as they are generated."""

    help = Session.help | {
        "/system TEXT": "say how the model is to behave; without TEXT: no longer",
        "/params K=V ...": "temperature=0.7 max_new_tokens=100, or another generation setting; alone shows them",
        "/more": "continue the text (recipes that continue text)",
    }

    def __init__(
        self,
        run: FinishedRun,
        speakers: list[Speaker],
        terminal: Terminal,
        system: str | None = None,
        settings: Json | None = None,
    ) -> None:
        """One conversation for each speaker.

        Args:
            run: whose recipe writes the prompts.
            speakers: the models that answer.
            terminal: where lines come from and answers go.
            system: how the models are to behave, for recipes of chats and instructions.
            settings: of transformers' GenerationConfig.

        Raises:
            UserError: the recipe's rows have no single field for a typed text.
        """
        super().__init__(run, speakers, terminal)
        from dsrecipes.inference.conversation import Conversation
        from dsrecipes.inference.prompting import find_prompt_field

        field = find_prompt_field(run)
        self.ask_with = "text> " if field.continues else "you> "
        # A conversation for each model, because its own answers are part of its next prompt.
        self.conversations = {
            speaker.name: Conversation(
                run,
                speaker.model,
                field,
                speaker.adapter,
                settings=dict(settings or {}),
                keep_cut=terminal.interactive,
                notice=lambda text: terminal.tell(f"({text})"),
                stopped=lambda: terminal.stopped(),  # a web page replaces it for each message
            )
            for speaker in speakers
        }
        if system:
            self.do_system(system)

    def take(self, line: str) -> None:
        """Say it to each model in turn."""
        self._answer_all(lambda conversation: conversation.say(line, self.terminal.write))

    def do_more(self, argument: str) -> None:
        """Continue the text."""
        self._answer_all(lambda conversation: conversation.more(self.terminal.write))

    def _answer_all(self, answer: Callable[[Any], str]) -> None:
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
        """Set a system text, where the recipe's prompts have a place for one."""
        for conversation in self.conversations.values():
            if conversation.prompt_field.field != "messages":
                raise UserError("DSR447", "/system: this recipe's prompts have no place for a system text")
            conversation.system = argument or None

    def do_params(self, argument: str) -> None:
        """Change generation settings, or show them."""
        from dsrecipes.inference.answers import generation_settings

        changes = dict(_setting(word) for word in argument.split())
        for conversation in self.conversations.values():
            settings = conversation.settings | changes
            check_sampling(settings)
            # A wrong name or value is refused here, not at the next answer.
            generation_settings(self.run, conversation.model, **settings)
            conversation.settings = settings
        self.terminal.tell("  ".join(f"{name}={value}" for name, value in settings.items()))

    def record(self) -> list[Json]:
        """One object per model; its `messages` are rows that the instruction recipes can read."""
        return [
            {
                "run": str(self.run.folder.path),
                "model": name,
                "settings": conversation.settings,
                "messages": conversation.messages(),
            }
            for name, conversation in self.conversations.items()
        ]


def _setting(word: str) -> tuple[str, Any]:
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise UserError("DSR448", f"/params {word}: write name=value, as in temperature=0.7")
    try:
        # Numbers, booleans and lists are JSON; any other value is text.
        return name, json.loads(value)
    except ValueError:
        return name, value
