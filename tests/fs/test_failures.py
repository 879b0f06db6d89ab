"""Ring: a real mount of a store that fails, restarts, stops or lies.

Whatever the store does, a tool at the mount ends with the truth or a clear error, in time; and the
mount works again as soon as the store does.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.support.lying_store import (
    Lie,
    LyingStore,
    Talk,
    hang_up,
    honest,
    on,
    says,
    sends,
    silence,
)
from tests.support.messages import Message
from tests.support.mounting import LIMIT, Mount, mounted, quick_params, refusal
from tests.support.programs import program
from tests.support.xenstored.harness import RealXenstored, XsClient, strings
from xsfs.xenstore.protocol import HEADER, Op, encode

TIMEOUT = 3.0
"""Of a request of xsfs: enough on a busy machine."""
HOME = "/local/domain/0"


# The effect of a lie does not depend on the daemon behind it.
@pytest.fixture(scope="module", params=quick_params(["C"], ["C", "ocaml"]))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        daemon.populate()
        yield daemon


@pytest.fixture
def new_liar(daemon: RealXenstored, tmp_path: Path) -> Iterator[LyingStore]:
    """For a test that mounts it itself."""
    with LyingStore(tmp_path / "liar.sock", daemon.socket) as liar:
        yield liar


@pytest.fixture
def over_new_liar(new_liar: LyingStore, tmp_path: Path) -> Iterator[Mount]:
    """A mount that has not asked for anything yet."""
    with mounted(["-o", f"timeout={TIMEOUT}", new_liar.path], tmp_path / "m") as mount:
        yield mount


@pytest.fixture(scope="module")
def liar_of_all(
    daemon: RealXenstored, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LyingStore]:
    with LyingStore(tmp_path_factory.mktemp("liar") / "sock", daemon.socket) as liar:
        yield liar


@pytest.fixture(scope="module")
def mount_of_all(
    liar_of_all: LyingStore, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mount]:
    path = tmp_path_factory.mktemp("mount") / "m"
    with mounted(["-o", f"timeout={TIMEOUT}", liar_of_all.path], path) as mount:
        yield mount


@pytest.fixture
def liar(liar_of_all: LyingStore) -> Iterator[LyingStore]:
    """One for all tests: after each lie the mount must go on as if there had been none."""
    yield liar_of_all
    liar_of_all.behave()


@pytest.fixture
def over_liar(liar: LyingStore, mount_of_all: Mount) -> Iterator[Mount]:
    yield mount_of_all
    liar.behave()
    works_again(mount_of_all.path)


# ------------------------------------------------------------------------------------------ lies


def doubled(talk: Talk, request: Message) -> bool:
    reply = talk.ask(request)
    talk.send(reply + reply)
    return True


def wrong_id(talk: Talk, request: Message) -> bool:
    talk.send(encode(request.op, request.req_id ^ 1, 0, b""))
    return True


def reordered() -> Lie:
    """Replies change places, two by two.  Each is known by its number, so it is the truth."""
    held: list[bytes] = []

    def lie(talk: Talk, request: Message) -> bool:
        held.append(talk.ask(request))
        if len(held) == 2:
            talk.send(held[1] + held[0])
            held.clear()
        return True

    return lie


LIES: dict[str, Lie] = {
    "garbage": sends(os.urandom(64).replace(b"\0", b"x")),
    "too long": sends(HEADER.pack(Op.READ, 1, 0, 1 << 30)),
    "cut": sends(HEADER.pack(Op.READ, 1, 0, 100) + b"only this", then_hang_up=True),
    "unasked": sends(encode(Op.READ, 0x7FFFFFFF, 0, b"value")),
    "wrong type": says(b"OK\0", Op.WRITE),
    "unknown type": says(b"OK\0", 99),
    "hang up": hang_up,
    "silence": silence,
    "error without a name": says(b"", Op.ERROR),
    "unknown error": says(b"EWHATEVER\0", Op.ERROR),
}


NUMBERS: dict[str, Lie] = {
    "wrong id": wrong_id,
    "doubled": doubled,
    "cut in the header": sends(HEADER.pack(Op.READ, 1, 0, 5)[:7], then_hang_up=True),
    "zeros": sends(bytes(4096)),
    "ones": sends(b"\xff" * 4096),
}


def outcome(action: Callable[[], object]) -> int:
    """The errno of the action; 0 if it went well.  It may take as long as the mount's limit."""
    start = time.monotonic()
    try:
        action()
        number = 0
    except OSError as error:
        number = error.errno or -1
    assert time.monotonic() - start < LIMIT / 2
    return number


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_a_clear_error_and_then_it_works(
    liar: LyingStore, over_liar: Mount, name: str
) -> None:
    path = over_liar.path
    (path / "data" / "x").write_text("before\n")
    opened = os.open(path / "data" / "x", os.O_WRONLY)
    actions: list[Callable[[], object]] = [
        lambda: (path / "name").read_text(),
        lambda: os.listdir(path),
        lambda: os.write(opened, b"lie\n"),
        lambda: (path / "data" / "d").mkdir(),
    ]
    for action in actions:
        liar.lie = LIES[name]
        number = outcome(action)
        assert number in (errno.EIO, errno.ETIMEDOUT), errno.errorcode.get(number, number)
        liar.behave()
        works_again(path)
    os.close(opened)
    assert (path / "data" / "x").read_text() == "before\n"


