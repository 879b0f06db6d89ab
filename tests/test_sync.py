"""xsfs.sync against both real daemons, a guest of each, and the embedded store."""

from __future__ import annotations

import inspect
import os
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import xsfs.sync
from tests.support import client_places
from tests.support.clients import HOME, Place
from tests.support.mirroring import await_true
from xsfs import Conflict, ConnectionLost, NotFound, StoreError, StoreUnavailable, TransactionEnded
from xsfs.sync import SyncStore, SyncTransaction, SyncWatch
from xsfs.xenstore import protocol
from xsfs.xenstore.commands import Commands
from xsfs.xenstore.store import Transaction

places, place = client_places.places, client_places.place

LIMIT = 60.0


@pytest.fixture
def store(place: Place) -> Iterator[SyncStore]:
    with xsfs.sync.open_store(place.path) as store:
        yield store


@pytest.fixture
def base(place: Place, store: SyncStore) -> Iterator[str]:
    """The path of a node for one test alone."""
    base = f"{place.root}/sync"
    store.mkdir(base)
    yield base
    store.delete(base)


# ------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(
    ("asynchronous", "blocking"), [(Commands, SyncStore), (Transaction, SyncTransaction)]
)
def test_all_operations_exist_with_their_arguments(
    asynchronous: type[Commands], blocking: type[SyncStore | SyncTransaction]
) -> None:
    within = {"finish", "walk_in_windows"}
    found = 0
    for name, method in inspect.getmembers(asynchronous):
        is_operation = inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)
        if is_operation and not name.startswith("_") and name not in within:
            mine = inspect.signature(getattr(blocking, name))
            assert list(mine.parameters) == list(inspect.signature(method).parameters), name
            assert getattr(blocking, name).__doc__
            found += 1
    assert found >= 20


def test_nodes(store: SyncStore, base: str) -> None:
    store.write(f"{base}/n", 42)
    assert store.read(f"{base}/n") == b"42"
    assert store.read_integer(path=f"{base}/n") == 42
    assert store.list(base) == [b"n"]
    assert store.exists(f"{base}/n")
    store.set_perms(f"{base}/n", store.get_perms(f"{base}/n"))
    assert store.call(protocol.read(f"{base}/n".encode())) == b"42"
    assert list(store.walk(base)) == [
        (base.encode(), b"", [b"n"]),
        (f"{base}/n".encode(), b"42", []),
    ]
    store.delete(f"{base}/n")
    assert not store.exists(f"{base}/n")
    assert store.get_domain_path(7) == HOME.encode()


def test_a_walk_in_many_windows(store: SyncStore, base: str) -> None:
    store.pipeline([protocol.mkdir(f"{base}/{number}".encode()) for number in range(500)])
    assert len(list(store.walk(base))) == 501
    # One that is not finished does no harm.
    assert next(store.walk(base))[0] == base.encode()


def test_errors_come_out_where_the_call_was_made(store: SyncStore, base: str) -> None:
    with pytest.raises(NotFound):
        store.read(f"{base}/missing")
    with pytest.raises(FileNotFoundError):
        next(store.walk(f"{base}/missing"))
    with pytest.raises(ValueError, match="not a Xenstore path"):
        store.read("a b")
    with pytest.raises(TypeError):
        store.write(base, None)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------- transactions


def test_a_transaction_commits_at_its_end(store: SyncStore, base: str) -> None:
    with store.transaction() as tx:
        tx.write(f"{base}/a", "1")
        tx.write(f"{base}/b", "2")
        assert sorted(tx.list(base)) == [b"a", b"b"]
        assert store.list(base) == []
    assert sorted(store.list(base)) == [b"a", b"b"]
    with pytest.raises(TransactionEnded):
        tx.read(base)


def test_a_transaction_is_rolled_back_if_its_block_raises(store: SyncStore, base: str) -> None:
    def raise_inside(error: type[BaseException]) -> None:
        with store.transaction() as tx:
            tx.write(f"{base}/a", "1")
            raise error

    for error in KeyError, KeyboardInterrupt, GeneratorExit, StopIteration:
        with pytest.raises(error):
            raise_inside(error)
    with store.transaction() as tx:
        tx.write(f"{base}/a", "1")
        tx.rollback()
    assert store.list(base) == []


def test_a_conflict(store: SyncStore, base: str) -> None:
    store.write(f"{base}/n", 1)

    def commit_in_conflict() -> None:
        with store.transaction() as tx:
            number = tx.read_integer(f"{base}/n")
            store.write(f"{base}/n", 5)
            tx.write(f"{base}/n", number + 1)

    with pytest.raises(Conflict):
        commit_in_conflict()
    assert store.read(f"{base}/n") == b"5"


def test_threads_count_together(store: SyncStore, base: str) -> None:
    store.write(f"{base}/n", 0)

    def count(tx: SyncTransaction) -> int:
        number = tx.read_integer(f"{base}/n") + 1
        tx.write(f"{base}/n", number)
        return number

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(lambda _: store.atomically(count), range(20), timeout=LIMIT))
    assert sorted(numbers) == list(range(1, 21))
    with pytest.raises(NotFound):
        store.atomically(lambda tx: tx.read(f"{base}/missing"))


