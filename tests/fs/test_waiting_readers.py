"""Ring: a real mount.  A signal interrupts a waiting read of a watch file; nothing else does."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import node
from tests.support.mounting import LIMIT, Place, each_place
from tests.support.programs import Program, program
from tests.support.roots import debian_root
from tests.support.xenstored.harness import XsClient

place = each_place("embedded")

WAITED = 2.0
"""Seconds in which xsfs looks at a blocked reader several times."""

SOON = 20.0
"""Seconds in which a signal acts: half a second, and what a busy machine adds.  Less than CENSUS_SECONDS, in
which xsfs would find it out in any case."""

READERS: Mapping[str, Sequence[str]] = {
    "cat": ("cat",),
    "head": ("head", "-n", "100"),
    "tail": ("tail", "-n", "+1"),
    "tr": ("tr", "a", "b"),
    "cut": ("cut", "-c1-"),
    "nl": ("nl",),
    "paste": ("paste", "-"),
    "uniq": ("uniq",),
    "rev": ("rev",),
    "fold": ("fold",),
    "expand": ("expand",),
    "column": ("column",),
    "sort": ("sort",),
    "od": ("od", "-c"),
    "tee": ("tee",),
    "dd": ("dd", "status=none"),
    "xxd": ("xxd",),
    "iconv": ("iconv", "-f", "latin1", "-t", "utf8"),
    "grep": ("grep", "."),
    "gawk": ("gawk", "{ print }"),
    "gawk getline": ("gawk", "BEGIN { while ((getline line) > 0) print line }"),
    "mawk": ("mawk", "-W", "interactive", "{ print }"),
    "sed": ("sed", "-u", ""),
    "perl": ("perl", "-ne", "print"),
    "perl sysread": ("perl", "-e", "while (sysread(STDIN, $data, 100)) { print $data }"),
    "lua": ("lua5.4", "-e", "for line in io.lines() do print(line) end"),
    "xargs": ("xargs", "-n1", "echo"),
    "bash": ("bash", "-c", "while read -r path; do echo $path; done"),
    "dash": ("dash", "-c", "while read -r path; do echo $path; done"),
    "busybox sed": ("busybox", "sed", ""),
    "ed": ("ed", "-s", "/dev/stdin"),
    "rg": ("rg", "--line-buffered", "."),
    "unexpand": ("unexpand",),
    "wc": ("wc", "-l"),
    "base64": ("base64",),
    "python": ("python3", "-c", "import sys\nfor line in sys.stdin: print(line)"),
}


class Blocked(Program):
    """A program whose standard input is the watch file of a directory of its own."""

    def __init__(self, name: str, directory: Path, *, system: Sequence[str], opener: str) -> None:
        directory.mkdir()
        self.name = name
        self.directory = directory
        file = directory / ".watch"
        command = (*system, *READERS[name])
        if opener == "itself":
            super().__init__("sh", "-c", 'exec "$@" < "$0"', file, *command)
        else:
            stdin = os.open(file, os.O_RDONLY)
            super().__init__(*command, stdin=stdin)
            os.close(stdin)

    @property
    def received(self) -> int:
        """How many bytes it has read."""
        text = Path(f"/proc/{self.process.pid}/io").read_text()
        return int(text.split()[1])

    @property
    def state(self) -> str:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(reached: Callable[[], bool], limit: float = LIMIT) -> bool:
    """Whether it is reached in time."""
    deadline = time.monotonic() + limit
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def waits(reader: Program) -> bool:
    """Whether it waits for an answer."""
    assert reader.process.poll() is None, f"{reader.process.args!r} has ended"
    return waits_for_xsfs(reader.process.pid)


def wchan(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text()
    except OSError:
        return ""


def waits_for_xsfs(pid: int) -> bool:
    return "request_wait_answer" in wchan(pid)


def has_ended(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def all_wait(readers: Sequence[Blocked]) -> bool:
    assert failing(readers, lambda reader: until(lambda: waits(reader))) == []
    return True


def failing(readers: Sequence[Blocked], check: Callable[[Blocked], bool]) -> list[str]:
    return [reader.name for reader in readers if not check(reader)]


INSTALL = """\
# A mirror of an unreleased suite may be older than the suite allows.
apt-get -qq update -o Acquire::Check-Valid-Until=false
apt-get -qq install -y --no-install-recommends bsdextrautils busybox gawk lua5.4 mawk perl-base \
    python3-minimal ripgrep xxd
