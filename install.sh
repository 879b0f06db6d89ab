#!/bin/sh
# Install xsfs on Debian 12 or 13 as root, and mount the embedded store, which needs no Xen.
#
#   ./install.sh [MOUNTPOINT]       default: /mnt/xenstore
#
# The program goes to a virtual environment of its own (XSFS_PREFIX, default /opt/xsfs), and is found
# as xsfs and mount.xsfs.  With MOUNTPOINT "-" nothing is mounted.
set -eu
umask 022
cd "$(dirname "$0")"
prefix=${XSFS_PREFIX:-/opt/xsfs}
mountpoint=${1:-/mnt/xenstore}

packages() {
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
packages python3-venv python3-trio python3-setuptools python3-wheel fuse3 mount attr
# The distribution's pyfuse3 serves from Debian 13 on.  For Debian 12 pip compiles a newer one.
needed=3.4
candidate=$(apt-cache policy python3-pyfuse3 | sed -n 's/^ *Candidate: //p')
if dpkg --compare-versions "$candidate" ge "$needed"; then
    packages python3-pyfuse3
else
    packages python3-dev gcc libc6-dev pkg-config libfuse3-dev
fi

/usr/bin/python3 -m venv --system-site-packages "$prefix"
pip() {
    "$prefix/bin/python" -m pip --quiet --disable-pip-version-check "$@"
}
pip install "pyfuse3>=$needed"
# From a copy: a build leaves files where it runs.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r pyproject.toml setup.cfg README.md LICENSE docs xsfs "$copy"
pip install --no-build-isolation --no-index "$copy"

ln -sf "$prefix/bin/xsfs" /usr/local/bin/xsfs
# mount(8) looks for its helpers here alone.
ln -sf "$prefix/bin/mount.xsfs" /sbin/mount.xsfs
# The manual and the completions.
(cd "$prefix/share" && find man bash-completion zsh -type f) | while read -r file; do
    mkdir -p "/usr/local/share/${file%/*}"
    ln -sf "$prefix/share/$file" "/usr/local/share/$file"
done
mkdir -p /usr/local/lib/systemd/system
install -m 644 systemd/*.service /usr/local/lib/systemd/system
[ ! -d /run/systemd/system ] || systemctl daemon-reload

[ "$mountpoint" != - ] || exit 0
mkdir -p "$mountpoint"
if [ "$(findmnt -n -o FSTYPE "$mountpoint")" = fuse.xsfs ]; then
    echo "$mountpoint is mounted already: unmount it and mount it again to use what is installed now"
    exit 0
fi
/usr/local/bin/xsfs embedded "$mountpoint"
echo "mounted at $mountpoint; to unmount: umount $mountpoint"
