"""What CONTRIBUTING.md, the workflows and the hooks name exists, and message ids lie in the ranges that it gives."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from support.tiny import ROOT

from dsrecipes.messages import RANGES

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
TEMPLATES = [block for block in BLOCKS if "def test_" in block]


def test_named_targets_and_paths_exist():
    texts = [TEXT, *(path.read_text("utf-8") for path in (ROOT / ".github").rglob("*.yml"))]
    named = set(re.findall(r"(?:`|run: |^)make ([\w-]+)", "\n".join(texts), flags=re.MULTILINE))
    assert len(named) > 5 and named <= TARGETS
    paths = re.findall(r"`((?:dsrecipes|recipes|tests|docs)/[\w./-]+)`", TEXT)
    written = {"recipes/NAME.py", "recipes/NAME.yaml", "dsrecipes/messages/LAYER.yaml"}
    assert len(paths) > 10 and [path for path in {*paths} - written if not (ROOT / path).exists()] == []


def test_three_templates_of_tests_import_what_exists():
    assert len(TEMPLATES) == 3
    for block in TEMPLATES:
        imports = [node for node in ast.parse(block).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), "CONTRIBUTING.md", "exec"), {})


def test_the_ranges_of_ids_are_current():
    rows = re.findall(r"\| (\w+) \| (\d{3})-(\d{3}) (?=\|)", TEXT)
    assert {layer: (int(first), int(last)) for layer, first, last in rows} == RANGES


def test_workflows_run_what_a_contributor_runs():
    ci, nightly = (
        yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8")) for name in ("ci.yml", "nightly.yml")
    )
    versions = ci["jobs"]["ci"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert f"python_requires = >={versions[0]}" in (ROOT / "setup.cfg").read_text("utf-8")
    assert ci["jobs"]["ci"]["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert nightly["jobs"]["test-all"]["steps"][-1]["run"] == "make test-all"


def test_the_issue_template_asks_for_the_files_of_a_run_folder():
    from dsrecipes.runs.folder import RunFolder

    template = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text("utf-8")
    labels = [field["attributes"].get("label") for field in yaml.safe_load(template)["body"]]
    folder = RunFolder(Path("run"))
    assert {folder.environment.name, folder.console.name} < set(labels)


def test_an_upper_bound_that_the_newest_release_passes_can_be_raised():
    spec = importlib.util.spec_from_file_location("latest", ROOT / ".ci" / "latest.py")
    assert spec and spec.loader
    latest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(latest)
    release = importlib.metadata.version("transformers")
    assert latest.verdict(Requirement(f"transformers >=5, <={release}")).endswith(f"newest {release:<10} within")
    raised = latest.verdict(Requirement("transformers >=4, <5"))
    assert raised.endswith(f"passes: raise the bound to <{release.split('.')[0]}.{int(release.split('.')[1]) + 1}")
    names = {requirement.name for requirement in latest.requirements()}
    assert {"transformers", "deepspeed", "accelerate", "peft", "pytest"} < names
    assert all(" " not in latest.unbounded(requirement) for requirement in latest.requirements())
