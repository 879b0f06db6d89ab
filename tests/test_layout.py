"""The source itself: which room may import from which, and that no imports run in circles."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xsfs

PACKAGE = Path(xsfs.__file__).parent

ROOMS = {
    "xenstore": {"xenstore"},
    "embedded": {"embedded", "xenstore.protocol", "xenstore.background"},
    "view": {"view", "xenstore"},
    "mirror": {"mirror", "view", "xenstore"},
    "fs": {"fs", "view", "xenstore"},
    "cli": {"cli", "fs", "mirror", "embedded", "view", "xenstore", "__init__"},
    "__init__": {"xenstore"},
    "sync": {"xenstore"},
    "__main__": {"cli"},
}
"""Each room, and the rooms or modules from which its modules may import."""

FUSE_ROOMS = {"fs", "cli"}

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)


def source(module: str) -> str:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text()


def without_type_checking(tree: ast.Module) -> Iterator[ast.AST]:
    """All parts of a module but its blocks `if TYPE_CHECKING`, which never run."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            queue += ast.iter_child_nodes(node)


def imports_of(module: str, *, at_run_time: bool = False) -> set[str]:
    """The full names of all modules that it imports, wherever in its text."""
    found = set()
    tree = ast.parse(source(module))
    for node in without_type_checking(tree) if at_run_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in line {node.lineno}"
            base = node.module or ""
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole.removeprefix("xsfs.") in MODULES else base)
    return found


def own_imports_of(module: str, *, at_run_time: bool = False) -> set[str]:
    """The modules of xsfs that it imports, without the name of the package."""
    return {
        name.removeprefix("xsfs.") if name != "xsfs" else "__init__"
        for name in imports_of(module, at_run_time=at_run_time)
        if name.partition(".")[0] == "xsfs"
    }


def packages_of(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports_of(module)}


def room_of(module: str) -> str:
    return module.partition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_from_the_rooms_below(module: str) -> None:
    allowed = ROOMS[room_of(module)]
    forbidden = {name for name in own_imports_of(module) if not {name, room_of(name)} & allowed}
    assert forbidden == set()


def test_no_imports_run_in_circles() -> None:
    graph = {module: own_imports_of(module, at_run_time=True) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_the_architecture_has_every_module() -> None:
    text = (PACKAGE.parent / "docs" / "dev" / "architecture.md").read_text()
    table = text[: text.index("## Flows")]
    named = set(re.findall("`([a-z_]+)`", table))
    assert {name.rpartition(".")[2] for name in MODULES if "__" not in name} <= named


def members_of_classes() -> Iterator[str]:
    """`Class.member` for each method and attribute that a class itself defines."""
    for module in MODULES:
        for node in ast.walk(ast.parse(source(module))):
            if isinstance(node, ast.ClassDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                        yield f"{node.name}.{inner.name}"
                    elif isinstance(inner, ast.Name | ast.Attribute):
                        name = inner.id if isinstance(inner, ast.Name) else inner.attr
                        if isinstance(inner.ctx, ast.Store):
                            yield f"{node.name}.{name}"


def test_the_members_that_the_documents_name_exist() -> None:
    documents = (PACKAGE.parent / "docs" / "dev").glob("*.md")
    text = "".join(document.read_text() for document in documents)
    named = set(re.findall(r"`([A-Z][A-Za-z]+\.[a-z_]+)`", text))
    assert len(named) > 20
    assert named - {*members_of_classes()} == set()


def test_only_the_file_system_knows_of_fuse() -> None:
    users = {module for module in MODULES if "pyfuse3" in packages_of(module)}
    assert {room_of(module) for module in users} <= FUSE_ROOMS
    assert users, "nothing imports pyfuse3: the test looks in the wrong place"


def test_the_python_interface_needs_no_pyfuse3() -> None:
    script = (
        "import sys; sys.modules['pyfuse3'] = None; import xsfs, xsfs.sync, xsfs.embedded.server;"
        "print(*(getattr(xsfs, name) for name in xsfs.__all__))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_no_operation_makes_the_kernel_take_a_lock() -> None:
    """To drop a name the kernel takes the directory's lock, which a process that creates something
    there holds until xsfs answers.  If xsfs is killed in between, neither of the two ever ends."""
    for module in MODULES:
        assert not re.search("invalidate_|notify_store", source(module)), module


def test_only_the_commands_use_argparse() -> None:
    users = {module for module in MODULES if "argparse" in packages_of(module)}
    assert {room_of(module) for module in users} == {"cli"}


def test_the_protocol_is_pure() -> None:
    forbidden = {"xsfs", "trio", "socket", "os", "select", "time"}
    assert packages_of("xenstore.protocol") & forbidden == set()


@pytest.mark.parametrize("module", [name for name in MODULES if source(name).strip()])
def test_every_module_has_a_docstring(module: str) -> None:
    assert ast.get_docstring(ast.parse(source(module)))


def test_no_class_name_is_used_twice() -> None:
    names = [
        node.name
        for module in MODULES
        for node in ast.walk(ast.parse(source(module)))
        if isinstance(node, ast.ClassDef)
    ]
    assert sorted({name for name in names if names.count(name) > 1}) == []
