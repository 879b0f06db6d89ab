"""The Xenstore of another host, reached by ssh(1).

One ssh forwards one Unix socket.  Each connection to its local end is a connection to the socket on the
other host.  ssh also runs `cat` there: sshd turns Nagle's algorithm off only for a session, and a value
takes up to 40 ms with it.  If the account may run nothing, ssh runs without a session (-N).

An `SshForward` owns at most one ssh, which its task `run` starts and serves to its end.  Any task of the
same loop may call `connect`.  `open_forward` owns the private directory with the local end of the socket.

Invariants:

- ssh ends with xsfs, however xsfs ends.  The kernel sends ssh SIGTERM when the thread that started it
  ends.  The standard input of `cat` is a pipe that only xsfs holds, so `cat` ends as well.
- xsfs holds a lock on its private directory while it lives.  If one is not locked, its xsfs was killed,
  and the next start removes it.
- ssh may ask for a password before `open` has returned, and only if xsfs has a terminal.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import trio

from xsfs.xenstore.background import open_background
from xsfs.xenstore.errors import StoreUnavailable
from xsfs.xenstore.protocol import Op, encode
from xsfs.xenstore.ssh_destination import DEFAULT_SSH, SshDestination
from xsfs.xenstore.transport import Transport, open_transport

log = logging.getLogger(__name__)

START_TIMEOUTS: Final = 3
"""How many times `timeout` ssh may take to connect and to log in."""

BACKOFF_FIRST: Final = 0.5
BACKOFF_MAX: Final = 15.0
"""Seconds from the end of one ssh to the start of the next."""

POLL_SECONDS: Final = 0.02
"""How often the first start looks whether ssh listens."""

ECHO_SECONDS: Final = 1.0
"""How long the first start waits for `cat` once ssh listens."""

END_SECONDS: Final = 0.5
"""How long ssh may take to end, and then again when it is killed."""

MESSAGES_MAX: Final = 4096
"""How many bytes of ssh's latest messages are kept."""

MARK: Final = b"xsfs: cat answers\n"
"""What `cat` has to answer."""

RUN_DIRECTORY: Final = "/run/xsfs"
PREFIX: Final = ".xsfs-ssh-"
SOCKET_NAME: Final = "socket"

ABOVE_MAX: Final = 107 - len(f"/{PREFIX}12345678/{SOCKET_NAME}")
"""How long the path above a private directory may be: sun_path of unix(7) has 107 bytes and a NUL."""

DOLLAR: Final = "XSFS_DOLLAR"
"""ssh expands `${NAME}` in the paths of sockets.  This variable has the value `$`."""

_LIBC: Final = ctypes.PyDLL(None)
"""Its functions keep the interpreter's lock, as a child must between fork(2) and execve(2)."""


@asynccontextmanager
async def open_forward(
    destination: SshDestination, *, timeout: float, command: Sequence[str] = (DEFAULT_SSH,)
) -> AsyncIterator[SshForward]:
    """A forward to a Xenstore that has answered; it ends with the block.

    timeout     seconds until ssh notices that the other host is gone
    command     ssh, and options for it

    Raises StoreUnavailable.
    """
    with private_directory() as place:
        forward = SshForward(destination, timeout, command, os.path.join(place, SOCKET_NAME))
        async with open_background() as nursery:
            nursery.start_soon(forward.run)
            await forward.open()
            yield forward


