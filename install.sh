#!/bin/sh
# Install xsfs on Debian 12 or 13 as root, and mount the embedded store, which needs no Xen.
#
#   ./install.sh [MOUNTPOINT]       default: /mnt/xenstore; "-" mounts nothing
#   ./install.sh --uninstall        remove everything that this script has installed, packages excepted
#
# The programs go to a virtual environment (XSFS_PREFIX, default /opt/xsfs), with links to xsfs, xsfs-watch and
# mount.xsfs.  Run the script again to upgrade: it restarts the services xsfs and xsfs@..., and
# leaves other mounts alone, since unmounting an embedded store loses its contents.
set -eu
umask 022
cd "$(dirname "$0")"
prefix=${XSFS_PREFIX:-/opt/xsfs}
units=/usr/local/lib/systemd/system

# `xsfs_mounts` lists the mountpoints of xsfs, `systemd_runs` tells whether systemd manages this machine.
xsfs_mounts() { findmnt -n -l -o TARGET -t fuse.xsfs || true; }
systemd_runs() { [ -d /run/systemd/system ]; }

# The links in a directory that lead to the virtual environment.
our_links() {
    find "$1" -type l 2>/dev/null | while read -r link; do
        case $(readlink "$link") in "$prefix"/*) echo "$link" ;; esac
    done
}

uninstall() {
    if systemd_runs && [ -e "$units/xsfs.service" ]; then
        systemctl stop xsfs.service 'xsfs@*.service'
        systemctl --quiet disable xsfs.service xsfs@.service
    fi
    # A running xsfs needs its files until it is unmounted.
    left=$(xsfs_mounts)
    if [ -n "$left" ]; then
        echo "xsfs is still mounted; umount first:" $left >&2
        exit 1
    fi
    for directory in /usr/local/bin /usr/sbin /usr/local/share; do
        our_links "$directory" | while read -r link; do rm "$link"; done
    done
    rm -f "$units/xsfs.service" "$units/xsfs@.service"
    if systemd_runs; then systemctl daemon-reload; fi
    # Only if it is what this script has made.
    if [ -x "$prefix/bin/mount.xsfs" ] && [ -f "$prefix/pyvenv.cfg" ]; then rm -r "$prefix"; fi
    echo "xsfs is uninstalled"
}

if [ "${1-}" = --uninstall ]; then
    uninstall
    exit
fi
mountpoint=${1:-/mnt/xenstore}

# Each step takes a minute or more on a slow machine.
step() { echo "install.sh: $*"; }

packages() {
    apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

export DEBIAN_FRONTEND=noninteractive
step "installing packages"
apt-get update -qq
packages python3-venv python3-trio python3-setuptools python3-wheel fuse3 mount attr
# Debian 13's pyfuse3 serves.  For Debian 12, whose pyfuse3 is older, pip compiles a newer one.
needed=3.4
candidate=$(apt-cache policy python3-pyfuse3 | sed -n 's/^ *Candidate: //p')
if dpkg --compare-versions "$candidate" ge "$needed"; then
    packages python3-pyfuse3
else
    packages python3-dev gcc libc6-dev pkg-config libfuse3-dev
fi

# setuptools leaves build/ and *.egg-info where it builds: in a copy.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R LICENSE README.md pyproject.toml setup.cfg docs systemd xsfs "$copy"

/usr/bin/python3 -m venv --system-site-packages "$prefix"
pip() { "$prefix/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
step "building xsfs"
pip install "pyfuse3>=$needed"
pip install --no-build-isolation --no-index --upgrade "$copy"
ln -sf "$prefix/bin/xsfs" "$prefix/bin/xsfs-watch" /usr/local/bin
# mount(8) looks for its helpers here alone.
ln -sf "$prefix/bin/mount.xsfs" /usr/sbin/mount.xsfs
# The manual and the completions.
(cd "$prefix/share" && find man bash-completion zsh -type f) | while read -r file; do
    mkdir -p "/usr/local/share/${file%/*}"
    ln -sf "$prefix/share/$file" "/usr/local/share/$file"
done

if systemd_runs; then
    mkdir -p "$units"
    cp systemd/*.service "$units"
    systemctl daemon-reload
    systemctl try-restart xsfs.service 'xsfs@*.service'
fi

[ "$mountpoint" != - ] || exit 0
if xsfs_mounts | grep -qxF "$mountpoint" && [ -d "$mountpoint" ]; then
    echo "xsfs is mounted at $mountpoint already; umount it and mount again to use the new version"
    exit
fi
# A mount whose process has died is no directory.
if xsfs_mounts | grep -qxF "$mountpoint"; then umount "$mountpoint"; fi
mkdir -p "$mountpoint"
/usr/local/bin/xsfs embedded "$mountpoint"
echo "xsfs is mounted at $mountpoint; to unmount: umount $mountpoint"