@pytest.mark.parametrize("name", NUMBERS)
def test_a_lie_about_the_numbers_is_an_error_or_the_truth(
    liar: LyingStore, over_liar: Mount, name: str
) -> None:
    path = over_liar.path
    for action in (
        lambda: (path / "name").read_text(),
        lambda: os.listdir(path),
        lambda: (path / "data" / "x").write_text("1\n"),
    ):
        liar.lie = NUMBERS[name]
        assert outcome(action) in (0, errno.EIO, errno.ETIMEDOUT)
        liar.behave()
        works_again(path)


def works_again(path: Path) -> None:
    """The store does, so the mount must: immediately, unless the machine is busy."""
    deadline = time.monotonic() + LIMIT
    while outcome(lambda: (path / "name").read_text()):
        assert time.monotonic() < deadline
    assert (path / "name").read_text() == "Domain-0\n"


def test_replies_in_another_order_are_the_truth(liar: LyingStore, over_liar: Mount) -> None:
    """A look-up is two requests, and so are the attributes."""
    path = over_liar.path
    liar.lie = reordered()
    for _ in range(10):
        found = (path / "name").stat()
        assert (stat.S_ISREG(found.st_mode), found.st_size) == (True, len("Domain-0\n"))
    liar.behave()
    works_again(path)


def test_a_listing_that_never_ends(
    liar: LyingStore, over_liar: Mount, daemon: RealXenstored
) -> None:
    """Part after part, each of a new generation, or all of one."""
    (over_liar.path / "data" / "child").write_text("1\n")
    for generation in (lambda count: count, lambda count: 7):
        parts = 0

        def endless(talk: Talk, request: Message, generation: Callable[[int], int]) -> bool:
            nonlocal parts
            if request.op == Op.DIRECTORY and request.payload == f"{HOME}/data\0".encode():
                talk.reply(request, b"E2BIG\0", Op.ERROR)
            elif request.op == Op.DIRECTORY_PART:
                parts += 1
                talk.reply(request, b"%d\0" % generation(parts) + b"name%d\0" % parts * 100)
            else:
                return False
            return True

        liar.lie = partial(endless, generation=generation)
        # Each part is an answer in time: it ends because there are too many, or they never agree.
        start = time.monotonic()
        listing = partial(os.listdir, over_liar.path / "data")
        assert refusal(listing) in (errno.EAGAIN, errno.EIO, errno.ETIMEDOUT)
        assert time.monotonic() - start < LIMIT
        assert parts < 100_000
        liar.behave()
        works_again(over_liar.path)


