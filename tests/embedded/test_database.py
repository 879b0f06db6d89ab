"""The embedded store's database without sockets, beyond the table of scenarios."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from xsfs.embedded.database import Database
from xsfs.embedded.domains import DOM0, Change
from xsfs.embedded.record import (
    PATH_MAX,
    PermissionEntry,
    Record,
    Refused,
    absolute,
    format_perms,
    is_path,
    parent_of,
    parse_perms,
)
from xsfs.embedded.transaction import DatabaseTransaction

GUEST = 7
OTHER = 8


class Recorder:
    """A database and the changes that it has reported."""

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.store = Database(self.changes.append)
        for domid in (GUEST, OTHER):
            self.store.introduce(domid)
            self.store.mkdir(DOM0, b"/g%d" % domid)
            self.store.set_perms(DOM0, b"/g%d" % domid, [b"n%d" % domid])
        self.changes.clear()

    def told(self, who: int = DOM0) -> list[tuple[bytes, bool]]:
        """(path, exact) of each event that the domain would get, since the last call."""
        found = [
            (change.path, change.exact)
            for change in self.changes
            if self.store.domains.may_read(who, change)
        ]
        self.changes.clear()
        return found

    def nodes_of(self, domid: int) -> int:
        return self.store.domains.known[domid].nodes


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def store(recorder: Recorder) -> Database:
    return recorder.store


def refused(name: str, function: Callable[..., object], *args: object) -> None:
    with pytest.raises(Refused) as caught:
        function(*args)
    assert caught.value.name == name


# ---------------------------------------------------------------------------------------- a node


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (b"/", True),
        (b"/a-Z_0@/@", True),
        (b"", False),
        (b"a", False),
        (b"//", False),
        (b"/a/", False),
        (b"/a//b", False),
        (b"/a.b", False),
        (b"/a\n", False),
        (b"/a\0", False),
        (b"/" + b"a" * (PATH_MAX - 1), True),
        (b"/" + b"a" * PATH_MAX, False),
        (b"/local/domain/12345/" + b"a" * PATH_MAX, True),
        (b"/local/domain/12345/" + b"a" * (PATH_MAX + 1), False),
        (b"/local/domain/123456/" + b"a" * PATH_MAX, False),
        (b"/local/domain/x/" + b"a" * PATH_MAX, False),
    ],
)
def test_paths(path: bytes, allowed: bool) -> None:
    assert is_path(path) is allowed


def test_absolute() -> None:
    assert absolute(b"a", 7) == b"/local/domain/7/a"
    assert absolute(b"", 7) == b"/local/domain/7/"
    assert absolute(b"/a", 7) == b"/a"
    assert absolute(b"@releaseDomain", 7) == b"@releaseDomain"


def test_parents() -> None:
    assert [parent_of(path) for path in (b"/a/b", b"/a", b"/")] == [b"/a", b"/", b"/"]


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        (b"n0", PermissionEntry(0, 0)),
        (b"r7", PermissionEntry(7, 1)),
        (b"w010", PermissionEntry(8, 2)),
        (b"b0x1F", PermissionEntry(31, 3)),
        (b"b +7", PermissionEntry(7, 3)),
        (b"n-1", PermissionEntry(0xFFFFFFFF, 0)),
    ],
)
def test_domids_are_read_as_strtol_does(text: bytes, entry: PermissionEntry) -> None:
    assert parse_perms([text]) == (entry,)


@pytest.mark.parametrize("text", [b"", b"n", b"7", b"x7", b"n7 ", b"n08", b"n0x", b"n--1", b"n1_0"])
def test_malformed_permissions(text: bytes) -> None:
    refused("EINVAL", parse_perms, [b"n0", text])


def test_domids_are_shown_as_signed_numbers() -> None:
    assert format_perms((PermissionEntry(0xFFFFFFFF, 0), PermissionEntry(7, 3))) == b"n-1\0b7\0"


def test_a_change_of_the_children_leaves_the_record_as_it_was() -> None:
    record = Record(b"v", (PermissionEntry(0, 0),), b"a\0bc\0c\0")
    assert record.with_child(b"d").names == [b"a", b"bc", b"c", b"d"]
    for name, left in (b"a", b"bc\0c\0"), (b"bc", b"a\0c\0"), (b"c", b"a\0bc\0"):
        assert record.without_child(name).children == left
    refused("EIO", record.without_child, b"b")
    assert record.children == b"a\0bc\0c\0"


# ------------------------------------------------------------------------------------- accounting


def test_nodes_are_counted_for_their_owners(recorder: Recorder) -> None:
    store = recorder.store
    assert (recorder.nodes_of(GUEST), recorder.nodes_of(OTHER)) == (1, 1)
    before = recorder.nodes_of(DOM0)
    store.write(GUEST, b"/g7/a/b", b"")
    assert recorder.nodes_of(GUEST) == 3
    store.write(DOM0, b"/g7/a/c", b"")
    assert recorder.nodes_of(GUEST) == 4
    store.set_perms(DOM0, b"/g7/a/c", [b"n8"])
    assert (recorder.nodes_of(GUEST), recorder.nodes_of(OTHER)) == (3, 2)
    store.rm(GUEST, b"/g7/a")
    assert (recorder.nodes_of(GUEST), recorder.nodes_of(OTHER)) == (1, 1)
    assert recorder.nodes_of(DOM0) == before


def test_nodes_of_a_transaction_count_when_it_ends(recorder: Recorder) -> None:
    store = recorder.store
    tx = DatabaseTransaction(GUEST)
    store.write(GUEST, b"/g7/a/b", b"", tx)
    store.rm(GUEST, b"/g7/a/b", tx)
    assert recorder.nodes_of(GUEST) == 1
    store.commit(tx)
    assert recorder.nodes_of(GUEST) == 2


def test_the_quota_counts_at_the_end_of_a_transaction(recorder: Recorder) -> None:
    store = recorder.store
    for number in range(store.quotas[b"nodes"] - 3):
        store.mkdir(DOM0, b"/g7/%d" % number)
    tx = DatabaseTransaction(GUEST)
    store.mkdir(GUEST, b"/g7/0/x", tx)
    store.commit(tx)
    tx = DatabaseTransaction(GUEST)
    store.mkdir(GUEST, b"/g7/0/y", tx)
    refused("ENOSPC", store.commit, tx)
    assert recorder.nodes_of(GUEST) == store.quotas[b"nodes"] - 1
    refused("ENOENT", store.readable, GUEST, b"/g7/0/y")
    store.mkdir(GUEST, b"/g7/0/y")
    refused("ENOSPC", store.mkdir, GUEST, b"/g7/0/z")


def test_a_refused_request_changes_nothing(recorder: Recorder) -> None:
    store = recorder.store
    refused("ENOSPC", store.write, GUEST, b"/g7/a/b", b"x" * 2048)
    refused("ENOSPC", store.write, GUEST, b"/g7", b"x" * 2048)
    refused("ENOSPC", store.mkdir, GUEST, b"/g7/" + b"n" * 2020 + b"/b/c")
    assert store.readable(GUEST, b"/g7").value == b""
    assert store.readable(GUEST, b"/g7").children == b""
    refused("ENOENT", store.readable, GUEST, b"/g7/a")
    assert recorder.nodes_of(GUEST) == 1
    assert recorder.told() == []


def test_a_transaction_with_a_node_too_large_fails(store: Database) -> None:
    tx = DatabaseTransaction(GUEST)
    refused("ENOSPC", store.write, GUEST, b"/g7/a", b"x" * 2048, tx)
    refused("ENOMEM", store.commit, tx)


# ----------------------------------------------------------------------------------- transactions


def test_lists_fixed_at_different_times_cannot_be_removed(store: Database) -> None:
    store.mkdir(DOM0, b"/t/a")
    tx = DatabaseTransaction(DOM0)
    store.readable(DOM0, b"/t", tx)
    store.rm(DOM0, b"/t/a")
    refused("EIO", store.rm, DOM0, b"/t", tx)
    refused("EAGAIN", store.commit, tx)
    assert store.readable(DOM0, b"/t").children == b""


def test_a_child_that_its_parent_does_not_list(store: Database) -> None:
    store.mkdir(DOM0, b"/t")
    tx = DatabaseTransaction(DOM0)
    store.readable(DOM0, b"/t", tx)
    store.mkdir(DOM0, b"/t/a")
    refused("EIO", store.rm, DOM0, b"/t/a", tx)
    refused("EAGAIN", store.commit, tx)
    assert store.readable(DOM0, b"/t").children == b"a\0"


def test_exact_and_other_events_of_one_node_make_one(recorder: Recorder) -> None:
    store = recorder.store
    store.mkdir(DOM0, b"/t/a")
    recorder.told()
    tx = DatabaseTransaction(DOM0)
    store.rm(DOM0, b"/t", tx)
    store.mkdir(DOM0, b"/t/a", tx)
    assert recorder.told() == []
    store.commit(tx)
    assert recorder.told() == [(b"/t", False), (b"/t/a", False)]


def test_an_event_once_not_exact_stays_so(recorder: Recorder) -> None:
    store = recorder.store
    store.mkdir(DOM0, b"/t/a")
    recorder.told()
    tx = DatabaseTransaction(DOM0)
    store.write(DOM0, b"/t/a", b"1", tx)
    store.rm(DOM0, b"/t", tx)
    store.commit(tx)
    assert recorder.told() == [(b"/t/a", False), (b"/t", False)]


def test_a_domain_that_could_read_a_node_gets_the_event_of_its_removal_in_a_transaction(
    recorder: Recorder,
) -> None:
    store = recorder.store
    store.set_perms(DOM0, b"/g7", [b"n7", b"r8"])
    store.write(DOM0, b"/g7/hidden", b"")
    store.set_perms(DOM0, b"/g7/hidden", [b"n7"])
    recorder.told()
    tx = DatabaseTransaction(DOM0)
    store.rm(DOM0, b"/g7/hidden", tx)
    store.commit(tx)
    changes = list(recorder.changes)
    assert recorder.told(GUEST) == [(b"/g7/hidden", False)]
    recorder.changes += changes
    # Without a transaction, the parent's permissions would have let it know.
    assert recorder.told(OTHER) == []


# ---------------------------------------------------------------------------------------- domains


def test_special_permissions(recorder: Recorder) -> None:
    store = recorder.store
    refused("EINVAL", store.set_perms, DOM0, b"@nonsense", [b"n0"])
    refused("EACCES", store.set_perms, GUEST, b"@releaseDomain", [b"n7"])
    refused("ENOENT", store.set_perms, DOM0, b"@releaseDomain", [b"n99"])
    store.set_perms(DOM0, b"@releaseDomain", [b"n7", b"r8"])
    store.set_perms(GUEST, b"@releaseDomain", [b"n7", b"r8", b"r9"])
    store.introduce(9)
    recorder.told()
    store.destroy(9)
    assert recorder.told(OTHER) == [(b"@releaseDomain", True)]
    store.destroy(OTHER)
    store.introduce(OTHER)
    recorder.told()
    store.forget(store.domains.known[GUEST])
    assert recorder.told(OTHER) == []


def test_a_new_domain_is_not_the_target_that_its_predecessor_was(store: Database) -> None:
    store.domains.set_target(GUEST, OTHER)
    assert store.readable(GUEST, b"/g8").value == b""
    store.destroy(OTHER)
    assert store.readable(GUEST, b"/g8").value == b""
    store.introduce(OTHER)
    refused("ENOENT", store.readable, DOM0, b"/g8")
    store.mkdir(DOM0, b"/new")
    store.set_perms(DOM0, b"/new", [b"n8"])
    refused("EACCES", store.readable, GUEST, b"/new")


def test_the_root_survives_its_owner(recorder: Recorder) -> None:
    store = recorder.store
    store.set_perms(DOM0, b"/", [b"r7", b"w8"])
    before = recorder.nodes_of(DOM0)
    store.destroy(GUEST)
    root = store.readable(DOM0, b"/")
    assert root.children == b"tool\0g8\0"
    assert format_perms(root.perms) == b"r0\0w8\0"
    assert recorder.nodes_of(DOM0) == before + 1
    store.mkdir(OTHER, b"/made")


def test_a_domain_that_was_never_introduced_ends_quietly(recorder: Recorder) -> None:
    store = recorder.store
    store.create(9)
    store.write(DOM0, b"/nine", b"")
    store.set_perms(DOM0, b"/nine", [b"n9"])
    recorder.told()
    store.destroy(9)
    assert recorder.told() == [(b"/nine", False)]
    store.destroy(9)
    assert recorder.told() == []


def test_targets_in_a_circle_stay_until_one_is_introduced_again(recorder: Recorder) -> None:
    store = recorder.store
    store.domains.set_target(GUEST, OTHER)
    store.domains.set_target(OTHER, GUEST)
    store.destroy(GUEST)
    store.destroy(OTHER)
    assert recorder.told() == []
    assert store.domains.is_introduced(GUEST)
    store.introduce(OTHER)
    assert recorder.told() == [
        *((b"/g7", False), (b"@releaseDomain", True), (b"/g8", False), (b"@releaseDomain", True)),
        (b"@introduceDomain", True),
    ]
    assert not store.domains.is_introduced(GUEST)


@pytest.mark.parametrize("domid", [0, -1, 0x7FF0, 1 << 32])
def test_domids_that_no_guest_can_have(store: Database, domid: int) -> None:
    with pytest.raises(ValueError, match="domid"):
        store.introduce(domid)


# ------------------------------------------------------------------------------------------- cost


def test_a_deep_tree_can_be_removed(store: Database) -> None:
    store.mkdir(DOM0, b"/d" * 1000)
    store.rm(DOM0, b"/d")
    refused("ENOENT", store.readable, DOM0, b"/d")


def test_the_cost_does_not_grow_with_the_number_of_nodes(store: Database) -> None:
    def cost() -> float:
        """Of some requests below one node, the best of a few tries."""
        best = float("inf")
        for _ in range(5):
            began = time.perf_counter()
            for number in range(200):
                store.write(DOM0, b"/many/1/%d" % number, b"x")
                store.readable(DOM0, b"/many/1/%d" % number)
                store.rm(DOM0, b"/many/1/%d" % number)
            best = min(best, time.perf_counter() - began)
        return best

    store.mkdir(DOM0, b"/many/1")
    few = cost()
    for number in range(50_000):
        store.mkdir(DOM0, b"/many/%d/n%d" % (number % 50, number))
    # A cost proportional to the number of nodes would be greater by orders of magnitude.
    assert cost() < 10 * few
