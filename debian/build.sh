#!/bin/sh
# Build the Debian package, as root if what it is built with has to be installed first.
#
#   ./debian/build.sh [DIRECTORY]      where the packages go; default: dist
#
# If the pyfuse3 of the distribution is too old (Debian 12), a package of a newer one is built, too.
set -eu
cd "$(dirname "$0")/.."
project=$PWD
mkdir -p "${1:-dist}"
target=$(cd "${1:-dist}" && pwd)
version=$(sed -n '1s/.*(\(.*\)-.*).*/\1/p' debian/changelog)
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH

if [ "$(id -u)" = 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends dpkg-dev build-essential fakeroot >/dev/null
    apt-get build-dep -y -qq --no-install-recommends ./ >/dev/null
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/xsfs-$version"
tar -c --exclude='./.[!.]*' --exclude=__pycache__ --exclude=./build --exclude=./dist \
    --exclude='*.egg-info' . | tar -x -C "$work/xsfs-$version"
cd "$work"
tar -c --exclude="./xsfs-$version/debian" "./xsfs-$version" | gzip -9n > "xsfs_$version.orig.tar.gz"
(cd "xsfs-$version" && dpkg-buildpackage --no-sign)
mv xsfs_* "$target"

candidate=$(apt-cache policy python3-pyfuse3 | sed -n 's/^ *Candidate: //p')
if ! dpkg --compare-versions "${candidate:-0}" ge 3.4; then "$project/packaging/pyfuse3/build.sh" "$target"; fi
