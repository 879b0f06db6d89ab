"""Ring: a real mount, of every store.  Values: reading, writing, appending, splicing, limits."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.mounting import LIMIT, Mount, Place, winners
from tests.support.xenstored.harness import XsClient, XsError

FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def node(place: Place, path: Path) -> str:
    """The Xenstore path of a file below `data`."""
    parts = path.parts
    return place.home + "/" + "/".join(parts[parts.index("data") :])


def fails(number: int) -> AbstractContextManager[object]:
    return pytest.raises(OSError, match=os.strerror(number))


def test_the_four_lines(place: Place, mount: Mount, witness: XsClient) -> None:
    name = witness.read(f"{place.home}/name").decode()
    assert mount.bash("cat name") == name + "\n"
    assert mount.bash("echo 42 > data/x; cat data/x") == "42\n"
    assert witness.read(f"{place.home}/data/x") == b"42"
    perms = ",".join(witness.get_perms(f"{place.home}/data"))
    assert f'user.xs.perms="{perms}"' in mount.bash("getfattr -n user.xs.perms data")


def events_of(witness: XsClient, path: str, change: str, mount: Mount) -> list[str]:
    """The events that the change makes, the watch's own first one left out."""
    witness.watch(path, "t")
    assert witness.event() == (path, "t")
    mount.bash(change)
    events = [event for event, _ in witness.events_so_far()]
    witness.unwatch(path, "t")
    return events


@pytest.mark.parametrize("exists", [False, True])
def test_echo_is_one_write(
    place: Place, mount: Mount, box: Path, witness: XsClient, exists: bool
) -> None:
    path = node(place, box / "x")
    if exists:
        witness.write(path, b"old")
    assert events_of(witness, path, f"echo 42 > {box}/x", mount) == [path]
    assert witness.read(path) == b"42"


def test_no_other_client_sees_an_empty_value_in_between(
    place: Place, mount: Mount, box: Path
) -> None:
    file, path = box / "x", node(place, box / "x")
    file.write_text("start\n")
    seen: set[str] = set()
    stop = threading.Event()

    def look() -> None:
        with place.witness() as client:
            while not stop.is_set():
                seen.add(client.read(path).decode())

    reader = threading.Thread(target=look)
    reader.start()
    mount.bash(f"for i in {{1..50}}; do echo $i > {file}; done")
    stop.set()
    reader.join(LIMIT)
    assert "" not in seen
    assert seen <= {"start", *(f"{i}" for i in range(1, 51))}


