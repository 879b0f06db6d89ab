"""The process of a daemon: started over the shim, waited for, paused, ended."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from typing import Final

from .client import XsClient, XsEOF, XsError, XsTimeout
from .shim import build_shim

START_TIMEOUT: Final = 60.0


class DaemonProcess:
    """Runs `command` with all its files in `directory`, until kill() or the end of this process."""

    def __init__(self, command: Sequence[str], directory: str) -> None:
        self.socket = os.path.join(directory, "run", "socket")
        self.log_file = os.path.join(directory, "daemon.log")
        unwanted = ("XENSTORED_", "NOTIFY_SOCKET")
        env = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        env |= {"LD_PRELOAD": build_shim(), "XENSHIM_DIR": directory}
        env["XENSTORED_RUNDIR"] = os.path.dirname(self.socket)
        with contextlib.ExitStack() as on_failure, contextlib.ExitStack() as childs:
            self._ready, ready = os.pipe()
            on_failure.callback(os.close, self._ready)
            childs.callback(os.close, ready)
            lifeline, self._lifeline = os.pipe()
            childs.callback(os.close, lifeline)
            on_failure.callback(os.close, self._lifeline)
            env |= {"XENSHIM_READY_FD": str(ready), "XENSHIM_LIFELINE_FD": str(lifeline)}
            log = childs.enter_context(open(self.log_file, "ab"))
            self.popen = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                pass_fds=(ready, lifeline),
                start_new_session=True,
            )
            on_failure.pop_all()

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def await_ready(self) -> None:
        """Wait until the daemon listens (the shim tells), and has answered a first request."""
        cause: Exception | None = None
        # Without a byte, the daemon has ended, and the pipe with it.
        if select.select([self._ready], [], [], START_TIMEOUT)[0] and os.read(self._ready, 1):
            try:
                with XsClient(self.socket, START_TIMEOUT) as client:
                    client.read("/tool")
                return
            except (OSError, XsEOF, XsTimeout, XsError) as err:
                cause = err
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(1.0)
        with open(self.log_file, errors="replace") as log:
            raise RuntimeError(
                f"{self.popen.args!r} did not start ({cause!r}); "
                f"exit code {self.popen.returncode}; its output:\n{log.read()}"
            ) from cause

    def kill(self, sig: int, timeout: float) -> None:
        """End the daemon, paused or not, with SIGKILL after the timeout."""
        if self.alive:
            self.popen.send_signal(sig)
            self.popen.send_signal(signal.SIGCONT)
            try:
                self.popen.wait(timeout)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait()
        for fd in self._lifeline, self._ready:
            if fd >= 0:
                os.close(fd)
        self._lifeline = self._ready = -1

    def pause(self) -> None:
        """SIGSTOP; it has taken effect when this returns."""
        self.popen.send_signal(signal.SIGSTOP)
        # WNOWAIT: an exit is for the Popen object to reap.
        os.waitid(os.P_PID, self.popen.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        self.popen.send_signal(signal.SIGCONT)
