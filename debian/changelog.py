"""Print debian/changelog, which follows from CHANGELOG.md, debian/control and SOURCE_DATE_EPOCH.

The newest version in CHANGELOG.md must be the one that is built.  What is unreleased is left out.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
from email.utils import formatdate
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

WIDTH: Final = 78


def find(pattern: str, name: str) -> str:
    found = re.search(pattern, (ROOT / name).read_text(), re.MULTILINE)
    if found is None:
        sys.exit(f"{name}: nothing like {pattern}")
    return found[1]


def main() -> None:
    version = find(r'^__version__ = "(.*)"$', "xsfs/__init__.py")
    newest = rf"\A(?:(?!^## \[\d).*\n)*## \[{re.escape(version)}\] - .*\n((?:(?!## ).*\n)*)"
    changes = re.sub("^### .*\n", "", find(newest, "CHANGELOG.md"), flags=re.MULTILINE)
    maintainer = find(r"^Maintainer: (.*)$", "debian/control")
    date = formatdate(float(os.environ["SOURCE_DATE_EPOCH"]))

    print(f"xsfs ({version}) unstable; urgency=medium\n")
    for change in re.split(r"\n\n+|\n(?=- )", changes.strip()):
        text = " ".join(change.removeprefix("- ").split())
        print(textwrap.fill(text, WIDTH, initial_indent="  * ", subsequent_indent="    "))
    print(f"\n -- {maintainer}  {date}")


if __name__ == "__main__":
    main()
