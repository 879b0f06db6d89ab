#!/bin/sh
# Build python3-pyfuse3 for a Debian whose own is too old for xsfs (Debian 12), as root.
#
#   packaging/pyfuse3/build.sh DIRECTORY      where the package goes
#
# The source is what Debian 13 builds its package from, taken from the mirror that apt uses.
set -eu
target=$(cd "$1" && pwd)
cd "$(dirname "$0")"
source=pyfuse3_3.4.0.orig.tar.gz
checksum=793493f4d5e2b3bc10e13b3421d426a6e2e3365264c24376a50b8cbc69762d39
PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH DEBIAN_FRONTEND=noninteractive

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Component: main' 'Origin: Debian' |
    head -n 1)
/usr/lib/apt/apt-helper -qq download-file "${mirror}pool/main/p/pyfuse3/$source" "$work/$source" "SHA256:$checksum"
tar -x -f "$work/$source" -C "$work"
cp -R debian "$work/pyfuse3-3.4.0"
cd "$work/pyfuse3-3.4.0"
apt-get build-dep -y -qq --no-install-recommends ./ >/dev/null
dpkg-buildpackage --build=binary --no-sign
mv ../python3-pyfuse3_*.deb "$target"
