"""Ring: real mounts of real daemons that are killed, stopped and restarted, with work under way."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.fs.test_values import fails
from tests.support.lying_store import LyingStore, Talk, on, says, silence
from tests.support.messages import Message
from tests.support.mounting import LIMIT, Mount, mounted, quick_params, refusal
from tests.support.programs import Lines, program
from tests.support.xenstored.harness import RealXenstored
from xsfs.xenstore.protocol import Op

TIMEOUT = 3.0
"""Of a request of xsfs: enough on a busy machine."""
HOME = "/local/domain/0"

CLEAR = {errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.ENOENT, errno.EEXIST}
"""An operation that timed out may have been carried out: EEXIST is then right."""


# A daemon that is gone or silent is as good as any other.
@pytest.fixture(params=quick_params(["C"], ["C", "ocaml"]))
def daemon(request: pytest.FixtureRequest) -> Iterator[RealXenstored]:
    with RealXenstored(request.param) as daemon:
        furnish(daemon)
        yield daemon


@pytest.fixture
def mount(daemon: RealXenstored, tmp_path: Path) -> Iterator[Mount]:
    with mounted(["-o", f"timeout={TIMEOUT}", daemon.socket], tmp_path / "m") as mount:
        yield mount


def furnish(daemon: RealXenstored) -> None:
    daemon.populate()
    with daemon.client() as client:
        for number in range(50):
            client.write(f"{HOME}/data/d{number}/n", b"0")


class InFlight:
    """Fifty operations at once, each again and again, of all kinds and in as many directories (the
    kernel lets one at a time into each).  It counts the results of the attempts."""

    def __init__(self, mount: Mount) -> None:
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0
        self.over = threading.Event()
        kinds = (self.read, self.write, self.list, self.append, self.make)
        self.threads = [
            threading.Thread(
                target=self.repeat, args=(kinds[number % 5], mount.path / "data" / f"d{number}")
            )
            for number in range(50)
        ]

    def __enter__(self) -> InFlight:
        for thread in self.threads:
            thread.start()
        self.wait_for("ok", 50)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "an operation never ended"

    def repeat(self, kind: Callable[[Path], object], directory: Path) -> None:
        while not self.over.is_set():
            start = time.monotonic()
            try:
                kind(directory)
                outcome = "ok"
            except OSError as error:
                outcome = "clear" if error.errno in CLEAR else str(error)
                self.over.wait(0.01)
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.outcomes[outcome] += 1

    def read(self, directory: Path) -> None:
        assert (directory / "n").read_text()

    def write(self, directory: Path) -> None:
        (directory / "n").write_text("1\n")

    def list(self, directory: Path) -> None:
        os.listdir(directory)

    def append(self, directory: Path) -> None:
        with open(directory / "n", "a") as file:
            file.write("1")
        if (directory / "n").stat().st_size > 500:
            (directory / "n").write_text("1\n")

    def make(self, directory: Path) -> None:
        (directory / "made").mkdir()
        (directory / "made").rmdir()

    def wait_for(self, outcome: str, more: int) -> None:
        """Until so many more came to this."""
        deadline = time.monotonic() + LIMIT
        wanted = self.outcomes[outcome] + more
        while self.outcomes[outcome] < wanted:
            assert time.monotonic() < deadline, self.outcomes
            time.sleep(0.01)

    def check(self) -> None:
        assert set(self.outcomes) <= {"ok", "clear"}, self.outcomes
        # An operation may take several requests, each of which has the limit.
        assert self.slowest < LIMIT / 2, self.slowest


# ------------------------------------------------------------------------ killed and restarted


def test_a_restart_with_fifty_operations_in_flight(daemon: RealXenstored, mount: Mount) -> None:
    with InFlight(mount) as work:
        for _ in range(3):
            daemon.restart()
            furnish(daemon)
            work.wait_for("ok", 200)
    work.check()
    assert mount.counter("reconnects") >= 3
    assert mount.counter("transactions") == 0


def test_gone_for_a_while_with_fifty_operations_in_flight(
    daemon: RealXenstored, mount: Mount
) -> None:
    with InFlight(mount) as work:
        daemon.kill()
        # Refused for longer than anybody waits.
        work.wait_for("clear", 60)
        daemon.start()
        furnish(daemon)
        work.wait_for("ok", 200)
    work.check()
    assert work.outcomes["clear"] >= 60


def test_stopped_with_fifty_operations_in_flight(daemon: RealXenstored, mount: Mount) -> None:
    with InFlight(mount) as work:
        daemon.pause()
        try:
            work.wait_for("clear", 60)
        finally:
            daemon.resume()
        work.wait_for("ok", 200)
    work.check()


def test_a_short_stop_is_no_error(daemon: RealXenstored, tmp_path: Path) -> None:
    with (
        mounted(["-o", f"timeout={LIMIT}", daemon.socket], tmp_path / "m") as mount,
        InFlight(mount) as work,
    ):
        for _ in range(5):
            daemon.pause()
            time.sleep(0.1)
            daemon.resume()
            work.wait_for("ok", 100)
    work.check()
    assert not work.outcomes["clear"], work.outcomes


CROWD = 20
"""As many as would wait for each other in the kernel."""


def crowd(attempt: Callable[[int], object]) -> tuple[set[int], float]:
    """So many processes' attempts at once: their errors, and how long the last one took."""
    errors: set[int] = set()
    threads = [
        threading.Thread(target=lambda number=number: errors.add(refusal(partial(attempt, number))))
        for number in range(CROWD)
    ]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * LIMIT)
        assert not thread.is_alive()
    return errors, time.monotonic() - start


