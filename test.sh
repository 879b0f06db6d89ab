#!/bin/sh
# Install on Debian 12, as root, all that the tests need, and run them: style, types, tests.
#
#   ./test.sh [ARGUMENT OF PYTEST...]
#
# Both real Xenstore daemons are Debian's; they run without Xen.  XSFS_VENV says where the virtual
# environment is (default: .venv).
set -eu
cd "$(dirname "$0")"
venv=${XSFS_VENV:-.venv}

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends \
    python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3 \
    xen-utils-4.17 xenstore-utils attr inotify-tools rsync dash procps util-linux mount systemd \
    man-db mandoc bash-completion zsh vim nano ed patch perl \
    debootstrap lintian pipx \
    qemu-system-x86 cpio kmod e2fsprogs >/dev/null

/usr/bin/python3 -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check -e '.[test]'

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
exec "$venv/bin/python" -m pytest -q "$@"