@pytest.mark.parametrize(
    "name",
    ["garbage", "too long", "wrong type", "hang up", "silence", "unknown error", "unasked"],
)
def test_a_lie_about_a_watch(liar: LyingStore, over_liar: Mount, name: str) -> None:
    path = over_liar.path / "data" / ".watch"
    liar.lie = on(Op.WATCH, LIES[name])
    assert outcome(lambda: os.close(os.open(path, os.O_RDONLY))) in (errno.EIO, errno.ETIMEDOUT)
    liar.behave()
    with program("cat", path) as reader:
        assert reader.lines.next() == "."
        (over_liar.path / "data" / "told").write_text("1\n")
        reader.lines.until("told")


@pytest.mark.parametrize(
    "event",
    [
        b"",
        b"/",
        b"relative",
        b"/local/domain/0/data/a\nb",
        b"/local/domain/0/data/" + b"x" * 3000,
        b"/local/domain/0/data/../../..",
        b"\xff\xfe",
    ],
)
def test_events_of_nonsense(liar: LyingStore, over_liar: Mount, event: bytes) -> None:
    """An event for our token with a path that no store has: a line, one, and no path out."""

    def with_event(talk: Talk, request: Message) -> bool:
        path, token = request.payload.split(b"\0")[:2]
        talk.send(talk.ask(request))
        talk.event(event, token)
        talk.event(path + b"/end", token)
        return True

    liar.lie = on(Op.WATCH, with_event)
    with program("cat", over_liar.path / "data" / ".watch") as reader:
        lines = reader.lines.until("end")
        assert all(lines)
        assert len(lines) <= 2
    liar.behave()
    works_again(over_liar.path)


@pytest.mark.parametrize(
    ("op", "payload", "read", "made"),
    [
        (Op.DIRECTORY, b"no NUL at the end", (errno.EIO, errno.EIO, 0), {0}),
        (
            Op.DIRECTORY,
            b"\0.\0..\0a/b\0good\0.value\0a b\0" + b"x" * 3000 + b"\0",
            (0, errno.EISDIR, 0),
            {0},
        ),
        (Op.READ, b"any \0 value \xff\n\n", (0, 0, 0), {errno.EEXIST, errno.ENOTDIR}),
        (Op.GET_PERMS, b"nonsense\0", (0, 0, 0), {0}),
        (Op.GET_PERMS, b"", (0, 0, 0), {0}),
        (Op.TRANSACTION_START, b"no number\0", (0, 0, 0), {errno.EIO}),
    ],
)
def test_replies_of_nonsense(
    liar: LyingStore,
    over_liar: Mount,
    op: Op,
    payload: bytes,
    read: tuple[int, int, int],
    made: set[int],
) -> None:
    """Permissions are shown as they come."""
    path, directory = over_liar.path, over_liar.path / "data" / "made"
    before = len(over_liar.stderr)
    liar.lie = on(op, says(payload))
    found = (
        outcome(lambda: os.listdir(path)),
        outcome(lambda: (path / "name").read_bytes()),
        outcome(lambda: os.getxattr(path / "name", "user.xs.perms")),
    )
    number = outcome(directory.mkdir)
    liar.behave()
    assert (found, number in made) == (read, True), number
    works_again(path)
    assert "name" in os.listdir(path)
    assert directory.exists() is (number == 0)
    if not number:
        directory.rmdir()
    assert "Traceback" not in over_liar.stderr[before:]


def test_hostile_names_are_left_out(liar: LyingStore, over_liar: Mount) -> None:
    long, too_long = b"x" * 1000, b"y" * 3060

    def names(talk: Talk, request: Message) -> bool:
        if request.op != Op.DIRECTORY or request.payload != f"{HOME}/data\0".encode():
            return False
        listing = b"\0.\0..\0a/b\0ok\0ok\0.value\0a b\0\x1b[31m\0" + long + b"\0" + too_long + b"\0"
        talk.reply(request, listing)
        return True

    data = over_liar.path / "data"
    for name in ("ok",):
        (data / name).write_text("1\n")
    before = len(over_liar.stderr)
    liar.lie = names
    alias = "x" * 200 + "~" + hashlib.sha256(long).hexdigest()[:16]
    # The long one is not there when asked for, and left out as any that vanished.
    assert os.listdir(data) == ["ok"]
    assert not (data / alias).exists()
    liar.behave()
    assert "left out" in over_liar.stderr[before:]
    (data / "ok").unlink()


