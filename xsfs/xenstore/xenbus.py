"""The kernel's device, /dev/xen/xenbus, where the kernel multiplexes the domain's one ring.

It takes one message with each write and drops a second one in the same buffer; it never reports that it
is writable, and need not: write only queues.  But it does not copy what it queues: each descriptor has
one buffer, and the next write overwrites a message that the kernel's thread has not put into the ring
yet.  So a descriptor can have one request at a time, and what is asked together goes out through
several.  WATCH and UNWATCH are carried out within write; one sent while another request of the same
descriptor is unanswered can deadlock the kernel's Xenstore driver for good.

What a `DeviceTransport` owns: its descriptors, opened when they are first needed, the messages that
wait for one, and of each descriptor whether its last request is unanswered and what has come of a
message that is not whole yet.

What always holds:

- Messages go out in the order in which they were sent, and the kernel keeps it, whichever descriptors
  they take: the first that has to wait holds up the others.
- A transaction is its descriptor's, and so is a watch: the kernel tells no other of them.  All of that
  goes through the first one.
- Only whole messages are given out, so that those of two descriptors do not mix.
"""

from __future__ import annotations

import errno
import os
import select
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from xsfs.xenstore.protocol import DEVICE_PAYLOAD_MAX, HEADER, Op

DESCRIPTORS_MAX: Final = 16

RECEIVE_SIZE: Final = 8192
"""Room for an answer, and for some events."""

_BLOCKING: Final = frozenset((Op.WATCH, Op.UNWATCH))
_OF_THE_FIRST: Final = frozenset((Op.TRANSACTION_START, Op.TRANSACTION_END))


class _Descriptor:
    def __init__(self, number: int) -> None:
        self.number = number
        self.asked = False
        """Whether a request is unanswered."""
        self.partial = b""

    def write(self, message: bytes) -> None:
        self.asked = True
        try:
            os.write(self.number, message)
        except OSError:
            self.asked = False  # a WATCH refused: there is no reply
            raise

    def take(self, data: bytes) -> bytes:
        """The whole messages, with what has come before."""
        data = self.partial + data
        end = 0
        while len(data) >= end + HEADER.size:
            op, _, _, length = HEADER.unpack_from(data, end)
            if len(data) < end + HEADER.size + length:
                break
            end += HEADER.size + length
            self.asked = self.asked and op == Op.WATCH_EVENT
        self.partial = data[end:]
        return data[:end]


class DeviceTransport:
    """See the module's text.

    open_device     a new descriptor of the device, which does not block
    """

    payload_max = DEVICE_PAYLOAD_MAX
    watch_blocks = True
    prompt = False

    def __init__(self, open_device: Callable[[], int]) -> None:
        self._open_device = open_device
        self._descriptors: dict[int, _Descriptor] = {}
        self._queue: deque[bytes] = deque()
        self._poll = select.epoll()
        # What is received by objects of this size, cut to what came, leaves holes in the heap.
        self._room = memoryview(bytearray(RECEIVE_SIZE))
        self._first = self._open()

    def _open(self) -> _Descriptor:
        descriptor = _Descriptor(self._open_device())
        try:
            self._poll.register(descriptor.number, select.EPOLLIN)
        except OSError:
            os.close(descriptor.number)
            raise
        self._descriptors[descriptor.number] = descriptor
        return descriptor

    def fileno(self) -> int:
        return self._poll.fileno()

    def outlet(self) -> int:
        return self._first.number

    def send(self, messages: Sequence[bytes]) -> bytes:
        if HEADER.unpack_from(messages[0])[0] in _BLOCKING:
            # In a thread, beside `receive`: the queue is the event loop's, which must not send these.
            for message in messages:
                self._first.write(message)
            return b""
        self._queue.extend(messages)
        self._send_queued()
        return b""

    def send_rest(self, rest: bytes) -> bytes:
        raise AssertionError("the device takes a message whole")

    def _send_queued(self) -> None:
        while self._queue and (descriptor := self._free_for(self._queue[0])) is not None:
            descriptor.write(self._queue.popleft())

    def _free_for(self, message: bytes) -> _Descriptor | None:
        op, _, tx_id, _ = HEADER.unpack_from(message)
        if tx_id or op in _OF_THE_FIRST:
            return None if self._first.asked else self._first
        for descriptor in self._descriptors.values():
            if not descriptor.asked:
                return descriptor
        if len(self._descriptors) < DESCRIPTORS_MAX:
            try:
                return self._open()
            except OSError:
                return None  # there are others, only slower
        return None

    def receive(self) -> bytes:
        messages = []
        for number, _ in self._poll.poll(0):
            try:
                data = bytes(self._room[: os.readv(number, (self._room,))])
            except BlockingIOError:
                continue
            if not data:
                return b""
            messages.append(self._descriptors[number].take(data))
        self._send_queued()
        received = b"".join(messages)
        if not received:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return received

    def receive_soon(self) -> bytes | None:
        return None

    def close(self) -> None:
        # A closed descriptor's number may belong to another file by the next call.
        descriptors, self._descriptors = self._descriptors, {}
        for number in descriptors:
            os.close(number)
        self._poll.close()
