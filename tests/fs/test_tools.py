"""Ring: a real mount, of every store, driven by the tools that administrators use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.test_values import node
from tests.support.mounting import Mount, Place, mounted
from tests.support.xenstored.harness import XsClient

Tree = dict[str, tuple[bytes, list[str]]]


def tree_of(client: XsClient, top: str) -> Tree:
    """All nodes below `top`, with value and permissions, as the witness sees them."""
    found: Tree = {}

    def walk(path: str) -> None:
        found[path[len(top) :]] = (client.read(path), client.get_perms(path))
        for name in client.ls(path):
            walk(f"{path}/{name}")

    walk(top)
    return found


@pytest.fixture
def sample(place: Place, box: Path, witness: XsClient) -> Tree:
    """A subtree with all that can be in one: values, binary ones, permissions, values of nodes that
    have children, an empty directory, an empty file."""
    top = f"{node(place, box)}/src"
    (box / "src").mkdir()
    (box / "src" / "emptydir").mkdir()
    me = place.domid
    for path, value in (
        ("text", b"hello"),
        ("binary", bytes(range(256))),
        ("newlines", b"a\n\nb\n"),
        ("empty", b""),
        ("both", b"value of a directory"),
        ("both/x", b"1"),
        ("both/deep/y", b"2"),
    ):
        witness.write(f"{top}/{path}", value)
    witness.set_perms(f"{top}/text", [f"n{me}", "r0" if me else "b0"])
    witness.set_perms(f"{top}/both/deep", [f"r{me}"])
    return tree_of(witness, top)


def copied(place: Place, box: Path, witness: XsClient, name: str) -> Tree:
    return tree_of(witness, f"{node(place, box)}/{name}")


def values(tree: Tree) -> dict[str, bytes]:
    return {path: value for path, (value, _) in tree.items()}


def test_cp_keeps_everything(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree
) -> None:
    mount.bash(f"cp -a {box}/src {box}/copy")
    assert copied(place, box, witness, "copy") == sample
    mount.bash(f"cp -r {box}/src {box}/plain")
    assert values(copied(place, box, witness, "plain")) == values(sample)


def test_tar_backs_up_and_restores(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree, tmp_path: Path
) -> None:
    archive = tmp_path / "backup.tar"
    mount.bash(f"tar --xattrs --xattrs-include='user.*' -C {box} -cf {archive} src")
    mount.bash(
        f"mkdir {box}/restored && "
        f"tar --xattrs --xattrs-include='user.*' -C {box}/restored -xf {archive}"
    )
    assert copied(place, box, witness, "restored/src") == sample


def test_rsync_out_and_in(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree, tmp_path: Path
) -> None:
    mount.bash(f"rsync -aX {box}/src/ {tmp_path}/out/")
    assert (tmp_path / "out" / "text").read_text() == "hello\n"
    for options in ("--inplace", ""):
        mount.bash(f"mkdir {box}/back && rsync -rX {options} {tmp_path}/out/ {box}/back/")
        assert copied(place, box, witness, "back") == sample
        mount.bash(f"rm -r {box}/back")


def test_mv_moves_a_subtree(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree
) -> None:
    mount.bash(f"mv {box}/src {box}/moved")
    assert copied(place, box, witness, "moved") == sample
    assert os.listdir(box) == ["moved"]


def test_mv_to_another_file_system_and_back(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree, tmp_path: Path
) -> None:
    mount.bash(f"mv {box}/src {tmp_path}/away && ls -A {box}")
    assert not os.listdir(box)
    mount.bash(f"mv {tmp_path}/away {box}/src")
    assert values(copied(place, box, witness, "src")) == values(sample)


@pytest.fixture(scope="module")
def other_mount(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    with mounted([place.socket], tmp_path_factory.mktemp("other") / "m") as mount:
        yield mount


def test_between_two_mounts(
    place: Place, mount: Mount, other_mount: Mount, box: Path, witness: XsClient, sample: Tree
) -> None:
    there = other_mount.path / box.relative_to(mount.path)
    mount.bash(f"cp -a {box}/src {there}/copy")
    assert copied(place, box, witness, "copy") == sample
    mount.bash(f"mv {box}/src {there}/moved")
    assert copied(place, box, witness, "moved") == sample
    assert sorted(os.listdir(box)) == ["copy", "moved"]
    mount.bash(f"mv {there}/moved/text {box}/text; mv {there}/moved {box}/src")
    assert copied(place, box, witness, "text")[""] == sample.pop("/text")
    assert copied(place, box, witness, "src") == sample


def test_sed_in_place(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    (box / "f").write_text("one two\n")
    os.setxattr(box / "f", "user.xs.perms", f"b{place.domid}".encode())
    mount.bash(f"sed -i s/two/three/ {box}/f")
    assert witness.read(f"{node(place, box)}/f") == b"one three"
    assert os.listdir(box) == ["f"]


def test_grep_and_find(mount: Mount, box: Path, sample: Tree) -> None:
    assert mount.bash(f"cd {box} && grep -r value .") == "./src/both/.value:value of a directory\n"
    assert mount.bash(f"cd {box} && find . -type f -empty") == "./src/empty\n"
    assert mount.bash(f"cd {box} && find . -type d | sort") == (
        ".\n./src\n./src/both\n./src/both/deep\n./src/emptydir\n"
    )
    assert mount.bash(f"cd {box} && find . -name x -exec cat {{}} +") == "1\n"
    assert mount.bash(f"cd {box} && du -a --apparent-size src | wc -l") == "11\n"


def test_getfattr_and_setfattr(
    place: Place, mount: Mount, box: Path, witness: XsClient, sample: Tree, tmp_path: Path
) -> None:
    me = place.domid
    dumped = mount.bash(f"cd {box} && getfattr -R -d src")
    assert f'user.xs.perms="r{me}"' in dumped
    mount.bash(f"cd {box} && setfattr -n user.xs.perms -v n{me},r0 src/empty")
    assert witness.get_perms(f"{node(place, box)}/src/empty") == [f"n{me}", "r0"]
    mount.bash(
        f"cd {box} && getfattr -R -d src > {tmp_path}/dump && setfattr --restore={tmp_path}/dump"
    )
    assert mount.bash(f"cd {box} && getfattr --only-values -n user.xs.path src/text") == (
        f"{node(place, box)}/src/text"
    )


def test_shell_idioms(place: Place, mount: Mount, box: Path, witness: XsClient) -> None:
    assert (
        mount.bash(
            f"""
        cd {box}
        echo 1 > n
        for i in 1 2 3; do echo $(( $(cat n) + 1 )) > n; done
        read x < n; echo $x
        [ -e n ] && [ ! -e m ] && [ -f n ] && [ -d . ] && echo tests
        mkdir -p a/b/c && rmdir -p a/b/c && ls
        printf 'no newline' > p; wc -c < p
        cat n p | tee t; echo
        exec 3<> rw; echo through >&3; exec 3>&-; cat rw
        {{ echo one; echo two; }} > both; cat both
        dd if=/dev/zero of=zeros bs=100 count=3 status=none; wc -c < zeros
        """
        )
        == "4\ntests\nn\n11\n4\nno newline\n\nthrough\none\ntwo\n301\n"
    )


def test_dash_and_vi_style_saves(mount: Mount, box: Path) -> None:
    assert mount.bash(
        f"dash -c 'cd {box}; echo 1 > a; echo 2 >> a; read x < a; echo $x; cat a'"
    ) == ("1\n1\n2\n")
    # Truncate, write, fsync, as an editor without backup files does.
    program = (
        "import os; f = os.open('a', os.O_WRONLY | os.O_TRUNC | os.O_CREAT); "
        "os.write(f, b'edited\\n'); os.fsync(f); os.close(f); print(open('a').read(), end='')"
    )
    assert mount.bash(f'cd {box}; python3 -c "{program}"') == "edited\n"
