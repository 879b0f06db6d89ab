"""The Xenstore of another host, reached by ssh(1).

One ssh forwards one Unix socket.  Each connection to its local end is a connection to the socket on the
other host.  ssh also runs `cat` there: sshd turns Nagle's algorithm off only for a session, and a value
takes up to 40 ms with it.  If the account may run nothing, ssh runs without a session (-N).

An `SshForward` owns at most one `SshProcess`, and the task `run`, which starts it and waits for its end.
Any task of the same trio loop may call `connect`.  `open_forward` owns the private directory with the
local end of the socket.

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
import secrets
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import trio

from xsfs.xenstore.background import open_background
from xsfs.xenstore.errors import StoreUnavailable
from xsfs.xenstore.protocol import directory, encode
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

REASON_LINES: Final = 2
REASON_MAX: Final = 300
"""How many of ssh's last lines, and characters, an error quotes."""

SSH_FAILED: Final = 255
"""The exit status of ssh if ssh itself has failed.  Any other status comes from `cat`."""

DENIED: Final = "Permission denied ("
"""A part of ssh's message if the host accepted no key."""

RUN_DIRECTORY: Final = "/run/xsfs"
PREFIX: Final = ".xsfs-ssh-"
SOCKET_NAME: Final = "socket"

ABOVE_MAX: Final = 107 - len(f"/{PREFIX}12345678/{SOCKET_NAME}")
"""How long the path above a private directory may be: sun_path of unix(7) has 107 bytes and a NUL."""

DOLLAR: Final = "XSFS_DOLLAR"
"""ssh expands `${NAME}` in the paths of sockets.  This variable has the value `$`."""

PR_SET_PDEATHSIG: Final = 1

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
        local = os.path.join(place, SOCKET_NAME)
        forward = SshForward(SshSettings(command, destination, timeout, local))
        async with open_background() as nursery:
            nursery.start_soon(forward.run)
            await forward.open()
            yield forward


class SshSettings(NamedTuple):
    """How to run ssh: as for `open_forward`, and `local`, the path of the local end of the socket."""

    command: Sequence[str]
    destination: SshDestination
    timeout: float
    local: str


class SshForward:
    """See the module's text.  `run` must be running while `open` and `connect` are used."""

    def __init__(self, settings: SshSettings) -> None:
        self._settings = settings
        self._destination = settings.destination
        self._process: SshProcess | None = None
        self._wanted = trio.Event()
        """Set when `connect` has found no ssh that listens."""
        self._failure: str | None = None
        """Why the last ssh ended.  None before the first end, and after an account has refused `cat`:
        the next ssh starts without it."""
        self._opened = False
        """Whether `open` has returned.  Before that ssh may use the terminal."""

    def connect(self) -> Transport:
        """A connection to the Xenstore of the other host.

        If no ssh listens, the task `run` starts one, with back-off.  Raises BlockingIOError while ssh
        connects, ConnectionRefusedError if the last ssh has failed.
        """
        try:
            return open_transport(self._settings.local)
        except (FileNotFoundError, ConnectionRefusedError):
            self._wanted.set()
        name = str(self._destination)
        if self._failure is not None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, self._failure, name)
        raise BlockingIOError(errno.EAGAIN, "ssh is still connecting", name)

    async def open(self) -> None:
        """Start ssh, and see that Xenstore answers.  Raises StoreUnavailable."""
        try:
            while not await self._answers():
                await trio.sleep(POLL_SECONDS)
        except ConnectionRefusedError as error:
            reason = error.strerror or ""
            command = shlex.join((*self._settings.command, self._destination.account, "true"))
            raise StoreUnavailable(
                f"cannot reach {self._destination} by ssh: {reason}",
                f"see what '{command}' does",
                denied=DENIED in reason,
            ) from None
        finally:
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
            assert self._process is not None
            await self._process.settle()
            request = directory(b"/")
            transport.send((encode(request.op, 1, 0, request.payload),))
            with trio.fail_after(self._settings.timeout):
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
            session = await self._run_ssh(session)
            ended = trio.current_time()
            self._wanted = trio.Event()
            if self._failure is None:
                delay = 0.0
            elif ended > started + BACKOFF_MAX:
                delay = BACKOFF_FIRST
            else:
                delay = min(2 * delay or BACKOFF_FIRST, BACKOFF_MAX)
            await trio.sleep_until(ended + delay)

    async def _run_ssh(self, session: bool) -> bool:
        """Run ssh once, to its end.  Whether the next one is to run `cat`."""
        with suppress(FileNotFoundError):
            os.unlink(self._settings.local)
        try:
            process = SshProcess(self._settings, session=session, may_ask=not self._opened)
        except (OSError, subprocess.SubprocessError) as error:
            reason = getattr(error, "strerror", error)
            self._failure = f"cannot run {self._settings.command[0]}: {reason}"
            return True
        self._process = process
        await process.run()
        self._failure = None if process.session_refused else process.reason
        if self._failure is not None and self._opened:
            log.warning("ssh to %s ended: %s", self._destination, self._failure)
        return not process.session_refused


