"""Ring: a real mount.  The command xsfs-watch."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import xsfs.cli.watch
from tests.fs.test_values import node
from tests.support.mounting import LIMIT, Mount, Place, mounted
from tests.support.programs import Program, program
from tests.support.xenstored.harness import XsClient
from xsfs.cli.watch import EXIT_COUNT, EXIT_FAILED, EXIT_TIME, EXIT_USAGE, STATUSES

# As a file, without site-packages: it may need nothing but the standard library.
COMMAND = (sys.executable, "-I", "-S", xsfs.cli.watch.__file__)


@contextmanager
def watcher(*arguments: str | Path) -> Iterator[Program]:
    with program(*COMMAND, *arguments) as running:
        yield running


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """It failed with one clear line."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("xsfs-watch: ")
    for word in words:
        assert word in done.stderr


def test_it_needs_only_the_standard_library() -> None:
    script = f"""
import runpy, sys
runpy.run_path({xsfs.cli.watch.__file__!r})
print(sorted({{name.partition(".")[0] for name in sys.modules}} - sys.stdlib_module_names))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['__main__']\n"


def test_a_line_a_change(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    long = "n" * 300
    with watcher(box) as running:
        assert running.lines.next() == str(box)
        for name in ("x", "a/b/c", "-rf", "@releaseDomain"):
            witness.write(f"{top}/{name}", b"")
            assert running.lines.next() == f"{box}/{name}"
        witness.write(top, b"itself")
        assert running.lines.next() == str(box)
        witness.write(f"{top}/{long}", b"value")
        assert Path(running.lines.next()).read_text() == "value\n"


def test_it_can_be_stopped_while_the_mount_is(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    """It must not ask the mount when a signal wakes it.  A kernel that suspends or migrates a guest freezes
    all processes in this way, and gives up if one of them waits for a frozen mount."""
    with watcher(box) as running:
        assert running.lines.next() == str(box)
        witness.write(f"{node(place, box)}/x", b"1")
        assert running.lines.next() == f"{box}/x"
        waits = Path(f"/proc/{running.process.pid}/wchan")
        until(lambda: "poll" in waits.read_text(), "it waits")
        mount.process.send_signal(signal.SIGSTOP)
        try:
            running.process.send_signal(signal.SIGSTOP)
            until(lambda: _state(running.process.pid) in "TD", "it has the signal")
            assert _state(running.process.pid) == "T"
        finally:
            mount.process.send_signal(signal.SIGCONT)
        running.process.send_signal(signal.SIGCONT)
        witness.write(f"{node(place, box)}/y", b"1")
        assert running.lines.next() == f"{box}/y"


def _state(process: int) -> str:
    """That of ps(1): T is stopped, D waits uninterruptibly."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.01)


