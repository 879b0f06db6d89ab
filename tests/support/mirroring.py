"""Live mirrors under test, and what they must be equal to.

The expected mirror is made of the store's answers to an independent client.  xsfs only tells which empty
nodes are directories, because a path alone does not tell that.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import trio

from tests.support.mounting import LIMIT, Mount, Place, mounted
from tests.support.xenstored.harness import XsClient, XsError, strings
from xsfs.mirror.mirror import Mirror
from xsfs.mirror.staging import MirrorDirectory
from xsfs.view.kinds import StickyDirectories
from xsfs.view.names import TEXT, ValueFormat
from xsfs.view.ownership import Ownership
from xsfs.view.view import NodeState, View
from xsfs.xenstore.store import open_store

PERMS = "user.xs.perms"

HOME = "/local/domain/0"

SHM = "/dev/shm"
"""A tmpfs: where mirrors are, not to be slowed by a disk."""


class Entry(NamedTuple):
    """The visible attributes of one file or directory."""

    directory: bool
    content: bytes
    perms: str


Tree = dict[str, Entry]
"""By path relative to the mirror's root, which is ``."""

IsDirectory = Callable[[str, bytes, bool], bool]
"""Whether the node of this absolute path, with this value, and children or not, is a directory."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in a tmpfs."""
    path = tempfile.mkdtemp(prefix="xsfs-", dir=SHM)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path)


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A tmpfs mounted there, that nobody else can write to."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=755", "none", str(path)]
    subprocess.run(command, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def has_user_attributes(directory: Path) -> bool:
    try:
        os.setxattr(directory, "user.xsfs.test", b"")
    except OSError:
        return False
    os.removexattr(directory, "user.xsfs.test")
    return True


# ------------------------------------------------------------------------------- what must be


def file_name(name: str) -> str:
    if len(name) <= 255:
        return name
    return f"{name[:200]}~{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _answers(witness: XsClient, paths: Sequence[str]) -> list[tuple[bytes, list[str], str] | None]:
    """Value, children and permissions of each; None for what is not there, or may not be read."""
    ops = ("READ", "DIRECTORY", "GET_PERMS")
    replies = witness.pipeline((op, strings(path)) for path in paths for op in ops)
    found: list[tuple[bytes, list[str], str] | None] = []
    for index, path in enumerate(paths):
        value, names, perms = replies[3 * index : 3 * index + 3]
        if isinstance(names, XsError) and names.name == "E2BIG":
            children = witness.ls_part(path)
        elif isinstance(names, XsError):
            children = []
        else:
            children = [name.decode() for name in names.split(b"\0")[:-1]]
        if isinstance(value, XsError) or isinstance(perms, XsError):
            found.append(None)
        else:
            text = ",".join(entry.decode() for entry in perms.split(b"\0")[:-1])
            found.append((value, children, text))
    return found


def tree_of_store(
    witness: XsClient,
    root: str,
    is_directory: IsDirectory,
    *,
    made_value: Callable[[str], bool] = lambda _: False,
    render: Callable[[bytes], bytes] = TEXT.render,
    lasting: Sequence[str] = (),
) -> Tree:
    """The expected mirror of the store now.

    made_value  whether `.value` of this directory was created, and exists although it is empty
    lasting     paths of directories that exist even without a node
    """
    tree: Tree = {}
    level = [(root, "")]
    while level:
        below = []
        answers = _answers(witness, [path for path, _ in level])
        for (path, place), answer in zip(level, answers, strict=True):
            lasts = path == root or (answer is None and path in lasting)
            if answer is None:
                if not lasts:
                    continue
                answer = b"", [], ""
            value, children, perms = answer
            if lasts or is_directory(path, value, bool(children)):
                tree[place] = Entry(True, b"", perms)
                if value or (answer[2] and made_value(path)):
                    tree[f"{place}/.value".lstrip("/")] = Entry(False, render(value), perms)
            else:
                tree[place] = Entry(False, render(value), perms)
            above = path.rstrip("/")
            children += [
                last.rpartition("/")[2] for last in lasting if last.rpartition("/")[0] == above
            ]
            for name in dict.fromkeys(children):
                if not (path == "/" and name.startswith("@")):
                    below.append((f"{above}/{name}", f"{place}/{file_name(name)}".lstrip("/")))
        level = below
    return tree


def tree_of_files(top: Path, *, perms: bool) -> Tree:
    """The names in a directory.  Raises FileNotFoundError for what goes meanwhile."""
    tree: Tree = {}

    left = [(str(top), "")]
    while left:
        path, place = left.pop()
        mode = os.lstat(path).st_mode
        text = ""
        if perms:
            try:
                text = os.getxattr(path, PERMS, follow_symlinks=False).decode()
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
        if stat.S_ISDIR(mode):
            tree[place] = Entry(True, b"", text)
            for name in os.listdir(path):
                left.append((f"{path}/{name}", f"{place}/{name}".lstrip("/")))
        else:
            # The owner of the files may have put anything there for a moment.
            content = Path(path).read_bytes() if stat.S_ISREG(mode) else b"no file"
            tree[place] = Entry(False, content, text)
    return tree


def differences(must: Tree, found: Tree) -> list[str]:
    said = []
    for place in sorted(must.keys() | found.keys()):
        if must.get(place) != found.get(place):
            said.append(f"{place or '.'}: must be {must.get(place)}, is {found.get(place)}")
    return said


def busy() -> float:
    """How many times longer work takes because of the load of this machine; at least 1."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def await_true(check: Callable[[], object], seconds: float = LIMIT) -> None:
    """Ask until what comes is true; what comes must be so in time."""
    deadline = time.monotonic() + seconds
    while not (said := check()):
        assert time.monotonic() < deadline, f"not in time: {said!r}"
        time.sleep(0.002)


def await_none(check: Callable[[], Sequence[str]], seconds: float = LIMIT) -> float:
    """Ask until there is nothing more to complain of; how many seconds that took."""
    start = time.monotonic()
    while True:
        asked_at = time.monotonic()
        try:
            said: Sequence[str] = check()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            said = [str(error)]
        if not said:
            return asked_at - start
        assert asked_at - start < seconds, "\n".join(said[:20])
        time.sleep(0.002)


# ------------------------------------------------------------------------------- in process


@dataclass
class Live:
    """A mirror in this process, in a thread of its own, without a mount."""

    directory: Path
    root: str
    witness: XsClient
    mirror: Mirror = field(init=False)
    view: View = field(init=False)
    token: trio.lowlevel.TrioToken = field(init=False)
    scope: trio.CancelScope = field(init=False)

    @property
    def sticky(self) -> StickyDirectories:
        return self.view.sticky

    def tell(self, change: Callable[[], None]) -> None:
        """Have it done in the mirror's thread."""
        trio.from_thread.run_sync(change, trio_token=self.token)

    def path(self, place: str) -> Path:
        return self.directory / place

    def is_directory(self, path: str, value: bytes, has_children: bool) -> bool:
        return self.view.is_directory(path.encode(), NodeState(value, has_children, True, True))

    def differences(self) -> list[str]:
        must = tree_of_store(
            self.witness,
            self.root,
            self.is_directory,
            made_value=lambda path: bool(self.sticky.has_value(path.encode())),
            render=self.view.value_format.render,
            lasting=[
                f"{self.root}/{name.decode()}"
                for name in self.view.always_there_below(self.root.encode())
            ],
        )
        perms = has_user_attributes(self.directory.parent)
        if not perms:
            must = {place: entry._replace(perms="") for place, entry in must.items()}
        found = tree_of_files(self.directory, perms=perms)
        if not self.mirror.is_current:
            return ["the mirror is gone"]
        if self.mirror.nodes != (count := sum(not is_own(place) for place in found)):
            return [f"{count} nodes are there, {self.mirror.nodes} are counted"]
        return differences(must, found)

    def settle(self, seconds: float = LIMIT) -> float:
        return await_none(self.differences, seconds)

    def emptied(self) -> XsClient:
        """The witness.  The root exists and is empty, and the mount knows no directories below it."""
        self.witness.rm(self.root)
        self.witness.mkdir(self.root)
        for path in list(self.sticky._has_value):
            self.tell(partial(self.sticky.discard, path))
        self.settle()
        return self.witness


def is_own(place: str) -> bool:
    """The root, and what is no node."""
    return place == "" or place.rpartition("/")[2] == ".value"


@contextmanager
def live(
    socket: str,
    witness: XsClient,
    *,
    root: str = "/",
    content: ValueFormat = TEXT,
    domid: int = 0,
    timeout: float = 10.0,
    wait: bool = True,
) -> Iterator[Live]:
    """A mirror of the store at `socket`, complete; `witness` sees the same store."""
    with scratch() as above:
        alive = Live(above / "m", root, witness)
        started = threading.Event()
        failures: list[BaseException] = []

        async def serve() -> None:
            alive.token = trio.lowlevel.current_trio_token()
            files = MirrorDirectory(
                str(alive.directory), Ownership(os.getuid(), os.getgid(), 0o077)
            )
            files.open()
            try:
                with trio.CancelScope() as alive.scope:
                    async with (
                        open_store(socket, timeout=timeout) as store,
                        trio.open_nursery() as nursery,
                    ):
                        sticky = StickyDirectories()
                        alive.view = View(store, domid, root.encode(), content, sticky)
                        alive.mirror = Mirror(store, alive.view, files)
                        if wait:
                            await nursery.start(alive.mirror.run)
                        else:
                            nursery.start_soon(alive.mirror.run)
                        started.set()
                        await trio.sleep_forever()
            finally:
                files.close()

        def run() -> None:
            try:
                trio.run(serve)
            except BaseException as error:
                failures.append(error)
            started.set()

        thread = threading.Thread(target=run, name="mirror")
        thread.start()
        try:
            assert started.wait(LIMIT), "the mirror does not start"
            if failures:
                raise failures[0]
            yield alive
        finally:
            if thread.is_alive():
                alive.token.run_sync_soon(alive.scope.cancel)
            thread.join(LIMIT)
            assert not thread.is_alive()
        if failures:
            raise failures[0]
        assert os.listdir(above) == [], "something is left behind"


@contextmanager
def live_at(place: Place, root: str) -> Iterator[Live]:
    """A mirror of a node of its own."""
    with place.witness() as witness:
        witness.mkdir(root)
        with live(place.socket, witness, root=root) as alive:
            yield alive


# ------------------------------------------------------------------------------- of a mount


@dataclass
class Mirrored:
    """A real mount with a mirror in `directory`, of the tree at `root`."""

    mount: Mount
    directory: Path
    root: str
    witness: XsClient

    def is_directory(self, path: str, value: bytes, has_children: bool) -> bool:
        """As the mount shows it."""
        return has_children or self._shown(path).is_dir()

    def _shown(self, path: str) -> Path:
        if path == self.root:
            return self.mount.path
        return self.mount.path.joinpath(".root", *map(file_name, path.split("/")[1:]))

    @property
    def perms(self) -> bool:
        return has_user_attributes(self.directory.parent)

    def found(self) -> Tree:
        """The contents of the mirror now."""
        return tree_of_files((self.mount.path / ".mirror").resolve(strict=True), perms=self.perms)

    def differences(self, found: Tree | None = None) -> list[str]:
        """The paths at which the mirror differs from the store and the mount."""
        if found is None:
            found = self.found()
        must = tree_of_store(
            self.witness,
            self.root,
            self.is_directory,
            made_value=lambda path: ".value" in os.listdir(self._shown(path)),
            lasting=[f"{self.root}/data"] if self.root == HOME else [],
        )
        if not self.perms:
            must = {place: entry._replace(perms="") for place, entry in must.items()}
        return differences(must, found)

    def settle(self, seconds: float = LIMIT) -> float:
        return await_none(self.differences, seconds)


@contextmanager
def mirrored(place: Place, directory: Path, *options: str, root: str = "") -> Iterator[Mirrored]:
    """A mount with a mirror."""
    with scratch() as above, place.witness() as witness:
        mirror = above / "m"
        chosen = [*options, *([f"root={root}"] if root else []), f"mirror={mirror}"]
        with mounted(["-o", ",".join(chosen), place.socket], directory) as mount:
            yield Mirrored(mount, mirror, root or HOME, witness)
        assert os.listdir(above) == []
