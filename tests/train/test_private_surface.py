"""The private methods of transformers that a run depends on are those that were read."""

import inspect

import pytest
from transformers import Trainer

from dsrecipes.train.private_surface import ATTRIBUTES, CALLS, OVERRIDES
from dsrecipes.train.trainer import RecipeTrainer


def parameters(function):
    """Names and defaults, without annotations."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("method", [*OVERRIDES, *CALLS], ids=lambda method: method.name)
def test_the_installed_trainer_has_the_method_that_was_read(method):
    assert parameters(getattr(Trainer, method.name)) == method.parameters


@pytest.mark.parametrize("method", OVERRIDES, ids=lambda method: method.name)
def test_an_override_names_each_parameter(method):
    assert parameters(vars(RecipeTrainer)[method.name]) == method.parameters


def test_all_overrides_are_listed():
    own = {name for cls in RecipeTrainer.__mro__[: RecipeTrainer.__mro__.index(Trainer)] for name in vars(cls)}
    private = {name for name in own if name.startswith("_") and not name.startswith("__") and hasattr(Trainer, name)}
    # each further override is one more that a release of transformers may break
    assert private == {method.name for method in OVERRIDES} and len(OVERRIDES) <= 9


def test_public_overrides_take_what_trainer_gives():
    """With the same names, so that a parameter which a release adds does not end up in another's place."""
    for name, own in vars(RecipeTrainer).items():
        theirs = getattr(Trainer, name, None)
        if name.startswith("_") or not inspect.isfunction(own) or theirs is None:
            continue
        kinds = {parameter.kind for parameter in inspect.signature(own).parameters.values()}
        assert inspect.Parameter.VAR_POSITIONAL not in kinds, name
        assert list(inspect.signature(own).parameters) == list(inspect.signature(theirs).parameters), name


def test_the_attributes_are_used_by_trainer():
    source = inspect.getsource(Trainer)
    assert all(f"self.{name} = " in source for name in ATTRIBUTES)
