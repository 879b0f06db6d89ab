"""The kernel's device, /dev/xen/xenbus, over which the kernel multiplexes the domain's one ring.

Each write(2) carries one message, and the kernel drops a second one.  The device never reports that it is
writable, and need not: a write only queues.  But the kernel does not copy what it queues: the next write
overwrites a message that the kernel's thread has not put into the ring yet.  So a descriptor can have one
request at a time, and a pipeline goes out through several.  The kernel carries out WATCH and UNWATCH within
write(2).  One that is sent while another request of its descriptor is unanswered can deadlock the kernel's
Xenstore driver until reboot.

A `DeviceTransport` owns its descriptors, which it opens when they are first needed, and the messages that
wait for one.  Only the tasks of its connection touch it; the thread of `send_watch` writes to the first
descriptor alone.

Invariants:

- Messages go out in the order in which they were sent, and the kernel keeps this order across
  descriptors.  The first message that has to wait holds up the others.
- A transaction belongs to its descriptor, and so does a watch.  Everything that concerns them goes
  through the first descriptor.
- `receive` returns whole messages only, so that the messages of two descriptors do not mix.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from xsfs.xenstore.background import run_in_thread
from xsfs.xenstore.protocol import DEVICE_PAYLOAD_MAX, HEADER, Op

DESCRIPTORS_MAX: Final = 16

RECEIVE_SIZE: Final = 8192
"""Room for a reply and some events."""


class WatchRefused(Exception):
    """write(2) of a WATCH failed: the daemon refused it, and no reply will come."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class DeviceTransport:
    """A `Transport` over the device; see the module's docstring.

    open_device     opens a new, non-blocking descriptor of the device
    """

    payload_max = DEVICE_PAYLOAD_MAX
    is_served_in_turn = False

    def __init__(self, open_device: Callable[[], int]) -> None:
        self._open_device = open_device
        self._partial: dict[int, bytes] = {}
        """For each descriptor, the part of a message that has come."""
        self._busy: set[int] = set()
        """Descriptors with an unanswered request."""
        self._queue: deque[bytes] = deque()
        self._poll = select.epoll()
        # Receiving into objects of this size, which are cut to what came, leaves holes in the heap.
        self._room = memoryview(bytearray(RECEIVE_SIZE))
        self._first = self._open()

    def _open(self) -> int:
        descriptor = self._open_device()
        try:
            self._poll.register(descriptor, select.EPOLLIN)
        except PermissionError:  # it cannot be polled
            os.close(descriptor)
            raise OSError(errno.ENODEV, "not Xenstore's device") from None
        self._partial[descriptor] = b""
        return descriptor

    def send(self, messages: Sequence[bytes]) -> bytes:
        self._queue.extend(messages)
        self._send_queued()
        return b""

    async def send_rest(self, rest: bytes) -> bytes:
        raise AssertionError("the device accepts each message whole")

    async def send_watch(self, messages: Sequence[bytes]) -> bytes:
        """In a thread, because write(2) blocks for a round trip."""
        try:
            await run_in_thread(partial(self._write_watch, messages))
        except OSError as error:
            raise WatchRefused(errno.errorcode.get(error.errno or errno.EIO, "EIO")) from error
        return b""

    def _write_watch(self, messages: Sequence[bytes]) -> None:
        for message in messages:
            self._write(self._first, message)

    def _write(self, descriptor: int, message: bytes) -> None:
        self._busy.add(descriptor)
        try:
            os.write(descriptor, message)
        except OSError:
            self._busy.discard(descriptor)  # there will be no reply
            raise

    def _send_queued(self) -> None:
        while self._queue and (descriptor := self._free_for(self._queue[0])) is not None:
            self._write(descriptor, self._queue.popleft())

    def _free_for(self, message: bytes) -> int | None:
        op, _, tx_id, _ = HEADER.unpack_from(message)
        if tx_id or op == Op.TRANSACTION_START:
            return None if self._first in self._busy else self._first
        for descriptor in self._partial:
            if descriptor not in self._busy:
                return descriptor
        with suppress(OSError):  # fewer descriptors serve the pipeline, too, only slower
            if len(self._partial) < DESCRIPTORS_MAX:
                return self._open()
        return None

    async def receive(self) -> bytes:
        while True:
            await trio.lowlevel.wait_readable(self._poll.fileno())
            if self._poll.closed:
                raise trio.ClosedResourceError  # a task that ran in between has closed it
            received = b""
            for descriptor, _ in self._poll.poll(0):
                try:
                    data = bytes(self._room[: os.readv(descriptor, (self._room,))])
                except BlockingIOError:
                    continue
                if not data:
                    return b""
                received += self._whole_messages(descriptor, data)
            self._send_queued()
            if received:
                return received

    def _whole_messages(self, descriptor: int, data: bytes) -> bytes:
        """The whole messages in what has come so far."""
        data = self._partial[descriptor] + data
        end = 0
        while len(data) >= end + HEADER.size:
            op, _, _, length = HEADER.unpack_from(data, end)
            if len(data) < end + HEADER.size + length:
                break
            end += HEADER.size + length
            if op != Op.WATCH_EVENT:
                self._busy.discard(descriptor)
        self._partial[descriptor] = data[end:]
        return data[:end]

    def receive_soon(self) -> bytes | None:
        return None

    def close(self) -> None:
        if self._poll.closed:
            return
        trio.lowlevel.notify_closing(self._poll.fileno())
        # A closed descriptor's number may belong to another file by the next call.
        descriptors, self._partial = self._partial, {}
        for descriptor in descriptors:
            os.close(descriptor)
        self._poll.close()
