"""A C program on libxenstore, which is what the Xenstore tools are made of: see read.c."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.support.xenstored.harness import MissingProgramError

from .errors import BenchmarkError
from .kinds import BATCH, PROGRAM_SECONDS
from .timing import Contender

SOURCE: Final = Path(__file__).with_name("read.c")
HEADER: Final = "/usr/include/xenstore.h"


@dataclass
class Reader:
    """The program, connected."""

    process: subprocess.Popen[bytes]
    expected: bytes

    def read(self, times: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"%d\n" % times)
        self.process.stdin.flush()
        answer = self.process.stdout.fileno()
        if not select.select([answer], [], [], PROGRAM_SECONDS)[0]:
            raise BenchmarkError("the C program does not answer")
        if (value := os.read(answer, 4096)) != self.expected:
            raise BenchmarkError(f"the C program has read {value!r} instead of {self.expected!r}")

    def contender(self) -> Contender:
        return Contender("C, libxenstore", lambda: self.read(BATCH), BATCH)


@contextlib.contextmanager
def reader(node: str, expected: bytes, environment: Mapping[str, str]) -> Iterator[Reader]:
    if not os.path.exists(HEADER):
        raise MissingProgramError(HEADER, "libxen-dev")
    with tempfile.TemporaryDirectory() as directory:
        program = os.path.join(directory, "read")
        subprocess.run(["gcc", "-O2", "-o", program, SOURCE, "-lxenstore"], check=True)
        with subprocess.Popen(
            [program, node], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            try:
                yield Reader(process, expected)
            finally:
                process.kill()
