"""The Debian package, built and used in a fresh root of each Debian, under a real systemd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.roots import Root, copy_checkout, debian_root
from tests.support.sshd import free_port
from xsfs import __version__

pytestmark = pytest.mark.slow

# The build takes nothing from the network, and no python3 or cache that comes first somewhere.
BUILD = """\
mkdir -p /root/bin
printf '#!/bin/sh\\necho "the wrong python3" >&2; exit 1\\n' > /root/bin/python3
chmod +x /root/bin/python3
PATH=/root/bin:$PATH /root/xsfs/debian/build.sh /root/dist
rm -r /root/bin
"""

# A newer version with the same files.
NEWER = """\
cd /root
dpkg-deb -R dist/xsfs_*_all.deb newer
sed -i 's/^Version: .*/&.1/' newer/DEBIAN/control
dpkg-deb -b newer newer.deb
rm -r newer
"""

INSTALL = """\
apt-get update -qq
apt-get install -y -qq --no-install-recommends systemd systemd-sysv mount attr \\
    openssh-client openssh-server /root/dist/*.deb
"""

# Off Xen the condition keeps the unit from starting.
SERVICES = """\
test "$(systemctl is-enabled xsfs.service)" = disabled
! systemctl -q is-active xsfs.service
mkdir -p /etc/systemd/system/xsfs.service.d /etc/systemd/system/xsfs@.service.d
printf '[Unit]\\nConditionPathExists=\\n' | tee /etc/systemd/system/xsfs.service.d/any.conf \\
    > /etc/systemd/system/xsfs@.service.d/any.conf
echo SOURCE=embedded | tee /etc/default/xsfs > /etc/default/xsfs-srv-xen
systemctl daemon-reload
systemctl enable xsfs.service
systemctl start xsfs.service xsfs@srv-xen.service || { journalctl -b --no-pager | tail -50; exit 1; }
cat /run/xenstore/name /srv/xen/name
"""

# The units forbid the network; the drop-in of docs/other-hosts.md permits it.
OTHER_HOST = """\
install -d -m 700 /root/.ssh /run/sshd
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
echo "[127.0.0.1]:PORT $(cut -d ' ' -f 1,2 /etc/ssh/ssh_host_ed25519_key.pub)" > /root/.ssh/known_hosts
printf 'Host other\\nHostName 127.0.0.1\\nPort PORT\\n' > /root/.ssh/config
/usr/sbin/sshd -o ListenAddress=127.0.0.1:PORT -o PidFile=/run/other.pid
mkdir /mnt/other
xsfs -o listen=/run/other.socket embedded /mnt/other
echo other > /mnt/other/data/name
echo SOURCE=root@other:/run/other.socket > /etc/default/xsfs-srv-other
! systemctl start xsfs@srv-other.service
systemctl stop xsfs@srv-other.service
drop_in=/etc/systemd/system/xsfs@srv-other.service.d
mkdir $drop_in
sed -n '/^    \\[Service]/,/^$/s/^    //p' /root/xsfs/docs/other-hosts.md > $drop_in/network.conf
systemctl daemon-reload
systemctl start xsfs@srv-other.service || { journalctl -b --no-pager | tail -50; exit 1; }
name=$(cat /srv/other/data/name)
systemctl stop xsfs@srv-other.service
umount /mnt/other
kill "$(cat /run/other.pid)"
echo "mounted $name"
"""

UPGRADE = """\
pids() { systemctl show --value -p MainPID xsfs.service xsfs@srv-xen.service | sort; }
pids > /run/before
apt-get install -y -qq /root/newer.deb
pids > /run/after
test "$(sort /run/before /run/after | uniq -d)" = ""
systemctl is-active xsfs.service xsfs@srv-xen.service
cat /run/xenstore/name /srv/xen/name
systemctl stop xsfs.service
apt-get install -y -qq --reinstall /root/newer.deb
"""

REMOVE = """\
systemctl start xsfs.service
apt-get remove -y -qq xsfs
! systemctl -q is-active xsfs.service
! systemctl -q is-active xsfs@srv-xen.service
! findmnt -t fuse.xsfs
! test -e /usr/lib/python3/dist-packages/xsfs
apt-get purge -y -qq xsfs
! test -e /etc/systemd/system/multi-user.target.wants/xsfs.service
! find /var/lib/systemd | grep xsfs
"""


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def root(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Root]:
    """A root with what the build has made in /root/dist."""
    with debian_root(request.param, tmp_path_factory.mktemp("debian") / "root") as root:
        copy_checkout(root.path / "root" / "xsfs")
        root.sh(BUILD)
        yield root


def test_the_version_is_that_of_the_program(root: Root) -> None:
    assert f"/xsfs_{__version__}-" in root.sh("echo /root/dist/xsfs_*_all.deb")


def test_lintian_finds_nothing(root: Root) -> None:
    root.sh(
        "apt-get install -y -qq --no-install-recommends lintian >/dev/null\n"
        "lintian --allow-root --fail-on error,warning,info /root/dist/*.changes /root/dist/*.deb"
    )


def test_its_whole_life(root: Root) -> None:
    """Installed, enabled, upgraded, removed, purged."""
    root.sh(INSTALL)
    root.sh("/root/xsfs/debian/tests/embedded")
    root.sh(NEWER)
    with root.booted() as booted:
        assert booted.sh(SERVICES).endswith("Domain-0\nDomain-0\n")
        assert booted.sh(OTHER_HOST.replace("PORT", str(free_port()))).endswith("mounted other\n")
        assert "Domain-0\nDomain-0\n" in booted.sh(UPGRADE)
        booted.sh(REMOVE)
