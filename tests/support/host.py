"""A machine of its own, as far as the file system goes: what a document says can be done there as it
stands, and nothing of it reaches the real one.

It is a mount namespace, where xsfs is installed as a command and as a helper of mount(8), a Xenstore is
at /run/xenstored/socket, /etc/fstab is empty, and so are /mnt/xenstore and /tmp.  The mounts made
in it are visible in it alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.mounting import LIMIT

REPOSITORY: Final = Path(__file__).resolve().parents[2]

_SETUP: Final = """\
set -eu
unmount_all() {
    findmnt -n -l -o TARGET -t fuse.xsfs | while read -r mountpoint; do umount -l "$mountpoint"; done
}
# A directory with the same programs in it, and room for more: a link to each.  What is a link already
# keeps its aim, as it may be a relative one.
roomy() {
    mkdir "$2"
    mount --bind "$1" "$2"
    for file in "$2"/*; do
        name=${file##*/}
        if [ -L "$file" ]; then aim=$(readlink -f "$1/$name") || continue; else aim=$file; fi
        echo "$aim" "$name"
    done > /mnt/.links
    mount -t tmpfs -o mode=755 none "$1"
    while read -r aim name; do ln -s "$aim" "$1/$name"; done < /mnt/.links
}
repository=$1 python=$2
shift 2
# A copy of a mount keeps its xsfs running when the mount itself has gone.
unmount_all
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/xenstore /mnt/.repository /mnt/.python
# Seen here by everybody, wherever they are.
mount --bind "$repository" /mnt/.repository
mount --bind "$python" /mnt/.python
roomy /usr/sbin /mnt/.sbin
roomy /usr/local/bin /mnt/.bin
rm -f /usr/local/bin/xsfs /usr/sbin/mount.xsfs
cat > /usr/local/bin/xsfs << 'end'
#!/mnt/.python/bin/python
import sys
sys.path.insert(0, "/mnt/.repository")
from xsfs.cli.main import main
sys.exit(main())
end
chmod 755 /usr/local/bin/xsfs
ln -s /usr/local/bin/xsfs /usr/sbin/mount.xsfs
: > /mnt/.fstab
mount --bind /mnt/.fstab /etc/fstab
# Sockets: where they are to be seen, and where they are.
for pair in "$@"; do
    touch "/mnt/.${pair%%=*}"
    mount --bind "${pair#*=}" "/mnt/.${pair%%=*}"
done
mount -t tmpfs -o mode=1777 none /tmp
mount -t tmpfs -o mode=755 none /run
mkdir -p /run/xenstored /run/lock
for pair in "$@"; do
    case $pair in xenstore=*) place=/run/xenstored/socket ;; *) place=/run/${pair%%=*}.socket ;; esac
    touch "$place"
    mount --move "/mnt/.${pair%%=*}" "$place"
done
cd /
echo ready
# The end of stdin is the end of it, however the tests end; each xsfs ends with its mount.
cat
unmount_all
"""


class Host:
    """See the module's text.  `fstab` is its /etc/fstab."""

    def __init__(self, holder: subprocess.Popen[str]) -> None:
        self._holder = holder
        self.root = Path(f"/proc/{holder.pid}/root")
        """Its file system, as seen from here."""
        self.enter = ("nsenter", f"--mount=/proc/{holder.pid}/ns/mnt")
        """The words before a command that is to run there."""
        self.fstab = self.root / "etc" / "fstab"

    def start(
        self, script: str, *arguments: str, user: int = 0, **environment: str
    ) -> subprocess.Popen[str]:
        """A shell there.  What it writes to stderr is part of stdout, in the order of writing."""
        return self._start(script, arguments, user, environment, subprocess.DEVNULL)

    def shell(self, before: str) -> subprocess.Popen[str]:
        """A shell that reads its commands from stdin, after those."""
        return self._start(f"{before}\nexec bash", (), 0, {}, subprocess.PIPE)

    def _start(
        self,
        script: str,
        arguments: Sequence[str],
        user: int,
        environment: Mapping[str, str],
        stdin: int,
    ) -> subprocess.Popen[str]:
        change_user = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        clean = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        return subprocess.Popen(
            [
                *(*self.enter, "--wdns=/mnt"),
                *("setpriv", *change_user, "--", "bash", "-c", script, "bash", *arguments),
            ],
            env={**clean, "LC_ALL": "C", "TZ": "UTC", **environment},
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="surrogateescape",
        )

    def run(
        self, script: str, *arguments: str, user: int = 0, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """The same, to its end."""
        return self.finish(self.start(script, *arguments, user=user, **environment), LIMIT * 3)

    def finish(
        self, process: subprocess.Popen[str], limit: float
    ) -> subprocess.CompletedProcess[str]:
        """A shell's output, to its end, which must come within `limit` seconds."""
        with process:
            try:
                printed, _ = process.communicate(timeout=limit)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, printed)

    def sh(self, script: str, *arguments: str, user: int = 0, **environment: str) -> str:
        """What it prints; it must succeed."""
        done = self.run(script, *arguments, user=user, **environment)
        assert done.returncode == 0, f"{script!r}: {done.stdout}"
        return done.stdout

    def mounts(self) -> list[str]:
        """Where xsfs is mounted there."""
        listed = self.run("findmnt -n -l -o TARGET -t fuse.xsfs").stdout
        return listed.splitlines()

    def unmount_all(self) -> None:
        for mountpoint in reversed(self.mounts()):
            self.run('umount "$1" || umount -l "$1"', mountpoint)
        assert self.mounts() == []


@contextmanager
def open_host(socket: str | None = None, **others: str) -> Iterator[Host]:
    """A host whose Xenstore is at that socket; without one it has none.  Other sockets are to be found
    as /run/NAME.socket."""
    sockets = others | ({"xenstore": socket} if socket else {})
    holder = subprocess.Popen(
        [
            *("unshare", "--mount", "--propagation=private", "sh", "-c", _SETUP),
            *("setup", str(REPOSITORY), sys.prefix),
            *(f"{name}={path}" for name, path in sockets.items()),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        with holder.stdin:
            assert holder.stdout.readline() == "ready\n", "the host could not be set up"
            host = Host(holder)
            try:
                yield host
            finally:
                host.unmount_all()
