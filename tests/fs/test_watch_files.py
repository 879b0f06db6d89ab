"""Ring: a real mount, of every store.  Watch files: as streams, in shells, in Python, under load."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from pyfuse3 import FUSEError
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.fs.test_values import fails, node
from tests.support.mounting import LIMIT, Mount, Place, mounted
from tests.support.operating import RDONLY, RDWR, World, ctx, in_world, refused, world
from tests.support.programs import Lines, Program, needs_poll, program
from tests.support.xenstored.harness import RealXenstored, XsClient, XsError
from xsfs.fs import waiting_readers, watch_files
from xsfs.fs.waiting_readers import CENSUS, Census, Family, Outcome
from xsfs.fs.watch_files import READERS_MAX, WATCHES_MAX, line_of, path_of
from xsfs.xenstore.watches import EVENTS_MAX

SOON = 20.0
"""Seconds in which a signal ends a blocked reader: half a second, and what a busy machine adds."""


@contextmanager
def opened(path: Path, flags: int = os.O_RDONLY | os.O_NONBLOCK) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def watching(path: Path) -> Iterator[Lines]:
    """The lines of a directory's watch file, from the one after the first on."""
    with opened(path / ".watch") as descriptor:
        lines = Lines(descriptor)
        assert lines.next() == "."
        yield lines


@contextmanager
def control(path: Path) -> Iterator[tuple[int, Lines]]:
    """A watch file for reading and writing."""
    with opened(path / ".watch", os.O_RDWR | os.O_NONBLOCK) as descriptor:
        yield descriptor, Lines(descriptor)


def add(descriptor: int, *lines: str) -> None:
    data = "".join(f"{line}\n" for line in lines).encode()
    assert os.write(descriptor, data) == len(data)


def wait_for(mount: Mount, counter: str, value: int) -> None:
    """A close(2) does not wait for what it sets off."""
    deadline = time.monotonic() + LIMIT
    while mount.counter(counter) != value:
        assert time.monotonic() < deadline, (counter, mount.counter(counter), value)


# --------------------------------------------------------------------------------------- lines


