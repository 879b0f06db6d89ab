#!/bin/sh
# Install xsfs on Debian 12 as root, and mount the embedded store, which needs no Xen.
#
#   ./install.sh [MOUNTPOINT]       default: /mnt/xenstore
#
# The program goes to a virtual environment of its own (XSFS_PREFIX, default /opt/xsfs), and is found
# as xsfs and mount.xsfs.  With MOUNTPOINT "-" nothing is mounted.
set -eu
cd "$(dirname "$0")"
prefix=${XSFS_PREFIX:-/opt/xsfs}
mountpoint=${1:-/mnt/xenstore}

# pyfuse3 is built from its source: hence the compiler, Python's and libfuse's headers.
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    python3-venv python3-dev gcc pkg-config libfuse3-dev fuse3 attr >/dev/null

/usr/bin/python3 -m venv "$prefix"
"$prefix/bin/pip" install -q --disable-pip-version-check .
ln -sf "$prefix/bin/xsfs" /usr/local/bin/xsfs
# mount(8) looks for its helpers here alone.
ln -sf "$prefix/bin/mount.xsfs" /sbin/mount.xsfs
# The manual and the completions.
(cd "$prefix/share" && find man bash-completion zsh -type f) | while read -r file; do
    mkdir -p "/usr/local/share/${file%/*}"
    ln -sf "$prefix/share/$file" "/usr/local/share/$file"
done

[ "$mountpoint" != - ] || exit 0
mkdir -p "$mountpoint"
/usr/local/bin/xsfs embedded "$mountpoint"
echo "mounted at $mountpoint; 'umount $mountpoint' ends it"
