"""Can an upper bound of setup.cfg be raised? `make test-latest` installs the newest releases and asks this.

python .ci/latest.py requirements    what to install, without bounds
python .ci/latest.py bounds          each upper bound, and whether the installed release, which passed, lies above it
"""

from __future__ import annotations

import configparser
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


def requirements() -> Iterator[Requirement]:
    """What setup.cfg requires to run and to test."""
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[1] / "setup.cfg", "utf-8")
    for text in (config["options"]["install_requires"], config["options.extras_require"]["test"]):
        yield from (Requirement(line) for line in text.splitlines() if line.strip())


def unbounded(requirement: Requirement) -> str:
    """The name, with its extras, without versions."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}"


def verdict(requirement: Requirement) -> str:
    """Whether the installed release of a requirement lies above its upper bound, and the bound to write then."""
    release = Version(importlib.metadata.version(requirement.name))
    line = f"{str(requirement):<40} newest {str(release):<10}"
    if requirement.specifier.contains(release, prereleases=True):
        return f"{line} within"
    return f"{line} passes: raise the bound to <{release.major}.{release.minor + 1}"


if __name__ == "__main__":
    if sys.argv[1:] == ["requirements"]:
        print(*sorted({unbounded(requirement) for requirement in requirements()}))
    elif sys.argv[1:] == ["bounds"]:
        bounded = [one for one in requirements() if any(part.operator in ("<", "<=") for part in one.specifier)]
        print("\n".join(map(verdict, bounded)) or "setup.cfg has no upper bound")
    else:
        sys.exit(__doc__)
