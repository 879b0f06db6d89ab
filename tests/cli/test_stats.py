"""Ring: `.stats` tells which store is mounted, with each real daemon, in dom0 and in a guest."""

from __future__ import annotations

from pathlib import Path

from tests.support.mounting import Mount, Place, mounted

DAEMONS = {"C": "C xenstored", "ocaml": "oxenstored"}


def test_the_daemon_is_named(place: Place, mount: Mount) -> None:
    lines = (mount.path / ".stats").read_text().splitlines()
    # What listens for the embedded store is a C xenstored to its clients.
    assert lines[:2] == [
        f"store {place.socket}",
        f"daemon {DAEMONS.get(place.kind, 'C xenstored')}",
    ]


def test_the_embedded_store_is_named(tmp_path: Path) -> None:
    with mounted(["embedded"], tmp_path / "m") as mount:
        lines = (mount.path / ".stats").read_text().splitlines()
    assert lines[:2] == ["store embedded", "daemon embedded"]
