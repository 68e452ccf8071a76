"""How does a person talk to a run's model? In a terminal, by lines of a pipe, or on a web page (--web).

dsrecipes chat last
dsrecipes chat last --web
echo "Name the capital of France." | dsrecipes chat last
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsrecipes.config.adapter import adapter_folder
from dsrecipes.errors import UserError
from dsrecipes.inference.device import add_device, memory_errors
from dsrecipes.inference.finished import FinishedRun, open_run
from dsrecipes.inference.sampling import add_settings, check_sampling, settings_of
from dsrecipes.io.arguments import CommandParser, above_zero

if TYPE_CHECKING:
    from dsrecipes.inference.session import Session, Speaker, Terminal

Json = dict[str, Any]


@memory_errors("a smaller --max_new_tokens")
def chat(
    run: str | Path | FinishedRun,
    turns: list[str],
    *,
    base: bool = False,
    system: str | None = None,
    seed: int | None = None,
    device: str = "auto",
    **settings: Any,
) -> list[Json]:
    """Say `turns` in order, and return the conversation as messages, {"role", "content"}.

    For a multiple-choice run each turn is a question and four options separated by tabs, and the result is a list of
    {"question", "options", "answer", "probabilities"}. For a classifier each turn is a text (or two separated by a tab), and
    the result is a list of {"text", "predicted", "probabilities"}, or of {"text", "value"} for numbers.

    Args:
        run: a run folder's path, `last`, or an opened run.
        turns: what is said.
        base: talk to the model as it was before the run.
        system: how the model is to behave, for recipes of chats and instructions.
        seed: of sampling.
        device: cpu, cuda, cuda:N, or auto: a GPU where there is one, unless the run was trained with --use_cpu.
        settings: of transformers' GenerationConfig: max_new_tokens, temperature, top_p, ...

    Raises:
        UserError: no such run, a turn that does not fit, settings that transformers refuses.
    """
    from dsrecipes.inference.session import Terminal, TextSession

    check_sampling(settings)
    opened = run if isinstance(run, FinishedRun) else open_run(str(run), device)
    waiting = iter(turns)
    silent = Terminal(False, lambda label: next(waiting, None), lambda text: None, lambda text: None)
    session = _session(opened, _speakers(opened, base, False), silent, system, settings)
    _seed(seed)
    for turn in waiting:
        session.take(turn)
    if isinstance(session, TextSession):
        return next(iter(session.conversations.values())).messages()
    return session.record()


def _seed(seed: int | None) -> None:
    import torch

    if seed is not None:
        torch.manual_seed(seed)


def _speakers(run: FinishedRun, base: bool, both: bool) -> list[Speaker]:
    """The models that answer; base and tuned of a LoRA run share one model, with the adapter off and on."""
    from dsrecipes.inference.session import Speaker

    if not both:
        return [Speaker("base" if base else "tuned", run.load(base=base))]
    tuned = run.load()
    # A run that continued an adapter has that adapter in its base, so each of the two needs a model of its own.
    started_from_base = adapter_folder(run.config.model.model_name_or_path) is None
    if started_from_base and (run.folder.model / "adapter_config.json").is_file():
        return [Speaker("base", tuned, adapter=False), Speaker("tuned", tuned)]
    return [Speaker("base", run.load(base=True)), Speaker("tuned", tuned)]


def _session(run: FinishedRun, speakers: list[Speaker], terminal: Terminal, system: str | None, settings: Json) -> Session:
    """The session that fits the kind of model."""
    # max_new_tokens has a default, so it may be there without being given.
    generates = bool(system) or bool(settings.keys() - {"max_new_tokens"})
    if run.recipe.auto_class.endswith("ForMultipleChoice"):
        from dsrecipes.inference.multiple_choice import QuestionSession

        if generates:
            raise UserError(
                "DSR450",
                f"{run.folder.path}: this model chooses among four options; it takes no system text and no sampling",
            )
        return QuestionSession(run, speakers, terminal)
    if run.recipe.auto_class.endswith("ForSequenceClassification"):
        from dsrecipes.inference.labels import LabelSession

        if generates:
            raise UserError(
                "DSR450", f"{run.folder.path}: this model gives a text its label; it takes no system text and no sampling"
            )
        return LabelSession(run, speakers, terminal)
    from dsrecipes.inference.session import TextSession

    return TextSession(run, speakers, terminal, system, settings)


def _terminal() -> Terminal:
    """A person's terminal, with line editing; or a pipe, whose output is the answers alone."""
    from dsrecipes.inference.session import Terminal

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        # Some builds of Python have no readline; input() works without it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines with it)
    else:
        assert isinstance(sys.stdin, io.TextIOWrapper)
        # The locale of a script is often C: the pipe is UTF-8 all the same, and broken bytes are reported.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")

    def read(label: str) -> str | None:
        try:
            if interactive:
                # A terminal in another encoding gives lone surrogates, which tokenizers refuse.
                return input(label).encode("utf-8", "replace").decode()
            return sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise UserError("DSR451", f"the input is not UTF-8 ({error.reason})") from None
        except (EOFError, KeyboardInterrupt):
            if not interactive:
                raise
            print()
            return None

    return Terminal(
        interactive,
        read,
        lambda text: print(text, end="", flush=True),
        lambda text: print(text, file=sys.stderr, flush=True),
    )


