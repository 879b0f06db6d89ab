"""A whole subtree in one read, on real mounts: `.ls` and `.json` beside the tools that they must agree with."""

from __future__ import annotations

import base64
import errno
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support.mounting import GUEST, LIMIT, Mount, Place, mounted, open_place, refusal
from tests.support.xenstored.harness import XsClient, XsError

EVERY_BYTE = bytes(range(256))


def xenstore_ls(place: Place, path: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["xenstore-ls", "-f", "-p", path],
        env={**os.environ, "XENSTORED_PATH": place.socket},
        capture_output=True,
        timeout=LIMIT * 3,
        check=False,
    )


def cat(path: Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["cat", path], capture_output=True, timeout=LIMIT * 3, check=False)


def node_of(place: Place, box: Path) -> str:
    return f"{place.home}/data/{box.name}"


def fill(place: Place, witness: XsClient, top: str) -> None:
    """Nodes of every kind that a domain can make."""
    for number, value in enumerate((b"", b"plain", b"two\nlines\n", b"\\ and \t", EVERY_BYTE)):
        witness.write(f"{top}/values/{number}", value)
    witness.write(f"{top}/values", b"a directory's own")
    witness.write(f"{top}/" + "/".join("d" * 60), b"deep")
    witness.write(f"{top}/{'n' * 300}/{'m' * 900}", b"long")
    for number in range(250):
        witness.write(f"{top}/many/{number * 7919 % 1000}", b"%d" % number)
    witness.mkdir(f"{top}/empty")
    owner = place.domid
    witness.set_perms(f"{top}/values/1", [f"b{owner}", "r3", "n4", "w9"])


def plain(value: bytes) -> object:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(value).decode()}


def names_of(witness: XsClient, path: str) -> list[str]:
    try:
        return witness.ls_part(path)
    except XsError:
        return witness.ls(path)  # oxenstored has no parts


def expected_json(witness: XsClient, path: str, *, top: bool = True) -> object:
    """What a node is as JSON, by a client of its own."""
    value, names = witness.read(path), names_of(witness, path)
    if not names and not top:
        return plain(value)
    own = {".value": plain(value)} if value else {}
    return own | {name: expected_json(witness, f"{path}/{name}", top=False) for name in names}


def test_ls_is_byte_for_byte_what_xenstore_ls_prints(
    place: Place, witness: XsClient, box: Path, tmp_path: Path
) -> None:
    fill(place, witness, node_of(place, box))
    expected = xenstore_ls(place, node_of(place, box))
    assert expected.returncode == 0
    assert expected.stdout.count(b"\n") > 300
    (tmp_path / "expected").write_bytes(expected.stdout)
    with open(tmp_path / "ls", "wb") as file:
        subprocess.run(["cat", ".ls"], cwd=box, stdout=file, check=True, timeout=LIMIT)
    subprocess.run(["cmp", tmp_path / "expected", tmp_path / "ls"], check=True, timeout=LIMIT)


def test_ls_of_the_home_and_of_the_whole_store(place: Place, mount: Mount) -> None:
    for path, directory in (
        (place.home, mount.path),
        (f"{place.home}/device", mount.path / ".root" / place.home[1:] / "device"),
        ("/", mount.path / ".root"),
    ):
        expected = xenstore_ls(place, path)
        shown = cat(directory / ".ls")
        assert shown.stdout == expected.stdout, path
        assert bool(shown.returncode) == bool(expected.returncode), path
    if not place.guest:
        assert expected.stdout


def test_ls_of_a_leaf_is_empty(place: Place, mount: Mount, witness: XsClient, box: Path) -> None:
    witness.write(f"{node_of(place, box)}/leaf", b"value")
    assert (box / "leaf.d" / ".ls").read_bytes() == b""
    assert xenstore_ls(place, f"{node_of(place, box)}/leaf").stdout == b""


def test_permissions_of_every_kind_are_as_xenstore_ls_prints_them(
    place: Place, witness: XsClient, box: Path
) -> None:
    top, owner = node_of(place, box), place.domid
    entries = (
        "r0",
        "b7",
        "r-1",
        "w4294967295",
        "b32757",
        "n65536",
        "r010",
        "r99999999999999999999",
    )
    for number, entry in enumerate(entries):
        witness.write(f"{top}/{number}", b"x")
        try:
            witness.set_perms(f"{top}/{number}", [f"n{owner}", entry])
        except Exception as error:
            assert "EINVAL" in str(error), entry
    assert cat(box / ".ls").stdout == xenstore_ls(place, top).stdout


