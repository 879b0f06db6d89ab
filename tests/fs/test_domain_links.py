"""Guests by name, on real mounts: `.domain` in the root of a tree."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from tests.support.mounting import Mount, Place, each_place, mounted, refusal
from tests.support.xenstored.harness import XsClient

place = each_place("C", "ocaml", "embedded")


def name_domain(client: XsClient, domid: int, name: bytes) -> None:
    client.write(f"/local/domain/{domid}/name", name)


@pytest.fixture
def domains(witness: XsClient) -> XsClient:
    """Domains 101 and up, which the test may name, and nobody else does."""
    for name in witness.ls("/local/domain"):
        if int(name) > 100:
            witness.rm(f"/local/domain/{name}")
    return witness


def test_a_link_leads_to_the_home_of_the_domain(mount: Mount, domains: XsClient) -> None:
    name_domain(domains, 101, b"guest-101")
    domains.write("/local/domain/101/device/vif/0/mac", b"00:16:3e:00:00:01")
    link = mount.path / ".domain" / "guest-101"
    assert os.readlink(link) == "../.root/local/domain/101"
    assert stat.S_ISLNK(os.lstat(link).st_mode)
    assert os.lstat(link).st_size == len(os.readlink(link))
    assert (link / "device" / "vif" / "0" / "mac").read_text() == "00:16:3e:00:00:01\n"
    (link / "new").write_text("by name")
    assert domains.read("/local/domain/101/new") == b"by name"
    assert "guest-101" in os.listdir(mount.path / ".domain")


def test_links_follow_the_store(mount: Mount, domains: XsClient) -> None:
    directory = mount.path / ".domain"
    name_domain(domains, 101, b"moves")
    assert os.readlink(directory / "moves").endswith("/101")
    domains.rm("/local/domain/101")
    assert "moves" not in os.listdir(directory)
    assert refusal(lambda: os.readlink(directory / "moves")) == errno.ENOENT
    name_domain(domains, 102, b"moves")
    assert os.readlink(directory / "moves").endswith("/102")


def test_a_name_of_two_domains_is_not_listed(mount: Mount, domains: XsClient) -> None:
    directory = mount.path / ".domain"
    name_domain(domains, 101, b"twins")
    name_domain(domains, 102, b"twins")
    name_domain(domains, 103, b"single")
    listed = os.listdir(directory)
    assert "single" in listed
    assert "twins" not in listed
    assert refusal(lambda: os.stat(directory / "twins")) == errno.ENOTUNIQ
    assert refusal(lambda: os.readlink(directory / "twins")) == errno.ENOTUNIQ
    domains.rm("/local/domain/102")
    assert os.readlink(directory / "twins").endswith("/101")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"nul\0nul", b"n" * 256])
def test_a_name_that_no_file_can_have_is_left_out(
    mount: Mount, domains: XsClient, name: bytes
) -> None:
    name_domain(domains, 101, b"proper")
    name_domain(domains, 102, name)
    listed = os.listdir(bytes(mount.path / ".domain"))
    assert b"proper" in listed
    assert all(each and b"/" not in each and len(each) <= 255 for each in listed)
    assert len(listed) == len(set(listed))
    assert not {b"", b".", b"..", b"a", b"etc", b"nul"} & set(listed)


def test_odd_names_that_files_can_have(mount: Mount, domains: XsClient) -> None:
    for number, name in enumerate(
        (b"with blank", b"-r", b".hidden", b"\xff\xfe", b"n" * 255, b"a\nb")
    ):
        name_domain(domains, 101 + number, name)
        assert os.readlink(bytes(mount.path / ".domain") + b"/" + name).endswith(
            b"/%d" % (101 + number)
        )
        assert name in os.listdir(bytes(mount.path / ".domain"))


def test_nothing_can_be_changed_there(mount: Mount, domains: XsClient) -> None:
    name_domain(domains, 101, b"guest")
    directory = mount.path / ".domain"
    assert refusal(lambda: (directory / "guest").unlink()) == errno.EPERM
    assert refusal(lambda: (directory / "new").mkdir()) == errno.EPERM
    assert refusal(lambda: (directory / "new").write_text("x")) == errno.EPERM
    assert refusal(lambda: (directory / "new").symlink_to("x")) == errno.EPERM
    assert refusal(lambda: (directory / "guest").rename(directory / "other")) == errno.EPERM
    assert os.stat(directory).st_mode & 0o777 == 0o500


def test_it_is_never_listed(mount: Mount) -> None:
    assert ".domain" not in os.listdir(mount.path)


def test_in_a_transaction_the_names_are_its_own(mount: Mount, domains: XsClient) -> None:
    name_domain(domains, 101, b"old-name")
    tx = mount.path / ".transaction" / "t"
    tx.mkdir()
    try:
        (tx / ".root" / "local" / "domain" / "101" / "name").write_text("new-name")
        assert os.readlink(tx / ".domain" / "new-name") == "../.root/local/domain/101"
        assert (tx / ".domain" / "new-name" / "name").read_text() == "new-name\n"
        assert "old-name" in os.listdir(mount.path / ".domain")
        assert "new-name" not in os.listdir(mount.path / ".domain")
    finally:
        tx.rmdir()


def test_under_another_root(place: Place, domains: XsClient, tmp_path: Path) -> None:
    name_domain(domains, 101, b"guest")
    for root in ("/", "/local/domain/101"):
        with mounted(["-o", f"root={root}", place.socket], tmp_path / "m") as other:
            assert (other.path / ".domain" / "guest" / "name").read_text() == "guest\n"


def test_many_domains_are_one_listing(mount: Mount, domains: XsClient) -> None:
    for number in range(101, 701):
        name_domain(domains, number, b"guest-%d" % number)
    before = mount.counter("requests")
    listed = os.listdir(mount.path / ".domain")
    assert {f"guest-{number}" for number in range(101, 701)} <= set(listed)
    assert mount.counter("requests") - before < 2 * 700