@pytest.mark.parametrize("how", ["stopped", "gone"])
def test_a_crowd_waits_for_one_time_limit_and_not_each_in_turn(
    daemon: RealXenstored, mount: Mount, how: str
) -> None:
    """The kernel lets one process at a time look up the same name, or make something in a directory."""
    data = mount.path / "data"
    assert (data / "d0" / "n").read_text()
    Path("/proc/sys/vm/drop_caches").write_text("2\n")
    attempts: list[Callable[[int], object]] = [
        lambda number: os.stat(data / f"d{number}" / "n"),
        lambda number: os.mkdir(data / "d0" / f"made{number}"),
        lambda number: os.listdir(data),
    ]
    daemon.pause() if how == "stopped" else daemon.kill()
    try:
        for number, attempt in enumerate(attempts):
            errors, seconds = crowd(attempt)
            assert errors <= {errno.ETIMEDOUT, errno.EIO}, errors
            # The first requests find out; later ones fail soon.
            assert seconds < CROWD * TIMEOUT / 2, (number, seconds)
    finally:
        comes_back = threading.Thread(target=daemon.resume if how == "stopped" else daemon.start)
        comes_back.start()
        start = time.monotonic()
        # Without a pause, or xsfs would forget that nothing was answered.
        while refusal(lambda: os.stat(data / "d0" / "n")) in (errno.ETIMEDOUT, errno.EIO):
            assert time.monotonic() - start < LIMIT, mount.stderr
        comes_back.join(LIMIT)
    assert mount.stderr.count("has not answered") == 1
    assert mount.stderr.count("answers again") == 1


def test_a_silent_daemon_is_not_asked_while_nobody_asks(
    daemon: RealXenstored, tmp_path: Path
) -> None:
    asked = []

    def count(talk: Talk, request: Message) -> bool:
        asked.append(request.op)
        return True

    with (
        LyingStore(tmp_path / "liar.sock", daemon.socket) as liar,
        mounted(["-o", f"timeout={TIMEOUT}", liar.path], tmp_path / "m") as mount,
    ):
        liar.lie = count
        with fails(errno.ETIMEDOUT):
            (mount.path / "name").read_text()
        time.sleep(2 * TIMEOUT)
        before = len(asked)
        assert 2 < before < 30
        time.sleep(TIMEOUT)
        assert len(asked) == before
        # The next request has the whole time limit again.
        threading.Timer(TIMEOUT / 2, liar.behave).start()
        start = time.monotonic()
        refusal(lambda: os.stat(mount.path / "name"))
        assert time.monotonic() - start > TIMEOUT / 2
        liar.behave()
        while refusal(lambda: os.stat(mount.path / "name")):
            assert time.monotonic() - start < LIMIT