class SshProcess:
    """One ssh, from its start to its end: the process, the pipes to it, and the terminal while ssh may ask
    for a password.

    session     whether it runs `cat`
    may_ask     whether it may use the terminal of this process

    The start raises OSError, subprocess.SubprocessError.
    """

    def __init__(self, settings: SshSettings, *, session: bool, may_ask: bool) -> None:
        self._local = settings.local
        self._seconds = START_TIMEOUTS * settings.timeout
        self._mark = secrets.token_hex(8).encode() + b"\n"
        self._echoed = False
        self._session = session
        self._settled = trio.Event()
        """Set when `cat` has answered, or cannot answer."""
        if not session:
            self._settled.set()
        self._messages = b""
        self.reason = ""
        """Why ssh ended."""
        self._terminal = _own_terminal() if may_ask else None
        arguments = _arguments(settings, session=session, batch=self._terminal is None)
        try:
            self._process = subprocess.Popen(
                (*settings.command, *arguments),
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, DOLLAR: "$"},
                # Ctrl-C at a terminal must reach xsfs alone, which unmounts before ssh ends.
                start_new_session=self._terminal is None,
                process_group=None if self._terminal is None else 0,
                preexec_fn=partial(_before_exec, os.getpid(), self._terminal),
            )
            try:
                self._pidfd = os.pidfd_open(self._process.pid)
            except OSError:
                self._process.kill()
                self._process.wait()
                raise
        except BaseException:
            self._take_terminal_back()
            raise

    @property
    def session_refused(self) -> bool:
        """Whether the account may log in, but not run `cat`.  Known when ssh has ended."""
        return self._session and not self._echoed and self._listens()

    def _listens(self) -> bool:
        return os.path.exists(self._local)

    async def settle(self) -> None:
        """Once ssh listens: wait until `cat` has answered or cannot answer, ECHO_SECONDS at most."""
        self._take_terminal_back()
        with trio.move_on_after(ECHO_SECONDS):
            await self._settled.wait()

    async def run(self) -> None:
        """Serve ssh until it has ended.  If cancelled, end ssh."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            os.set_blocking(process.stdout.fileno(), False)
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(self._mark)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read, process.stdout.fileno())
                    if self._terminal is None:
                        nursery.start_soon(self._limit_start)
                    await trio.lowlevel.wait_readable(self._pidfd)
                    nursery.cancel_scope.cancel()
            finally:
                self._take_terminal_back()
                with trio.CancelScope(shield=True):
                    await self._end()
                os.close(self._pidfd)
            with suppress(BlockingIOError):  # once: a program that ssh has started may still write
                self._read_some(process.stdout.fileno())
        self.reason = self.reason or self._last_words()
        self._settled.set()

    async def _read(self, output: int) -> None:
        """Read the messages of ssh, and the answer of `cat`."""
        await trio.lowlevel.wait_readable(output)
        while self._read_some(output):
            await trio.lowlevel.wait_readable(output)

    def _read_some(self, output: int) -> bool:
        """Read once.  False at the end.  Raises BlockingIOError."""
        data = os.read(output, MESSAGES_MAX)
        self._messages += data
        if self._mark in self._messages:
            self._messages = self._messages.replace(self._mark, b"")
            self._echoed = True
            self._settled.set()
            if not self._listens():
                self._signal(signal.SIGTERM)
        self._messages = self._messages[-2 * MESSAGES_MAX :]
        return bool(data)

    async def _limit_start(self) -> None:
        await trio.sleep(self._seconds)
        if not self._listens():
            self.reason = f"no login within {self._seconds:g} seconds"
            self._signal(signal.SIGTERM)

    async def _end(self) -> None:
        """End ssh and the programs that it has started, and reap it."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            with trio.move_on_after(END_SECONDS):
                await trio.lowlevel.wait_readable(self._pidfd)
                break
        self._process.poll()

    def _signal(self, number: int) -> None:
        """Signal the process group of ssh.  ssh is not reaped yet, so no other process has its number."""
        with suppress(OSError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        """The last lines of ssh's messages, or how ssh ended."""
        status = self._process.returncode
        text = self._messages.decode(errors="replace")
        lines = [line.strip().removeprefix("ssh: ") for line in text.splitlines() if line.strip()]
        if status == SSH_FAILED and lines:
            words = "; ".join(lines[-REASON_LINES:])[-REASON_MAX:]
            return "".join(each if each.isprintable() else "?" for each in words)
        if status is None:
            return "ssh does not end"
        if status < 0:
            return f"ssh was ended by {signal.Signals(-status).name}"
        return f"ssh ended with status {status}"

    def _take_terminal_back(self) -> None:
        if self._terminal is not None:
            with suppress(OSError):
                _give_terminal(self._terminal, os.getpgrp())
            os.close(self._terminal)
            self._terminal = None


def _arguments(settings: SshSettings, *, session: bool, batch: bool) -> list[str]:
    """The arguments of ssh.  For each option ssh takes the first value that it finds: in the user's
    command, then here, then in ssh_config(5)."""
    _, destination, timeout, local = settings
    options = {
        "BatchMode": "yes" if batch else "no",
        "ConnectTimeout": str(math.ceil(timeout)),
        # After one interval of silence ssh sends a question, after a second one it ends.
        "ServerAliveInterval": str(max(1, int(timeout / 2))),
        "ServerAliveCountMax": "1",
        # A shared connection would outlive this ssh.
        "ControlMaster": "no",
        "ControlPath": "none",
        # Another ssh may have taken the ports of LocalForward lines in ssh_config(5).
        "ExitOnForwardFailure": "no",
        "StreamLocalBindUnlink": "yes",
        "StreamLocalBindMask": "0177",
        "ForwardAgent": "no",
        "ForwardX11": "no",
        "PermitLocalCommand": "no",
        "RemoteCommand": "none",
        "RequestTTY": "no",
    }
    arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    arguments += ["-L", f"{_escaped(local)}:{_escaped(destination.socket)}"]
    if session:
        return [*arguments, "--", destination.account, "cat"]
    return [*arguments, "-N", "--", destination.account]


def _escaped(path: str) -> str:
    """A path of a socket, with any characters but NUL, in the argument of -L."""
    path = path.replace("\\", "\\\\").replace(":", "\\:").replace("%", "%%")
    return path.replace("${", f"${{{DOLLAR}}}{{")


# ------------------------------------------------------------------------------------- the terminal


def _own_terminal() -> int | None:
    """A descriptor of the controlling terminal, if this process is in its foreground."""
    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    with suppress(OSError):
        if os.tcgetpgrp(terminal) == os.getpgrp():
            return terminal
    os.close(terminal)
    return None


def _give_terminal(terminal: int, group: int) -> None:
    """Make a process group the terminal's foreground.  SIGTTOU stops others who try."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(terminal, group)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _before_exec(parent: int, terminal: int | None) -> None:
    """In the child, before it becomes ssh.  Nothing here may take a lock: other threads are gone, and the
    locks that they held are not."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # xsfs ended before that
    if terminal is not None:
        # The shell does not know of a stopped ssh, and could not continue it.
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)
        _give_terminal(terminal, os.getpid())


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
                path = stack.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix=PREFIX, dir=above, ignore_cleanup_errors=True
                    )
                )
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
