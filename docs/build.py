"""Build the pages of docs/ in both languages into build/docs; a warning is an error.

python docs/build.py
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main

DOCS = Path(__file__).resolve().parent
LANGUAGES = {"en": "en", "zh-TW": "zh_TW"}
_START = """<!DOCTYPE html>
<meta charset="utf-8"><title>dsrecipes</title>
<p><a href="en/index.html">English</a> · <a href="zh-TW/index.html">中文</a></p>
"""


def build(target: Path) -> int:
    """Build each language in a folder of its own, and a start page; 0, or the exit code of a build that failed."""
    failed = 0
    os.environ |= {"COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(target, ignore_errors=True)
    for folder, language in LANGUAGES.items():
        # without the cache, which does not know that the code has changed
        options = ["-q", "-E", "-W", "--keep-going", "-b", "html", "-d", str(target / "doctrees" / folder)]
        places = ["-c", str(DOCS), "-D", f"language={language}", str(DOCS / folder), str(target / folder)]
        failed = main([*options, *places]) or failed
    shutil.rmtree(target / "doctrees")
    (target / "index.html").write_text(_START, "utf-8")
    if not failed:
        print(f"built {target / 'index.html'}")
    return failed


if __name__ == "__main__":
    sys.exit(build(DOCS.parent / "build" / "docs"))