def test_of_a_file_only_its_own_changes(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    long = "n" * 300
    witness.write(f"{top}/{long}", b"")
    (alias,) = os.listdir(box)
    for name in ("x", "-rf", "@a", alias):
        own = name if name != alias else long
        witness.write(f"{top}/{own}", b"1")
        with watcher(box / name, box / "end") as running:
            assert {running.lines.next(), running.lines.next()} == {str(box / name), f"{box}/end"}
            for other in (f"{top}/other", f"{top}/{own}/child", top):
                witness.write(other, b"")
            witness.write(f"{top}/{own}", b"2")
            assert running.lines.next() == str(box / name)
            witness.rm(f"{top}/{own}")
            assert running.lines.next() == str(box / name)
            witness.write(f"{top}/{own}", b"3")
            assert running.lines.next() == str(box / name)
            witness.write(f"{top}/end", b"")
            assert running.lines.next() == f"{box}/end"


def test_of_a_name_that_is_missing(place: Place, box: Path, witness: XsClient) -> None:
    with watcher("-v", box / "later") as running:
        assert running.lines.next() == str(box / "later")
        witness.write(f"{node(place, box)}/later", b"here")
        assert running.lines.next() == f"{box}/later = here"


def test_of_the_value_of_a_directory(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    witness.write(f"{top}/child", b"")
    with watcher("-v", box / ".value") as running:
        assert running.lines.next() == f"{box}/.value = "
        witness.write(f"{top}/child", b"")
        witness.write(top, b"value")
        assert running.lines.next() == f"{box}/.value = value"


def test_several_paths_and_the_first_line_of_each(
    place: Place, mount: Mount, box: Path, witness: XsClient
) -> None:
    top = node(place, box)
    (box / "d").mkdir()
    (box / "f").write_text("1\n")
    with watcher(box / "d", box / "f", mount.path / ".root" / "tool") as running:
        first = {running.lines.next() for _ in range(3)}
        assert first == {str(box / "d"), str(box / "f"), str(mount.path / ".root" / "tool")}
        witness.write(f"{top}/d/x", b"")
        assert running.lines.next() == str(box / "d" / "x")
        witness.write(f"{top}/f", b"")
        assert running.lines.next() == str(box / "f")
    with watcher("-s", box / "d", box / "f") as running:
        poll_watched(mount, 2)
        witness.write(f"{top}/d/x", b"")
        assert running.lines.next() == str(box / "d" / "x")


@pytest.mark.quick_if(place=["C"])
@pytest.mark.parametrize("values", [(), ("-v",)])
@pytest.mark.parametrize("form", [(), ("-j",)])
@pytest.mark.parametrize("skips", [(), ("-s",)])
@pytest.mark.parametrize("end", [(), ("-n", "2"), ("-t", "3600"), ("-t", "3600", "-n", "2")])
def test_options_go_together_and_with_several_paths(
    place: Place,
    mount: Mount,
    box: Path,
    witness: XsClient,
    values: tuple[str, ...],
    form: tuple[str, ...],
    skips: tuple[str, ...],
    end: tuple[str, ...],
) -> None:
    """-n counts the lines of all paths together."""
    top = node(place, box)
    witness.write(f"{top}/d/x", b"")
    witness.write(f"{top}/f", b"1")
    paths = [box / "d", box / "f", box / "missing"]

    def line(path: Path, value: str | None) -> str:
        if form:
            return json.dumps({"path": str(path), **({"value": value} if values else {})})
        return f"{path} = {value}" if values and value is not None else str(path)

    first = {line(paths[0], ""), line(paths[1], "1"), line(paths[2], None)}
    count = 2 if "-n" in end else 1000
    with watcher(*values, *form, *skips, *end, *paths) as running:
        if skips:
            poll_watched(mount, 3)
        else:
            shown = {running.lines.next() for _ in range(min(count, len(first)))}
            assert shown <= first
            assert len(shown) == min(count, len(first))
            count -= len(shown)
        # A change of `missing` could be merged with the first line, and be skipped with it.
        for name, value in (("d/x", "2"), ("d/y" if skips else "missing", "3")):
            if count:
                witness.write(f"{top}/{name}", value.encode())
                assert running.lines.next() == line(box / name, value)
                count -= 1
        if "-n" in end:
            assert running.process.wait(LIMIT) == EXIT_COUNT
        else:
            assert running.process.poll() is None


def test_time_is_over_for_several_paths(box: Path) -> None:
    done = run("-v", "-j", "-s", "-t", "1", box, box / "f")
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_TIME, "", "")


def poll_watched(mount: Mount, readers: int) -> None:
    deadline = time.monotonic() + LIMIT
    while mount.counter("readers") != readers:
        assert time.monotonic() < deadline


def test_values(place: Place, box: Path, witness: XsClient) -> None:
    top = node(place, box)
    nasty = b"two\nlines \\ \x1b[31m\xff\t"
    with watcher("-v", box) as plain, watcher("-j", "-v", box) as objects:
        assert plain.lines.next() == f"{box} = "
        assert json.loads(objects.lines.next()) == {"path": str(box), "value": ""}
        witness.write(f"{top}/x", b"4 = 2")
        assert plain.lines.next() == f"{box}/x = 4 = 2"
        assert json.loads(objects.lines.next()) == {"path": f"{box}/x", "value": "4 = 2"}
        witness.write(f"{top}/x", nasty)
        assert plain.lines.next() == f"{box}/x = two\\nlines \\\\ \\x1b[31m\\xff\\t"
        line = json.loads(objects.lines.next())
        assert base64.b64decode(line["base64"]) == nasty
        witness.rm(f"{top}/x")
        assert plain.lines.next() == f"{box}/x"
        assert json.loads(objects.lines.next()) == {"path": f"{box}/x", "value": None}
    with watcher("-j", box) as running:
        assert json.loads(running.lines.next()) == {"path": str(box)}


def test_count_and_time(box: Path) -> None:
    done = run("-n", "1", "-t", "9e8", box)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_COUNT, f"{box}\n", "")
    start = time.monotonic()
    done = run("-t", "3", "-n", "2", box)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_TIME, f"{box}\n", "")
    assert time.monotonic() - start >= 3
    assert len(STATUSES) == 4


def test_paths_that_cannot_be_watched(mount: Mount, box: Path, tmp_path: Path) -> None:
    refused(run(tmp_path), EXIT_FAILED, f"cannot watch {tmp_path}: not in an xsfs mount")
    refused(run(tmp_path / "a" / "b"), EXIT_FAILED, "No such file or directory")
    refused(run(box / "a.b"), EXIT_FAILED, "Invalid argument")
    refused(run(mount.path / ".stats"), EXIT_FAILED, "no node of Xenstore")
    refused(run(box, tmp_path), EXIT_FAILED, f"cannot watch {tmp_path}")