def test_a_listing_of_many_parts(place: Place, witness: XsClient, box: Path) -> None:
    if place.guest:
        pytest.skip("a guest may not have so many nodes")
    top = node_of(place, box)
    for start in range(0, 3000, 100):
        witness.pipeline(
            ("WRITE", f"{top}/a-long-name-{number}".encode() + b"\0%d" % number)
            for number in range(start, start + 100)
        )
    lines = cat(box / ".ls").stdout.splitlines()
    assert len(lines) == 3000
    names = [line.partition(b" = ")[0].rpartition(b"/")[2].decode() for line in lines]
    assert names == names_of(witness, top)
    if place.kind == "C":
        # oxenstored's reply is longer than xenstore-ls accepts.
        assert b"\n".join(lines) + b"\n" == xenstore_ls(place, top).stdout
    assert len(json.loads((box / ".json").read_bytes())) == 3000


def test_json_is_the_tree(place: Place, witness: XsClient, box: Path) -> None:
    fill(place, witness, node_of(place, box))
    expected = expected_json(witness, node_of(place, box))
    text = (box / ".json").read_text(encoding="utf-8")
    assert json.loads(text) == expected
    assert text == json.dumps(json.loads(text), ensure_ascii=False) + "\n"


def test_jq_finds_its_way_in_json(place: Place, witness: XsClient, box: Path) -> None:
    top = node_of(place, box)
    witness.write(f"{top}/device/vif/0/mac", b"00:16:3e:00:00:07")
    witness.write(f"{top}/device/vif/0", b"own")
    witness.write(f"{top}/binary", b"\xff\0")
    for question, answer in (
        ('.device.vif["0"].mac', "00:16:3e:00:00:07"),
        ('.device.vif["0"][".value"]', "own"),
        (".binary.base64", "/wA="),
    ):
        done = subprocess.run(
            ["jq", "-r", question],
            stdin=open(box / ".json", "rb"),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=True,
        )
        assert done.stdout == answer + "\n"


def test_json_shows_directories_as_the_mount_does(mount: Mount, box: Path) -> None:
    (box / "made").mkdir()
    (box / "empty").write_text("")
    assert json.loads((box / ".json").read_bytes()) == {"made": {}, "empty": ""}
    assert json.loads((box / "made" / ".json").read_bytes()) == {}


def test_the_files_are_never_listed_and_cannot_be_written(box: Path) -> None:
    (box / "x").write_text("1")
    assert os.listdir(box) == ["x"]
    for name in (".ls", ".json"):
        state = os.stat(box / name)
        assert (state.st_mode & 0o7777, state.st_size) == (0o400, 0)
        assert refusal(lambda name=name: os.open(box / name, os.O_WRONLY)) == errno.EACCES  # type: ignore[misc]
        assert refusal(lambda name=name: (box / name).unlink()) == errno.EPERM  # type: ignore[misc]


def test_the_text_is_that_of_the_opening(witness: XsClient, place: Place, box: Path) -> None:
    top = node_of(place, box)
    witness.write(f"{top}/x", b"before")
    with open(box / ".json", "rb", buffering=0) as file:
        witness.write(f"{top}/x", b"after")
        start = file.read(4)
        file.seek(0)
        assert (start + file.read()[4:]) == b'{"x": "before"}\n'
    assert (box / ".json").read_bytes() == b'{"x": "after"}\n'


def test_a_directory_that_is_gone_is_an_error(witness: XsClient, place: Place, box: Path) -> None:
    (box / "gone").mkdir()
    directory = os.open(box / "gone", os.O_RDONLY | os.O_DIRECTORY)
    witness.rm(f"{node_of(place, box)}/gone")
    for name in (".ls", ".json"):
        number = refusal(lambda name=name: os.open(name, os.O_RDONLY, dir_fd=directory))  # type: ignore[misc]
        assert number in (errno.ESTALE, errno.ENOENT)
    os.close(directory)


def test_inside_a_transaction_they_are_of_the_transaction(box: Path, tx: Path) -> None:
    (box / "x").write_text("outside")
    tx.mkdir()
    inside = tx / "data" / box.name
    (inside / "x").write_text("inside")
    assert json.loads((inside / ".json").read_bytes()) == {"x": "inside"}
    assert b'/x = "inside"' in (inside / ".ls").read_bytes()
    assert json.loads((box / ".json").read_bytes()) == {"x": "outside"}