class SshForward:
    """See the module's text.  `run` must be running while `open` and `connect` are used.

    local       the path of the local end of the socket
    """

    def __init__(
        self, destination: SshDestination, timeout: float, command: Sequence[str], local: str
    ) -> None:
        self._destination = destination
        self._timeout = timeout
        self._command = command
        self._local = local
        self._wanted = trio.Event()
        """Set when `connect` has found no ssh that listens."""
        self._settled = trio.Event()
        """Set when `cat` has answered, or cannot answer."""
        self._messages = b""
        """The last messages of the last ssh."""
        self._failure: str | None = None
        """Why the last ssh ended.  None before the first end, and after an account has refused `cat`."""
        self._opened = False
        self._terminal: int | None = None
        """The terminal that ssh may use, while `open` runs."""

    def connect(self) -> Transport:
        """A connection to the Xenstore of the other host.

        If no ssh listens, the task `run` starts one, with back-off.  Raises BlockingIOError while ssh
        connects, ConnectionRefusedError if the last ssh has failed.
        """
        try:
            return open_transport(self._local)
        except (FileNotFoundError, ConnectionRefusedError):
            self._wanted.set()
        name = str(self._destination)
        if self._failure is not None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, self._failure, name)
        raise BlockingIOError(errno.EAGAIN, "ssh is still connecting", name)

    async def open(self) -> None:
        """Start ssh, and see that Xenstore answers.  Raises StoreUnavailable."""
        try:
            with _own_terminal() as self._terminal:
                while not await self._answers():
                    await trio.sleep(POLL_SECONDS)
        except ConnectionRefusedError as error:
            reason = error.strerror or ""
            command = shlex.join((*self._command, self._destination.account, "true"))
            raise StoreUnavailable(
                f"cannot reach {self._destination} by ssh: {reason}",
                f"see what '{command}' does",
                denied="Permission denied (" in reason,  # the host accepted no key
            ) from None
        finally:
            self._terminal = None
            self._opened = True

    async def _answers(self) -> bool:
        """Whether Xenstore has answered; False while ssh connects.

        Raises ConnectionRefusedError if ssh has failed, StoreUnavailable.
        """
        try:
            transport = self.connect()
        except BlockingIOError:
            return False
        try:
            with trio.move_on_after(ECHO_SECONDS):
                await self._settled.wait()
            transport.send((encode(Op.DIRECTORY, 1, 0, b"/\0"),))
            with trio.fail_after(self._timeout):
                if await transport.receive():
                    return True
        except trio.TooSlowError:
            raise StoreUnavailable(
                f"the Xenstore of {self._destination} does not answer",
                f"see whether 'xenstore-read domid' works on {self._destination.account}",
            ) from None
        except ConnectionError:
            pass
        finally:
            transport.close()
        # ssh closes a connection if it gets none on the other host, and when ssh itself ends.
        with suppress(BlockingIOError):
            self.connect().close()
            raise StoreUnavailable(
                f"no access to {self._destination.socket} of {self._destination.account}",
                "a xenstored must listen there, the user have the right to connect (mostly root "
                "alone), and sshd allow it (AllowStreamLocalForwarding)",
            )
        return False

    async def run(self) -> None:
        """Start ssh whenever it is wanted, until cancelled."""
        delay = 0.0
        session = True
        while True:
            await self._wanted.wait()
            started = trio.current_time()
            await self._run_ssh(session)
            self._wanted = trio.Event()
            session = self._failure is not None
            if not session or trio.current_time() > started + BACKOFF_MAX:
                delay = 0.0
            else:
                delay = min(2 * delay or BACKOFF_FIRST, BACKOFF_MAX)
            await trio.sleep(delay)

    async def _run_ssh(self, session: bool) -> None:
        """Run ssh once, to its end.  In a session it runs `cat`."""
        with suppress(FileNotFoundError):
            os.unlink(self._local)
        self._messages = b""
        self._settled = trio.Event()
        if not session:
            self._settled.set()
        try:
            process = self._start(session)
            pidfd = os.fdopen(os.pidfd_open(process.pid))
        except OSError as error:
            self._failure = f"cannot run {self._command[0]}: {error.strerror}"
            return
        with pidfd:
            self._failure = await self._serve(process, pidfd.fileno())
        if not self._settled.is_set() and os.path.exists(self._local):
            self._failure = None
        elif self._opened:
            log.warning("ssh to %s ended: %s", self._destination, self._failure)
        self._settled.set()

    def _start(self, session: bool) -> subprocess.Popen[bytes]:
        """Raises OSError."""
        terminal = self._terminal
        process = subprocess.Popen(
            (*self._command, *self._arguments(session=session, batch=terminal is None)),
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, DOLLAR: "$"},
            # Ctrl-C at a terminal must reach xsfs alone, which unmounts before ssh ends.
            start_new_session=terminal is None,
            process_group=None if terminal is None else 0,
            preexec_fn=_before_exec,
        )
        if terminal is not None:
            _set_foreground(terminal, process.pid)
            os.killpg(process.pid, signal.SIGCONT)  # it may have asked already, and been stopped
        return process

    async def _serve(self, process: subprocess.Popen[bytes], pidfd: int) -> str:
        """Serve ssh until it has ended.  Returns why.  If cancelled, this ends ssh."""
        assert process.stdin is not None
        assert process.stdout is not None
        # A user at a terminal may take long to type a password.
        limit = START_TIMEOUTS * self._timeout if self._terminal is None else math.inf
        with process.stdin, process.stdout:
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(MARK)
                async with trio.open_nursery() as nursery:
                    await nursery.start(self._read, process.stdout.fileno())
                    with trio.move_on_after(limit) as login:
                        await trio.lowlevel.wait_readable(pidfd)
                    is_late = login.cancelled_caught and not os.path.exists(self._local)
                    if not is_late:
                        await trio.lowlevel.wait_readable(pidfd)
                    nursery.cancel_scope.cancel()
            finally:
                with trio.CancelScope(shield=True):
                    await _end(process, pidfd)
        return f"no login within {limit:g} seconds" if is_late else self._reason(process.returncode)

    async def _read(self, output: int, task_status: trio.TaskStatus[None]) -> None:
        """Read the messages of ssh, and the answer of `cat`."""
        task_status.started()  # and wait from now on, so that this wakes together with the end of ssh
        while True:
            await trio.lowlevel.wait_readable(output)
            data = os.read(output, MESSAGES_MAX)
            if not data:
                return
            self._messages = (self._messages + data)[-MESSAGES_MAX:]
            if MARK in self._messages:
                self._messages = b""
                self._settled.set()

    def _reason(self, status: int | None) -> str:
        """A line that quotes the end of ssh's messages, or tells how ssh ended."""
        text = self._messages.decode(errors="replace")
        lines = [line.strip().removeprefix("ssh: ") for line in text.splitlines() if line.strip()]
        if status != 255 or not lines:  # of `cat`, or of a signal
            return f"ssh ended with status {status}"
        words = "; ".join(lines[-2:])[-300:]
        return "".join(each if each.isprintable() else "?" for each in words)

    def _arguments(self, *, session: bool, batch: bool) -> list[str]:
        """The arguments of ssh.  For each option ssh takes the first value that it finds: in the user's
        command, then here, then in ssh_config(5)."""
        options = {
            "BatchMode": "yes" if batch else "no",
            "ConnectTimeout": str(math.ceil(self._timeout)),
            # After one interval of silence ssh sends a question, after a second one it ends.
            "ServerAliveInterval": str(max(1, int(self._timeout / 2))),
            "ServerAliveCountMax": "1",
            # A shared connection would outlive this ssh.
            "ControlPath": "none",
            # Another ssh may have taken the ports of LocalForward lines in ssh_config(5).
            "ExitOnForwardFailure": "no",
            "StreamLocalBindMask": "0177",
            "ForwardAgent": "no",
            "ForwardX11": "no",
            "PermitLocalCommand": "no",
            "RemoteCommand": "none",
            "RequestTTY": "no",
        }
        arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        arguments += ["-L", f"{_escaped(self._local)}:{_escaped(self._destination.socket)}"]
        if session:
            return [*arguments, "--", self._destination.account, "cat"]
        return [*arguments, "-N", "--", self._destination.account]