"""


@pytest.fixture(scope="module", params=["here", pytest.param("sid", marks=pytest.mark.slow)])
def system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sequence[str]]:
    """The command that starts programs of a system: of this one, or of a Debian with the newest coreutils,
    which take EINTR for an error."""
    if request.param == "here":
        yield ()
        return
    with debian_root("sid", tmp_path_factory.mktemp("roots") / "sid") as root:
        root.sh(INSTALL)
        major, minor = map(int, root.sh("cat --version").split()[3].split("."))
        assert (major, minor) >= (9, 8)
        yield "unshare", "--mount-proc", f"--root={root.path}"


@contextmanager
def all_blocked(box: Path, system: Sequence[str], opener: str) -> Iterator[list[Blocked]]:
    """All kinds of readers, blocked for WAITED seconds.  Their first line is read."""
    with ExitStack() as stack:
        readers = []
        for number, name in enumerate(READERS):
            if system and name == "ed":
                continue  # it opens its file for writing, too, and then there is no watch at first
            reader = Blocked(name, box / f"d{number}", system=system, opener=opener)
            stack.callback(reader.end)
            readers.append(reader)
        assert all_wait(readers)
        time.sleep(WAITED)
        assert failing(readers, lambda reader: reader.process.poll() is None) == []
        yield readers


def all_read_on(place: Place, witness: XsClient, readers: Sequence[Blocked]) -> None:
    before = {reader.name: reader.received for reader in readers}
    for reader in readers:
        witness.write(f"{node(place, reader.directory)}/line", b"")
    assert failing(readers, lambda r: until(lambda: r.received >= before[r.name] + 5)) == []
    assert all_wait(readers)


@pytest.mark.parametrize("opener", ["itself", "its parent"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_reader_waits_and_ends_when_it_is_signalled(
    place: Place,
    box: Path,
    witness: XsClient,
    system: Sequence[str],
    opener: str,
    number: signal.Signals,
) -> None:
    with all_blocked(box, system, opener) as readers:
        all_read_on(place, witness, readers)

        start = time.monotonic()
        for reader in readers:
            reader.process.send_signal(number)
        ended = failing(readers, lambda r: until(lambda: r.process.poll() is not None, SOON))
        assert ended == []
        assert time.monotonic() - start < SOON


@pytest.mark.parametrize("opener", ["itself", "its parent"])
def test_a_reader_that_was_stopped_goes_on(
    place: Place, box: Path, witness: XsClient, system: Sequence[str], opener: str
) -> None:
    with all_blocked(box, system, opener) as readers:
        start = time.monotonic()
        for reader in readers:
            reader.process.send_signal(signal.SIGSTOP)
        assert failing(readers, lambda r: until(lambda: r.state == "T")) == []
        assert time.monotonic() - start < SOON
        for reader in readers:
            reader.process.send_signal(signal.SIGCONT)
        assert all_wait(readers)
        all_read_on(place, witness, readers)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A control group of the second version."""
    top = tmp_path / "cgroup"
    top.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "cgroup2", "none", top], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this kernel gives no control groups of the second version: {mounted.stderr}")
    path = top / f"xsfs-test-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        (path / "cgroup.freeze").write_text("0")
        assert until(lambda: "populated 0" in (path / "cgroup.events").read_text())
        path.rmdir()
        subprocess.run(["umount", top], check=True, timeout=LIMIT)


@pytest.mark.parametrize("opener", ["itself", "its parent"])
def test_a_reader_that_was_frozen_goes_on(
    place: Place, box: Path, witness: XsClient, group: Path, system: Sequence[str], opener: str
) -> None:
    with all_blocked(box, system, opener) as readers:
        for reader in readers:
            (group / "cgroup.procs").write_text(str(reader.process.pid))
        start = time.monotonic()
        (group / "cgroup.freeze").write_text("1")
        assert until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        assert time.monotonic() - start < SOON
        (group / "cgroup.freeze").write_text("0")
        assert all_wait(readers)
        all_read_on(place, witness, readers)


def test_a_reader_hears_nothing_while_nothing_happens(box: Path) -> None:
    """No line, and no EINTR, though other readers of the directory are signalled."""
    with ExitStack() as stack:
        readers = [
            stack.enter_context(program("perl", "-e", SYSREAD, box / ".watch")) for _ in range(5)
        ]
        for reader in readers:
            assert reader.lines.next() == "."
            reader.wait_blocked()
        for reader in readers[1:]:
            assert reader.signal(signal.SIGTERM) < SOON
        time.sleep(WAITED)
        assert not select.select([readers[0].lines.descriptor], [], [], 0)[0]
        assert readers[0].process.poll() is None


SYSREAD = """
    open(my $file, "<", $ARGV[0]) or die; $| = 1;
    while (defined(my $count = sysread($file, my $data, 100))) { print $data }
    print "error: $!\\n";
"""


