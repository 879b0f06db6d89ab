"""The outermost ring, about the source itself: which module may lean on which, and how long each is.

LAYERS is the whole of it, from the ground up: a module, and the modules it may import, all of which
must stand above it in the list.  So there are no cycles, and a new dependency is a decision.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import xsfs

PACKAGE = Path(xsfs.__file__).parent

LINES_MAX = 400

LAYERS = """
    __init__

    wire
    permissions         wire
    errors              wire
    device              wire
    linger
    transport           wire errors linger device
    drain               transport
    servants
    threads
    eventual
    unanswered          wire errors
    connection          wire errors transport threads unanswered
    link                errors transport connection
    session             permissions wire errors eventual unanswered
    outage              errors
    transaction         wire errors unanswered connection session outage
    watches             wire errors drain connection link outage
    client              wire errors transport servants eventual unanswered connection transaction \
link session outage watches

    store_node
    store_domains       store_node
    store_transaction   store_node
    tree                store_node store_domains store_transaction
    store_content       store_node store_domains tree
    store_watch         wire store_node store_domains store_transaction
    store_requests      wire store_node store_domains store_transaction tree store_watch
    embedded            wire store_domains store_content store_watch store_requests

    names               wire
    containers
    known
    guesses
    ownership
    prefetched
    looks               permissions wire errors unanswered names
    view                wire errors eventual unanswered session transaction client names containers \
known guesses looks
    children            wire errors eventual unanswered session names looks view
    workshop
    mirror_files        ownership workshop
    mirror_copy         permissions wire names looks view mirror_files
    mirror_window       client view
    mirror_pace
    mirror              wire errors servants watches client view mirror_files mirror_copy \
mirror_window mirror_pace
    node                eventual names view ownership prefetched
    mirror_link         node
    xattrs              permissions wire names looks view node
    changes             permissions wire errors session names view node
    values              wire errors eventual session names looks view node xattrs changes
    listing             wire eventual names looks view children node xattrs
    watch_files         wire errors watches names view node xattrs
    generated           node
    directories         wire errors eventual session names looks view node xattrs changes values \
generated listing watch_files
    transactions        wire errors unanswered session transaction view known node
    transaction_files   wire names view node generated directories transactions mirror_link
    verdicts            wire errors
    handles             node
    session_loop        linger
    answering           session_loop wire errors eventual verdicts
    operations          handles answering eventual names node

    background
    tasks
    options             wire errors ownership
    statuses
    notify
    mount               errors transport drain servants link client embedded names known view node \
watch_files transactions transaction_files operations background tasks options statuses mirror \
mirror_files workshop notify
    command             __init__ options statuses notify mount
    __main__            command
"""

ALLOWED = {
    module: set(imports)
    for module, *imports in (line.split() for line in LAYERS.splitlines() if line.strip())
}

FILE_SYSTEM = {
    *(
        "node",
        "xattrs",
        "changes",
        "values",
        "generated",
        "listing",
        "watch_files",
        "directories",
        "mirror_link",
        "transactions",
        "transaction_files",
        "session_loop",
        "handles",
        "answering",
        "operations",
        "mount",
    ),
}

MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text()


def imports_of(module: str) -> set[str]:
    """The full names of all modules that it imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            base = node.module or ""
            if base == "xsfs":
                names = {alias.name for alias in node.names}
                found |= {f"xsfs.{name if name in MODULES else '__init__'}" for name in names}
            else:
                found.add(base)
    return found


def packages_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(ALLOWED)


def test_the_architecture_has_every_module() -> None:
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    table = text[: text.index("## What flows")]
    named = set(re.findall("`([a-z_]+)`", table))
    assert {name for name in MODULES if not name.startswith(("store_", "__"))} == named


def test_layers_lean_only_on_those_below() -> None:
    below: set[str] = set()
    for module, allowed in ALLOWED.items():
        assert allowed <= below, module
        below.add(module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_within_the_package(module: str) -> None:
    own = {name.removeprefix("xsfs.") for name in imports_of(module) if name.startswith("xsfs")}
    assert own - ALLOWED.get(module, set()) == set()


def test_only_the_file_system_knows_of_fuse() -> None:
    users = {module for module in MODULES if "pyfuse3" in packages_of(module)}
    assert users - FILE_SYSTEM == set()
    assert users, "nobody uses pyfuse3: the test looks in the wrong place"


def test_nothing_is_told_to_the_kernel_that_takes_a_lock() -> None:
    """To have it forget a name it takes the directory's lock, which whoever makes something there has
    until xsfs answers: a process killed in between never ends, and neither do they."""
    for module in MODULES:
        assert not re.search("invalidate_|notify_store", source(module)), module


def test_only_the_command_knows_of_argparse() -> None:
    assert {module for module in MODULES if "argparse" in packages_of(module)} == {"command"}


def test_the_wire_is_pure() -> None:
    assert packages_of("wire") & {"xsfs", "trio", "socket", "os", "select", "time"} == set()


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is(module: str) -> None:
    assert ast.get_docstring(ast.parse(source(module)))


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module: str) -> None:
    assert len(source(module).splitlines()) <= LINES_MAX