def test_help() -> None:
    text = run("--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    assert text.partition("\nexamples:\n")[2].count("\n  xsfs-watch ") >= 1


@pytest.mark.parametrize(
    "arguments",
    [(), ("-n", "0", "x"), ("-n", "x", "x"), ("-t", "-1", "x"), ("-t", "inf", "x"), ("-z", "x")],
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    refused(run(*arguments), EXIT_USAGE, "(try 'xsfs-watch --help')")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(box: Path, number: signal.Signals) -> None:
    with watcher(box) as running:
        assert running.lines.next() == str(box)
        running.signal(number)
        assert running.process.returncode == -number


def test_it_ends_with_the_program_that_reads_it(box: Path) -> None:
    """At once, not with the next line."""
    script = f'{" ".join(COMMAND)} "$0" | head -n 1; echo ${{PIPESTATUS[0]}}'
    with program("bash", "-c", script, box) as running:
        assert running.lines.next() == str(box)
        assert running.lines.next() == str(128 + signal.SIGPIPE)


def test_a_loop_in_the_shell(place: Place, box: Path, witness: XsClient) -> None:
    script = f'{" ".join(COMMAND)} "$0" | while read -r path; do echo "got $path"; done'
    with program("dash", "-c", script, box) as running:
        assert running.lines.next() == f"got {box}"
        witness.write(f"{node(place, box)}/x", b"")
        assert running.lines.next() == f"got {box}/x"


@pytest.mark.parametrize("cat", ["busybox cat", "/usr/lib/cargo/bin/coreutils/cat"])
def test_beside_a_cat_that_splices(place: Place, box: Path, witness: XsClient, cat: str) -> None:
    """The kernel ends a splice(2) of a file of size 0 at once, without a request to xsfs."""
    done = subprocess.run(
        [*cat.split(), box / ".watch"], capture_output=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"")
    script = f'{" ".join(COMMAND)} "$0" | {cat}'
    with program("bash", "-c", script, box) as running:
        assert running.lines.next() == str(box)
        witness.write(f"{node(place, box)}/x", b"")
        assert running.lines.next() == f"{box}/x"


def test_a_mount_that_ends(tmp_path: Path) -> None:
    mount = Mount(["embedded"], tmp_path / "m")
    try:
        mount.wait_mounted()
        with watcher(mount.path) as running:
            assert running.lines.next() == str(mount.path)
            mount.process.terminate()
            assert running.process.wait(LIMIT) == EXIT_FAILED
        assert mount.process.wait(LIMIT) == 0
    finally:
        mount.clear()


def test_a_mount_for_reading_only(place: Place, tmp_path: Path, witness: XsClient) -> None:
    """Nothing can be written there, not even what to watch."""
    top = f"{place.home}/data/readonly"
    witness.write(f"{top}/x", b"")
    with mounted(["-o", "ro", place.socket], tmp_path / "m") as mount:
        box = mount.path / "data" / "readonly"
        with watcher("-s", box / "x") as one, watcher(box) as all_of_it:
            assert all_of_it.lines.next() == str(box)
            poll_watched(mount, 2)
            witness.write(f"{top}/y", b"")
            witness.write(f"{top}/x", b"")
            assert one.lines.next() == str(box / "x")
            assert all_of_it.lines.until(str(box / "x")) == [str(box / "y")]
    witness.rm(top)


WITHOUT_POLL = """
import sys
from xsfs.fs.operations import Operations
del Operations.poll
from xsfs.cli.main import main
sys.exit(main())
"""


def test_a_mount_without_poll(tmp_path: Path) -> None:
    """As with a pyfuse3 that does not have it: the kernel says that all can be read at all times."""
    path = tmp_path / "m"
    path.mkdir()
    arguments = (sys.executable, "-c", WITHOUT_POLL, "-f", "embedded", path)
    process = subprocess.Popen(arguments)
    try:
        deadline = time.monotonic() + LIMIT
        while not os.path.ismount(path):
            assert time.monotonic() < deadline
        with watcher(path / "data", path / "name") as running:
            assert {running.lines.next(), running.lines.next()} == {f"{path}/data", f"{path}/name"}
            for _ in range(3):
                (path / "data" / "x").write_text("1\n")
                assert running.lines.next() == f"{path}/data/x"
            (path / "name").write_text("1\n")
            assert running.lines.next() == f"{path}/name"
            assert running.signal(signal.SIGTERM) < LIMIT / 2
    finally:
        subprocess.run(["umount", path], check=True, timeout=LIMIT)
        process.wait(LIMIT)