def test_truncation_alone_is_carried_out_by_the_close(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "x"
    file.write_text("42\n")
    assert mount.bash(f": > {file}; cat {file}; : > {box}/new; ls {box}") == "new\nx\n"
    assert witness.read(node(place, file)) == b""
    assert witness.read(node(place, box / "new")) == b""


def test_touch_creates_and_leaves_alone(mount: Mount, box: Path) -> None:
    assert mount.bash(f"cd {box}; touch a; ls; echo 1 > a; touch a; cat a") == "a\n1\n"


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
@given(value=st.binary(max_size=600) | st.sampled_from([b"\n", b"\n\n", b"a\n", b"", b"\0"]))
def test_values_of_any_bytes_survive(
    place: Place, mount: Mount, box: Path, witness: XsClient, value: bytes
) -> None:
    file, path = box / "v", node(place, box / "v")
    witness.write(path, value)
    content = file.read_bytes()
    assert content == (value + b"\n" if value else b"")
    assert file.stat().st_size == len(content)
    assert os.getxattr(file, "user.xs.value") == value
    (box / "copy").write_bytes(content)
    # An emptied file reaches the store after its close(2), but before whatever asks the mount next.
    assert (box / "copy").stat().st_size == len(content)
    assert witness.read(node(place, box / "copy")) == value
    os.setxattr(box / "copy", "user.xs.value", value + b"x")
    assert witness.read(node(place, box / "copy")) == value + b"x"


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
@given(
    pieces=st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\n"), min_size=1, max_size=6),
)
def test_pieces_written_one_by_one_are_the_whole(
    place: Place, mount: Mount, box: Path, witness: XsClient, pieces: list[bytes]
) -> None:
    file = box / "pieces"
    with open(file, "wb", buffering=0) as out:
        for piece in pieces:
            out.write(piece)
    whole = b"".join(pieces)
    expected = whole[:-1] if whole.endswith(b"\n") else whole
    assert witness.read(node(place, file)) == expected


def test_writes_at_offsets_splice(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    file, path = box / "s", node(place, box / "s")
    file.write_text("0123456789\n")
    with open(file, "r+b", buffering=0) as out:
        out.seek(3)
        out.write(b"abc")
        assert witness.read(path) == b"012abc6789"
        out.seek(15)
        out.write(b"z")
    assert witness.read(path) == b"012abc6789\n\0\0\0\0z"


def test_truncate_to_a_size(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    file, path = box / "s", node(place, box / "s")
    file.write_text("0123456789\n")
    mount.bash(f"truncate -s 4 {file}")
    assert witness.read(path) == b"0123"
    os.truncate(file, 6)
    assert witness.read(path) == b"0123\n\0"
    mount.bash(f"truncate -s 0 {file}")
    assert witness.read(path) == b""


def test_reading_from_the_start_reads_anew(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file, path = box / "r", node(place, box / "r")
    witness.write(path, b"first")
    with open(file, "rb", buffering=0) as opened:
        assert opened.read() == b"first\n"
        witness.write(path, b"second, and longer")
        # A fetched value serves for some milliseconds.
        assert opened.read() in (b"", b", and longer\n")
        opened.seek(0)
        assert opened.read() == b"second, and longer\n"


def test_a_file_in_creation_is_there_for_the_mount(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "f"
    with open(file, "ab", buffering=0) as opened:
        assert file.exists()
        with pytest.raises(FileExistsError):
            os.close(os.open(file, os.O_CREAT | os.O_EXCL))
        os.setxattr(opened.fileno(), "user.xs.perms", f"b{place.domid}".encode())
        assert witness.get_perms(node(place, file)) == [f"b{place.domid}"]
    with open(box / "moved", "ab", buffering=0) as opened:
        (box / "moved").rename(box / "elsewhere")
        opened.write(b"1\n")
    assert (box / "elsewhere").read_text() == "1\n"
    with open(box / "removed", "wb", buffering=0):
        (box / "removed").unlink()
    assert sorted(os.listdir(box)) == ["elsewhere", "f"]


def test_nothing_is_read_after_a_truncation(mount: Mount, box: Path) -> None:
    (box / "t").write_text("old\n")
    with open(box / "t", "w+") as file:
        assert file.read() == ""


def test_a_handle_reads_what_it_wrote(mount: Mount, box: Path) -> None:
    with open(box / "rw", "w+b", buffering=0) as file:
        assert file.read() == b""
        file.write(b"42\n")
        file.seek(0)
        assert file.read() == b"42\n"


def test_append(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    file = box / "a"
    mount.bash(f"echo a >> {file}; echo b >> {file}; printf c >> {file}")
    assert witness.read(node(place, file)) == b"a\nb\nc"


def test_appends_by_many_processes_lose_nothing(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "log"
    script = f"for i in {{1..10}}; do echo $0.$i >> {file} || exit 1; done"
    writers = [subprocess.Popen(["bash", "-c", script, name]) for name in "abcd"]
    for writer in writers:
        assert writer.wait(LIMIT * 3) == 0
    lines = witness.read(node(place, file)).decode().splitlines()
    assert sorted(lines) == sorted(f"{n}.{i}" for n in "abcd" for i in range(1, 11))


def test_a_value_too_large_is_refused_and_the_old_one_stays(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file, path = box / "big", node(place, box / "big")
    file.write_text("old\n")
    for size in (4096, 5000, 300_000):
        done = mount.run(f"head -c {size} /dev/zero > {file}")
        assert "File too large" in done.stderr
        assert witness.read(path) == b"old"
    with open(file, "r+b", buffering=0) as out, fails(errno.EFBIG):
        os.pwrite(out.fileno(), b"x", 1 << 40)
    with fails(errno.EFBIG):
        os.truncate(file, 1 << 40)
    assert witness.read(path) == b"old"


def test_the_largest_value(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    file, path = box / "big", node(place, box / "big")
    largest = 4096 - len(path) - 1
    if place.kind == "ocaml":
        largest = 2048
    elif place.guest:
        largest = 1500
    file.write_bytes(b"v" * largest)
    assert witness.read(path) == b"v" * largest
    assert file.stat().st_size == largest + 1
    with fails(errno.ENOSPC if place.name == "C-guest" else errno.EFBIG):
        file.write_bytes(b"v" * (largest + (600 if place.guest else 1)))
    assert witness.read(path) == b"v" * largest


def test_exclusive_creation_is_a_lock(mount: Mount, box: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    assert winners(lambda: os.close(os.open(box / "lock", flags))) == 1
    assert mount.run(f"set -o noclobber; echo 1 > {box}/lock").returncode != 0
    assert mount.bash(f"set -o noclobber; echo $$ > {box}/other; cat {box}/other").strip().isdigit()


def test_a_file_that_was_removed_lives_on_for_its_handles_alone(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "gone"
    file.write_text("1\n")
    with open(file, "r+b", buffering=0) as opened:
        file.unlink()
        assert opened.write(b"2") == 1
        opened.seek(0)
        assert opened.read() == b"2\n"
        assert os.fstat(opened.fileno()).st_nlink == 0
    with pytest.raises(XsError, match="ENOENT"):
        witness.read(node(place, file))


def error_of_opening(found: int) -> int:
    """The errno of opening what O_PATH found, without a lookup, and by another thread."""
    errors = []

    def attempt() -> None:
        try:
            os.close(os.open(f"/proc/self/fd/{found}", os.O_RDONLY))
        except OSError as error:
            errors.append(error.errno or 0)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(LIMIT)
    return errors[0] if errors else 0


def test_a_node_that_vanishes_between_lookup_and_open(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file, path = box / "vanishing", node(place, box / "vanishing")
    file.write_text("1\n")
    found = os.open(file, os.O_PATH)
    try:
        witness.rm(path)
        assert error_of_opening(found) == errno.ESTALE
        with pytest.raises(FileNotFoundError):
            file.read_text()
        # The open file does not become the directory that takes its path.
        witness.write(path + "/child", b"")
        assert error_of_opening(found) == errno.ESTALE
        assert os.listdir(file) == ["child"]
    finally:
        os.close(found)


def test_fsync_carries_a_truncation_out(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "synced"
    file.write_text("1\n")
    with open(file, "wb", buffering=0) as opened:
        assert witness.read(node(place, file)) == b"1"
        os.fsync(opened.fileno())
        assert witness.read(node(place, file)) == b""


def test_a_reader_syncs_what_the_file_owes(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    file = box / "synced"
    with open(file, "wb", buffering=0):
        mount.bash(f"sync {file}")
        assert witness.read(node(place, file)) == b""


# ------------------------------------------------------------------------- what fstat(2) tells


def slow() -> None:
    """Longer than the kernel keeps attributes."""
    time.sleep(0.02)


def test_an_emptied_file_is_empty_for_fstat(place: Place, box: Path, witness: XsClient) -> None:
    path = box / "f"
    path.write_text("long value\n")
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    slow()
    assert os.fstat(descriptor).st_size == 0
    # The store hears of it with the first write.
    assert witness.read(node(place, path)) == b"long value"
    os.write(descriptor, b"x\n")
    slow()
    assert os.fstat(descriptor).st_size == 2
    os.close(descriptor)
    assert path.stat().st_size == 2


def test_what_became_a_directory_keeps_its_value(
    place: Place, box: Path, witness: XsClient
) -> None:
    path = box / "f"
    path.write_text("value\n")
    descriptor = os.open(path, os.O_RDWR)
    witness.write(f"{node(place, path)}/child", b"1")
    for size in (0, 2):
        with fails(errno.ESTALE):
            os.ftruncate(descriptor, size)
        assert witness.read(node(place, path)) == b"value"
    os.close(descriptor)
    os.truncate(path / ".value", 0)
    assert witness.read(node(place, path)) == b""


def test_truncation_of_a_file(place: Place, box: Path, witness: XsClient) -> None:
    path = box / "f"
    path.write_text("value\n")
    for size, value in ((3, b"val"), (0, b""), (2, b"\0\0")):
        os.truncate(path, size)
        assert witness.read(node(place, path)) == value


def test_a_file_made_where_a_directory_would_be_by_custom(
    place: Place, mount: Mount, witness: XsClient
) -> None:
    """It stays a file for the process that created it, as long as that process has it open."""
    path = mount.path / "error" / "hotplug"
    with contextlib.suppress(FileExistsError):
        path.parent.mkdir()
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR)
    try:
        slow()
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        os.write(descriptor, b"text\n")
        slow()
        assert os.fstat(descriptor).st_size == 5
        assert path.read_text() == "text\n"
    finally:
        os.close(descriptor)
        witness.rm(f"{place.home}/error/hotplug")
