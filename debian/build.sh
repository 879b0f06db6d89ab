#!/bin/sh
# Build the Debian package, as root if what it is built with has to be installed first.
#
#   ./debian/build.sh [DIRECTORY]      where the package goes; default: dist
#
# pip fetches the source of pyfuse3 where the distribution's is too old.
set -eu
cd "$(dirname "$0")/.."
mkdir -p "${1:-dist}"
target=$(cd "${1:-dist}" && pwd)

if [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends dpkg-dev build-essential fakeroot >/dev/null
    apt-get build-dep -y -qq --no-install-recommends ./ >/dev/null
fi

# In a copy: nothing is left behind here, and debian/changelog follows from what the project has.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/xsfs"
tar -c --exclude='./.[!.]*' --exclude=__pycache__ --exclude=./build --exclude=./dist \
    --exclude='*.egg-info' . | tar -x -C "$work/xsfs"
cd "$work/xsfs"

: "${SOURCE_DATE_EPOCH:=$(stat -c %Y CHANGELOG.md)}"
export SOURCE_DATE_EPOCH
python3 debian/changelog.py > debian/changelog
dpkg-buildpackage --build=binary --no-sign
mv ../xsfs_* "$target"
rm -f "$target"/xsfs_*.buildinfo "$target"/xsfs_*.changes
