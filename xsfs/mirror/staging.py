"""The files of a live mirror: the directory DIR, and the staging directory `.NAME.xsfs` beside it.

`MirrorDirectory` holds descriptors of both, and of their parent.  Only the mirror's task may use it.

Invariants:

- Every operation is relative to one of these descriptors, or to a directory that was opened below one
  of them with O_NOFOLLOW.  A directory that somebody swaps for a symbolic link leads xsfs nowhere.
- Only root, or the user who runs xsfs, can write to DIR's parent or swap anything above it.  (The owner
  of the files, `uid=`, can write below DIR.)
- A running xsfs holds the lock in its staging directory.  The lock file names the DIR.  If no process holds
  the lock, that xsfs has died, and DIR holds its copy.  xsfs refuses any other DIR that is not empty.
- Readers see whole values and whole copies: xsfs makes them in the staging directory, and moves them to
  DIR when they are complete.  DIR itself stays, and so do inotify watches on it.
- xsfs leaves a reserve of the file system free.

Paths are bytes, relative to DIR, which is b"".  They consist of file names, not of Xenstore's names.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Final

from xsfs.view.ownership import Ownership

DIRECTORY_PATH_MAX: Final = 512
"""Bytes of DIR's own path.  With the longest path of Xenstore below it, it must fit PATH_MAX."""

RUN_DIRECTORY: Final = "/run/xsfs"

PERMS_ATTRIBUTE: Final = "user.xs.perms"

RESERVE: Final = 20
RESERVE_BYTES: Final = (1 << 20, 64 << 20)
RESERVE_INODES: Final = (64, 4096)
"""The mirror leaves one twentieth of its file system free, within these limits."""

CHECK_EVERY: Final = 16
"""After how many new files xsfs looks how much room is left: a look takes a tenth of the time of a file."""

OPEN_MAX: Final = 64
"""How many directories are kept open.  A path of Xenstore may have 1,500 levels."""

CONTENT_MAX: Final = 1 << 16
"""Bytes of a file that xsfs compares with a value, which is shorter."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK: Final = b"lock"
_NEW: Final = b"new"
_TREE: Final = b"tree"
"""In the staging directory: the lock file, the file on its way to its place, and the directory of copies
that are being made or removed."""

_GET_VERSION: Final = 0x80007601 | struct.calcsize("l") << 16
"""FS_IOC_GETVERSION, ioctl_iflags(2)"""

_OTHER: Final = "name another directory: mirror=DIR"
_EMPTY: Final = "name an empty directory, or one to be made: mirror=DIR"
_TRUSTED: Final = "name a directory in a place where nobody else can write: mirror=DIR"

Steps = Generator[bytes, None, None]
"""A change in small steps, with a turn for other tasks after each.  Yields the changed path, or b""."""

log = logging.getLogger(__name__)


class MirrorPlaceError(Exception):
    """There can be no mirror in this directory; the text is the reason."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def default_directory(mountpoint: str) -> str:
    """The mirror's directory if the user names none.  Makes the directory above it.

    Raises MirrorPlaceError.
    """
    name = os.path.realpath(mountpoint).strip("/").replace("/", "-") or "root"
    above = RUN_DIRECTORY
    if os.geteuid() != 0:
        if "XDG_RUNTIME_DIR" not in os.environ:
            raise MirrorPlaceError(
                "no default directory for the mirror: XDG_RUNTIME_DIR is not set", "use mirror=DIR"
            )
        above = os.path.join(os.environ["XDG_RUNTIME_DIR"], "xsfs")
    try:
        with suppress(FileExistsError):
            os.mkdir(above)
            # Other users may have to pass, whatever the umask of this process is.
            os.chmod(above, 0o755)
    except OSError as error:
        raise MirrorPlaceError(f"cannot make {above}: {error.strerror}", _OTHER) from error
    return os.path.join(above, name)


# ------------------------------------------------------------------------------ trusted places


def _distrust(found: os.stat_result, *, sticky: bool) -> str | None:
    """Why a directory is not trusted; None if it is.

    sticky      whether others may write there if the sticky bit keeps them from swapping entries
    """
    if found.st_uid not in (0, os.geteuid()):
        return "belongs to another user"
    if found.st_mode & 0o022 and not (sticky and found.st_mode & stat.S_ISVTX):
        return "can be written by others"
    return None


