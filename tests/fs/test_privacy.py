"""Values are secrets: the log never has them, not even with -d."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.support.lying_store import Lie, LyingStore, Talk, on, says
from tests.support.messages import Message
from tests.support.mounting import Mount, mounted, open_place
from xsfs.xenstore.protocol import Op, encode

SECRET = "correct-horse-battery-staple"


def test_no_value_is_logged(tmp_path: Path) -> None:
    with mounted(["-d", "-o", "root=/", "embedded"], tmp_path / "m") as mount:
        _use_the_secret(mount)
        log = mount.stderr
    # The log has the operations, and only the lengths of the values.
    assert f"write /tool/vnc 0 {len(SECRET) + 1} bytes: ok" in log
    assert f"setxattr /tool/vnc 'user.xs.value' {len(SECRET)} bytes" in log
    assert "read /tool/vnc 0" in log
    assert not [line for line in log.splitlines() if SECRET in line or SECRET[8:] in line]


def _use_the_secret(mount: Mount) -> None:
    """By every way in which a value goes through the mount."""
    path = mount.path / "tool" / "vnc"
    path.write_text(SECRET + "\n")
    assert path.read_text() == SECRET + "\n"
    os.setxattr(path, "user.xs.value", SECRET.encode())
    assert os.getxattr(path, "user.xs.value") == SECRET.encode()
    mount.bash(f"echo {SECRET} >> tool/vnc; truncate -s 30 tool/vnc; mv tool/vnc tool/moved")
    mount.bash(f"mkdir tool/d; echo {SECRET} > tool/d/.value; grep -r . tool")
    mount.bash(f"mkdir .transaction/t; echo {SECRET} > .transaction/t/tool/in")
    mount.bash("echo commit > .transaction/t/.control")
    # Refused writes, too.
    assert mount.run(f"echo {SECRET} > .stats").returncode != 0
    assert mount.run(f"yes {SECRET} | head -c 5000 > tool/moved").returncode != 0
    for name in ".ls", ".json", ".dump":
        if (mount.path / "tool" / name).exists():
            (mount.path / "tool" / name).read_text()
    dump = mount.path / "tool" / ".dump"
    if dump.exists():
        dump.write_text(json.dumps({"path": "restored", "value": SECRET, "perms": "n0"}) + "\n")


def nonsense_event(talk: Talk, request: Message) -> bool:
    if request.op != Op.WATCH:
        return False
    talk.send(encode(Op.WATCH_EVENT, 0, 0, SECRET.encode() + b"\0"))
    return True


@pytest.mark.parametrize(
    ("lie", "script"),
    [
        (on(Op.READ, says(SECRET.encode() + b"\0", Op.ERROR)), "cat data/x"),
        (on(Op.GET_PERMS, says(SECRET.encode() + b"\0")), "stat data/x"),
        (on(Op.TRANSACTION_START, says(SECRET.encode() + b"\0")), "mkdir data/d"),
        (on(Op.DIRECTORY, says(SECRET.encode())), "ls data"),
        (nonsense_event, "timeout 60 head -n 2 data/.watch"),
    ],
)
def test_no_reply_that_makes_no_sense_is_logged(lie: Lie, script: str, tmp_path: Path) -> None:
    """A daemon that got out of step may send a value where something else belongs."""
    with (
        open_place("C-guest", tmp_path) as place,
        LyingStore(tmp_path / "liar", place.socket) as liar,
        mounted(["-d", liar.path], tmp_path / "m") as mount,
    ):
        mount.bash("echo 1 > data/x")
        liar.lie = lie
        assert mount.run(script).returncode != 0
        liar.behave()
        assert "Xenstore broke the protocol" in mount.stderr
        assert SECRET not in mount.stderr