def test_events_that_nobody_asked_for_are_harmless(liar: LyingStore, over_liar: Mount) -> None:
    def events_first(talk: Talk, request: Message) -> bool:
        for _ in range(100):
            talk.event(b"/some/path", b"no such token")
        return False

    liar.lie = events_first
    for _ in range(20):
        assert (over_liar.path / "name").read_text() == "Domain-0\n"


def test_replies_byte_by_byte(liar: LyingStore, over_liar: Mount) -> None:
    def slowly(talk: Talk, request: Message) -> bool:
        for byte in talk.ask(request):
            talk.send(bytes((byte,)))
        return True

    liar.lie = slowly
    assert (over_liar.path / "name").read_text() == "Domain-0\n"


LACKING: dict[str, tuple[Op, Callable[[Path], object]]] = {
    "open": (Op.READ, lambda path: os.close(os.open(path / "name", os.O_RDONLY))),
    "read": (Op.READ, lambda path: (path / "name").read_bytes()),
    "getxattr of permissions": (
        Op.GET_PERMS,
        lambda path: os.getxattr(path / "name", "user.xs.perms"),
    ),
    "getxattr of the value": (Op.READ, lambda path: os.getxattr(path / "name", "user.xs.value")),
    "setxattr": (
        Op.SET_PERMS,
        lambda path: os.setxattr(path / "data", "user.xs.perms", b"n0"),
    ),
    "opendir": (Op.DIRECTORY, lambda path: os.listdir(path / "data")),
    "mkdir": (Op.MKDIR, lambda path: (path / "data" / f"d{time.monotonic_ns()}").mkdir()),
    "write": (Op.WRITE, lambda path: (path / "data" / "x").write_text("1\n")),
    "remove": (Op.RM, lambda path: (path / "data" / "x").unlink(missing_ok=True)),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_the_store_lacks_once_works_afterwards(
    new_liar: LyingStore, over_new_liar: Mount, name: str
) -> None:
    """The kernel would turn an operation off, until the mount ends, that fails with ENOSYS."""
    op, action = LACKING[name]
    path = over_new_liar.path
    (path / "data" / "x").write_text("0\n")
    lies = 0

    def once(talk: Talk, request: Message) -> bool:
        nonlocal lies
        if request.op != op or lies:
            return False
        lies += 1
        return says(b"ENOSYS\0", Op.ERROR)(talk, request)

    new_liar.lie = once
    with fails(errno.EOPNOTSUPP):
        action(path)
    assert lies == 1
    for _ in range(3):
        action(path)
    got = subprocess.run(
        ["getfattr", "-n", "user.xs.perms", "--only-values", path / "name"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert got.stdout.startswith("n0")
    works_again(path)


def test_an_unknown_error_is_logged(liar: LyingStore, over_liar: Mount) -> None:
    before = len(over_liar.stderr)
    liar.lie = on(Op.READ, says(b"EWHATEVER\0", Op.ERROR))
    with fails(errno.EIO):
        (over_liar.path / "name").read_text()
    liar.behave()
    assert "EWHATEVER" in over_liar.stderr[before:]


# ------------------------------------------------------------------------- restarts, stopped ones


def test_the_daemon_restarts(tmp_path: Path, daemon: RealXenstored) -> None:
    with mounted(["-o", f"timeout={TIMEOUT}", daemon.socket], tmp_path / "m") as mount:
        path = mount.path
        (path / "data" / "x").write_text("1\n")
        held = os.open(path / "data" / "x", os.O_RDWR)
        for _ in range(2):
            daemon.restart()
            daemon.populate()
            # xsfs retries requests that only read; the store is a new one.
            assert (path / "name").read_text() == "Domain-0\n"
            with pytest.raises(FileNotFoundError):
                (path / "data" / "x").read_text()
            (path / "data" / "y").write_text("2\n")
            assert (path / "data" / "y").read_text() == "2\n"
        os.close(held)
        assert mount.counter("reconnects") == 2


def test_the_daemon_is_gone_and_comes_back(tmp_path: Path, daemon: RealXenstored) -> None:
    with mounted(["-o", f"timeout={TIMEOUT}", daemon.socket], tmp_path / "m") as mount:
        path = mount.path
        daemon.kill()
        for action in (
            lambda: (path / "name").read_text(),
            lambda: os.listdir(path),
            lambda: (path / "name").write_text("1\n"),
        ):
            assert outcome(action) in (errno.EIO, errno.ETIMEDOUT)
        daemon.start()
        daemon.populate()
        works_again(path)
        assert (path / "name").read_text() == "Domain-0\n"


def test_the_daemon_stops_and_goes_on(tmp_path: Path, daemon: RealXenstored) -> None:
    with mounted(["-o", f"timeout={TIMEOUT}", daemon.socket], tmp_path / "m") as mount:
        path = mount.path
        daemon.pause()
        try:
            outcomes: list[int] = []
            threads = [
                threading.Thread(
                    target=lambda: outcomes.append(outcome(lambda: (path / "name").stat()))
                )
                # The kernel lets one lookup into a directory at a time.
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(LIMIT)
            assert outcomes == [errno.ETIMEDOUT] * 3
        finally:
            daemon.resume()
        works_again(path)
        # The connection that was not answered was given up.
        assert mount.counter("reconnects") >= 1


def test_a_signal_ends_the_mount_of_a_stopped_daemon(tmp_path: Path, daemon: RealXenstored) -> None:
    mount = Mount([daemon.socket], tmp_path / "m")
    try:
        mount.wait_mounted()
        assert (mount.path / "name").read_text() == "Domain-0\n"
        daemon.pause()
        waiting = threading.Thread(target=lambda: outcome(lambda: (mount.path / "name").stat()))
        waiting.start()
        assert mount.end(signal.SIGTERM) == 0
        waiting.join(LIMIT)
        assert not waiting.is_alive()
    finally:
        daemon.resume()
        mount.clear()


def test_a_store_that_never_answers(new_liar: LyingStore, tmp_path: Path) -> None:
    """One line, and no more."""
    new_liar.lie = silence
    place = tmp_path / "m"
    place.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "xsfs", "-o", f"timeout={TIMEOUT}", new_liar.path, str(place)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("xsfs: Xenstore did not answer in time (")
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("lie", [honest, says(b"EIO\0", Op.ERROR)], ids=["good", "bad"])
def test_the_waiting_process_is_killed(new_liar: LyingStore, tmp_path: Path, lie: Lie) -> None:
    """Nothing stays mounted that nobody has been told of, however the store answers in the end."""
    asked = threading.Event()
    go_on = threading.Event()

    def late(talk: Talk, request: Message) -> bool:
        asked.set()
        assert go_on.wait(LIMIT)
        return lie(talk, request)

    new_liar.lie = late
    place = tmp_path / "m"
    place.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "xsfs", new_liar.path, str(place)], stderr=subprocess.PIPE, text=True
    ) as waiting:
        assert asked.wait(LIMIT)
        waiting.kill()
        waiting.wait(LIMIT)
        go_on.set()
        assert waiting.stderr is not None
        said = waiting.stderr.read()  # until the process in the background ends
    assert "a bug" not in said
    assert not os.path.ismount(place)


# -------------------------------------------------------------------------------- very large stores


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_a_directory_of_100_000_children(tmp_path: Path, kind: str) -> None:
    # A daemon of its own: C xenstored takes minutes to remove them again.
    names = [f"c{number}" for number in range(100_000)]
    with (
        RealXenstored(kind) as daemon,
        mounted(["-o", "timeout=60", daemon.socket], tmp_path / "m") as mount,
        XsClient(daemon.socket, timeout=120.0) as witness,
    ):
        replies = witness.pipeline(
            [("WRITE", strings(f"{HOME}/data/big/{name}") + b"v") for name in names]
        )
        assert set(replies) == {b"OK\0"}
        big = mount.path / "data" / "big"
        assert sorted(os.listdir(big)) == sorted(names)
        assert (big / "c99999").read_text() == "v\n"
        assert os.listdir(mount.path) == ["data"]
        status = Path(f"/proc/{mount.process.pid}/status").read_text()
        resident = int(status.split("VmRSS:")[1].split()[0]) / 1024
        assert resident < 100, "MiB"
