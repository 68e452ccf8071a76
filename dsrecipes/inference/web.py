"""How does a browser on this machine talk to a run's model? A page by gradio, served to this machine alone.

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
# /save would let a browser write files, and a page is left by closing it.
_NOT_HERE = ("/save FILE", "quit")


def import_gradio() -> ModuleType:
    """Import gradio, after turning its telemetry off.

    Raises:
        UserError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    # gradio checks with a request that its own server is up; a proxy would not find it.
    os.environ["no_proxy"] = f"{direct},{HOST}"
    try:
        import gradio
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        message = "--web: the page needs gradio, which is not installed: `pip install 'gradio>=6.31'`"
        raise UserError("DSR458", message) from None
    return gradio


class _PageTerminal(Terminal):
    """The terminal of one browser: answers are labelled where two models give them."""

    def label(self, name: str) -> str:
        """Text before an answer."""
        return f"{name}: " if self.labels else ""


class BrowserChat:
    """One browser's session. The models forget what the page removes by retry, undo and clear."""

    def __init__(self, start: Start, both: bool) -> None:
        self.terminal = _PageTerminal(True, lambda label: None, lambda text: None, lambda text: None, labels=both)
        session = start(self.terminal)
        assert isinstance(session, TextSession)
        self.session = session
        self.session.help = {name: what for name, what in self.session.help.items() if name not in _NOT_HERE}
        self._before: dict[int, dict[str, Conversation]] = {}
        """Number of a message -> the conversations before it."""

    def hear(self, message: str, number: int) -> None:
        """Say the page's message `number`, counted from 0, to each model."""
        # gradio does not report undo and retry; a message number that was used before reveals them.
        removed = [index for index in self._before if index >= number]
        if removed:
            self.session.conversations = self._before[min(removed)]
            self._before = {index: saved for index, saved in self._before.items() if index < number}
        conversations = self.session.conversations.items()
        # Copies, because turns are appended in place.
        self._before[number] = {name: replace(talk, turns=[*talk.turns]) for name, talk in conversations}
        self.session.hear(message.strip())


class Page:
    """The page of a run and its server."""

    def __init__(self, start: Start, title: str) -> None:
        """Start one session at once, so that mistakes show before the page does.

        Args:
            start: makes a session that reads and writes a terminal.
            title: of the page.

        Raises:
            UserError: no gradio, or the session cannot start.
        """
        self.gradio, self.start, self.title = import_gradio(), start, title
        # One thread: the model answers one browser at a time.
        self._worker = ThreadPoolExecutor(1)
        self._closing = Event()
        session = start(Terminal(False, lambda label: None, lambda text: None, lambda text: None))
        self.both = len(session.speakers) > 1
        self.blocks = self._questions(session) if isinstance(session, QuestionSession) else self._chat(session.ask_with)

    def open(self, port: int | None = None) -> str:
        """Start the server, on a free port from 7860 where none is given, and return its address.

        Raises:
            UserError: the port is taken or not allowed.
        """
        # Fonts of the browser: gradio's default ones would be fetched from a network.
        font = ("system-ui", "sans-serif")
        theme = self.gradio.themes.Default(font=font, font_mono=("ui-monospace", "monospace"))
        try:
            # Whatever would publish the page, record its use or load from a network is off.
            _, address, _ = self.blocks.launch(
                server_name=HOST,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                inline=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                theme=theme,
                css=":root:has(.dark) { color-scheme: dark }",
            )
        except OSError:
            ports = f"--port {port}" if port else "ports 7860 to 7959"
            raise UserError("DSR452", f"{ports}: already taken, or not allowed; name another with --port") from None
        return address

    def close(self) -> None:
        """Stop the server, and the answer that is being written at its next token."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)
        self.blocks.close(verbose=False)

    def _chat(self, ask_with: str) -> gr.Blocks:
        gr = self.gradio
        invitation = "Begin a text" if ask_with.startswith("text") else "Say something"
        with gr.Blocks(title=self.title, analytics_enabled=False, fill_height=True) as blocks:
            state = gr.State(None)
            gr.ChatInterface(
                self._answer,
                title=self.title,
                chatbot=gr.Chatbot(render_markdown=False, show_label=False, buttons=["copy", "copy_all"], scale=1),
                textbox=gr.Textbox(
                    placeholder=f"{invitation}; /help lists the commands", submit_btn=True, stop_btn=True, autofocus=True
                ),
                additional_inputs=[state],
                additional_outputs=[state],
                api_name="chat",
                analytics_enabled=False,
            )
        return blocks

    def _answer(self, message: str, history: list[Json], chat: BrowserChat | None) -> Iterator[tuple[str, BrowserChat]]:
        """Yield the growing answer; the page's stop button closes this generator.

        The model runs in the one worker thread, and its words come through a queue whose end is None.
        """
        chat = chat or BrowserChat(self.start, self.both)
        words: SimpleQueue[str | None] = SimpleQueue()
        stopped, answer = Event(), ""
        terminal = chat.terminal

        def hear() -> None:
            terminal.write, terminal.tell = words.put, lambda text: words.put(f"{text}\n")
            terminal.stopped = lambda: stopped.is_set() or self._closing.is_set()
            chat.hear(message, sum(turn["role"] == "user" for turn in history))

        job = self._worker.submit(hear)
        job.add_done_callback(lambda job: words.put(None))
        try:
            while (word := words.get()) is not None:
                answer += word
                # gradio would show markup in an answer, though it is not to render Markdown
                yield html.escape(answer.rstrip("\n"), quote=False), chat
            job.result()
            if not answer.strip():
                yield "(done)" if message.startswith("/") else "(an empty answer)", chat
        finally:
            stopped.set()

    def _questions(self, session: QuestionSession) -> gr.Blocks:
        gr = self.gradio

        def ask(question: str, *options: str) -> Any:
            """The probability of each option by each model; gradio takes a single one without a list."""
            texts = [option.strip() for option in options]
            if not all((question.strip(), *texts)):
                raise gr.Error("give the question and all four options", print_exception=False)
            try:
                shares = [
                    probabilities(session.run, speaker.model, question.strip(), texts, speaker.adapter)
                    for speaker in session.speakers
                ]
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None
            names = [f"{letter} {text}" for letter, text in zip(LETTERS, texts, strict=True)]
            labels = [dict(zip(names, of_model, strict=True)) for of_model in shares]
            return labels if self.both else labels[0]

        with gr.Blocks(title=self.title, analytics_enabled=False) as blocks:
            gr.Markdown(f"# {self.title}")
            question = gr.Textbox(label="Question", lines=2, autofocus=True)
            options = [gr.Textbox(label=letter) for letter in LETTERS]
            button = gr.Button("Ask", variant="primary")
            with gr.Row():
                names = [speaker.name if self.both else "Answer" for speaker in session.speakers]
                answers = [gr.Label(label=name, show_heading=False) for name in names]
            gr.on(
                [button.click, *(option.submit for option in options)],
                ask,
                [question, *options],
                answers,
                api_name="ask",
                concurrency_limit=1,
            )
            gr.ClearButton([question, *options, *answers])
        return blocks


def serve(start: Start, title: str, port: int | None = None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: no gradio, a port that is taken, or a session that cannot start.
    """
    page = Page(start, title)
    print(f"{page.open(port)} (for this machine alone; Ctrl-C ends it)", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close()
