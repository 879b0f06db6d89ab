"""The files of a live mirror: a directory that holds a copy of a tree, and the place where it is made.

What `MirrorFiles` owns: a directory DIR, whose content is the copy, and the workshop beside it
(xsfs/mirror/workshop.py).  Only the mirror's task may use it, and what works in its place while it
waits.

What always holds:

- Readers see whole values: a file is made in the workshop and then renamed to its place.
- A new copy is made in the workshop, too (`begin`), and moved to DIR when it is complete (`publish`);
  an old one is moved out before it is removed (`clear`).  DIR itself stays, and whoever watches it.
- Nothing outside DIR and the workshop is ever changed, whatever the owner of the files does to them
  (`uid=` makes one who may put a symbolic link where a directory was): each change is made relative
  to an open directory, whose place is looked at after it was opened; or to the workshop, which is open
  all the time, and nobody else's.
- Paths are bytes, relative to the copy's root, which is b"".  File names, not Xenstore names.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Generator
from contextlib import suppress
from typing import Final

from xsfs.mirror.workshop import MirrorPlaceError, Workshop
from xsfs.view.ownership import Ownership

log = logging.getLogger(__name__)

PERMS_ATTRIBUTE: Final = "user.xs.perms"

_NEW: Final = b"new"
_OLD: Final = b"old"
_TREE: Final = b"tree"
"""In the workshop: the file on its way, copies to be removed, the copy being made."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

Steps = Generator[bytes, None, None]
"""A change in small steps, for callers that have others to serve in between; of each, what changed."""


def _split(path: bytes) -> tuple[bytes, bytes]:
    parent, _, name = path.rpartition(b"/")
    return parent, name


