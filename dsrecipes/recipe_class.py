"""Which class is a recipe, and do its methods fit what a run calls them with?"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from dsrecipes.base import RecipeBase
from dsrecipes.config.find import RecipeFiles
from dsrecipes.config.layers import layer
from dsrecipes.errors import UserError, inflect

_RUN_HOOKS = ("configure", "load_model", "collator", "metrics", "write_extras")
"""Hooks whose arguments are checked when a recipe is loaded, since a run calls them late."""


def recipe_class(files: RecipeFiles) -> type[RecipeBase]:
    """Find the one RecipeBase subclass that a recipe's module defines.

    Raises:
        UserError: the file does not parse, defines none or several, or one that lacks a method or has a wrong one.
    """
    try:
        module = files.load()
    except SyntaxError as error:
        raise UserError("DSR624", f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except ImportError as error:
        # a shipped recipe that does not import is our fault, and keeps its traceback
        if str(files.module).startswith("dsrecipes."):
            raise
        raise UserError("DSR624", f"{files.module}: {error}") from error
    # of this module: it may import the recipe that it derives from
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, RecipeBase) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        names = [cls.__name__ for cls in classes]
        raise UserError("DSR625", f"{files.module}: expected one class derived from RecipeBase, found {names}")
    _check_methods(classes[0], str(files.module))
    return classes[0]


def _check_methods(recipe: type[RecipeBase], file: str) -> None:
    """Refuse a recipe whose methods are missing, never called, or take other arguments than a run gives (UserError)."""
    missing = sorted(recipe.__abstractmethods__)
    if missing:
        methods = f"{inflect(len(missing), 'method')} {', '.join(missing)}"
        raise UserError("DSR626", f"{file}: {recipe.__name__} lacks the {methods}")
    if recipe.auto_class.endswith("ForCausalLM") and recipe.metrics is not RecipeBase.metrics:
        raise UserError(
            "DSR627",
            f"{file}: {recipe.__name__}.metrics is never called: the evaluation of a causal language model keeps no logits "
            "and reports the perplexity. Remove the method, or set auto_class",
        )
    # only too many arguments are refused: call_hook leaves out what a method does not take
    for name in _RUN_HOOKS:
        given = list(inspect.signature(getattr(RecipeBase, name)).parameters)
        required = [key for key, value in _positional(getattr(recipe, name)).items() if value.default is value.empty]
        if len(required) > len(given):
            raise UserError("DSR628", f"{file}: {recipe.__name__}.{name} is called with ({', '.join(given)}), not more")


def call_hook(recipe: RecipeBase, name: str, **made: Any) -> Any:
    """Call a method of a recipe with as many of the arguments as it takes, in their order.

    Before hooks had arguments, `collator(self)` read `self.tokenizer`: what a method does not take is set on the recipe.
    """
    hook = getattr(recipe, name)
    # *args takes all of them; **kwargs takes none, since arguments are passed by position
    takes_all = any(value.kind is value.VAR_POSITIONAL for value in inspect.signature(hook).parameters.values())
    taken = len(made) if takes_all else len(_positional(hook))
    for key, value in list(made.items())[taken:]:
        setattr(recipe, key, value)
    return hook(*list(made.values())[:taken])


def _positional(hook: Callable) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(hook).parameters
    return {key: value for key, value in parameters.items() if value.kind is value.POSITIONAL_OR_KEYWORD}


def load_recipe(recipe: str | None, **values: Any) -> RecipeBase:
    """Load a recipe by name, .py file or module, with values for any flag: load_recipe("gpt2_clm", max_steps=10).run().

    Raises:
        UserError: unknown recipe or key, or a value of the wrong type.
    """
    layers = layer({"recipe": recipe, **values}, origin="python")
    return recipe_class(layers.recipe)(layers)