def _escaped(path: str) -> str:
    """A path of a socket, with any characters but NUL, in the argument of -L."""
    path = path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")
    return path.replace("${", f"${{{DOLLAR}}}{{")


async def _end(process: subprocess.Popen[bytes], pidfd: int) -> None:
    """End ssh and the programs that it has started, and reap it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(OSError):
            os.killpg(process.pid, number)  # not reaped yet, so no other group has its number
        with trio.move_on_after(END_SECONDS):
            await trio.lowlevel.wait_readable(pidfd)
            break
    process.poll()


def _before_exec() -> None:
    """In the child, before it becomes ssh.  Nothing here may take a lock: other threads are gone, and the
    locks that they held are not."""
    _LIBC.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
    # The shell does not know of a stopped ssh, and could not continue it.
    signal.signal(signal.SIGTSTP, signal.SIG_IGN)


# ------------------------------------------------------------------------------------- the terminal


@contextmanager
def _own_terminal() -> Iterator[int | None]:
    """A descriptor of the controlling terminal, if this process is in its foreground.  Afterwards it is
    there again."""
    own = None
    with ExitStack() as stack:
        with suppress(OSError):
            terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
            stack.callback(os.close, terminal)
            if os.tcgetpgrp(terminal) == os.getpgrp():
                stack.callback(_set_foreground, terminal, os.getpgrp())
                own = terminal
        yield own


def _set_foreground(terminal: int, group: int) -> None:
    # The kernel stops a background process that tries this and accepts SIGTTOU.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    with suppress(OSError):  # the group, or the terminal, has gone
        os.tcsetpgrp(terminal, group)


# -------------------------------------------------------------------------- the private directory


@contextmanager
def private_directory() -> Iterator[str]:
    """The path of a new directory for the local end of the socket.  Raises StoreUnavailable."""
    with ExitStack() as stack:
        yield _make_directory(stack)


def _make_directory(stack: ExitStack) -> str:
    failure = "the paths of all directories for temporary files are too long"
    for above in _places():
        try:
            os.makedirs(above, 0o755, exist_ok=True)
            _remove_stale(above)
            if len(os.fsencode(above)) <= ABOVE_MAX:
                path = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=above))
                stack.enter_context(_locked(path))
                return path
        except OSError as error:
            failure = f"cannot make a directory in {above}: {error.strerror}"
    raise StoreUnavailable(f"no place for the socket of ssh: {failure}", "set XDG_RUNTIME_DIR")


def _places() -> Iterator[str]:
    if os.geteuid() == 0:
        yield RUN_DIRECTORY
    elif "XDG_RUNTIME_DIR" in os.environ:
        yield os.path.abspath(os.path.join(os.environ["XDG_RUNTIME_DIR"], "xsfs"))
    yield tempfile.gettempdir()
    yield "/tmp"


def _remove_stale(above: str) -> None:
    """Remove the directories of xsfs processes that have been killed."""
    for path in Path(above).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.geteuid():
                with _locked(path):
                    shutil.rmtree(path)


@contextmanager
def _locked(directory: str | Path) -> Iterator[None]:
    """Hold the lock of a directory.  Raises OSError, also if another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
