"""Ring: values are secrets, and the log never has them, not even with -d."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.support.mounting import Mount, mounted

SECRET = "correct-horse-battery-staple"


def test_no_value_is_logged(tmp_path: Path) -> None:
    with mounted(["-d", "-o", "root=/", "embedded"], tmp_path / "m") as mount:
        _use_the_secret(mount)
        log = mount.stderr
    # The operations are there, and only their lengths.
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