# ---------------------------------------------------------------------------------------- watches


def test_a_watch_of_several_nodes(store: SyncStore, base: str) -> None:
    with store.watch(f"{base}/a", f"{base}/b") as events:
        assert {events.wait(LIMIT), events.wait(LIMIT)} == {
            f"{base}/a".encode(),
            f"{base}/b".encode(),
        }
        store.write(f"{base}/b/c", 1)
        assert events.wait(LIMIT) == f"{base}/b/c".encode()
        store.write(f"{base}/a", 1)
        assert events.wait() == f"{base}/a".encode()
        assert events.wait(0) is None


def test_no_node_of_a_watch_holds_up_another(store: SyncStore, base: str) -> None:
    with store.watch(f"{base}/a", f"{base}/b") as events, store.watch(base) as all_events:
        for path in f"{base}/a/1", f"{base}/a/2", f"{base}/b/1":
            store.write(path, 1)
        while all_events.wait(LIMIT) != f"{base}/b/1".encode():
            pass
        # The first events of the two nodes, then one of each.
        paths = [events.wait(LIMIT) or b"" for _ in range(4)]
        assert f"{base}/b/1".encode() in paths


def test_an_iteration_ends_after_a_time_without_events(store: SyncStore, base: str) -> None:
    with store.watch(base, timeout=2) as events:
        assert list(events) == [base.encode()]
        store.write(f"{base}/n", 1)
        assert list(events) == [f"{base}/n".encode()]


def test_a_refused_watch(store: SyncStore, base: str) -> None:
    with pytest.raises(ValueError, match="not a Xenstore path"), store.watch(base, "a b"):
        pass


def await_waiter(events: SyncWatch) -> None:
    """Until a thread waits for an event of the watch."""
    await_true(lambda: bool(events._arrived))


def test_the_end_of_a_watch_ends_the_wait_of_another_thread(store: SyncStore, base: str) -> None:
    with ThreadPoolExecutor() as pool:
        with store.watch(base) as events:
            assert events.wait(LIMIT) is not None
            result = pool.submit(events.wait)
            await_waiter(events)
        assert result.result(LIMIT) is None
        assert list(events) == []


def test_an_interrupt_loses_no_event(store: SyncStore, base: str) -> None:
    with store.watch(base) as events, ThreadPoolExecutor() as pool:
        assert events.wait(LIMIT) is not None

        def interrupt() -> None:
            await_waiter(events)
            os.kill(os.getpid(), signal.SIGINT)

        done = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            events.wait(LIMIT)
        done.result(LIMIT)
        store.write(f"{base}/n", 1)
        assert events.wait(LIMIT) == f"{base}/n".encode()


# ------------------------------------------------------------------------------ the store's life


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "xsfs"]


def test_the_end_of_the_store_ends_its_thread_and_all_waits(place: Place) -> None:
    with ThreadPoolExecutor() as pool:
        with xsfs.sync.open_store(place.path) as store:
            watch = store.watch(place.root)
            events = watch.__enter__()
            assert events.wait(LIMIT) is not None
            result = pool.submit(events.wait)
            await_waiter(events)
        with pytest.raises(ConnectionLost, match="the store was closed"):
            result.result(LIMIT)
    with pytest.raises(ConnectionLost, match="the store was closed"):
        store.read(place.root)
    with pytest.raises(ConnectionLost, match="the store was closed"):
        watch.__exit__(None, None, None)
    assert threads() == []


def test_an_error_is_not_hidden_by_the_end_of_the_store(place: Place) -> None:
    with xsfs.sync.open_store(place.path) as store:
        transaction = store.transaction()
        transaction.__enter__()
    error = KeyError()
    assert not transaction.__exit__(KeyError, error, None)


def test_there_is_no_store(tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "missing", StoreError), (tmp_path, StoreUnavailable)):
        with pytest.raises(kind), xsfs.sync.open_store(str(path)):
            pass
    assert threads() == []


def test_an_interrupt_ends_the_wait_for_a_silent_store(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as silent, ThreadPoolExecutor() as pool:
        silent.bind(path)
        silent.listen()
        silent.settimeout(LIMIT)

        def interrupt() -> None:
            connection, _ = silent.accept()
            with connection:
                assert connection.recv(4096)  # a request
                os.kill(os.getpid(), signal.SIGINT)
                assert connection.recv(4096) == b""

        done = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt), xsfs.sync.open_store(path, timeout=LIMIT):
            pass
        done.result(LIMIT)
    assert threads() == []


def test_an_interrupt_while_the_thread_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InterruptedThread(threading.Thread):
        def start(self) -> None:
            super().start()
            raise KeyboardInterrupt

    monkeypatch.setattr(xsfs.sync, "Thread", InterruptedThread)
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(path)
        silent.listen()
        with pytest.raises(KeyboardInterrupt), xsfs.sync.open_store(path, timeout=LIMIT):
            pass
        assert threads() == []


def test_no_descriptor_is_left(places: dict[str, Place]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            open_and_close(places["C"].path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    open_and_close(places["C"].path)
    assert threads() == []


def open_and_close(path: str) -> None:
    with xsfs.sync.open_store(path):
        pass
