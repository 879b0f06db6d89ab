#!/bin/sh
# Build Debian 13's python3-pyfuse3 for this older Debian, as root, in Debian's way: a package of its own.
#
#   ./debian/backport.sh DIRECTORY      where the package goes
#
# Only the source comes from Debian 13; apt keeps no trace of it.
set -eu
target=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export DEBIAN_FRONTEND=noninteractive DEB_BUILD_OPTIONS='nocheck nodoc' DEB_BUILD_PROFILES='nocheck nodoc'

apt-get install -y -qq --no-install-recommends dpkg-dev build-essential fakeroot devscripts >/dev/null
echo 'deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main' \
    > "$work/sources.list"
mkdir -p "$work/lists/partial"
sources="-o Dir::Etc::SourceList=$work/sources.list -o Dir::Etc::SourceParts=- -o Dir::State::Lists=$work/lists"
cd "$work"
chmod 755 .
apt-get $sources update -qq
apt-get $sources source -qq pyfuse3
cd pyfuse3-*/
apt-get build-dep -y -qq --no-install-recommends ./ >/dev/null
# A version below that of Debian 13: an upgrade replaces it.
. /etc/os-release
version=$(dpkg-parsechangelog -S Version)
DEBEMAIL=root@localhost DEBFULLNAME=root dch --newversion "$version~bpo$VERSION_ID+1" --distribution unstable \
    --force-distribution "Rebuild for $PRETTY_NAME."
dpkg-buildpackage --build=binary --no-sign >/dev/null
mv ../python3-pyfuse3_*.deb "$target"
