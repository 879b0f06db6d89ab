"""Domains come and go, seen and driven through the mount in dom0."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounting import Mount
from tests.system.xen.checks.guest import Guest
from tests.system.xen.checks.machine import LIMIT, Witness, shell, until


@contextmanager
def heard(mount: Mount, directory: Path, *paths: str) -> Iterator[Path]:
    """A file with what .watch tells of some paths."""
    output = directory / "heard"
    script = "exec 3<> .watch; " + "".join(f"echo {path} >&3; " for path in paths)
    with open(output, "wb") as file:
        reader = subprocess.Popen(
            ["bash", "-c", f"{script} exec cat <&3"], cwd=mount.path, stdout=file
        )
    try:
        until(lambda: len(output.read_text().splitlines()) == len(paths), "the watches are armed")
        yield output
    finally:
        reader.kill()
        reader.wait()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_creation(dom0: Mount, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """xl makes the domU that the other checks share."""
    with heard(dom0, tmp_path, "@introduceDomain", "@releaseDomain") as said:
        before = lines(said)
        guest = request.getfixturevalue("guest")
        assert lines(said).count("@introduceDomain") == 2
        assert lines(said).count("@releaseDomain") == before.count("@releaseDomain")
    home = dom0.path / guest.home[1:]
    assert (home / "name").read_text() == f"{guest.name}\n"
    assert str(guest.domid) in dom0.bash("ls local/domain").split()
    assert dom0.bash(f"cat .{guest.home}/device/vbd/51712/state") == "4\n"


def test_names(dom0: Mount, guest: Guest) -> None:
    """`.domain` has the domains that xl has created, by the names that xl gives them."""
    named = dom0.path / ".domain"
    for name in (guest.name, "renamed"):
        if name != guest.name:
            shell(f"xl rename {guest.name} {name}")
        assert sorted(os.listdir(named)) == ["Domain-0", name]
        assert (named / name / "domid").read_text() == f"{guest.domid}\n"
    shell(f"xl rename renamed {guest.name}")


def test_more_domains(dom0: Mount, guest: Guest, witness: Witness, tmp_path: Path) -> None:
    """The nodes of two domUs like this one: one of them copied through the mount, and both read."""
    tar = tmp_path / "tar"
    shell(
        f"cd {dom0.path}/local/domain; tar -C {guest.domid} -cf {tar} .;"
        f" mkdir 1001; tar -C 1001 -xf {tar}"
    )
    pattern = re.compile(rf'^{guest.home}(/\S+) = "(.*)"$', re.M)
    nodes = pattern.findall(witness.run("ls", "-f", guest.home))
    copy = ((f"/local/domain/1002{path}", value) for path, value in nodes)
    witness.write(*(word for pair in copy for word in pair))
    find = "find local/domain/{} -type f | wc -l"
    assert dom0.bash(find.format("1001")) == dom0.bash(find.format(guest.domid))
    assert dom0.bash("cat local/domain/100?/name | sort | uniq -c").split() == ["2", guest.name]
    truth = shell("xenstore-ls -f /local/domain | grep -c '^/local/domain/100[0-9]/.* = \"..*\"'")
    found = dom0.bash("grep -r . local/domain/100? | wc -l")
    assert int(found) == int(truth), (found, truth)
    shell(f"cd {dom0.path}/local/domain; rm -r 1001", limit=LIMIT * 2)
    witness.remove("/local/domain/1002")
    assert dom0.run("ls -d local/domain/100?").returncode != 0
    shell("xl list")
