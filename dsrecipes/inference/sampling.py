"""Which flags set an answer's length and sampling, and which values make sense?"""

from __future__ import annotations

import argparse
from typing import Any

from dsrecipes.errors import UserError
from dsrecipes.io.arguments import above_zero

Json = dict[str, Any]


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an answer's length and of sampling."""
    parser.add_argument("--max_new_tokens", type=above_zero, default=256, help="longest answer in tokens (256)")
    parser.add_argument("--temperature", type=float, help="above 0 samples; without it the likeliest token is taken")
    parser.add_argument(
        "--top_p", type=float, help="sample from the likeliest tokens that have this share; needs --temperature"
    )


def settings_of(flags: argparse.Namespace) -> Json:
    """The flags of add_settings that were given, checked together.

    Raises:
        UserError: a value out of range, or top_p without sampling.
    """
    settings = {name: getattr(flags, name) for name in ("max_new_tokens", "temperature", "top_p")}
    settings = {name: value for name, value in settings.items() if value is not None}
    check_sampling(settings)
    return settings


def check_sampling(settings: Json) -> None:
    """Refuse sampling settings that transformers would ignore or fail on late (UserError)."""
    temperature, top_p = settings.get("temperature", 0), settings.get("top_p")
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise UserError("DSR435", f"temperature {temperature}: give a number of at least 0; 0 takes the likeliest token")
    if top_p is not None and not (isinstance(top_p, (int, float)) and 0 < top_p <= 1):
        raise UserError("DSR435", f"top_p {top_p}: give a share above 0, up to 1")
    # transformers only warns of it and decodes greedily.
    if top_p is not None and not temperature:
        raise UserError("DSR435", f"top_p {top_p} has no effect without sampling: give a temperature too")