def test_a_line_an_event(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    changes: list[tuple[Callable[[], object], str]] = [
        (lambda: witness.write(f"{top}/x", b"1"), "x"),
        (lambda: witness.write(f"{top}/x", b"1"), "x"),
        (lambda: witness.write(f"{top}/a/b/c", b""), "a/b/c"),
        (lambda: witness.write(top, b"itself"), "."),
        (lambda: witness.rm(f"{top}/a"), "a"),
        (lambda: witness.set_perms(f"{top}/x", [f"r{place.domid}"]), "x"),
    ]
    with watching(box) as lines:
        for change, line in changes:
            change()
            assert lines.next() == line


@pytest.mark.quick_if(place=["C", "ocaml-guest"])
def test_each_change_is_one_line(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    """The reader waits for each change, however it is made.  The next line belongs to the next change."""
    top = node(place, box)
    shell = (
        "echo 1 > $n",
        "echo 1 >> $n",
        "printf x > $n",
        ": > $n",
        "mkdir $n",
        "truncate -s 3 $n",
    )
    with program("cat", box / ".watch") as reader:
        assert reader.lines.next() == "."
        for number in range(50):
            name = f"n{number}"
            for change in (*shell[number % len(shell) :: len(shell)], "echo 2 > m"):
                mount.bash(f"cd {box}; n={name}; {change}")
                assert reader.lines.next() == ("m" if change.endswith(" m") else name)
            for step in (name, name, "m"):
                witness.write(f"{top}/{step}", b"%d" % number)
                assert reader.lines.next() == step
        witness.write(f"{top}/last", b"")
        assert reader.lines.next() == "last"


def test_what_is_written_through_the_mount_is_seen_too(mount: Mount, box: Path) -> None:
    with watching(box) as lines:
        mount.bash(f"echo 42 > {box}/x; mkdir {box}/d; mv {box}/x {box}/y")
        seen: set[str] = set()
        while len(seen) < 3:  # "x" comes twice if the reader is faster than mv
            seen.add(lines.next())
        assert seen == {"d", "x", "y"}


def test_every_directory_has_one_and_none_lists_it(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    top = node(place, box)
    (box / "file").write_text("1\n")
    below = top.removeprefix(place.home + "/")
    for path, line in (
        (mount.path, f"{below}/x"),
        (mount.path / "data", f"{box.name}/x"),
        (mount.path / ".root", f"{top}/x"[1:]),
        (mount.path / ".root" / place.home[1:] / "data", f"{box.name}/x"),
        (mount.path / "data.d", f"{box.name}/x"),
    ):
        with watching(path) as lines:
            witness.write(f"{top}/x", b"")
            assert lines.until(line) == []
    with watching(box / "file.d") as lines:
        witness.write(f"{top}/file", b"2")
        assert lines.next() == "."
    assert sorted(os.listdir(box)) == ["file", "x"]
    assert "watch" not in mount.bash(f"find {box}; ls -a .")


def test_a_removed_directory(place: Place, box: Path, witness: XsClient) -> None:
    (box / "d").mkdir()
    with watching(box / "d") as lines:
        witness.rm(node(place, box / "d"))
        assert lines.next() == "."
        assert not (box / "d" / ".watch").exists()
        with pytest.raises(FileNotFoundError):
            os.open(box / "d" / ".watch", os.O_RDONLY)
        witness.write(f"{node(place, box)}/d/again", b"")
        assert lines.until("again") == []


def test_names_that_are_something_else_to_tools(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    long = "n" * 300
    with watching(box) as lines:
        witness.write(f"{top}/-rf", b"")
        assert lines.next() == "./-rf"
        witness.write(f"{top}/@releaseDomain", b"")
        assert lines.next() == "./@releaseDomain"
        witness.write(f"{top}/{long}", b"long")
        line = lines.next()
        assert (box / line).read_text() == "long\n"
    with control(box) as (descriptor, lines):
        add(descriptor, "./-rf")
        assert lines.next() == "./-rf"
        add(descriptor, "-./-rf")


@given(
    base=st.lists(st.text("aB-@9_", min_size=1), max_size=4).map("/".join),
    path=st.lists(st.text("aB-@9_", min_size=1), max_size=6).map("/".join),
    below=st.booleans(),
)
def test_a_line_says_which_path(base: str, path: str, below: bool) -> None:
    top, event = f"/{base}".encode(), f"/{path}".encode()
    if below:
        event = (top.rstrip(b"/") + event).rstrip(b"/") or b"/"
    line = line_of(event, top)
    assert path_of(line, top) == event
    assert not line.startswith((b"-", b"@"))
    assert (line == b".") == (event == top)
    assert line.startswith(b"/") == (not (event + b"/").startswith(top.rstrip(b"/") + b"/"))


def test_special_events_are_lines_as_they_are() -> None:
    for special in (
        b"@introduceDomain",
        b"@releaseDomain",
        b"@introduceDomain/0",
        b"@releaseDomain/32767",
    ):
        assert line_of(special, b"/") == line_of(special, b"/local") == special
        assert path_of(special, b"/local") == special


# ------------------------------------------------------------------------------------- a stream


def test_it_has_no_positions(box: Path) -> None:
    with opened(box / ".watch") as descriptor:
        with fails(errno.ESPIPE):
            os.lseek(descriptor, 0, os.SEEK_CUR)
        with fails(errno.ESPIPE):
            os.pread(descriptor, 10, 0)
        assert os.fstat(descriptor).st_size == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_reads_of_any_size_give_whole_lines_or_pieces_of_one(
    place: Place, box: Path, witness: XsClient, size: int
) -> None:
    names = [*(f"n{i}" for i in range(12)), "long" * 10, "last"]
    with watching(box) as lines:
        for name in names:
            witness.write(f"{node(place, box)}/{name}", b"")
        received: list[str] = []
        buffer = b""
        while "last" not in received:
            data = lines.read(size)
            assert 0 < len(data) <= size
            # Either whole lines, or no more than the piece of a single one.
            assert data.endswith(b"\n") or data.count(b"\n") == 0
            buffer += data
            *complete, buffer = buffer.split(b"\n")
            received += [line.decode() for line in complete]
        assert received == names
        with fails(errno.EAGAIN):
            os.read(lines.descriptor, size)


def test_equal_lines_unread_are_one(place: Place, box: Path, witness: XsClient) -> None:
    with watching(box) as lines:
        for _ in range(20):
            for name in "abc":
                witness.write(f"{node(place, box)}/{name}", b"")
        # Another reader has had it all, so this one has.
        witness.write(f"{node(place, box)}/end", b"")
        poll = select.poll()
        poll.register(lines.descriptor, select.POLLIN)
        with watching(box) as other:
            witness.write(f"{node(place, box)}/later", b"")
            other.until("later")
        assert lines.until("later") == ["a", "b", "c", "end"]


def test_opening_for_writing_only(mount: Mount, box: Path) -> None:
    with fails(errno.EINVAL):
        os.open(box / ".watch", os.O_WRONLY)
    assert "Invalid argument" in mount.run(f"echo x > {box}/.watch").stderr
    assert mount.run(f"rm {box}/.watch").returncode != 0


# ------------------------------------------------------------------------------ poll and others


def test_nonblocking(place: Place, box: Path, witness: XsClient) -> None:
    with watching(box) as lines:
        with fails(errno.EAGAIN):
            os.read(lines.descriptor, 100)
        witness.write(f"{node(place, box)}/x", b"")
        assert lines.next() == "x"
        with fails(errno.EAGAIN):
            os.read(lines.descriptor, 100)


@needs_poll
def test_poll(place: Place, box: Path, witness: XsClient) -> None:
    with watching(box) as lines:
        poll = select.poll()
        poll.register(lines.descriptor, select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == []
        witness.write(f"{node(place, box)}/x", b"")
        for _ in range(3):
            assert poll.poll(LIMIT * 1000) == [(lines.descriptor, select.POLLIN)]
        # The rest of a line can be read as well.
        assert os.read(lines.descriptor, 1) == b"x"
        assert poll.poll(0) == [(lines.descriptor, select.POLLIN)]
        assert os.read(lines.descriptor, 10) == b"\n"
        assert poll.poll(0) == []
    with control(box) as (descriptor, _):
        poll = select.poll()
        poll.register(descriptor, select.POLLIN | select.POLLOUT)
        assert poll.poll(0) == [(descriptor, select.POLLOUT)]


@needs_poll
@pytest.mark.parametrize("flags", [0, select.EPOLLET, select.EPOLLONESHOT])
def test_epoll(place: Place, box: Path, witness: XsClient, flags: int) -> None:
    with watching(box) as lines, select.epoll() as epoll:
        epoll.register(lines.descriptor, select.EPOLLIN | flags)
        for _ in range(3):
            assert epoll.poll(0) == []
            witness.write(f"{node(place, box)}/x", b"")
            assert epoll.poll(LIMIT) == [(lines.descriptor, select.EPOLLIN)]
            if flags == 0:
                assert epoll.poll(0) == [(lines.descriptor, select.EPOLLIN)]
            assert lines.next() == "x"
            if flags == select.EPOLLONESHOT:
                epoll.modify(lines.descriptor, select.EPOLLIN | flags)


@needs_poll
def test_an_edge_for_each_event_though_nothing_was_read(
    place: Place, box: Path, witness: XsClient
) -> None:
    with watching(box) as lines, select.epoll() as epoll:
        epoll.register(lines.descriptor, select.EPOLLIN | select.EPOLLET)
        for name in "abc":
            witness.write(f"{node(place, box)}/{name}", b"")
            assert epoll.poll(LIMIT) == [(lines.descriptor, select.EPOLLIN)]
        assert lines.until("c") == ["a", "b"]


@needs_poll
def test_select_of_many(place: Place, box: Path, witness: XsClient) -> None:
    for name in "abcde":
        (box / name).mkdir()
    with ExitStack() as stack:
        files = {name: stack.enter_context(watching(box / name)) for name in "abcde"}
        descriptors = [lines.descriptor for lines in files.values()]
        for name, lines in files.items():
            witness.write(f"{node(place, box)}/{name}/x", b"")
            assert select.select(descriptors, [], [], LIMIT)[0] == [lines.descriptor]
            assert lines.next() == "x"
        assert select.select(descriptors, [], [], 0)[0] == []


@needs_poll
def test_selectors(place: Place, box: Path, witness: XsClient) -> None:
    with watching(box) as lines, selectors.DefaultSelector() as selector:
        selector.register(lines.descriptor, selectors.EVENT_READ, "data")
        assert selector.select(0) == []
        witness.write(f"{node(place, box)}/x", b"")
        assert [key.data for key, _ in selector.select(LIMIT)] == ["data"]


def test_asyncio(place: Place, box: Path, witness: XsClient) -> None:
    async def changes(count: int) -> list[str]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str] = asyncio.Queue()
        with opened(box / ".watch") as descriptor:

            def readable() -> None:
                for line in os.read(descriptor, 65536).decode().splitlines():
                    queue.put_nowait(line)

            loop.add_reader(descriptor, readable)
            seen = [await queue.get()]
            for i in range(count):
                await loop.run_in_executor(None, witness.write, f"{node(place, box)}/n{i}", b"")
                seen.append(await queue.get())
            loop.remove_reader(descriptor)
        return seen

    seen = asyncio.run(asyncio.wait_for(changes(5), LIMIT))
    assert seen == [".", "n0", "n1", "n2", "n3", "n4"]


# ---------------------------------------------------------------------------- shells and programs

LOOP = 'while read -r path; do echo "$path"; [ "$path" = end ] && exit 5; done < "$0"'
PIPE = 'cat "$0" | while read -r path; do echo "$path"; [ "$path" = end ] && break; done; exit 5'
TIMED = """
exec 3< <(exec cat "$0")
while read -r -t 0.3 -u 3 path || [ $? -gt 128 ]; do
    echo "${path:-timeout}"
    [ "$path" = end ] && exit 5
done
exit 6
"""
PYTHON = """
import sys
for line in open(sys.argv[1]):
    print(line, end="", flush=True)
    if line == "end\\n":
        sys.exit(5)
"""


@pytest.mark.parametrize(
    "command",
    [
        ["bash", "-c", LOOP],
        ["dash", "-c", LOOP],
        ["bash", "-c", PIPE],
        ["dash", "-c", PIPE],
        [sys.executable, "-c", PYTHON],
    ],
    ids=lambda command: f"{Path(command[0]).name}-{'pipe' if command[2] == PIPE else 'loop'}",
)
def test_loops(place: Place, box: Path, witness: XsClient, command: Sequence[str]) -> None:
    with program(*command, box / ".watch") as reader:
        assert reader.lines.next() == "."
        wait_blocked(reader)
        for name in ("one", "two/three", "end"):
            witness.write(f"{node(place, box)}/{name}", b"")
            assert reader.lines.next() == name
        deadline = time.monotonic() + LIMIT
        while reader.process.poll() is None and time.monotonic() < deadline:
            # As with any pipe, cat notices only when it writes after the loop has ended.
            if command[2] == PIPE:
                witness.write(f"{node(place, box)}/more", b"")
            with suppress(subprocess.TimeoutExpired):
                reader.process.wait(0.2)
        assert reader.process.returncode == 5


def wait_blocked(reader: Program) -> None:
    """Until the program, or its first child, waits in a read."""
    pid = str(reader.process.pid)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    wchan = Path(f"/proc/{children[0] if children else pid}/wchan")
    deadline = time.monotonic() + LIMIT
    while "request_wait_answer" not in wchan.read_text():
        assert time.monotonic() < deadline


def test_cat_into_a_file(place: Place, box: Path, witness: XsClient, tmp_path: Path) -> None:
    """cat would rather have the kernel copy from file to file."""
    out = tmp_path / "out"
    out.touch()

    def wait_until(content: str) -> None:
        deadline = time.monotonic() + LIMIT
        while out.read_text() != content:
            assert time.monotonic() < deadline, out.read_text()

    with program("bash", "-c", 'exec cat "$0" > "$1"', box / ".watch", out) as cat:
        wait_until(".\n")
        cat.wait_blocked()
        witness.write(f"{node(place, box)}/x", b"")
        wait_until(".\nx\n")


def test_read_with_a_timeout_in_bash(place: Place, box: Path, witness: XsClient) -> None:
    with program("bash", "-c", TIMED, box / ".watch") as reader:
        assert reader.lines.next() == "."
        assert reader.lines.next() == "timeout"
        witness.write(f"{node(place, box)}/x", b"")
        assert set(reader.lines.until("x")) <= {"timeout"}
        witness.write(f"{node(place, box)}/end", b"")
        assert set(reader.lines.until("end")) <= {"timeout"}
        assert reader.process.wait(LIMIT) == 5


@needs_poll
def test_read_t_0_in_bash(place: Place, mount: Mount, box: Path) -> None:
    """Whether there is something to read, by select(2)."""
    script = f"""
        exec 3< {box}/.watch
        read -r -u 3; read -t 0 -u 3; echo $?
        echo 1 > {box}/x
        cat {box}/x > /dev/null
        until read -t 0 -u 3; do :; done; read -r -u 3; echo $REPLY
    """
    assert mount.bash(script) == "1\nx\n"


def wait_in_read(reader: Program) -> None:
    """Until it is blocked in read(2), not in the fstat(2) before it: what a trap is to do then, bash
    does only after that read has ended, of whatever file."""
    deadline = time.monotonic() + LIMIT
    call = Path(f"/proc/{reader.process.pid}/syscall")
    while call.read_text().split()[0] not in ("0", "63"):  # of x86-64, of all newer ones
        assert time.monotonic() < deadline
    reader.wait_blocked()


@pytest.mark.parametrize("shell", ["bash", "dash"])
def test_traps(box: Path, shell: str) -> None:
    script = 'trap "echo trapped; exit 3" USR1; read -r x; echo "$x"; read -r x; exit 4'
    with ExitStack() as stack:
        stdin = stack.enter_context(opened(box / ".watch", os.O_RDONLY))
        reader = stack.enter_context(program(shell, "-c", script, stdin=stdin))
        assert reader.lines.next() == "."
        wait_in_read(reader)
        assert reader.signal(signal.SIGUSR1) < SOON
        assert reader.process.returncode == 3
        assert reader.lines.next() == "trapped"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize(
    "command",
    [["cat"], ["bash", "-c", LOOP], ["dash", "-c", LOOP], [sys.executable, "-c", PYTHON]],
    ids=lambda command: Path(command[0]).name,
)
def test_signals_end_a_blocked_reader(
    mount: Mount, box: Path, command: Sequence[str], number: signal.Signals
) -> None:
    with program(*command, box / ".watch") as reader:
        assert reader.lines.next() == "."
        reader.wait_blocked()
        assert reader.signal(number) < SOON
        assert reader.process.returncode in (-number, 128 + number)
    wait_for(mount, "readers", 0)


def test_timeout_ends_a_blocked_reader(mount: Mount, box: Path) -> None:
    start = time.monotonic()
    done = mount.run(f"timeout 0.7 cat {box}/.watch")
    assert (done.returncode, done.stdout) == (124, ".\n")
    assert 0.7 <= time.monotonic() - start < 0.7 + SOON


# ------------------------------------------------------------------------------ what is watched


def test_paths_are_added_and_removed(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    elsewhere = f"{place.home}/data/elsewhere"
    with control(box) as (descriptor, lines):
        with fails(errno.EAGAIN):
            os.read(descriptor, 100)
        add(descriptor, "a")
        assert lines.next() == "a"
        add(descriptor, elsewhere, f"{top}/b")
        assert [lines.next(), lines.next()] == [elsewhere, "b"]
        for path in (f"{top}/unwatched", f"{top}/a/x", elsewhere, f"{top}/b/y"):
            witness.write(path, b"")
        assert lines.until("b/y") == ["a/x", elsewhere]
        add(descriptor, "-a", f"-{elsewhere}")
        for path in (f"{top}/a/x", elsewhere, f"{top}/b/z"):
            witness.write(path, b"")
        assert lines.next() == "b/z"
        add(descriptor, "-b", ".")
        assert lines.next() == "."
        witness.write(f"{top}/c", b"")
        assert lines.next() == "c"
    witness.rm(elsewhere)


def test_what_cannot_be_watched(place: Place, mount: Mount, box: Path) -> None:
    with control(box) as (descriptor, lines):
        for path in (
            "",
            "a b",
            "a//b",
            "a/",
            "/a/",
            "..",
            "./",
            "a.b",
            "\0",
            "@foo",
            "@releaseDomain/x",
            "-",
            "-a b",
        ):
            with fails(errno.EINVAL):
                os.write(descriptor, f"{path}\n".encode())
        with fails(errno.ENAMETOOLONG):
            os.write(descriptor, b"/" + b"a" * 4100)
        with fails(errno.ENOENT):
            os.write(descriptor, b"-a\n")
        add(descriptor, "a")
        for same in ("a", "./a", f"{node(place, box)}/a"):
            with fails(errno.EEXIST):
                os.write(descriptor, same.encode())
        assert lines.next() == "a"
        add(descriptor, f"-{node(place, box)}/a")
        # The write ends before the line that is refused; the rest is what a program writes next.
        assert os.write(descriptor, b"x\ny\na b\nz\n") == 4
        assert [lines.next(), lines.next()] == ["x", "y"]
    script = f"exec 3<> {box}/.watch; echo ok >&3; echo $?; echo a//b >&3; echo $?"
    done = mount.run(script)
    assert done.stdout == "0\n1\n"
    assert "Invalid argument" in done.stderr


@pytest.mark.quick_if(place=["C", "ocaml-guest"])
def test_the_verdict_of_the_store_is_the_error(place: Place, mount: Mount, box: Path) -> None:
    """A guest may have about a hundred watches; all others as many as a file takes."""
    verdict = errno.ENOSPC
    if place.guest and place.kind == "ocaml":
        verdict = errno.EDQUOT
    added = 0
    with control(box) as (descriptor, _):
        with fails(verdict):
            for added in range(WATCHES_MAX + 1):
                os.write(descriptor, b"n%d\n" % added)
        if place.guest:
            assert 50 < added < 200
        else:
            assert added == WATCHES_MAX
        assert mount.counter("watches") == place.own_watches + added
        # One less is one more.
        add(descriptor, "-n0", "n0")
    wait_for(mount, "watches", place.own_watches)


def test_special_watches(place: Place, box: Path) -> None:
    with control(box) as (descriptor, lines):
        add(descriptor, "@introduceDomain", "@releaseDomain")
        assert [lines.next(), lines.next()] == ["@introduceDomain", "@releaseDomain"]
        if place.daemon is not None and not place.guest:
            place.daemon.add_guest(9)
            assert lines.next() == "@introduceDomain"
            place.daemon.destroy_domain(9)
            assert "@releaseDomain" in [lines.next()]
        add(descriptor, "-@introduceDomain", "-@releaseDomain")
        with fails(errno.ENOENT):
            os.write(descriptor, b"-@releaseDomain\n")


def test_special_watches_of_one_domain(place: Place, mount: Mount, box: Path) -> None:
    """The daemon decides, as it does for other clients."""
    verdict = 0
    with place.witness() as other:
        try:
            other.watch("@releaseDomain/9", "token")
        except XsError as error:
            verdict = getattr(errno, error.name)
    with control(box) as (descriptor, lines):
        if not verdict:
            add(descriptor, "@releaseDomain/9")
            assert lines.next() == "@releaseDomain/9"
            add(descriptor, "-@releaseDomain/9")
        else:
            with fails(verdict):
                os.write(descriptor, b"@releaseDomain/9\n")
            assert mount.counter("watches") == place.own_watches


def test_transactions_are_ignored(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    transaction = mount.path / ".transaction" / "watched"
    transaction.mkdir()
    inside = transaction / "data" / box.name
    with watching(inside) as lines, watching(box) as outside:
        (inside / "x").write_text("1\n")
        witness.write(f"{node(place, box)}/y", b"")
        assert lines.next() == outside.next() == "y"
    transaction.rmdir()


# -------------------------------------------------------------------------------- many of them


def test_readers_share_a_watch(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    wait_for(mount, "watches", place.own_watches)
    with ExitStack() as stack:
        readers = [stack.enter_context(program("cat", box / ".watch")) for _ in range(5)]
        for reader in readers:
            assert reader.lines.next() == "."
        assert mount.counter("watches") == place.own_watches + 1
        assert mount.counter("readers") == 5
        readers[0].end()
        wait_for(mount, "readers", 4)
        assert mount.counter("watches") == place.own_watches + 1
        for i in range(20):
            witness.write(f"{node(place, box)}/n{i}", b"")
        for reader in readers[1:]:
            lines = [line for line in reader.lines.until("n19") if line != "."]
            assert lines == [f"n{i}" for i in range(19)]
    wait_for(mount, "readers", 0)
    wait_for(mount, "watches", place.own_watches)


def test_the_same_as_xenstore_watch(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """The watch file returns the changes that the tool prints, in its order."""
    top = node(place, box)
    tool = program("stdbuf", "-oL", "xenstore-watch", top, XENSTORED_PATH=place.socket)
    with tool as theirs, watching(box) as ours:
        assert theirs.lines.next() == top
        changes: list[Callable[[], object]] = [
            lambda: witness.write(f"{top}/a", b"1"),
            lambda: witness.write(f"{top}/b/c/d", b"1"),
            lambda: mount.bash(f"mkdir {box}/e"),
            lambda: mount.bash(f"echo 1 >> {box}/a; mv {box}/a {box}/f; rmdir {box}/e"),
            lambda: witness.set_perms(f"{top}/b", [f"n{place.domid}"]),
            lambda: witness.rm(f"{top}/b"),
            lambda: witness.write(top, b"value"),
        ]
        for number, change in enumerate(changes):
            change()
            witness.write(f"{top}/end{number}", b"")
            seen = theirs.lines.until(f"{top}/end{number}")
            expected = dict.fromkeys(path.removeprefix(top).strip("/") or "." for path in seen)
            assert list(dict.fromkeys(ours.until(f"end{number}"))) == list(expected)


def time_of_cat(mount: Mount, count: int = 60) -> float:
    """The shortest of them in seconds: other processes only add to it."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        subprocess.run(["cat", mount.path / "name"], stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.mark.quick_if(place=["C"])
def test_hundreds_of_blocked_readers_slow_nobody_down(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    alone = time_of_cat(mount)
    with ExitStack() as stack:
        readers = [stack.enter_context(program("cat", box / ".watch")) for _ in range(250)]
        for reader in readers:
            assert reader.lines.next() == "."
        for reader in readers:
            reader.wait_blocked()
        assert mount.counter("readers") == 250
        in_company = time_of_cat(mount)
        witness.write(f"{node(place, box)}/x", b"")
        for reader in readers:
            reader.lines.until("x")
        # If nobody reads its events in time, oxenstored stops the writer permanently.
        flood(witness, node(place, box), 300, 5000)
        witness.write(f"{node(place, box)}/end", b"")
        for reader in readers:
            reader.lines.until("end")
        for reader in readers:
            reader.process.terminate()
    wait_for(mount, "readers", 0)
    # The rest of the machine may have become busier meanwhile.
    assert in_company < 5 * max(alone, time_of_cat(mount)) + 0.01


@pytest.mark.quick_if(place=["C"])
def test_more_readers_than_there_may_be(mount: Mount, box: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    wait_for(mount, "readers", 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], READERS_MAX + 200), limits[1]))
    try:
        with ExitStack() as stack:
            for _ in range(READERS_MAX):
                stack.enter_context(opened(box / ".watch"))
            with fails(errno.EMFILE):
                os.open(box / ".watch", os.O_RDONLY)
            with fails(errno.EMFILE):
                os.open(box / ".watch", os.O_RDWR)
            assert mount.bash("cat data/.value name; ls -R . > /dev/null; cat .domid")
        wait_for(mount, "readers", 0)
        with watching(box):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


# ------------------------------------------------------------------- slow readers, dying daemons


def resident(mount: Mount) -> int:
    """Bytes."""
    status = Path(f"/proc/{mount.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def wait_stopped(process: subprocess.Popen[bytes]) -> None:
    """It stops as soon as its read has been answered."""
    deadline = time.monotonic() + LIMIT
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline


def flood(witness: XsClient, top: str, names: int, count: int) -> float:
    """Write so many times to so many nodes; how long it took.

    One request after the other, as programs do.
    """
    start = time.monotonic()
    for i in range(count):
        witness.write(f"{top}/n{i % names}", b"%d" % i)
    return time.monotonic() - start


@pytest.mark.quick_if(place=["C"])
def test_a_reader_that_sleeps_hurts_nobody(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    top = node(place, box)
    # More nodes than events are kept; a guest may have fewer, and so has no overflow.
    names = 300 if place.guest else EVENTS_MAX + 1000
    flood(witness, top, names, 10_000)
    with program("cat", box / ".watch") as awake, program("cat", box / ".watch") as reader:
        for each in (awake, reader):
            assert each.lines.next() == "."
        reader.process.send_signal(signal.SIGSTOP)
        wait_stopped(reader.process)
        before = resident(mount)
        assert flood(witness, top, names, 60_000) < 10 * LIMIT
        witness.write(f"{top}/end", b"")
        # Nobody else waits: neither for the mount, nor for the daemon, nor for events.
        assert mount.bash("cat name")
        awake.lines.until("end")
        assert resident(mount) - before < 8 << 20
        reader.process.send_signal(signal.SIGCONT)
        seen = reader.lines.until("end")
        complete = {f"n{i}" for i in range(names)}
        assert "." in seen or complete <= set(seen)
        # A reader that was stopped gets `.`, too, if its read was waiting then.
        assert "." in seen or place.guest
        assert len(seen) <= EVENTS_MAX


@pytest.mark.parametrize("kind", ["C", "ocaml"])
def test_the_daemon_restarts_and_each_reader_gets_a_line(kind: str, tmp_path: Path) -> None:
    with RealXenstored(kind) as daemon, ExitStack() as stack:
        daemon.populate()
        mount = stack.enter_context(mounted([daemon.socket], tmp_path / "m"))
        readers = [
            stack.enter_context(program("cat", mount.path / path / ".watch"))
            for path in (".", "data", "data", ".root")
        ]
        descriptor, lines = stack.enter_context(control(mount.path))
        add(descriptor, "data/x", "@releaseDomain")
        assert [lines.next(), lines.next()] == ["data/x", "@releaseDomain"]
        for reader in readers:
            assert reader.lines.next() == "."
            reader.wait_blocked()
        daemon.restart()
        for reader in readers:
            assert reader.lines.next() == "."
        assert {lines.next(), lines.next()} == {"data/x", "@releaseDomain"}
        with daemon.client() as witness:
            witness.write("/local/domain/0/data/x", b"1")
        assert lines.until("data/x") is not None
        for reader, line in zip(
            readers, ("data/x", "x", "x", "local/domain/0/data/x"), strict=True
        ):
            assert set(reader.lines.until(line)) <= {"."}


def test_the_mount_ends_under_blocked_readers(place: Place, tmp_path: Path) -> None:
    with ExitStack() as stack:
        mount = Mount([place.socket], tmp_path / "m")
        stack.callback(mount.clear)
        mount.wait_mounted()
        readers = [stack.enter_context(program("cat", mount.path / ".watch")) for _ in range(3)]
        for reader in readers:
            assert reader.lines.next() == "."
            reader.wait_blocked()
        start = time.monotonic()
        assert mount.end(signal.SIGTERM) == 0
        assert time.monotonic() - start < SOON
        for reader in readers:
            assert reader.process.wait(LIMIT) == 1
        assert "Traceback" not in mount.stderr


def test_a_path_that_is_refused_is_an_errno() -> None:
    with pytest.raises(FUSEError) as caught:
        path_of(b"a b", b"/local")
    assert caught.value.errno == errno.EINVAL


def test_a_signal_acts_within_half_a_second() -> None:
    clock = MockClock()

    async def test() -> None:
        async with world() as w:
            file = await w.lookup(b"data", b".watch")
            info = await w.operations.open(file.st_ino, RDONLY, ctx())
            assert await w.operations.read(info.fh, 0, 100) == b".\n"
            ended = trio.Event()

            async def read() -> None:
                await refused(errno.EINTR, w.operations.read(info.fh, 0, 100))
                ended.set()

            outcome = Outcome.WAITS
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(random, "uniform", lambda least, most: most)
                patch.setattr(CENSUS, "possible", True)
                patch.setattr(waiting_readers, "look", lambda thread, writable: outcome)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read)
                    await wait_all_tasks_blocked()
                    clock.jump(10)
                    await wait_all_tasks_blocked()
                    assert not ended.is_set()
                    outcome = Outcome.INTERRUPTED  # right after xsfs has looked
                    clock.jump(0.5)
                    await wait_all_tasks_blocked()
                    assert ended.is_set()
            await w.operations.release(info.fh)

    trio.run(test, clock=clock)


@in_world
async def test_two_watched_paths_that_become_one_at_a_migration_leave_no_watch(w: World) -> None:
    file = await w.lookup(b"data", b".watch")
    info = await w.operations.open(file.st_ino, RDWR, ctx())
    await w.operations.write(info.fh, 0, b"/old/x\n/new/x\n")
    w.store.watches.move(b"/old", b"/new")
    w.operations.move_handles(b"/old", b"/new")
    await w.operations.release(info.fh)
    with trio.fail_after(LIMIT):
        while len(w.store.watches):
            await trio.sleep(0.01)


def test_the_census_takes_a_tenth_of_the_time_even_if_it_finds_nobody() -> None:
    taken: list[float] = []

    async def take() -> dict[int, list[Family]]:
        taken.append(trio.current_time())
        await trio.sleep(1)
        return {}

    async def test() -> None:
        census = Census()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(census, "_take", take)
            for _ in range(3):
                await census.waiting(1, trio.current_time())

    trio.run(test, clock=MockClock(autojump_threshold=0))
    assert [later - earlier for earlier, later in pairwise(taken)] == [10, 10]


@in_world
async def test_an_event_ends_the_wait_for_a_census(w: World) -> None:
    """The search for the thread that reads may take long on a large host."""
    with pytest.MonkeyPatch.context() as patch:
        now = trio.current_time()
        patch.setattr(CENSUS, "possible", True)
        patch.setattr(CENSUS, "_began", now - 1000)
        patch.setattr(CENSUS, "_due", now + 9000)
        patch.setattr(watch_files, "LOOK_SECONDS", (0, 0))
        file = await w.lookup(b"data", b".watch")
        info = await w.operations.open(file.st_ino, RDONLY, ctx())
        assert await w.operations.read(info.fh, 0, 100) == b".\n"
        lines: list[bytes] = []

        async def read() -> None:
            lines.append(await w.operations.read(info.fh, 0, 100))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            await w.store.write("data/x", b"1")
        assert lines == [b"x\n"]
        await w.operations.release(info.fh)
