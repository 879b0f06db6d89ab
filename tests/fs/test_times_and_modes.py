"""Times, blocks and modes on real mounts, for the programs that copy, back up and build.

A program that takes an unchanged time for an unchanged value must see each change.  A program that sets the
mode that a file has anyway must succeed.
"""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import stat
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounting import LIMIT, Mount, Place, each_place, mounted
from tests.support.programs import await_screen, on_terminal
from tests.support.xenstored.harness import XsClient

place = each_place("C", "ocaml", "C-guest", "embedded", quick=("C-guest", "embedded"))


def node(place: Place, path: Path) -> str:
    """The Xenstore path of a file below `data`."""
    parts = path.parts
    return place.home + "/" + "/".join(parts[parts.index("data") :])


few_places = pytest.mark.parametrize(
    "place", ["C-guest", "embedded"], indirect=True, scope="module"
)
"""For programs that take seconds."""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A directory of an ordinary file system."""
    path = tmp_path / "disk"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def mount_with(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Mount]]:
    """The mount of a combination of options, which all tests of a place share."""
    mounts: dict[str, Mount] = {}
    with ExitStack() as stack:

        def mount(options: str) -> Mount:
            if options not in mounts:
                path = tmp_path_factory.mktemp("with") / "m"
                mounts[options] = stack.enter_context(mounted(["-o", options, place.socket], path))
            return mounts[options]

        yield mount


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "LC_ALL": "C", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT * 3,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


def slow() -> None:
    """Wait longer than the kernel keeps attributes, and longer than a tick of file times."""
    time.sleep(0.02)


def next_second() -> None:
    """rsync compares whole seconds."""
    second = int(time.time())
    while int(time.time()) == second:
        time.sleep(0.02)


def filled(box: Path) -> Path:
    top = box / "tree"
    (top / "inner").mkdir(parents=True)
    (top / "a").write_text("value 1\n")
    (top / "inner" / "b").write_text("value 2\n")
    return top


# -------------------------------------------------------------------------------------------- times


@pytest.mark.parametrize("by", ["mount", "client"])
def test_a_change_of_equal_length_changes_the_time(
    place: Place, box: Path, witness: XsClient, by: str
) -> None:
    file = box / "f"
    before = time.time_ns()
    file.write_text("1\n")
    slow()
    first = file.stat()
    assert before - 10**9 <= first.st_mtime_ns <= time.time_ns()
    slow()
    assert file.stat().st_mtime_ns == first.st_mtime_ns, "it stays while the value stays"
    if by == "mount":
        file.write_text("2\n")
    else:
        witness.write(node(place, file), b"2")
    slow()
    second = file.stat()
    assert second.st_mtime_ns > first.st_mtime_ns
    assert second.st_ctime_ns > first.st_ctime_ns
    with open(file) as held:
        assert os.fstat(held.fileno()).st_mtime_ns == second.st_mtime_ns


def test_a_new_child_changes_the_time_of_its_directory(
    place: Place, box: Path, witness: XsClient
) -> None:
    (box / "x").write_text("1\n")
    slow()
    first = box.stat().st_mtime_ns
    slow()
    assert box.stat().st_mtime_ns == first
    witness.write(node(place, box / "y"), b"1")
    slow()
    assert box.stat().st_mtime_ns > first


def test_setting_times_succeeds(mount: Mount, box: Path) -> None:
    (box / "f").write_text("1\n")
    os.utime(box / "f", (0, 0))
    mount.bash(f"touch -d 2001-01-01 {box}/f; touch {box}/f; touch {box}")
    assert (box / "f").stat().st_mtime > 10**9


def test_rsync_copies_what_changed_with_equal_length(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    top = filled(box)
    run("rsync", "-a", f"{top}/", f"{disk}/copy/")
    next_second()
    witness.write(node(place, top / "a"), b"value 9")
    run("rsync", "-a", f"{top}/", f"{disk}/copy/")
    assert (disk / "copy" / "a").read_text() == "value 9\n"
    assert (disk / "copy" / "inner" / "b").read_text() == "value 2\n"


@pytest.mark.parametrize(
    "copy", ["rsync -aX {}/ {}", "cp -a {} {}", "tar -C {} --xattrs -cf - . | tar x --xattrs -C {}"]
)
def test_rsync_restores_what_changed_with_equal_length(
    place: Place, mount: Mount, box: Path, disk: Path, witness: XsClient, copy: str
) -> None:
    top, backup = filled(box), disk / "backup"
    if "tar" in copy:
        backup.mkdir()
    mount.bash(copy.format(top, backup))
    next_second()
    witness.write(node(place, top / "a"), b"value 9")
    (top / "inner" / "more").write_text("1\n")
    run("rsync", "-rX", "--inplace", "--delete", f"{backup}/", f"{top}/")
    assert witness.read(node(place, top / "a")) == b"value 1"
    assert os.listdir(top / "inner") == ["b"]


def test_rsync_of_attributes_from_a_source_that_has_none(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    """rsync removes the attributes of the target, which then has the permissions of its parent."""
    top, backup = filled(box), disk / "backup"
    run("cp", "-r", top, backup)
    me = place.domid
    os.setxattr(top, "user.xs.perms", f"b{me},r3".encode())
    os.setxattr(top / "a", "user.xs.perms", f"r{me}".encode())
    above = witness.get_perms(node(place, box))
    for name in ("a", "inner/b"):
        (backup / name).write_text("longer value\n")
    for _ in range(2):
        run("rsync", "-rX", "--inplace", f"{backup}/", f"{top}/")
        for path in (top, top / "a", top / "inner", top / "inner" / "b"):
            assert witness.get_perms(node(place, path)) == above
    assert witness.read(node(place, top / "a")) == b"longer value"


def test_the_owner_stays_when_permissions_are_removed(
    place: Place, box: Path, witness: XsClient
) -> None:
    """A guest's nodes stay its own if domain 0 gives them the permissions of their parent."""
    home = "/local/domain/7/removed"
    if place.daemon is None or place.guest:
        home = node(place, box) + "/removed"
    owner = 7 if home.startswith("/local/domain/7") else place.domid
    witness.write(home, b"1")
    witness.set_perms(home, [f"n{owner}", "r3"])
    file = box.parents[1] / ".root" / home[1:]
    above = witness.get_perms(home.rpartition("/")[0])
    os.removexattr(file, "user.xs.perms")
    assert witness.get_perms(home) == [f"{above[0][0]}{owner}", *above[1:]]
    witness.rm(home)


