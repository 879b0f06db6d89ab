#!/bin/sh
# Install on Debian 12 or 13, as root, everything that the tests need, and run them: style, types, tests.
# Without root it installs nothing, and runs what needs no root.
#
#   ./test.sh [ARGUMENT OF PYTEST...]           the tests that take seconds, four files at a time: 10 minutes
#   ./test.sh --ci                              these, whole matrices, long storms, and real Xen: 50 minutes
#   ./test.sh --all [ARGUMENT OF PYTEST...]     all slow ones, too: other distributions
#
# Both real Xenstore daemons are Debian's; they run without Xen.  XSFS_VENV says where the virtual
# environment is (default: .venv).
set -eu
umask 022
cd "$(dirname "$0")"

# Some tests run xsfs as another user.  If that user cannot reach the checkout, as it is in /root, the
# tests run in a view of it that everybody can reach, which ends with them.
show_to_all() {
    place=/opt/xsfs-checkout
    if [ "$PWD" != "$place" ] && ! setpriv --reuid=65534 --regid=65534 --clear-groups test -r "$PWD/xsfs"; then
        mkdir -p "$place"
        chmod -R a+rX .
        exec unshare --mount --propagation=private sh -c '
            mount --bind "$PWD" "$0" && chmod 755 "$0" && exec "$0/test.sh" "$@"' "$place" "$@"
    fi
}

# These programs run in a mount, or build packages and machines.  They take minutes to install, and the tests
# of four rooms need none of them.
programs="man-db mandoc bash-completion zsh gawk mawk lua5.4 busybox xxd bsdextrautils rust-coreutils
    vim nano emacs-nox ed patch perl git make cpio jq ripgrep nodejs sqlite3 zip unzip less rsync
    restic borgbackup ansible-core debootstrap dpkg-dev lintian pipx rpm rpmlint
    qemu-system-x86 kmod e2fsprogs"
install_packages() {
    needed=$programs
    for argument in "$@"; do
        case $argument in
        tests/xenstore* | tests/embedded* | tests/view* | tests/mirror*) needed= ;;
        tests/*) needed=$programs && break ;;
        esac
    done
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # xen-utils-4.17 on Debian 12, xen-utils-4.20 on Debian 13.
    xen_utils=$(apt-cache search --names-only '^xen-utils-[0-9.]+$' | sort -V | tail -n 1)
    # shellcheck disable=SC2086
    apt-get install -y -qq --no-install-recommends \
        python3-venv python3-dev gcc libc6-dev pkg-config libfuse3-dev fuse3 \
        "${xen_utils%% *}" xenstore-utils attr inotify-tools dash procps util-linux mount systemd \
        openssh-server openssh-client $needed >/dev/null
}

# Other users have to install these packages before.
if [ "$(id -u)" -eq 0 ]; then
    show_to_all "$@"
    install_packages "$@"
fi

# Each of hundreds of interpreters would compile xsfs again, which takes longer than all the rest of a mount.
unset PYTHONDONTWRITEBYTECODE

venv=${XSFS_VENV:-.venv}
/usr/bin/python3 -m venv "$venv"
"$venv/bin/pip" install -q --disable-pip-version-check -e '.[test]'

"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
# Four files at a time on two processors, since tests also wait.  tests/conftest.py puts the longest files
# first.
parallel() { "$venv/bin/python" -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder "$@"; }
case ${1-} in
--all)
    shift
    exec "$venv/bin/python" -m pytest -q "$@"
    ;;
--ci)
    status=0
    parallel -m "not slow or ci" --ignore tests/system/test_xen.py || status=$?
    # One after the other: real Xen takes a processor for itself.  Without the checks inside the domU it
    # takes two thirds of the time.
    XSFS_TEST_XEN="-k 'not inside'" "$venv/bin/python" -m pytest -q -m ci tests/system/test_xen.py ||
        status=$?
    exit "$status"
    ;;
*) parallel -m "not slow" "$@" ;;
esac