def test_a_known_file_costs_the_time_limit_once(daemon: RealXenstored, mount: Mount) -> None:
    """The kernel asks twice for a name that it knows."""
    path = mount.path / "data" / "d0" / "n"
    for _ in range(2):
        assert path.read_text() == "0\n"
    daemon.pause()
    try:
        start = time.monotonic()
        with fails(errno.ETIMEDOUT):
            path.read_text()
        assert TIMEOUT * 0.9 < time.monotonic() - start < 1.9 * TIMEOUT
    finally:
        daemon.resume()
    assert path.read_text() == "0\n"


# --------------------------------------------------------------------------------- transactions


def begin(mount: Mount) -> Path:
    tx = mount.path / ".transaction" / "t"
    tx.mkdir()
    number = tx / "data" / "d0" / "n"
    number.write_text(f"{int(number.read_text()) + 1}\n")
    return tx


def commit(tx: Path) -> None:
    descriptor = os.open(tx / ".control", os.O_WRONLY)
    try:
        os.write(descriptor, b"commit\n")
    finally:
        os.close(descriptor)


def test_a_commit_while_the_daemon_is_stopped(daemon: RealXenstored, mount: Mount) -> None:
    """Nobody knows its outcome; it happens once at most, also when the daemon goes on."""
    for _ in range(3):
        with daemon.client() as client:
            before = int(client.read(f"{HOME}/data/d0/n"))
        tx = begin(mount)
        control = os.open(tx / ".control", os.O_WRONLY)
        daemon.pause()
        try:
            with fails(errno.EIO):
                os.write(control, b"commit\n")
        finally:
            daemon.resume()
            os.close(control)
        assert os.listdir(mount.path / ".transaction") == []
        with daemon.client() as client:
            # The daemon may have carried out requests that xsfs sent before it saw the hang-up: once.
            assert int(client.read(f"{HOME}/data/d0/n")) in (before, before + 1)
    assert "unknown" in mount.stderr


def test_a_commit_while_the_daemon_is_killed(daemon: RealXenstored, mount: Mount) -> None:
    tx = begin(mount)
    control = os.open(tx / ".control", os.O_WRONLY)
    daemon.pause()
    outcomes: list[int] = []

    def attempt() -> None:
        try:
            os.write(control, b"commit\n")
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno or -1)

    thread = threading.Thread(target=attempt)
    thread.start()
    # It has been sent when it waits for its answer.
    deadline = time.monotonic() + LIMIT
    while "wait" not in Path(f"/proc/self/task/{thread.native_id}/wchan").read_text():
        assert time.monotonic() < deadline
    daemon.restart()
    furnish(daemon)
    thread.join(LIMIT)
    os.close(control)
    assert outcomes in ([errno.EIO], [errno.ESTALE])
    assert (mount.path / "data" / "d0" / "n").read_text() == "0\n"


def test_a_transaction_of_a_daemon_that_is_gone(daemon: RealXenstored, mount: Mount) -> None:
    tx = begin(mount)
    opened = os.open(tx / "data" / "d0" / "n", os.O_RDWR)
    watch = os.open(tx / "data" / ".watch", os.O_RDONLY | os.O_NONBLOCK)
    lines = Lines(watch)
    assert lines.next() == "."
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    daemon.restart()
    furnish(daemon)
    # poll(2) of its watch file returns, because no event will come.
    assert poll.poll(LIMIT * 1000)
    for attempt in (
        lambda: os.pread(opened, 10, 0),
        lambda: os.write(opened, b"2\n"),
        lambda: os.read(watch, 100),
    ):
        with fails(errno.ESTALE):
            attempt()
    os.close(opened)
    os.close(watch)
    # The kernel may have forgotten it.
    assert refusal(partial(commit, tx)) in (errno.ESTALE, errno.ENOENT)
    assert os.listdir(mount.path / ".transaction") == []
    begin(mount)
    commit(tx)
    assert (mount.path / "data" / "d0" / "n").read_text() == "1\n"