def test_rsync_archives_onto_the_mount(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    (disk / "inner").mkdir()
    (disk / "a").write_text("value 1\n")
    (disk / "inner" / "b").write_text("value 2\n")
    for path in (disk, disk / "inner"):
        path.chmod(0o755)
    for _ in range(2):
        run("rsync", "-a", "--inplace", f"{disk}/", f"{box}/tree/")
        assert witness.read(node(place, box / "tree" / "inner" / "b")) == b"value 2"
        next_second()
        (disk / "a").write_text("value 9\n")
    run("rsync", "-a", "--inplace", f"{disk}/", f"{box}/tree/")
    assert witness.read(node(place, box / "tree" / "a")) == b"value 9"


def test_cp_of_what_is_newer(place: Place, box: Path, disk: Path, witness: XsClient) -> None:
    file, copy = box / "f", disk / "copy"
    file.write_text("1\n")
    run("cp", "-u", file, copy)
    assert copy.read_text() == "1\n"
    slow()
    witness.write(node(place, file), b"2")
    run("cp", "-u", file, copy)
    assert copy.read_text() == "2\n"
    slow()
    copy.write_text("3\n")
    run("cp", "-u", copy, file)
    assert witness.read(node(place, file)) == b"3"


def test_make_builds_again_after_a_change(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    file = box / "f"
    file.write_text("1\n")
    (disk / "Makefile").write_text(f"target: {file}\n\tcp {file} target\n")
    run("make", cwd=disk)
    assert (disk / "target").read_text() == "1\n"
    assert "up to date" in run("make", cwd=disk)
    slow()
    witness.write(node(place, file), b"2")
    run("make", cwd=disk)
    assert (disk / "target").read_text() == "2\n"


def test_git_sees_a_change_of_equal_length(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    """Its work tree is the mount; what git keeps for itself is elsewhere."""
    top = filled(box)
    settings = {
        "GIT_DIR": str(disk / "git"),
        "GIT_WORK_TREE": str(top),
        "GIT_CONFIG_GLOBAL": "/dev/null",
        **{f"GIT_{who}_NAME": "x" for who in ("AUTHOR", "COMMITTER")},
        **{f"GIT_{who}_EMAIL": "x@x" for who in ("AUTHOR", "COMMITTER")},
    }
    run("git", "init", "-q", cwd=top, **settings)
    run("git", "add", "-A", cwd=top, **settings)
    run("git", "commit", "-qm", "x", cwd=top, **settings)
    assert run("git", "status", "--porcelain", cwd=top, **settings) == ""
    slow()
    witness.write(node(place, top / "a"), b"value 9")
    assert run("git", "status", "--porcelain", cwd=top, **settings) == " M a\n"
    run("git", "checkout", "--", ".", cwd=top, **settings)
    assert witness.read(node(place, top / "a")) == b"value 1"
    slow()
    witness.write(node(place, top / "a"), b"value 9")
    run("git", "commit", "-qam", "y", cwd=top, **settings)
    assert run("git", "show", "HEAD:a", cwd=top, **settings) == "value 9\n"


def test_filecmp_sees_a_change_of_equal_length(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    file, copy = box / "f", disk / "f"
    file.write_text("1\n")
    shutil.copy2(file, copy)
    assert filecmp.cmp(file, copy)
    slow()
    witness.write(node(place, file), b"2")
    assert not filecmp.cmp(file, copy)


def test_tar_makes_incremental_backups(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    top = filled(box)
    tar = ("tar", "-C", box, "-g", disk / "state")
    run(*tar, "-cf", disk / "0.tar", "tree")
    next_second()
    witness.write(node(place, top / "a"), b"value 9")
    run(*tar, "-cf", disk / "1.tar", "tree")
    assert "tree/a" in run("tar", "-tf", disk / "1.tar").splitlines()
    assert run("tar", "-xOf", disk / "1.tar", "tree/a") == "value 9\n"
    (top / "more").write_text("1\n")
    run("rm", "-r", top / "inner")
    run("tar", "-C", box, "-g", "/dev/null", "-xf", disk / "0.tar")
    assert witness.read(node(place, top / "a")) == b"value 1"
    assert sorted(os.listdir(top)) == ["a", "inner"], "the restored state is that of the backup"


@few_places
@pytest.mark.quick_if(place=["C-guest"])
def test_restic_backs_up_and_restores(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    top = filled(box)

    def restic(*words: object) -> str:
        settings = {"RESTIC_PASSWORD": "x", "RESTIC_REPOSITORY": str(disk / "repository")}
        return run("restic", "--no-cache", *words, cwd=box, **settings)

    restic("init")
    restic("backup", "tree")
    witness.write(node(place, top / "a"), b"value 9")
    assert "1 changed" in restic("backup", "tree")
    witness.write(node(place, top / "a"), b"value 8")
    restic("restore", "latest", "--target", box / "back")
    assert (box / "back" / "tree" / "a").read_text() == "value 9\n"
    assert witness.read(node(place, box / "back" / "tree" / "inner" / "b")) == b"value 2"
    restic("restore", "latest", "--target", box)
    assert witness.read(node(place, top / "a")) == b"value 9"


@few_places
@pytest.mark.slow
@pytest.mark.ci
def test_borg_backs_up_and_restores(place: Place, box: Path, disk: Path, witness: XsClient) -> None:
    top = filled(box)

    def borg(*words: object, cwd: Path = box) -> str:
        settings = {
            "BORG_BASE_DIR": str(disk / "borg"),
            "BORG_REPO": str(disk / "repository"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        return run("borg", *words, cwd=cwd, **settings)

    borg("init", "-e", "none")
    borg("create", "::first", "tree")
    slow()
    witness.write(node(place, top / "a"), b"value 9")
    borg("create", "::second", "tree")
    assert borg("extract", "--stdout", "::second", "tree/a") == "value 9\n"
    (box / "back").mkdir()
    borg("extract", "::first", cwd=box / "back")
    assert witness.read(node(place, box / "back" / "tree" / "a")) == b"value 1"
    borg("extract", "::first")
    assert witness.read(node(place, top / "a")) == b"value 1"


def test_zipfile_stores_and_extracts(
    place: Place, box: Path, disk: Path, witness: XsClient
) -> None:
    """A zip file can hold no time before 1980."""
    top = filled(box)
    with zipfile.ZipFile(disk / "zip", "w") as archive:
        for path in sorted(top.rglob("*")):
            archive.write(path, path.relative_to(box))
    with zipfile.ZipFile(disk / "zip") as archive:
        archive.extractall(box / "back")
    assert witness.read(node(place, box / "back" / "tree" / "inner" / "b")) == b"value 2"


@pytest.mark.parametrize("by", ["mount", "client"])
def test_vim_tells_that_a_file_has_changed(
    place: Place, mount: Mount, box: Path, disk: Path, witness: XsClient, by: str
) -> None:
    file = box / "f"
    file.write_text("1\n")
    change = f"echo 2 > {file}"
    if by == "client":
        change = f"XENSTORED_PATH={place.socket} xenstore-write {node(place, file)} 2"
    script = (
        f"-c 'au FileChangedShell * call writefile([v:fcs_reason], \"{disk}/reason\")'"
        " -c 'sleep 20m' -c checktime"
        f" -c 'call system(\"{change}\")' -c 'sleep 20m' -c checktime -c q!"
    )
    mount.bash(f"vim -u NONE -N -es {script} {file} </dev/null")
    assert (disk / "reason").read_text() == "changed\n"


def test_vim_tells_nothing_if_nothing_has_changed(mount: Mount, box: Path, disk: Path) -> None:
    file = box / "f"
    file.write_text("1\n")
    script = (
        f"-c 'au FileChangedShell * call writefile([v:fcs_reason], \"{disk}/reason\")'"
        " -c 'sleep 20m' -c checktime -c q!"
    )
    mount.bash(f"vim -u NONE -N -es {script} {file} </dev/null")
    assert not (disk / "reason").exists()


def test_nano_tells_that_a_file_has_changed(place: Place, box: Path, witness: XsClient) -> None:
    file = box / "f"
    file.write_text("one\n")
    with on_terminal("nano", "-I", file) as terminal:
        await_screen(terminal, b"one")
        next_second()
        witness.write(node(place, file), b"two")
        os.write(terminal, b"x\x0f\r")  # write out, under the same name
        await_screen(terminal, b"File on disk has changed")
    assert witness.read(node(place, file)) == b"two"


# ------------------------------------------------------------------------------------------- blocks


def test_tar_of_sparse_files_keeps_values(mount: Mount, box: Path) -> None:
    value = "v" * 600 + "\n"
    (box / "big").write_text(value)
    assert (box / "big").stat().st_blocks == 2
    assert mount.bash(f"cd {box}; tar -Scf - big | tar -xOf -") == value
    assert mount.bash(f"cd {box}; echo -n > empty; stat -c %b empty; du big") == "0\n1\tbig\n"
    mount.bash(f"cp --sparse=auto {box}/big {box}/copy")
    assert (box / "copy").read_text() == value


# -------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_install_of_ordinary_modes(
    place: Place, box: Path, disk: Path, witness: XsClient, mode: int
) -> None:
    (disk / "f").write_text("1\n")
    run("install", "-m", f"{mode:o}", disk / "f", box / "f")
    assert witness.read(node(place, box / "f")) == b"1"
    run("install", "-d", "-m", "755", box / "d" / "e")
    run("install", "-D", "-m", f"{mode:o}", disk / "f", box / "x" / "y" / "f")
    assert witness.read(node(place, box / "x" / "y" / "f")) == b"1"


def fill_disk(disk: Path, file_mode: int, directory_mode: int) -> None:
    """Files to be copied onto the mount."""
    (disk / "inner").mkdir()
    for name in ("a", "inner/b"):
        (disk / name).write_text(f"{name}\n")
        (disk / name).chmod(file_mode)
    for path in (disk, disk / "inner"):
        path.chmod(directory_mode)


NODE_CP = "require('fs').cpSync(process.argv[1], process.argv[2], {{recursive: true}})"

TREE_COPIES = [
    "cp -a {}/. {}",
    "cp -rp {}/. {}",
    "tar -C {} -cf - . | tar x -C {}",
    "tar -C {} -cf - . | tar xp -C {}",
    "cd {} && find . | cpio -o --quiet | (cd {} && cpio -idm --quiet)",
    "rsync -r --inplace {}/ {}",
    "rsync -a --inplace {}/ {}",
    "rsync -r {}/ {}",
    "rsync -a {}/ {}",
    f'node -e "{NODE_CP}" {{}} {{}}',
]


@pytest.mark.quick_if(place=["C-guest"])
@pytest.mark.parametrize("copy", TREE_COPIES)
@pytest.mark.parametrize(("file_mode", "directory_mode"), [(0o644, 0o755), (0o600, 0o700)])
def test_ordinary_trees_are_copied_onto_the_mount(
    place: Place,
    mount: Mount,
    box: Path,
    disk: Path,
    witness: XsClient,
    copy: str,
    file_mode: int,
    directory_mode: int,
) -> None:
    fill_disk(disk, file_mode, directory_mode)
    target = box / "target"
    target.mkdir()
    done = mount.run(copy.format(disk, target))
    assert (done.returncode, done.stderr) == (0, "")
    assert witness.read(node(place, target / "a")) == b"a"
    assert witness.read(node(place, target / "inner" / "b")) == b"inner/b"


COPIES: list[Callable[[Path, Path], object]] = [shutil.copy, shutil.copy2, shutil.move]

NODE_COPY = "require('fs').copyFileSync(process.argv[1], process.argv[2])"

PROGRAM_COPIES: list[Callable[[Path, Path], object]] = [
    lambda source, target: run("node", "-e", NODE_COPY, source, target),
    lambda source, target: run("cp", "-p", source, target),
    lambda source, target: run("cp", "-a", source, target),
    lambda source, target: run("rsync", "-a", "--inplace", source, target),
    lambda source, target: run("rsync", "-a", source, target),
]


@pytest.mark.parametrize("copy", COPIES, ids=lambda copy: copy.__name__)
@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_python_copies_files_both_ways(
    box: Path, disk: Path, mode: int, copy: Callable[[Path, Path], object]
) -> None:
    (disk / "f").write_text("1\n")
    (disk / "f").chmod(mode)
    copy(disk / "f", box / "f")
    assert (box / "f").read_text() == "1\n"
    copy(box / "f", disk / "back")
    assert (disk / "back").read_text() == "1\n"


def test_python_copies_trees_both_ways(box: Path, disk: Path) -> None:
    top = filled(box)
    shutil.copytree(top, disk / "copy")
    shutil.copytree(disk / "copy", box / "again")
    assert (box / "again" / "inner" / "b").read_text() == "value 2\n"
    shutil.move(disk / "copy", box / "moved")
    assert (box / "moved" / "inner" / "b").read_text() == "value 2\n"


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o755])
def test_node_copies_a_file_onto_a_node(
    place: Place, box: Path, disk: Path, witness: XsClient, mode: int
) -> None:
    """copyFileSync removes its target if fchmod fails."""
    (disk / "new").write_text("new\n")
    (disk / "new").chmod(mode)
    file = box / "f"
    file.write_text("old\n")
    perms = witness.get_perms(node(place, file))
    run("node", "-e", NODE_COPY, disk / "new", file)
    assert witness.read(node(place, file)) == b"new"
    assert witness.get_perms(node(place, file)) == perms


only_embedded = pytest.mark.parametrize("place", ["embedded"], indirect=True, scope="module")


@only_embedded
@pytest.mark.parametrize("copy", TREE_COPIES)
@pytest.mark.parametrize(
    ("options", "file_mode", "directory_mode", "succeeds"),
    [
        ("umask=022", 0o644, 0o755, True),
        ("umask=022", 0o600, 0o700, True),
        ("allow_other,umask=022", 0o644, 0o755, True),
        ("allow_other,umask=022", 0o600, 0o700, False),
    ],
)
def test_trees_are_copied_onto_mounts_of_other_modes(
    place: Place,
    box: Path,
    disk: Path,
    mount_with: Callable[[str], Mount],
    witness: XsClient,
    copy: str,
    options: str,
    file_mode: int,
    directory_mode: int,
    succeeds: bool,
) -> None:
    """A mode that others would get in by is never pretended.  Then the program fails, and nothing is lost."""
    fill_disk(disk, file_mode, directory_mode)
    (box / "child").write_text("or the other mount takes it for a file\n")
    mount = mount_with(options)
    target = mount.path / "data" / box.name / "target"
    target.mkdir()
    (target / "old").write_text("old\n")
    done = mount.run(copy.format(disk, target))
    if succeeds:
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode != 0
        assert "not permitted" in done.stderr
    assert witness.read(node(place, target / "old")) == b"old"
    if succeeds:
        assert witness.read(node(place, target / "a")) == b"a"
        assert witness.read(node(place, target / "inner" / "b")) == b"inner/b"
    assert (disk / "a").read_text() == "a\n"


@only_embedded
@pytest.mark.parametrize("options", ["umask=022", "allow_other,umask=022"])
@pytest.mark.parametrize("mode", [0o644, 0o755])
def test_single_files_are_copied_onto_mounts_of_other_modes(
    place: Place,
    disk: Path,
    mount_with: Callable[[str], Mount],
    witness: XsClient,
    options: str,
    mode: int,
) -> None:
    data = mount_with(options).path / "data"
    for number, copy in enumerate((*COPIES, *PROGRAM_COPIES)):
        text = "x" * (2 * number + 1)  # rsync takes files of one second and one size for equal
        source = disk / str(number)
        source.write_text(text)
        source.chmod(mode)
        copy(source, data / "f")
        assert witness.read(node(place, data / "f")) == text.encode()
    (data / "f").unlink()


@only_embedded
def test_node_removes_its_target_if_it_cannot_set_the_mode(
    place: Place, disk: Path, mount_with: Callable[[str], Mount]
) -> None:
    (disk / "f").write_text("new\n")
    (disk / "f").chmod(0o600)
    mount = mount_with("allow_other,umask=022")
    (mount.path / "data" / "f").write_text("old\n")
    done = mount.run(f'node -e "{NODE_COPY}" {disk}/f data/f')
    assert done.returncode == 1
    assert "EPERM" in done.stderr
    assert not (mount.path / "data" / "f").exists()


@only_embedded
def test_install_makes_files_private_at_first(
    place: Place, disk: Path, mount_with: Callable[[str], Mount], witness: XsClient
) -> None:
    """It asks for the mode 0600 before the one that it is to set.  On a mount that others may read this
    fails, after the content was written."""
    (disk / "f").write_text("1\n")
    mount = mount_with("allow_other,umask=022")
    done = mount.run(f"install -m 644 {disk}/f data/f")
    assert done.returncode == 1
    assert "not permitted" in done.stderr
    assert witness.read(node(place, mount.path / "data" / "f")) == b"1"
    mount.bash("rm data/f")


def test_chmod_never_pretends_rights(mount: Mount, box: Path) -> None:
    file = box / "f"
    file.write_text("1\n")
    present = stat.S_IMODE(file.stat().st_mode)
    for mode in (present, 0o400, 0o644, 0o666, 0o755):
        file.chmod(mode)
    for mode in (0o4755, 0o2755):
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            file.chmod(mode)
    assert stat.S_IMODE(file.stat().st_mode) == present
    os.chown(file, os.getuid(), os.getgid())
    with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
        os.chown(file, 12345, -1)


def test_chmod_never_pretends_what_others_may(
    box: Path, mount_with: Callable[[str], Mount]
) -> None:
    file = mount_with("allow_other,umask=022").path / "data" / box.name / "f"
    (box / "x").write_text("a directory for this mount, too\n")
    file.write_text("1\n")
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    file.chmod(0o644)
    file.chmod(0o666)  # the umask cuts it, as at creation
    for mode in (0o600, 0o640, 0o604):
        with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
            file.chmod(mode)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
