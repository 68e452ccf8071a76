"""A release of DeepSpeed, accelerate or transformers that changes what zero/internals.py uses fails here, by name."""

import ast
import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest

import dsrecipes
from dsrecipes.zero.internals import READ_IN, SURFACE, Part


def find(owner: str) -> object:
    """A module, or a class in it."""
    module, _, name = owner.partition(":")
    loaded = importlib.import_module(module)
    return getattr(loaded, name) if name else loaded


def problem(part: Part) -> str | None:
    """How the installed package differs from what was recorded; None where it does not."""
    package = part.owner.partition(".")[0]
    versions = f"{package} {importlib.metadata.version(package)}, read in {READ_IN[package]}"
    try:
        owner = find(part.owner)
        if part.signature is not None:
            signature = str(inspect.signature(getattr(owner, part.name)))
            there = signature == part.signature
        else:
            classes = inspect.getmro(owner) if inspect.isclass(owner) else [owner]
            sources = [inspect.getsource(each) for each in classes if each is not object]
            signature = "nothing of this name"
            # assigned, annotated as a field, or answered by the module's __getattr__
            assigned = rf"(\b{part.name}\s*(:[^=\n]+)?=[^=])|(^\s+{part.name}: )|({part.name}\"\]? = )"
            there = any(re.search(assigned, source, re.MULTILINE) for source in sources)
    except (ImportError, AttributeError) as error:
        there, signature = False, str(error)
    expected = f"{part.owner}.{part.name}{part.signature or ''}"
    return None if there else f"{versions}: expected {expected}, found {signature}. It is used because: {part.why}"


@pytest.mark.parametrize("part", SURFACE, ids=lambda part: part.name)
def test_the_installed_package_has_what_was_recorded(part: Part):
    assert problem(part) is None


def test_a_change_is_named():
    renamed = Part("deepspeed.runtime.engine:DeepSpeedEngine", "clip_all_gradients", "it is used", "(self)")
    assert "expected deepspeed.runtime.engine:DeepSpeedEngine.clip_all_gradients(self), found" in str(problem(renamed))
    changed = Part("deepspeed.runtime.engine:DeepSpeedEngine", "clip_fp32_gradients", "it is used", "(self, norm)")
    assert "found (self). It is used because: it is used" in str(problem(changed))
    gone = Part("deepspeed.runtime.engine:DeepSpeedEngine", "_norm_of_all_gradients", "it is used")
    assert "found nothing of this name" in str(problem(gone))
    assert "No module named" in str(problem(Part("deepspeed.runtime.elsewhere", "x", "it is used")))


def test_no_other_module_touches_them():
    """Attributes by their names, also as the text of a getattr; names that occur in ordinary code are left out."""
    common = {"deepspeed_config", "fill_match", "loss_scaler", "global_steps", "global_samples", "skipped_steps"}
    names = {part.name for part in SURFACE} - common
    package = Path(dsrecipes.__file__).parent
    for path in package.glob("**/*.py"):
        if path.name == "internals.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            attribute = node.attr if isinstance(node, ast.Attribute) else None
            text = node.value if isinstance(node, ast.Constant) else None
            assert attribute not in names and text not in names, f"{path}, line {node.lineno}: use zero/internals.py"