def _open_trusted(place: Path) -> int:
    """Open a directory that only root and this user can write to, or swap for another.

    place       absolute, without symbolic links

    As sshd's StrictModes, from the root down: nobody else can swap what is below a checked directory.
    """
    for directory in (*reversed(place.parents), place):
        if (why := _distrust(directory.lstat(), sticky=directory != place)) is not None:
            raise MirrorPlaceError(f"the mirror is not safe in {directory}: it {why}", _TRUSTED)
    return os.open(place, _DIRECTORY)


def _identity(fd: int) -> bytes:
    """The number of the inode, and its generation if the file system uses numbers again."""
    try:
        generation = fcntl.ioctl(fd, _GET_VERSION, bytes(struct.calcsize("l"))).hex()
    except OSError:
        generation = "none"
    return b"%d.%s" % (os.fstat(fd).st_ino, generation.encode())


@contextmanager
def _unprotected(directories: Sequence[int], mode: int) -> Iterator[None]:
    for fd in directories:
        os.fchmod(fd, mode | 0o700)
    try:
        yield
    finally:
        for fd in directories:
            os.fchmod(fd, mode)


# ------------------------------------------------------------------------------ the directories


def below(path: bytes, name: bytes) -> bytes:
    """The path of a file in a directory."""
    return b"%s/%s" % (path, name) if path else name


class _OpenDirectories:
    """The directories below an open one, opened on the way down and kept for the next operation.

    top     an open directory, which stays open
    """

    def __init__(self, top: int) -> None:
        self.top = top
        self._open: dict[bytes, int] = {}

    def start_at(self, top: int) -> None:
        self.close()
        self.top = top

    def enter(self, path: bytes) -> int:
        """A descriptor of the directory, good until the next call.

        Raises FileNotFoundError or NotADirectoryError with the highest missing directory as its filename.
        """
        above = path
        while above and above not in self._open:
            above = above.rpartition(b"/")[0]
        fd = self._open.get(above, self.top)
        for name in filter(None, path[len(above) :].split(b"/")):
            above = below(above, name)
            try:
                fd = os.open(name, _DIRECTORY, dir_fd=fd)
            except (FileNotFoundError, NotADirectoryError) as error:
                error.filename = above
                raise
            self._open[above] = fd
            if len(self._open) > OPEN_MAX:
                self.forget(next(iter(self._open)))
        return fd

    def forget(self, path: bytes) -> None:
        """Close it.  The next operation opens the directory that is there then."""
        if path in self._open:
            os.close(self._open.pop(path))

    def close(self) -> None:
        """Close all except `top`."""
        while self._open:
            os.close(self._open.popitem()[1])