def test_children_that_share_one_directory(box: Path) -> None:
    """The shell has opened all of the files, and waits for its children."""
    script = 'for i in 1 2 3 4; do (exec 3< "$0"; cat <&3; :) & done; wait'
    with program("bash", "-c", script, box / ".watch") as shell:
        for _ in range(4):
            assert shell.lines.next() == "."
        pid = shell.process.pid
        shells = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        cats = [int(Path(f"/proc/{p}/task/{p}/children").read_text()) for p in shells]
        for cat in cats:
            assert until(partial(waits_for_xsfs, cat))
        time.sleep(WAITED)
        for cat in cats:
            os.kill(cat, signal.SIGTERM)
            assert until(partial(has_ended, cat), SOON)
        assert shell.process.wait(LIMIT) == 0
        assert not select.select([shell.lines.descriptor], [], [], 0)[0] or (
            os.read(shell.lines.descriptor, 100) == b""
        )


def test_a_child_reads_one_file_and_the_opener_of_both_another(box: Path) -> None:
    (box / "other").mkdir()
    script = """
        exec 3< "$0/.watch" 4< "$0/other/.watch"
        cat <&4 > /dev/null & echo $!
        while read -r path <&3; do :; done
    """
    with program("sh", "-c", script, box) as shell:
        child = int(shell.lines.next())
        assert until(partial(waits_for_xsfs, child))
        assert until(lambda: waits(shell))
        time.sleep(WAITED)
        os.kill(child, signal.SIGTERM)
        assert until(lambda: not waits_for_xsfs(child), SOON)
        assert waits(shell)


def test_two_readers_of_one_open_file(box: Path) -> None:
    """The second waits for the first in the kernel, and no signal can reach it there."""
    with program("sh", "-c", 'exec 3< "$0"; cat <&3 & cat <&3 & wait', box / ".watch") as shell:
        assert shell.lines.next() == "."
        pid = shell.process.pid
        cats: list[int] = []

        def blocked() -> bool:
            cats[:] = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
            places = {wchan(cat) for cat in cats}
            return len(cats) == 2 and any("fdget_pos" in place for place in places)

        assert until(blocked)
        second = next(c for c in cats if "fdget_pos" in wchan(c))
        os.kill(second, signal.SIGKILL)
        assert until(partial(has_ended, second), SOON)


def test_a_write_is_let_in_while_a_thread_reads(place: Place, box: Path) -> None:
    descriptor = os.open(box / ".watch", os.O_RDWR)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(os.read(descriptor, 100)))
    try:
        reader.start()
        tasks = f"/proc/{os.getpid()}/task/{reader.native_id}/wchan"
        assert until(lambda: "request_wait" in Path(tasks).read_text())
        start = time.monotonic()
        assert os.write(descriptor, b"x\n") == 2
        assert time.monotonic() - start < SOON
        reader.join(LIMIT)
        assert received == [b"x\n"]
    finally:
        os.close(descriptor)


def test_signal_handlers_get_eintr(box: Path) -> None:
    """perl defers its handlers until the system call has ended."""
    script = f'$SIG{{USR1}} = sub {{ print "handled\\n" }};{SYSREAD}'
    with program("perl", "-e", script, box / ".watch") as reader:
        assert reader.lines.next() == "."
        reader.wait_blocked()
        reader.process.send_signal(signal.SIGUSR1)
        assert reader.lines.until("handled") == []
        assert reader.lines.next() == "error: Interrupted system call"


def test_ignored_and_blocked_signals_are_no_signals(box: Path) -> None:
    block = "use POSIX; sigprocmask(SIG_BLOCK, POSIX::SigSet->new(SIGUSR2));"
    with program(
        "perl", "-e", f'$SIG{{USR1}} = "IGNORE";{block}{SYSREAD}', box / ".watch"
    ) as reader:
        assert reader.lines.next() == "."
        reader.wait_blocked()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD, signal.SIGWINCH):
            reader.process.send_signal(number)
        time.sleep(WAITED)
        assert not select.select([reader.lines.descriptor], [], [], 0)[0]
        assert reader.signal(signal.SIGTERM) < SOON


def test_readers_that_xsfs_cannot_see_end_now_and_then(tmp_path: Path) -> None:
    """xsfs runs in a PID namespace of its own."""
    path = tmp_path / "m"
    path.mkdir()
    xsfs = [sys.executable, "-m", "xsfs", "-f", "embedded", str(path)]
    process = subprocess.Popen(["unshare", "--pid", "--fork", "--kill-child", *xsfs])
    try:
        assert until(lambda: os.path.ismount(path))
        with program("perl", "-e", SYSREAD, path / ".watch") as reader:
            assert reader.lines.next() == "."
            assert reader.lines.next() == "error: Interrupted system call"
        with program("cat", path / ".watch") as reader:
            assert reader.lines.next() == "."
            reader.wait_blocked()
            assert reader.signal(signal.SIGTERM) < SOON
    finally:
        subprocess.run(["umount", path], check=True, timeout=LIMIT)
        process.wait(LIMIT)