class MirrorFiles:
    """See the module's text.  `open` and `close` frame all else.

    directory   DIR: see Workshop
    """

    def __init__(self, directory: str, ownership: Ownership) -> None:
        self._workshop = Workshop(directory)
        self.directory = self._workshop.directory
        self.ownership = ownership
        self._file_mode = stat.S_IMODE(ownership.mode(stat.S_IFREG, True, False))
        self._directory_mode = stat.S_IMODE(ownership.mode(stat.S_IFDIR, True, False))
        mask = os.umask(0o077)
        os.umask(mask)
        # What is made gets the modes less the process's own mask.
        self._chmod = bool(mask & (self._file_mode | self._directory_mode))
        self._new_file_mode = self._file_mode
        self._chown = (ownership.uid, ownership.gid) != (os.geteuid(), os.getegid())
        # Only root may write in directories that have no write permission.
        self._unlock = os.geteuid() != 0
        if self._unlock:
            # Nor give permissions to files that have none.
            self._chmod = True
            self._new_file_mode = 0o600
        self._base = self.directory
        self._parent: tuple[bytes, int] | None = None
        self._new = -1
        """The file on its way, where it was made ahead."""
        self.has_perms = False
        """Whether files can have user attributes here: tmpfs has them since Linux 6.6."""
        self.staged = False
        """Whether what is changed is the copy in the workshop."""

    def is_inside(self, directory: str) -> bool:
        above = os.fsencode(os.path.realpath(directory))
        return self.directory == above or self.directory.startswith(above.rstrip(b"/") + b"/")

    # ------------------------------------------------------------------------ begin and end

    def open(self) -> None:
        """Take the directory, and clear what a dead xsfs has left.  Raises MirrorPlaceError."""
        self._workshop.open()
        try:
            self._clear_now()
            os.chmod(self.directory, self._directory_mode)
            if self._chown:
                os.chown(self.directory, self.ownership.uid, self.ownership.gid)
        except OSError as error:
            self.close()
            raise MirrorPlaceError(
                f"cannot use {os.fsdecode(self.directory)}: {error.strerror}", "look what is in it"
            ) from error
        try:
            os.setxattr(self._workshop.fd, PERMS_ATTRIBUTE, b"n0")
            self.has_perms = True
        except OSError as error:
            log.info("no permissions in the mirror: %s", error.strerror)

    def close(self) -> None:
        """Leave nothing behind.  What cannot be removed is logged, and left to the next start."""
        try:
            self._clear_now()
            self.set_perms(b"", b"")
            self._let_go()
        except OSError:
            log.exception("the mirror could not be removed")
        self._workshop.close()

    def rest(self) -> None:
        """Nothing is to be changed for now."""
        self._let_go()
        self._give_up_new()

    def _clear_now(self) -> None:
        for _ in self.clear():
            pass
        if os.path.lexists(self._workshop.inside(_NEW)):
            os.unlink(_NEW, dir_fd=self._workshop.fd)

    def clear(self) -> Steps:
        """Remove all copies, finished or not.  The one that is seen goes first."""
        self.rest()
        # What is moved out of DIR into the workshop may still be open for the files' owner.
        self.staged = False
        old = self._workshop.inside(_OLD)
        if os.path.isdir(old):
            yield from self._move_all(self.directory, old)
        self._base = self._workshop.path
        try:
            for name in (_OLD, _TREE):
                if self.is_directory(name):
                    yield from self.removing(name)
        finally:
            self._let_go()
            # It was entered like a directory of the copy.
            os.fchmod(self._workshop.fd, 0o700)
            self._base = self.directory

    # ----------------------------------------------------------------------- the whole copy

    def begin(self) -> None:
        """What is made from now on is not seen before `publish`."""
        self._let_go()
        self._base = b"/proc/self/fd/%d/%s" % (self._workshop.fd, _TREE)
        os.mkdir(self._base, 0o700)
        # Made now, since it is wanted when the file system may be full.
        os.mkdir(_OLD, 0o700, dir_fd=self._workshop.fd)
        self.staged = True

    def publish(self) -> Steps:
        """Let all that was made be seen."""
        self._let_go()
        yield from self._move_all(self._base, self.directory)
        perms = self.perms(b"")
        os.rmdir(self._base)
        self._base = self.directory
        self.staged = False
        self.set_perms(b"", perms)

    def _move_all(self, source: bytes, target: bytes) -> Steps:
        if self._unlock:
            os.chmod(target, 0o700)
            os.chmod(source, 0o700)
        for name in os.listdir(source):
            path, moved = os.path.join(source, name), os.path.join(target, name)
            # To move a directory is to change what `..` is in it.
            locked = self._unlock and stat.S_ISDIR(os.lstat(path).st_mode)
            if locked:
                os.chmod(path, 0o700)
            os.rename(path, moved)
            if locked:
                os.chmod(moved, self._directory_mode)
            yield name
        if self._unlock:
            os.chmod(source, self._directory_mode)
            os.chmod(target, self._directory_mode)

    # ------------------------------------------------------------------------------- to see

    def _absolute(self, path: bytes) -> bytes:
        return self._base + b"/" + path if path else self._base

    def kind(self, path: bytes) -> int:
        """S_IFDIR, S_IFREG, or 0 for what is not there."""
        try:
            return stat.S_IFMT(os.lstat(self._absolute(path)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def is_directory(self, path: bytes) -> bool:
        if not self.staged:
            return self.kind(path) == stat.S_IFDIR
        try:
            self._enter(path)  # as who asks does next
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def names(self, path: bytes) -> list[bytes]:
        return os.listdir(self._absolute(path))

    def content(self, path: bytes) -> bytes | None:
        """None for what is no file."""
        try:
            # Not to wait for who writes a pipe that the files' owner has put there.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(self._absolute(path), flags)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.read(fd, 1 << 20)
        except IsADirectoryError:
            return None
        finally:
            os.close(fd)

    def perms(self, path: bytes) -> bytes:
        """The permissions as they were set; nothing where there are none."""
        if not self.has_perms:
            return b""
        try:
            return os.getxattr(self._absolute(path), PERMS_ATTRIBUTE, follow_symlinks=False)
        except OSError:
            return b""

    # ---------------------------------------------------------------------------- to change

    def expect(self, path: bytes | None = None) -> None:
        """A file is probably put next: make it before it is known with what, and perhaps which.

        What fails now is met, and told, when it is.
        """
        with suppress(OSError):
            if path is not None:
                self._enter(_split(path)[0])
            if self._new < 0:
                self._new = self._make(_NEW, self._workshop.fd)

    def put(self, path: bytes, content: bytes, perms: bytes, *, new: bool = False) -> None:
        """Make the file, or replace it by a new one.

        new     none is there; FileExistsError in the workshop if that is not so
        """
        if new and self.staged:
            self._fill(self._make(*self._reach(path)), content, perms)
            return
        parent, name = _split(path)
        directory = self._enter(parent)
        fd, self._new = self._new, -1
        if fd < 0:
            fd = self._make(_NEW, self._workshop.fd)
        elif not content:
            os.utime(fd)  # nothing is written that would tell when
        try:
            self._fill(fd, content, perms)
            os.rename(_NEW, name, src_dir_fd=self._workshop.fd, dst_dir_fd=directory)
        except OSError:
            os.unlink(_NEW, dir_fd=self._workshop.fd)
            raise

    def _make(self, name: bytes, directory: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(name, flags, self._new_file_mode, dir_fd=directory)

    def _give_up_new(self) -> None:
        if self._new < 0:
            return
        fd, self._new = self._new, -1
        os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=self._workshop.fd)

    def _fill(self, fd: int, content: bytes, perms: bytes) -> None:
        try:
            if content and os.write(fd, content) != len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if perms and self.has_perms:
                os.setxattr(fd, PERMS_ATTRIBUTE, perms)
            if self._chmod:
                os.fchmod(fd, self._file_mode)
            if self._chown:
                os.fchown(fd, self.ownership.uid, self.ownership.gid)
        finally:
            os.close(fd)

    def make_directory(self, path: bytes) -> None:
        # It may have the last inode.
        self._give_up_new()
        name, directory = self._reach(path)
        os.mkdir(name, self._directory_mode, dir_fd=directory)
        if not (self._chmod or self._chown):
            return
        # By a descriptor: the owner of what is above may have put something else there.
        fd = os.open(name, _DIRECTORY, dir_fd=directory)
        try:
            if self._chmod:
                os.fchmod(fd, self._directory_mode)
            if self._chown:
                os.fchown(fd, self.ownership.uid, self.ownership.gid)
        finally:
            os.close(fd)

    def set_perms(self, path: bytes, perms: bytes, *, new: bool = False) -> None:
        """Set a directory's permissions, where they are others; nothing takes them away.

        new     it was made just now, and has none
        """
        if not self.has_perms:
            return
        if new and self.staged and not self._unlock:
            os.setxattr(self._absolute(path), PERMS_ATTRIBUTE, perms, follow_symlinks=False)
            return
        if not new and self.perms(path) == perms:
            return
        if perms:
            os.setxattr(self._enter(path), PERMS_ATTRIBUTE, perms)
        else:
            os.removexattr(self._enter(path), PERMS_ATTRIBUTE)

    def remove_file(self, path: bytes) -> None:
        parent, name = _split(path)
        os.unlink(name, dir_fd=self._enter(parent))

    def removing(self, top: bytes) -> Steps:
        """Remove the directory with all below it, from the leaves up."""
        stack = [top]
        while stack:
            path = stack[-1]
            directory = self._enter(path)
            below = []
            with os.scandir(directory) as entries:
                for entry in entries:
                    name = os.fsencode(entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        below.append(path + b"/" + name)
                    else:
                        os.unlink(name, dir_fd=directory)
                        yield path + b"/" + name
            if below:
                stack += below
                continue
            stack.pop()
            parent, name = _split(path)
            os.rmdir(name, dir_fd=self._enter(parent))
            yield path

    # --------------------------------------------------------------------------- directories

    def _reach(self, path: bytes) -> tuple[bytes, int]:
        """By which name, relative to which directory, what is to be made there is reached."""
        if self.staged and not self._unlock:
            return _TREE + b"/" + path, self._workshop.fd
        parent, name = _split(path)
        return name, self._enter(parent)

    def _enter(self, path: bytes) -> int:
        """A descriptor of the directory, which is in its place.  The last one is kept open."""
        if self._parent is not None:
            if self._parent[0] == path:
                return self._parent[1]
            self._let_go()
        absolute = self._absolute(path)
        fd = os.open(absolute, _DIRECTORY)
        try:
            # The copy that is being made nobody else can reach.
            if not self.staged and os.readlink(b"/proc/self/fd/%d" % fd) != absolute:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), absolute)
            if self._unlock:
                os.fchmod(fd, 0o700)
        except OSError:
            os.close(fd)
            raise
        self._parent = (path, fd)
        return fd

    def _let_go(self) -> None:
        if self._parent is None:
            return
        fd = self._parent[1]
        self._parent = None
        try:
            if self._unlock:
                os.fchmod(fd, self._directory_mode)
        finally:
            os.close(fd)
