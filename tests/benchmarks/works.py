"""What is measured of the mount, against what, and how fast it should be."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Final

from .kinds import BATCH, LONG_BATCH, bash, batch, find, grep, listing, open_read_close
from .libxenstore import Reader
from .mounting import Mount
from .stores import DOMAINS_MIN, NAME, NAME_VALUE, SCRATCH, Store
from .timing import Comparison, Contender

LOOP: Final = 200
"""Values that a script reads or writes in one run."""

OPEN: Final = 400
"""Files, and as many watch files, that are open while a value is read."""


@dataclass(frozen=True)
class Stage:
    """All that there is to be measured."""

    whole: Store
    quarter: Store
    """A store with a quarter of the nodes, for what a node costs in it."""
    bare: Mount
    """Its file has the same content as that of NAME in xsfs."""
    asking: Mount
    """The same, but each lookup asks the store."""
    tree: Mount
    """The names of all nodes that are read: each listing asks the store, as xsfs has to."""
    tmpfs: str
    """A file with the same content in a tmpfs."""
    pyxs: Any
    """A connected pyxs.Client of the whole store."""
    libxenstore: Reader
    """A C program that is connected to it."""


ECHO: Final = f'for i in {{1..{LOOP}}}; do echo $i > "$1"; done'

LINE: Final = f"{NAME_VALUE}\n".encode()


def comparisons(stage: Stage) -> list[Comparison]:
    return [*one_value(stage), *scripts(stage), *trees(stage)]


def pyxs_read(stage: Stage) -> Contender:
    node = NAME.encode()
    return batch("pyxs", lambda: stage.pyxs.read(node), NAME_VALUE.encode())


def one_value(stage: Stage) -> list[Comparison]:
    """A program that reads one value, and has everything open that it needs for it.

    pyxs is what such a program uses instead; the bare file system is what no file system on pyfuse3
    can do better, so bare against pyxs is the part of the ratio which is not xsfs's; and bare that asks
    the store once against bare is what the truth costs.
    """
    path = stage.whole.file(NAME)
    bare_path = bare_file(stage.bare)
    asking_path = bare_file(stage.asking)
    ours = batch("xsfs", lambda: open_read_close(path), LINE)
    pyxs, library = pyxs_read(stage), stage.libxenstore.contender()
    bare = batch("bare pyfuse3", lambda: open_read_close(bare_path), LINE)
    asking = batch("bare, asks once", lambda: open_read_close(asking_path), LINE)
    tmpfs = batch("tmpfs", lambda: open_read_close(stage.tmpfs), LINE, LONG_BATCH)
    work = "open, read, close a value"
    return [
        Comparison(work, ours, pyxs, 2.5, each=True),
        Comparison(work, ours, bare, 1.6, each=True),
        Comparison(work, ours, asking, each=True),
        Comparison(work, ours, library, each=True),
        Comparison(work, ours, tmpfs, each=True),
        Comparison("the same of bare pyfuse3", bare, pyxs, each=True),
        Comparison("the same of bare, asks once", asking, bare, each=True),
        Comparison(f"the same, {OPEN} open", crowded(stage.whole), ours, 1.2, each=True),
    ]


def crowded(store: Store) -> Contender:
    """Reading one value while many files and watches are open."""
    path = store.file(NAME)
    watches = [store.file(f"/local/domain/{domid}/.watch") for domid in range(DOMAINS_MIN)]

    def run() -> float:
        opened: list[int] = []
        try:
            for number in range(OPEN):
                opened.append(os.open(path, os.O_RDONLY))
                watch = watches[number % len(watches)]
                opened.append(os.open(watch, os.O_RDONLY | os.O_NONBLOCK))
            start = time.perf_counter()
            for _ in range(BATCH):
                open_read_close(path)
            return time.perf_counter() - start
        finally:
            for descriptor in opened:
                os.close(descriptor)

    return Contender(f"xsfs, {OPEN} files and as many watch files open", run, BATCH)


def bare_file(mount: Mount) -> str:
    return os.path.join(mount.path, "value")


def tool_reads(store: Store) -> Contender:
    script = f'for i in {{1..{LOOP}}}; do xenstore-read "$1"; done'
    return bash(store, "xenstore-read", script, SCRATCH, LOOP)


def shell_reads(store: Store, name: str, path: str) -> Contender:
    """What was read last proves that something was."""
    script = f'for i in {{1..{LOOP}}}; do read -r x < "$1"; done; [[ $x ]]'
    return bash(store, name, script, path, LOOP)


def scripts(stage: Stage) -> list[Comparison]:
    """A shell script, such as a hotplug script: the shell's own `echo` and `read` on a file against
    a process for each value.  Both sides contain the start of one bash."""
    store = stage.whole
    times = f"for i in {{1..{LOOP}}}; do"
    path = store.file(SCRATCH)
    echo = bash(store, "echo > FILE", ECHO, path, LOOP)
    write = f'{times} xenstore-write "$1" $i; done'
    tool = bash(store, "xenstore-write", write, SCRATCH, LOOP)
    read = shell_reads(store, "read < FILE", path)
    bare = shell_reads(store, "read < bare FILE", bare_file(stage.bare))
    asking = shell_reads(store, "read < asking FILE", bare_file(stage.asking))
    reads = tool_reads(store)
    return [
        Comparison(f"{LOOP} times echo > FILE in bash", echo, tool, 0.35),
        Comparison(f"{LOOP} times read < FILE in bash", read, reads, 0.2),
        Comparison("the same of bare pyfuse3", bare, reads),
        Comparison("the same of bare, asks once", asking, reads),
    ]


def trees(stage: Stage) -> list[Comparison]:
    """Somebody who looks through the whole store: for a name, or for a value.

    `xenstore-ls -f` prints names and values both, so it stands against either.  A node must not
    cost more because there are more of them, hence the same by the node in the smaller store.
    """
    whole = stage.whole
    finds, greps = [], []
    for store in (whole, stage.quarter):
        finds.append(find(store, f"find in {store.read}", store.file(store.top)))
        greps.append(grep(store, f"grep -r in {store.read}", store.file(store.top)))
    ls = listing(whole)
    bare = find(whole, "find in a bare tree", stage.tree.path)
    bare_grep = grep(whole, "grep -r in a bare tree", stage.tree.path)
    return [
        Comparison(f"find in {whole.read} nodes", finds[0], ls, 0.4),
        Comparison(f"find in {whole.read} nodes", finds[0], bare),
        Comparison("the same of a bare tree", bare, ls),
        Comparison(f"grep -r in {whole.read} nodes", greps[0], ls, 2.0),
        Comparison(f"grep -r in {whole.read} nodes", greps[0], bare_grep),
        Comparison("the same of a bare tree", bare_grep, ls),
        Comparison("find, by the node", finds[0], finds[1], 1.2, each=True),
        Comparison("grep -r, by the node", greps[0], greps[1], 1.2, each=True),
    ]
