"""A page with the conversation, through gradio: for the browsers of this machine alone.

dsrecipes chat last --web
"""

from __future__ import annotations

import html
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from threading import Event
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dsrecipes.errors import UserError
from dsrecipes.inference.multiple_choice import LETTERS, QuestionSession, probabilities
from dsrecipes.inference.session import Session, Terminal, TextSession

if TYPE_CHECKING:
    import gradio as gr

    from dsrecipes.inference.conversation import Conversation

Json = dict[str, Any]
Start = Callable[[Terminal], Session]
HOST = "127.0.0.1"
_NOT_HERE = ("/save FILE", "quit")


def import_gradio() -> ModuleType:
    """gradio, told to keep to this machine before it is imported.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ["no_proxy"] = f"{direct},{HOST}"  # gradio asks its own server whether it is up
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("--web: the page needs gradio, which is not installed: `pip install 'gradio>=6.31'`") from None
    return gradio


class _PageTerminal(Terminal):
    """The terminal of one browser: answers are labelled where two models give them."""

    def label(self, name: str) -> str:
        """What stands before an answer."""
        return f"{name}: " if self.labels else ""


class Talk:
    """One browser's session. What the page takes back, by its retry, undo and clear, the models forget too."""

    def __init__(self, start: Start, both: bool) -> None:
        self.terminal = _PageTerminal(True, lambda label: None, lambda text: None, lambda text: None, labels=both)
        self.session = start(self.terminal)
        assert isinstance(self.session, TextSession)
        self.session.help = {name: what for name, what in self.session.help.items() if name not in _NOT_HERE}
        self._before: dict[int, dict[str, Conversation]] = {}
        """The conversations as they stood before the page's message of each number."""

    def hear(self, message: str, number: int) -> None:
        """Say the page's message `number`, counted from 0, to each model."""
        if later := [each for each in self._before if each >= number]:
            self.session.conversations = self._before[min(later)]
            self._before = {each: kept for each, kept in self._before.items() if each < number}
        conversations = self.session.conversations
        self._before[number] = {name: replace(each, turns=[*each.turns]) for name, each in conversations.items()}
        self.session.hear(message.strip())


class Page:
    """The page of a run and its server."""

    def __init__(self, start: Start, title: str) -> None:
        """`start` makes a session that reads and writes a terminal; one is made at once, so that mistakes are told here.

        Raises:
            UserError: no gradio, or the session cannot be had.
        """
        self.gradio, self.start, self.title = import_gradio(), start, title
        self._one = ThreadPoolExecutor(1)  # the model answers one browser at a time
        self._closing = Event()
        session = start(Terminal(False, lambda label: None, lambda text: None, lambda text: None))
        self.both = len(session.speakers) > 1
        self.blocks = self._questions(session) if isinstance(session, QuestionSession) else self._chat(session.ask_with)

    def open(self, port: int | None = None) -> str:
        """Start the server, on a free port from 7860 where none is given; its address.

        Raises:
            UserError: the port cannot be had.
        """
        font = ("system-ui", "sans-serif")  # the browser's own: none is fetched
        theme = self.gradio.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
        try:
            _, address, _ = self.blocks.launch(
                server_name=HOST, server_port=port, share=False, prevent_thread_lock=True, quiet=True, inline=False,
                ssr_mode=False, mcp_server=False, pwa=False, enable_monitoring=False, run_history=False, footer_links=[],
                theme=theme, css=":root:has(.dark) { color-scheme: dark }",
            )  # fmt: skip
        except OSError:
            where = f"--port {port}: " if port else "ports 7860 to 7959: "
            raise UserError(f"{where}taken already, or not allowed; name another with --port") from None
        return address

    def close(self) -> None:
        """End the answer that is being written, at its next token, and the server."""
        self._closing.set()
        self._one.shutdown(cancel_futures=True)
        self.blocks.close(verbose=False)

    def _chat(self, ask_with: str) -> gr.Blocks:
        gr = self.gradio
        asked = "Begin a text" if ask_with.startswith("text") else "Say something"
        with gr.Blocks(title=self.title, analytics_enabled=False, fill_height=True) as blocks:
            state = gr.State(None)
            gr.ChatInterface(
                self._answer,
                title=self.title,
                chatbot=gr.Chatbot(render_markdown=False, show_label=False, buttons=["copy", "copy_all"], scale=1),
                textbox=gr.Textbox(
                    placeholder=f"{asked}; /help lists the commands", submit_btn=True, stop_btn=True, autofocus=True
                ),
                additional_inputs=[state],
                additional_outputs=[state],
                api_name="chat",
                analytics_enabled=False,
            )
        return blocks

    def _answer(self, message: str, history: list[Json], talk: Talk | None) -> Iterator[tuple[str, Talk]]:
        """The answer as far as it is written, again and again; the page's stop button closes this generator."""
        talk = talk or Talk(self.start, self.both)
        words: SimpleQueue[str | None] = SimpleQueue()
        stopped, said = Event(), ""
        terminal = talk.terminal

        def hear() -> None:
            terminal.write, terminal.tell = words.put, lambda text: words.put(f"{text}\n")
            terminal.stopped = lambda: stopped.is_set() or self._closing.is_set()
            talk.hear(message, sum(each["role"] == "user" for each in history))

        job = self._one.submit(hear)
        job.add_done_callback(lambda job: words.put(None))
        try:
            while (word := words.get()) is not None:
                said += word
                yield html.escape(said.rstrip("\n"), quote=False), talk  # gradio shows markup, here too
            job.result()
            if not said.strip():
                yield "(done)" if message.startswith("/") else "(an empty answer)", talk
        finally:
            stopped.set()

    def _questions(self, session: QuestionSession) -> gr.Blocks:
        gr = self.gradio

        def ask(question: str, *options: str) -> Any:
            """The probability of each option, from each model; gradio wants a single one bare."""
            texts = [each.strip() for each in options]
            if not all((question.strip(), *texts)):
                raise gr.Error("give the question and all four options", print_exception=False)
            try:
                shares = [
                    probabilities(session.run, each.model, question.strip(), texts, each.adapter)
                    for each in session.speakers
                ]
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None
            names = [f"{letter} {text}" for letter, text in zip(LETTERS, texts, strict=True)]
            shown = [dict(zip(names, each, strict=True)) for each in shares]
            return shown if self.both else shown[0]

        with gr.Blocks(title=self.title, analytics_enabled=False) as blocks:
            gr.Markdown(f"# {self.title}")
            question = gr.Textbox(label="Question", lines=2, autofocus=True)
            options = [gr.Textbox(label=letter) for letter in LETTERS]
            button = gr.Button("Ask", variant="primary")
            with gr.Row():
                names = [each.name if self.both else "Answer" for each in session.speakers]
                answers = [gr.Label(label=name, show_heading=False) for name in names]
            gr.on(
                [button.click, *(each.submit for each in options)], ask, [question, *options], answers,
                api_name="ask", concurrency_limit=1,
            )  # fmt: skip
            gr.ClearButton([question, *options, *answers])
        return blocks


def serve(start: Start, title: str, port: int | None = None) -> None:
    """Show the page until Ctrl-C.

    Raises:
        UserError: no gradio, or a port or session that cannot be had.
    """
    page = Page(start, title)
    print(f"{page.open(port)} (for this machine alone; Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close()
