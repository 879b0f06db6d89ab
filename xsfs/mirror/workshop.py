"""A live mirror's directory as something that is taken, and given back.

What `Workshop` owns: beside the directory DIR the directory `.NAME.xsfs`, locked as long as it is open,
for what is on its way to DIR or was removed from there.  In it the mark says which directory is kept,
by its inode, and whether and how it was before.

What always holds: where the workshop is there and not locked, an xsfs has died, and what is in the
marked DIR was its copy.  Any other DIR that is not empty is somebody else's, and left alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import struct
from contextlib import suppress
from typing import Final

DIRECTORY_PATH_MAX: Final = 512
"""Bytes of DIR's own path: with the longest path of Xenstore below it, it must fit PATH_MAX."""

RUN_DIRECTORY: Final = "/run/xsfs"

_MARK: Final = b"mark"

_GET_VERSION: Final = 0x80007601 | struct.calcsize("l") << 16

log = logging.getLogger(__name__)

_OTHER: Final = "name another directory: mirror=DIR"
_EMPTY: Final = "name an empty directory, or one to be made: mirror=DIR"


class MirrorPlaceError(Exception):
    """Why there can be no mirror in this directory, with what to do about it."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def default_directory(mountpoint: str) -> str:
    """Where the mirror of a mount is if nobody says.  The directory above it is made."""
    name = os.path.realpath(mountpoint).strip("/").replace("/", "-") or "root"
    above = RUN_DIRECTORY
    if os.geteuid() != 0:
        if "XDG_RUNTIME_DIR" not in os.environ:
            raise MirrorPlaceError("there is no place for a mirror", "name one: mirror=DIR")
        above = os.path.join(os.environ["XDG_RUNTIME_DIR"], "xsfs")
    try:
        os.makedirs(above, 0o755, exist_ok=True)
    except OSError as error:
        raise MirrorPlaceError(f"cannot make {above}: {error.strerror}", _OTHER) from error
    return os.path.join(above, name)


class Workshop:
    """See the module's text.

    directory   DIR, absolute.  Its parent must exist, on the same file system.
    """

    def __init__(self, directory: str) -> None:
        self.directory = os.fsencode(os.path.realpath(directory))
        above, name = os.path.split(self.directory)
        self.path = os.path.join(above, b"." + name + b".xsfs")
        self.fd = -1

    def open(self) -> None:
        """Take DIR, and lock it.  Raises MirrorPlaceError."""
        shown = os.fsdecode(self.directory)
        if len(self.directory) > DIRECTORY_PATH_MAX:
            raise MirrorPlaceError(f"the mirror's path {shown} is too long", _OTHER)
        try:
            self._lock(shown)
            try:
                self._take(shown)
            except BaseException:
                self._give_up()
                raise
        except OSError as error:
            raise MirrorPlaceError(
                f"cannot keep a mirror in {shown}: {error.strerror}", _OTHER
            ) from error

    def _lock(self, shown: str) -> None:
        with suppress(FileExistsError):
            os.mkdir(self.path, 0o700)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self.path, flags)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = os.fstat(self.fd)
            if found.st_uid != os.geteuid():
                raise MirrorPlaceError(f"the mirror {shown} is another user's", _OTHER)
            if not os.path.samestat(found, os.lstat(self.path)):
                raise BlockingIOError  # its owner has just removed it
        except (BlockingIOError, FileNotFoundError):
            os.close(self.fd)
            raise MirrorPlaceError(f"the mirror {shown} is that of another mount", _OTHER) from None
        except BaseException:
            os.close(self.fd)
            raise

    def _take(self, shown: str) -> None:
        kept = self._read_mark()[0]
        try:
            found = os.lstat(self.directory)
        except FileNotFoundError:
            os.mkdir(self.directory, 0o700)
            try:
                self._write_mark(b"")
            except OSError:
                os.rmdir(self.directory)
                raise
            return
        if not stat.S_ISDIR(found.st_mode):
            raise MirrorPlaceError(f"the mirror {shown} is not a directory", _EMPTY)
        if found.st_dev != os.fstat(self.fd).st_dev:
            raise MirrorPlaceError(f"the mirror {shown} is a mountpoint itself", _EMPTY)
        if self._identity() != kept:
            if os.listdir(self.directory):
                raise MirrorPlaceError(f"the mirror {shown} is not empty", _EMPTY)
            mode = stat.S_IMODE(found.st_mode)
            self._write_mark(b"%d %d %d" % (mode, found.st_uid, found.st_gid))

    def _identity(self) -> bytes:
        """What no other directory in the place of DIR has: its inode's number, and the generation
        where the file system gives numbers again (ioctl_iflags(2), FS_IOC_GETVERSION)."""
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            generation = fcntl.ioctl(fd, _GET_VERSION, bytes(struct.calcsize("l"))).hex()
        except OSError:
            generation = "none"
        finally:
            number = os.fstat(fd).st_ino
            os.close(fd)
        return b"%d.%s" % (number, generation.encode())

    def _write_mark(self, before: bytes) -> None:
        fd = os.open(_MARK, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600, dir_fd=self.fd)
        try:
            with open(fd, "wb") as mark:
                mark.write(self._identity() + b" " + before)
        except OSError:
            os.unlink(_MARK, dir_fd=self.fd)
            raise

    def _read_mark(self) -> tuple[bytes, bytes]:
        """Which directory is kept, and how it was before; nothing of the latter where it was made."""
        try:
            with open(self.inside(_MARK), "rb") as mark:
                identity, _, before = mark.read().partition(b" ")
                return identity, before
        except FileNotFoundError:
            return b"", b""

    def inside(self, name: bytes) -> bytes:
        return self.path + b"/" + name

    def close(self) -> None:
        """Give DIR back, empty, as it was before; or remove it, if it was made.

        Where that fails it is logged, and the workshop left for the next start.
        """
        try:
            self._give_back()
            self._leave()
        except OSError as error:
            log.error("the mirror %s cannot be removed: %s", os.fsdecode(self.directory), error)
        finally:
            os.close(self.fd)

    def _give_back(self) -> None:
        before = self._read_mark()[1]
        if before:
            mode, uid, gid = map(int, before.split())
            os.chown(self.directory, uid, gid)
            os.chmod(self.directory, mode)
        else:
            os.rmdir(self.directory)

    def _give_up(self) -> None:
        """DIR was not taken.  What a dead xsfs has left is left."""
        with suppress(OSError):
            os.rmdir(self.path)
        os.close(self.fd)

    def _leave(self) -> None:
        """Remove the workshop itself, and a directory that was made for all of them."""
        if os.path.lexists(self.inside(_MARK)):
            os.unlink(_MARK, dir_fd=self.fd)
        os.rmdir(self.path)
        above = os.fsdecode(os.path.dirname(self.path))
        if above == RUN_DIRECTORY and not os.listdir(above):
            os.rmdir(above)