def test_nodes_come_and_go_during_the_walk(place: Place, witness: XsClient, box: Path) -> None:
    top = node_of(place, box)
    for number in range(200):
        witness.write(f"{top}/stays/{number}", b"s")
    stop = threading.Event()

    def churn() -> None:
        with place.witness() as client:
            while not stop.is_set():
                for number in range(10):
                    client.write(f"{top}/goes/{number}/deep/er", b"g")
                client.rm(f"{top}/goes")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(30):
            tree = json.loads((box / ".json").read_bytes())
            assert len(tree["stays"]) == 200
            lines = (box / ".ls").read_bytes().splitlines()
            assert sum(b"/stays/" in line for line in lines) == 200
    finally:
        stop.set()
        thread.join(LIMIT)


@pytest.fixture(scope="module", params=["C-guest", "ocaml-guest"])
def guest_place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    with open_place(request.param, tmp_path_factory.mktemp("guest")) as place:
        yield place


def test_nodes_that_a_guest_may_not_read(guest_place: Place, tmp_path: Path) -> None:
    """xenstore-ls prints all before the first of them and fails; so does `.ls`."""
    place = guest_place
    with place.dom0() as dom0:
        for name, perms in (("a", "r7"), ("secret", "n7"), ("z", "r7")):
            dom0.write(f"{place.home}/data/box/{name}/below", b"value")
            dom0.set_perms(f"{place.home}/data/box/{name}/below", ["n0", f"r{GUEST}"])
            dom0.set_perms(f"{place.home}/data/box/{name}", ["n0", perms])
        dom0.set_perms(f"{place.home}/data/box", ["n0", f"r{GUEST}"])
    with mounted([place.socket], tmp_path / "m") as mount:
        box = mount.path / "data" / "box"
        expected = xenstore_ls(place, f"{place.home}/data/box")
        shown = cat(box / ".ls")
        assert expected.returncode == 1
        assert shown.stdout == expected.stdout
        assert b"/a/below" in shown.stdout
        assert shown.returncode == 1
        assert b"Permission denied" in shown.stderr
        tree = json.loads((box / ".json").read_bytes())
        assert tree == {"a": {"below": "value"}, "z": {"below": "value"}}
        for name in (".ls", ".json"):
            assert (
                refusal(lambda name=name: (mount.path / ".root" / name).read_bytes())
                == errno.EACCES
            )  # type: ignore[misc]


# ------------------------------------------------------------------------------- large subtrees


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A mount of a store with 100,000 nodes below `data/large`."""
    directory = tmp_path_factory.mktemp("large")
    with open_place("ocaml", directory) as place, mounted([place.socket], directory / "m") as mount:
        with place.witness() as client:
            client.write(f"{place.home}/data/one", b"1")
            for start in range(0, 100_000, 1000):
                client.pipeline(
                    (
                        "WRITE",
                        f"{place.home}/data/large/{number // 1000}/{number}".encode()
                        + b"\0value-%d" % number,
                    )
                    for number in range(start, start + 1000)
                )
        yield mount


def status_of(mount: Mount, field: str) -> int:
    """A number of KiB in /proc/PID/status."""
    for line in Path(f"/proc/{mount.process.pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def test_a_walk_takes_at_most_three_times_the_memory_of_its_text(large: Mount) -> None:
    (large.path / "data" / "one").read_text()
    Path(f"/proc/{large.process.pid}/clear_refs").write_text("5")
    before = status_of(large, "VmRSS")
    with open(large.path / "data" / "large" / ".ls", "rb", buffering=0) as file:
        peak = status_of(large, "VmHWM")
        size = 0
        while part := file.read(1 << 20):
            size += len(part)
    assert size > 5 << 20
    assert (peak - before) * 1024 < 3 * size


def test_a_killed_reader_ends_the_walk(large: Mount) -> None:
    path = large.path / "data" / "large" / ".ls"
    reader = subprocess.Popen(["cat", path], stdout=subprocess.DEVNULL)
    before = large.counter("requests")
    while large.counter("requests") < before + 1000:
        assert reader.poll() is None
    reader.kill()
    reader.wait(LIMIT)
    # It can only be dead once its open(2) was answered.
    assert large.counter("requests") < before + 200_000
    assert (large.path / "data" / "one").read_text() == "1\n"


def test_a_reader_beside_a_walk_hardly_waits(large: Mount) -> None:
    walk = subprocess.Popen(
        ["cat", large.path / "data" / "large" / ".ls"], stdout=subprocess.DEVNULL
    )
    waits = []
    while walk.poll() is None:
        start = time.perf_counter()
        (large.path / "data" / "one").read_text()
        waits.append(time.perf_counter() - start)
    waits.sort()
    assert walk.returncode == 0
    assert len(waits) > 100
    print(
        f"{len(waits)} reads: median {waits[len(waits) // 2]:.5f}, p99 {waits[-len(waits) // 100]:.5f}"
    )
    assert waits[-len(waits) // 100 - 1] < 0.05