class MirrorDirectory:
    """See the module's text.  `open` and `close` frame all else.

    directory   DIR.  Its parent must exist, on the same file system.
    ownership   who owns the files, and what is cut from their modes
    """

    def __init__(self, directory: str, ownership: Ownership) -> None:
        self.directory = os.path.realpath(directory)
        self.ownership = ownership
        self._name = os.path.basename(self.directory)
        self._staging_name = f".{self._name}.xsfs"
        self._file_mode = stat.S_IMODE(ownership.mode(stat.S_IFREG, True, False))
        self._directory_mode = stat.S_IMODE(ownership.mode(stat.S_IFDIR, True, False))
        self._is_root = os.geteuid() == 0
        self._unchecked = 0
        """How many files may be made before the next look at the room that is left."""
        self.has_perms = False
        """Whether files can have user attributes here: tmpfs has them since Linux 6.6."""
        self.is_publishing = False
        """Whether the copy is on its way from the staging directory to DIR."""

    # ------------------------------------------------------------------------ begin and end

    def open(self) -> None:
        """Lock the directory, and `clear` what a dead xsfs has left.  Raises MirrorPlaceError."""
        if len(os.fsencode(self.directory)) > DIRECTORY_PATH_MAX:
            raise MirrorPlaceError(f"the mirror's path {self.directory} is too long", _OTHER)
        try:
            with ExitStack() as end:
                self._parent = _open_trusted(Path(self.directory).parent)
                end.callback(os.close, self._parent)
                self._open_staging(end)
                self._open_directory(end)
                self._clear_now()
                self._finish(self._fd, self._directory_mode, b"")
                self._end = end.pop_all()
        except OSError as error:
            raise MirrorPlaceError(
                f"cannot keep a mirror in {self.directory}: {error.strerror}", _OTHER
            ) from error
        try:
            os.setxattr(self._staging, PERMS_ATTRIBUTE, b"n0")
            self.has_perms = True
        except OSError as error:
            log.info("no permissions in the mirror: %s", error.strerror)

    def close(self) -> None:
        """Leave DIR as it was before.  Never raises: what cannot be removed is left to the next start."""
        try:
            self._end.close()
        except OSError as error:
            log.error("the mirror %s cannot be removed: %s", self.directory, error)

    def _open_staging(self, end: ExitStack) -> None:
        """Open the staging directory and lock it."""
        with suppress(FileExistsError):
            os.mkdir(self._staging_name, 0o700, dir_fd=self._parent)
        self._staging = os.open(self._staging_name, _DIRECTORY, dir_fd=self._parent)
        end.callback(os.close, self._staging)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._lock = os.open(_LOCK, flags, 0o600, dir_fd=self._staging)
        end.callback(os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MirrorPlaceError(
                f"the mirror {self.directory} is that of another mount", _OTHER
            ) from None
        end.callback(self._remove_staging)
        with suppress(FileExistsError):
            os.mkdir(_TREE, 0o700, dir_fd=self._staging)
        self._tree = os.open(_TREE, _DIRECTORY, dir_fd=self._staging)
        end.callback(os.close, self._tree)

    def _remove_staging(self) -> None:
        if os.fstat(self._lock).st_size:
            return  # DIR was not given back: the next start needs the record
        with suppress(FileNotFoundError):
            os.rmdir(_TREE, dir_fd=self._staging)
        with suppress(FileNotFoundError):
            os.unlink(_LOCK, dir_fd=self._staging)
            os.rmdir(self._staging_name, dir_fd=self._parent)
        if os.path.dirname(self.directory) == RUN_DIRECTORY:
            with suppress(OSError):  # there are others
                os.rmdir(RUN_DIRECTORY)

    def _open_directory(self, end: ExitStack) -> None:
        """Open DIR, make it if it is missing, and record which one it is.

        The record is in the lock file: DIR's identity, and what DIR was before: its mode, owner and group,
        or nothing if xsfs made it.
        """
        mirror = f"the mirror {self.directory}"
        made = True
        try:
            os.mkdir(self._name, 0o700, dir_fd=self._parent)
        except FileExistsError:
            made = False
        try:
            self._fd = os.open(self._name, _DIRECTORY, dir_fd=self._parent)
        except NotADirectoryError:
            raise MirrorPlaceError(f"{mirror} is not a directory", _EMPTY) from None
        end.callback(os.close, self._fd)
        found = os.fstat(self._fd)
        if found.st_dev != os.fstat(self._staging).st_dev:
            raise MirrorPlaceError(f"{mirror} is a mountpoint itself", _EMPTY)
        identity = _identity(self._fd)
        recorded, _, before = os.pread(self._lock, 4096, 0).partition(b" ")
        if made:
            before = b""
        elif identity != recorded:
            if (why := _distrust(found, sticky=False)) is not None:
                raise MirrorPlaceError(f"{mirror} is not safe: it {why}", _TRUSTED)
            if os.listdir(self._fd):
                raise MirrorPlaceError(f"{mirror} is not empty", _EMPTY)
            before = b"%d %d %d" % (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid)
        self._copy = _OpenDirectories(self._fd)
        end.callback(self._give_back, before)
        os.ftruncate(self._lock, os.pwrite(self._lock, b"%s %s" % (identity, before), 0))

    def _give_back(self, before: bytes) -> None:
        self._clear_now()
        self.close_directories()
        if before:
            with self._writable(self._fd):
                self._set_attribute(self._fd, b"")
            mode, uid, gid = map(int, before.split())
            os.fchown(self._fd, uid, gid)
            os.fchmod(self._fd, mode)
        else:
            with suppress(FileNotFoundError, NotADirectoryError):  # somebody has taken it away
                os.rmdir(self._name, dir_fd=self._parent)
        os.ftruncate(self._lock, 0)

    # ------------------------------------------------------------------------ the whole copy

    def clear(self) -> Steps:
        """Remove the copy, finished or not; what readers see goes first.  The next copy is made in the
        staging directory, and nobody sees it before `publish`."""
        self.is_publishing = False
        self._copy.start_at(self._fd)
        yield from self._move_all(self._tree, renamed=True)
        self._copy.start_at(self._tree)
        for name, _ in list(self.scan(b"")):
            yield from self.removing(name)
        with suppress(FileNotFoundError):
            os.unlink(_NEW, dir_fd=self._staging)

    def _clear_now(self) -> None:
        for _ in self.clear():
            pass

    def publish(self) -> Steps:
        """Let all that was made be seen.  From now on files change in DIR."""
        perms = self.perms(b"")
        self.is_publishing = True
        yield from self._move_all(self._fd)
        self._copy.start_at(self._fd)
        self.is_publishing = False
        self.set_perms(b"", perms)

    def _move_all(self, target: int, *, renamed: bool = False) -> Steps:
        """Move the copy to another directory.

        renamed     by names that are not used there yet
        """
        for name, is_directory in list(self.scan(b"")):
            changed = [self._copy.top, target]
            if is_directory and not self._is_root:
                changed.append(self._copy.enter(name))  # a move changes what `..` is in it
            new_name = os.urandom(16).hex().encode() if renamed else name
            with self._writable(*changed):
                os.rename(name, new_name, src_dir_fd=self._copy.top, dst_dir_fd=target)
            yield name

    def close_directories(self) -> None:
        """To be called when there is nothing to do: the next change finds the directories in place then."""
        self._copy.close()

    # ------------------------------------------------------------------------------- to see

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """The directory that a path is in, and the name there."""
        parent, _, name = path.rpartition(b"/")
        return self._copy.enter(parent), name or b"."

    def first_missing(self, path: bytes) -> bytes | None:
        """The highest directory on the way to this one, itself included, that is missing."""
        try:
            self._copy.enter(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            missing: bytes = error.filename
            return missing
        return None

    def kind(self, path: bytes) -> int:
        """S_IFDIR, S_IFREG or another file type; 0 for what is missing."""
        try:
            directory, name = self._place(path)
            return stat.S_IFMT(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def scan(self, path: bytes) -> Generator[tuple[bytes, bool], None, None]:
        """The names in a directory, and which of them are directories.  Meanwhile, names may go."""
        # A descriptor of its own: others of the same opening share its position.
        fd = os.open(b".", _DIRECTORY, dir_fd=self._copy.enter(path))
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    yield os.fsencode(entry.name), entry.is_dir(follow_symlinks=False)
        finally:
            os.close(fd)

    def read(self, path: bytes) -> tuple[bytes, bytes] | None:
        """The content and the permissions of a file; None for what is no file, or cannot be read."""
        # The files' owner may have put anything there: xsfs does not wait for a pipe's writer.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            directory, name = self._place(path)
            fd = os.open(name, flags, dir_fd=directory)
            try:
                return os.read(fd, CONTENT_MAX), self.perms(path)
            finally:
                os.close(fd)
        except OSError:
            return None

    def perms(self, path: bytes) -> bytes:
        """The permissions of a file or directory as xsfs set them; nothing if there are none."""
        if not self.has_perms:
            return b""
        try:
            # getxattr(2) knows no path that is relative to a descriptor.
            place = b"/proc/self/fd/%d/%s" % self._place(path)
            return os.getxattr(place, PERMS_ATTRIBUTE, follow_symlinks=False)
        except OSError:
            return b""

    # ---------------------------------------------------------------------------- to change

    def _check_room(self) -> None:
        """Raises OSError ENOSPC if less than the reserve is left."""
        if self._unchecked:
            self._unchecked -= 1
            return
        room = os.fstatvfs(self._staging)
        least = sorted((*RESERVE_BYTES, room.f_blocks * room.f_frsize // RESERVE))[1]
        inodes = sorted((*RESERVE_INODES, room.f_files // RESERVE))[1]
        # Some file systems have no limit of the one or the other.
        lacks_bytes = room.f_blocks and room.f_bavail * room.f_frsize < least
        if lacks_bytes or (room.f_files and room.f_favail < inodes):
            text = f"{os.strerror(errno.ENOSPC)}: xsfs leaves {least >> 20} MiB and {inodes} inodes free"
            raise OSError(errno.ENOSPC, text, self.directory)
        self._unchecked = CHECK_EVERY - 1

    def put(self, path: bytes, content: bytes, perms: bytes, *, is_new: bool = False) -> None:
        """Make the file, or replace it by a new one unless it `is_new`.

        If this raises OSError, nothing is left of the new file.
        """
        self._check_room()
        directory, name = self._place(path)
        # Nobody sees a copy before it is complete.  By renames the start would take 14 % more processor time.
        in_place = is_new and self._copy.top == self._tree
        made_in, made_name = (directory, name) if in_place else (self._staging, _NEW)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with self._writable(directory):
            fd = os.open(made_name, flags, 0o600, dir_fd=made_in)
            try:
                try:
                    if content and os.write(fd, content) != len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._finish(fd, self._file_mode, perms)
                finally:
                    os.close(fd)
                if not in_place:
                    os.rename(_NEW, name, src_dir_fd=self._staging, dst_dir_fd=directory)
            except OSError:
                os.unlink(made_name, dir_fd=made_in)
                raise

    def _writable(self, *directories: int) -> AbstractContextManager[None]:
        """Lets this user change the directories in a block.  Root may do that whatever their mode is."""
        return nullcontext() if self._is_root else _unprotected(directories, self._directory_mode)

    def _finish(self, fd: int, mode: int, perms: bytes) -> None:
        """Give a new file or directory its attributes."""
        self._set_attribute(fd, perms)
        os.fchmod(fd, mode)
        os.fchown(fd, self.ownership.uid, self.ownership.gid)

    def _set_attribute(self, fd: int, perms: bytes) -> None:
        if not self.has_perms:
            return
        try:
            if perms:
                os.setxattr(fd, PERMS_ATTRIBUTE, perms)
                return
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.E2BIG, errno.ERANGE):
                raise
            # A guest can make them too long for the file system.  None are better than old ones.
            log.debug("permissions of %d bytes are left out: %s", len(perms), error.strerror)
        with suppress(OSError):  # there are none
            os.removexattr(fd, PERMS_ATTRIBUTE)

    def make_directory(self, path: bytes, perms: bytes) -> None:
        """Make the directory, which is missing.  Raises OSError."""
        self._check_room()
        directory, name = self._place(path)
        with self._writable(directory):
            os.mkdir(name, 0o700, dir_fd=directory)
        # By a descriptor: the owner of the directory above may have put something else there.
        self._finish(self._copy.enter(path), self._directory_mode, perms)

    def set_perms(self, path: bytes, perms: bytes) -> None:
        """Set a directory's permissions, if they are others; b"" removes them."""
        if self.perms(path) != perms:
            fd = self._copy.enter(path)
            with self._writable(fd):
                self._set_attribute(fd, perms)

    def removing(self, top: bytes) -> Steps:
        """Remove what is there, if anything, with all below it, from the leaves up."""
        kind = self.kind(top)
        left = [(top, kind == stat.S_IFDIR)] if kind else []
        found = []
        while left:
            path, is_directory = left.pop()
            found.append((path, is_directory))
            if is_directory:
                for name, is_below in self.scan(path):
                    left.append((path + b"/" + name, is_below))
                    yield b""
        for path, is_directory in reversed(found):
            self._copy.forget(path)
            directory, name = self._place(path)
            with self._writable(directory):
                if is_directory:
                    os.rmdir(name, dir_fd=directory)
                else:
                    os.unlink(name, dir_fd=directory)
            yield path