@memory_errors("a smaller --max_new_tokens")
def main(argv: list[str]) -> int:
    """`dsrecipes chat RUN [flags]`."""
    parser = CommandParser(
        "chat", "Talk to a run's model; each line from a pipe is a turn, and the output is the answers alone."
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or `last`")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base", action="store_true", help="the model as it was before the run")
    which.add_argument("--both", action="store_true", help="before and after, one under the other")
    parser.add_argument("--system", metavar="TEXT", help="how the model is to behave")
    parser.add_argument("--seed", type=int, help="random seed of sampling")
    parser.add_argument("--web", action="store_true", help="a web page, for browsers on this machine; needs gradio")
    parser.add_argument("--port", type=above_zero, help="of the page (default: the first free one from 7860)")
    add_settings(parser)
    add_device(parser)
    flags = parser.parse_args(argv)
    settings, run = settings_of(flags), open_run(flags.run, flags.device)
    if flags.port and not (flags.web and flags.port < 2**16):
        reason = "the highest port is 65535" if flags.web else "only with --web"
        raise UserError("DSR452", f"--port {flags.port}: {reason}")
    if flags.web:
        return _web(run, flags, settings)
    terminal = _terminal()
    terminal.labels = flags.both
    if terminal.interactive:
        print(f"{run.folder.path} · {run.config.layers.recipe.name} · loading", flush=True)
    session = _session(run, _speakers(run, flags.base, flags.both), terminal, flags.system, settings)
    _seed(flags.seed)
    if terminal.interactive:
        print("/help lists the commands; quit or Ctrl-D leaves")
    session.talk()
    return 0


def _web(run: FinishedRun, flags: argparse.Namespace, settings: Json) -> int:
    from dsrecipes.inference.web import import_gradio, serve

    if run.recipe.auto_class.endswith("ForSequenceClassification"):
        raise UserError(
            "DSR453", "--web: the page is for models that write or answer questions; talk to a classifier in the terminal"
        )
    # A missing package is reported before the model is loaded, which may take minutes.
    import_gradio()
    recipe = run.config.layers.recipe.name
    print(f"{run.folder.path} · {recipe} · loading", flush=True)
    speakers = _speakers(run, flags.base, flags.both)
    _seed(flags.seed)
    title = f"{recipe} · {run.folder.path.name}"
    serve(lambda terminal: _session(run, speakers, terminal, flags.system, settings), title, flags.port)
    return 0
