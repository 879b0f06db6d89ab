"""The reference of the Python interface has everything that is public, with a description.

That it agrees with the docstrings is tested with the other generated documents (tests/cli/test_manual.py).
"""

from __future__ import annotations

import inspect
import re

import pytest

import xsfs
import xsfs.sync
from docs.generate import DOCUMENTS, call_of, markdown
from xsfs.sync import SyncStore

TEXT = (DOCUMENTS / "python-reference.md").read_text()
HEADINGS = set(re.findall("^##+ (.*)$", TEXT, re.MULTILINE))


@pytest.mark.parametrize("name", sorted(set(xsfs.__all__) - {"__version__", "Permissions"}))
def test_every_public_name_has_an_entry(name: str) -> None:
    assert name in HEADINGS


def test_the_blocking_interface_has_entries() -> None:
    classes = {
        name
        for name, kind in inspect.getmembers(xsfs.sync, inspect.isclass)
        if kind.__module__ == "xsfs.sync" and not name.startswith("_")
    }
    assert classes - HEADINGS == {"SyncCommands"}  # the heading `Operations` has its methods
    assert {"Operations.walk", "SyncStore.watch", "SyncWatch.wait", "Operations.domid"} <= HEADINGS


def test_every_entry_has_a_description() -> None:
    without = re.findall(r"^##+ (.*)\n\n(?:    .*\n\n)?(?=#|<|\n)", TEXT, re.MULTILINE)
    assert set(without) <= {"xsfs", "Errors"}


def test_paragraphs_and_lists() -> None:
    docstring = """First line,
        and more.

        name        its meaning,
                    which is long
        other       another
        """
    assert list(markdown(docstring)) == [
        "First line, and more.",
        "",
        "- `name`: its meaning, which is long",
        "- `other`: another",
        "",
    ]


def test_how_to_call() -> None:
    assert call_of("read", xsfs.Store.read) == "await read(path: Path) -> bytes"
    assert call_of("read", SyncStore.read) == "read(path: Path) -> bytes"
    assert call_of("walk", xsfs.Store.walk) == "async for WalkedNode in walk(path: Path)"
    assert call_of("walk", SyncStore.walk) == "for WalkedNode in walk(path: Path)"
    assert call_of("t", xsfs.Store.transaction) == "async with t() as Transaction"
    assert call_of("t", SyncStore.transaction) == "with t() as SyncTransaction"
