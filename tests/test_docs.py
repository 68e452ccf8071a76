"""The README and docs/: both languages say the same, links and names exist, trees and sizes are as promised."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import dsrecipes
from dsrecipes.messages import load_all

from support.readme_blocks import LANGUAGES, Block, blocks, blocks_of, pages, toctree  # isort: skip
from support.tiny import ROOT  # isort: skip


def all_pages(language: str) -> list[Path]:
    """The pages of a language, also the frames of those that are generated."""
    return [*pages(language), *sorted((ROOT / "docs" / language / "reference").glob("*.md"))]


BOTH = [pytest.param(*pair, id=pair[0].stem) for pair in zip(*map(all_pages, LANGUAGES), strict=True)]
ALL = [pytest.param(page, id=str(page.relative_to(ROOT))) for language in LANGUAGES for page in all_pages(language)]
PLACES = ("dsrecipes/", "recipes/", "tests/", "benchmarks/", "docs/", "ds_configs/", ".ci/")


def headings(page: Path) -> list[tuple[int, str]]:
    """Level and text of each heading; `#` inside a fenced block is none."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.+)$", text, re.MULTILINE)]


def slug(heading: str) -> str:
    """A heading's anchor, as MyST and code hosts make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_comments(block: Block) -> list[str]:
    """Lines of a block; where it is shell or YAML, without comments, which are translated."""
    if block.language not in ("sh", "yaml"):
        return block.text.splitlines()
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in block.text.splitlines()]
    return [line for line in lines if line]


def test_both_languages_have_the_same_pages() -> None:
    assert toctree("en") == toctree("zh-TW")
    for language in LANGUAGES:
        folder = ROOT / "docs" / language
        assert sorted(page.stem for page in folder.glob("*.md")) == sorted(page.stem for page in pages(language)[1:])
        linked = re.findall(r"\]\(([\w/-]+)\.md\)", (folder / "index.md").read_text(encoding="utf-8"))
        assert linked == toctree(language)


@pytest.mark.parametrize(("english", "chinese"), BOTH)
def test_both_languages_of_a_page_have_the_same_headings_and_blocks(english: Path, chinese: Path) -> None:
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    ours, theirs = blocks_of(english), blocks_of(chinese)
    assert [(block.language, block.file) for block in ours] == [(block.language, block.file) for block in theirs]
    for block, other in zip(ours, theirs, strict=True):
        assert without_comments(block) == without_comments(other)


@pytest.mark.parametrize(("english", "chinese"), BOTH)
def test_both_languages_of_a_page_name_the_same_flags_files_and_ids(english: Path, chinese: Path) -> None:
    """Tables have as many rows, and flags, file names and message ids in code spans are the same."""
    assert table_rows(english) == table_rows(chinese)
    assert names(english) == names(chinese)


def table_rows(page: Path) -> int:
    return len(re.findall(r"^\|", text_of(page), re.MULTILINE))


def names(page: Path) -> set[str]:
    """Flags, file names and message ids in code spans; other words of a span, such as SECONDS, may be translated."""
    spans = re.findall(r"`([^`\n]+)`", text_of(page))
    return {name for span in spans for name in re.findall(r"(?:--|DSR)\w+|[\w/-]+\.[a-z]\w*", span)}


def text_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ALL)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in [slug(text) for _, text in headings(path)], target


@pytest.mark.parametrize("page", ALL)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(r"`([\w./-]+)`", text_of(page))
    missing = [name for name in named if name.startswith(PLACES) and not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.parametrize("page", [pages(language)[0] for language in LANGUAGES], ids=LANGUAGES)
def test_a_readme_has_at_most_150_lines(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 150


def test_the_trees_of_files_are_current() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no git")
    spec = importlib.util.spec_from_file_location("file_tree", ROOT / "docs" / "file_tree.py")
    assert spec and spec.loader
    file_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(file_tree)
    stale = [page for page, text in file_tree.pages().items() if (ROOT / page).read_text(encoding="utf-8") != text]
    assert stale == [], "run: python docs/file_tree.py"


def test_programs_and_recipes_import_public_names_only() -> None:
    """What the pages show needs nothing but `from dsrecipes import ...`, and python.md lists every public name."""
    for block in blocks():
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            assert not isinstance(node, ast.Import), block.text
            if isinstance(node, ast.ImportFrom):
                assert node.module == "dsrecipes" and {name.name for name in node.names} <= set(dsrecipes.__all__)
    for language in LANGUAGES:
        table = (ROOT / "docs" / language / "python.md").read_text(encoding="utf-8").split("\n## ")[-1]
        assert set(
            re.findall(r"`(\w+)`", "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `")))
        ) == set(dsrecipes.__all__)


def test_the_readme_shows_a_part_of_the_whole_recipe() -> None:
    recipe = next(block.text for block in blocks() if block.file == "mine.py")
    part = next(block.text for block in blocks_of(pages()[0]) if block.language == "python")
    assert part in recipe


@pytest.mark.parametrize("page", ALL)
def test_the_ids_of_messages_that_a_page_names_exist(page: Path) -> None:
    assert set(re.findall(r"DSR\d{3}", page.read_text(encoding="utf-8"))) <= set(load_all())