@pytest.mark.parametrize("how", ["commit", "rollback", "rmdir"])
def test_who_polls_in_a_transaction_hears_of_its_end(
    daemon: RealXenstored, mount: Mount, how: str
) -> None:
    tx = mount.path / ".transaction" / "t"
    tx.mkdir()
    watch = os.open(tx / "data" / ".watch", os.O_RDONLY | os.O_NONBLOCK)
    assert Lines(watch).next() == "."
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    told: list[object] = []
    # Nothing was changed in it, so there is no other event.
    thread = threading.Thread(target=lambda: told.append(poll.poll(LIMIT * 1000)))
    thread.start()
    if how == "rmdir":
        tx.rmdir()
    else:
        with open(tx / ".control", "wb", buffering=0) as control:
            control.write(how.encode())
    # Told, not found out when it looks again at the end of its time.
    thread.join(LIMIT / 2)
    assert told, "nobody told"
    assert told[0]
    with fails(errno.ESTALE):
        os.read(watch, 100)
    os.close(watch)


# ------------------------------------------------------------------------------------- watches


def test_readers_of_a_daemon_that_stands_still_when_it_comes_back(
    daemon: RealXenstored, mount: Mount
) -> None:
    """Its WATCHes get no answer in time.  In the end they are set."""
    with ExitStack() as stack:
        readers = [
            stack.enter_context(program("cat", mount.path / path / ".watch"))
            for path in ("data", "data", ".")
        ]
        for reader in readers:
            assert reader.lines.next() == "."
        daemon.restart()
        daemon.pause()
        time.sleep(1.5 * TIMEOUT)
        daemon.resume()
        for reader in readers:
            assert reader.lines.next() == "."
        furnish(daemon)
        with daemon.client() as client:
            client.write(f"{HOME}/data/end", b"")
        readers[0].lines.until("end")
        readers[1].lines.until("end")
        readers[2].lines.until("data/end")


def test_a_watch_that_is_refused_when_it_is_set_again(
    daemon: RealXenstored, tmp_path: Path
) -> None:
    """Others may have used up the quota.  xsfs retries the watch, and then its readers get an event."""
    with (
        LyingStore(tmp_path / "liar.sock", daemon.socket) as liar,
        mounted([liar.path], tmp_path / "m") as mount,
        program("cat", mount.path / "data" / ".watch") as reader,
        program("cat", mount.path / "data" / "d0" / ".watch") as other,
    ):
        for each in (reader, other):
            assert each.lines.next() == "."
        refused = []

        def refuse(talk: Talk, request: Message) -> bool:
            refused.append(time.monotonic())
            return says(b"E2BIG\0", Op.ERROR)(talk, request)

        liar.lie = on(Op.WATCH, refuse)
        liar.hang_up()
        # Each reader learns at once that it may have missed something.
        for each in (reader, other):
            assert each.lines.next() == "."
        deadline = time.monotonic() + LIMIT
        while len(refused) < 6:
            assert time.monotonic() < deadline, "it is not tried again"
            time.sleep(0.05)
        # Both at once, a second later, and another second later.
        assert refused[4] - refused[0] > 2.0
        liar.behave()
        for each in (reader, other):
            assert each.lines.next() == "."
        with daemon.client() as client:
            client.write(f"{HOME}/data/d0/end", b"")
        reader.lines.until("d0/end")
        other.lines.until("end")
        assert mount.stderr.count("refuses the watch") == 2
        assert mount.stderr.count("is set again") == 2


def test_watches_that_are_not_answered_when_they_are_set_again(
    daemon: RealXenstored, tmp_path: Path
) -> None:
    with (
        LyingStore(tmp_path / "liar.sock", daemon.socket) as liar,
        mounted(["-o", "timeout=2", liar.path], tmp_path / "m") as mount,
        program("cat", mount.path / "data" / ".watch") as reader,
    ):
        assert reader.lines.next() == "."
        liar.lie = on(Op.WATCH, silence)
        liar.hang_up()
        deadline = time.monotonic() + LIMIT
        while liar.connections < 5:
            assert time.monotonic() < deadline, "it is not tried again"
            time.sleep(0.05)
        liar.behave()
        assert reader.lines.next() == "."
        with daemon.client() as client:
            client.write(f"{HOME}/data/end", b"")
        reader.lines.until("end")
