"""The behaviour of Xenstore daemons as one table of scenarios.

A scenario is a name and steps.  Each scenario has a new store, in which domains 7 and 8 exist and
have homes (`HOMES`).  If the daemons differ, a step has `Differs(c=..., ocaml=...)`.  If a daemon of a
newer Xen differs from that of 4.17, the step has a column for it, and names the cause.  The embedded
store behaves like C xenstored 4.17.

CONNECTIONS names the clients.  The first step of a client opens its connection.  An unexpected event
is an error: at the end of a scenario no connection may have events left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Generic, TypeVar

from xsfs.xenstore import protocol
from xsfs.xenstore.protocol import Op, Request

T = TypeVar("T")


# ---------------------------------------------------------------------------------- expectations


Version = tuple[int, int]
Newer = Mapping[Version, tuple[T, str]]


@dataclass(frozen=True)
class Differs(Generic[T]):
    """The behaviour of each daemon.

    c           C xenstored of Xen 4.17, and with it the embedded store
    ocaml       oxenstored
    newer       C xenstored of each newer version at which it changes: the behaviour from then on, and the
                reason, which is the change in the daemon's source with its commit
    xapi        xapi's oxenstored, which counts its versions from 25.0, if it differs, and the reason
    """

    c: T
    ocaml: T
    newer: Newer[T] = field(default_factory=dict)
    xapi: tuple[T, str] | None = None

    def of(self, kind: str, version: Version) -> T:
        """The result of a store of that kind ("embedded", "C", "ocaml") and that version of Xen."""
        if kind == "ocaml":
            return self.xapi[0] if self.xapi and version >= (25, 0) else self.ocaml
        changes = [change for change in self.newer if change <= version]
        return self.newer[max(changes)][0] if changes else self.c


@dataclass(frozen=True)
class Error:
    name: str


@dataclass(frozen=True)
class Part:
    """A DIRECTORY_PART reply, whatever the generation; the NUL that marks the end included."""

    names: bytes


Reply = bytes | Error | Part
Event = tuple[str, str]

# The reasons of differences between versions.
SMALLER_RECORD: Final = "a node's record has a smaller header without tdb (45ce0cb38f)"
GUESTS_PATHS: Final = "the limit of a path's length is a quota, which dom0 has not (domain_max_chk)"
SPECIAL_NODES: Final = "special watches are nodes of their own (d6bb63924f)"
PERMS_FIRE: Final = "SET_PERMS of a special watch makes its event, as that of a node (d6bb63924f)"
BAD_PATHS: Final = "a bad path is refused by one function for all requests (f174147e63)"
QUOTA_NAMES: Final = "the quota of a node's permissions has another name (quota_adm)"
GET_FEATURE: Final = "requests for the features of the daemon (d239b81a17)"
MORE_FEATURES: Final = "watches with a depth are a feature (7e7723ea07)"
ONE_LESS: Final = "each quota is one less than it says (70fcc2531c)"
FULL_ERROR: Final = "one function checks all quotas, with one error (70fcc2531c)"
OWN_QUOTAS: Final = "a domain keeps the quotas that were set when it began (e52798141b)"
DOMIDS: Final = "a domid is refused if it is none (f8402a98b4)"
DEPTH: Final = "a watch may have a depth (7d96cab925)"
ALL_DOMAINS: Final = "all domains may watch the special nodes' events of an end (258263a4fb)"
DEAD_DOMAINS: Final = "permissions for a domain end with it (cdbcfd5d05)"
SPECIAL_SLASH: Final = "what follows the name of a special watch is checked (154054ea10)"

PARTS: Final = "oxenstored of xapi has DIRECTORY_PART, for dom0 (922e3df, 6bc999f)"
TOO_LONG: Final = "oxenstored of xapi sends the error of a reply in place of a long event (6bc999f)"

OK: Final = b"OK\0"
EINVAL: Final = Error("EINVAL")
EACCES: Final = Error("EACCES")
EEXIST: Final = Error("EEXIST")
ENOENT: Final = Error("ENOENT")
ENOSPC: Final = Error("ENOSPC")
ENOSYS: Final = Error("ENOSYS")
E2BIG: Final = Error("E2BIG")
EQUOTA: Final = Error("EQUOTA")
EBUSY: Final = Error("EBUSY")
EAGAIN: Final = Error("EAGAIN")
FULL: Final[Differs[Reply]] = Differs(ENOSPC, EQUOTA)


def changed(before: Reply, after: Reply, cause: str, since: Version = (4, 20)) -> Differs[Reply]:
    """The replies of C xenstored up to a version, and from then on.  oxenstored's are as before."""
    return Differs(before, before, {since: (after, cause)})


def of_part(reply: Reply, xapi: Reply | None = None) -> Differs[Reply]:
    """The replies to DIRECTORY_PART.  Those of xapi's oxenstored are C xenstored's if not given."""
    return Differs(reply, ENOSYS, xapi=(xapi or reply, PARTS))


def names(*found: str) -> bytes:
    """The reply to DIRECTORY, or to GET_PERMS."""
    return b"".join(name.encode() + b"\0" for name in found)


# ----------------------------------------------------------------------------------------- steps

CONNECTIONS: Final = {"dom0": 0, "second": 0, "guest": 7, "other": 8}
"""The domid of each connection."""


@dataclass(frozen=True)
class Ask:
    """One request and its reply.  The reply's header repeats the request's.

    `tx` names the request's transaction, `starts` the transaction that the reply starts, unless it is
    an error."""

    who: str
    request: Request | tuple[int, bytes]
    reply: Reply | Differs[Reply] = OK
    tx: str | None = None
    starts: str | None = None


@dataclass(frozen=True)
class Many:
    """Requests sent at once; all have the same reply."""

    who: str
    requests: tuple[Request, ...]
    reply: Reply | Differs[Reply] = OK
    tx: str | None = None


@dataclass(frozen=True)
class Told:
    """All events of a connection since its last `Told`, in their order.

    An error that is no reply stands as its name, with an empty token."""

    who: str
    events: tuple[Event, ...] | Differs[tuple[Event, ...]]


@dataclass(frozen=True)
class Order:
    """A request that causes one event for its sender: does the event or the reply come first?"""

    who: str
    request: Request
    event_first: bool | Differs[bool]


@dataclass(frozen=True)
class Oversize:
    """A request of 4097 bytes.  Either the connection ends, or the daemon replies.

    In the second case the daemon takes the rest for the next request, so the connection is of no
    more use."""

    who: str
    ends: bool | Differs[bool]


@dataclass(frozen=True)
class Create:
    """The domain exists and is introduced from now on."""

    domid: int


@dataclass(frozen=True)
class Destroy:
    domid: int


@dataclass(frozen=True)
class DestroyTarget:
    """The domain no longer exists, but the C daemon keeps it for a domain that targets it."""

    domid: int


@dataclass(frozen=True)
class Close:
    """Close the connection.  A later step opens a new one."""

    who: str


Step = Ask | Many | Told | Order | Oversize | Create | Destroy | DestroyTarget | Close
Scenario = tuple[Step, ...]


def told(who: str, *events: Event) -> Told:
    return Told(who, events)


def start(who: str, name: str = "t") -> Ask:
    return Ask(who, protocol.transaction_start(), starts=name)


def end(
    who: str, reply: Reply | Differs[Reply] = OK, *, name: str = "t", commit: bool = True
) -> Ask:
    return Ask(who, protocol.transaction_end(commit), reply, tx=name)


def set_perms(path: bytes, perms: str) -> Request:
    """Unlike the client's, it also accepts permissions that every daemon rejects."""
    entries = b"".join(entry.encode() + b"\0" for entry in perms.split())
    return Request(Op.SET_PERMS, path + b"\0" + entries)


def home(domid: int) -> tuple[Step, ...]:
    path = b"/local/domain/%d" % domid
    return (
        Ask("dom0", protocol.mkdir(path)),
        Ask("dom0", set_perms(path, f"n0 r{domid}")),
        Ask("dom0", protocol.write(path + b"/name", b"g%d" % domid)),
        Ask("dom0", protocol.mkdir(path + b"/data")),
        Ask("dom0", set_perms(path + b"/data", f"n{domid}")),
    )


HOMES: Final[Scenario] = (*home(7), *home(8))
"""The first steps of every scenario."""

read, write, mkdir, rm, directory = (
    protocol.read,
    protocol.write,
    protocol.mkdir,
    protocol.rm,
    protocol.directory,
)
get_perms, watch, unwatch, part = (
    protocol.get_perms,
    protocol.watch,
    protocol.unwatch,
    protocol.directory_part,
)


def node(path: bytes, perms: str, value: bytes = b"") -> tuple[Ask, Ask]:
    """dom0 creates a node with these permissions."""
    return Ask("dom0", write(path, value)), Ask("dom0", set_perms(path, perms))


def children(path: bytes, count: int, width: int = 4) -> tuple[Request, ...]:
    return tuple(mkdir(b"%b/%0*d" % (path, width, number)) for number in range(count))


def listing(numbers: Iterable[int], width: int = 4) -> bytes:
    return b"".join(b"%0*d\0" % (width, number) for number in numbers)


LONG_NAME: Final = b"n" * 2047
ANYBODY: Final = names("n0", "r32757")
RELEASED: Final = (("@releaseDomain", "r"),)
LONG_EVENT: Final = (("/" + LONG_NAME.decode() + "n", "t"),)
LONGEST_BELOW_HOME: Final = b"/local/domain/7/" + b"h" * 2048

# -------------------------------------------------------------------------------------- the table

SCENARIOS: Final[dict[str, Scenario]] = {
    # -- values
    "a value is any bytes, and may be empty": (
        Ask("dom0", write(b"/v", b"")),
        Ask("dom0", read(b"/v"), b""),
        Ask("dom0", write(b"/v", bytes(range(256)))),
        Ask("dom0", read(b"/v"), bytes(range(256))),
        Ask("dom0", write(b"/v", b"a\0b\0\0")),
        Ask("dom0", read(b"/v"), b"a\0b\0\0"),
    ),
    "a node has a value and children at once": (
        Ask("dom0", write(b"/v/child", b"1")),
        Ask("dom0", read(b"/v"), b""),
        Ask("dom0", write(b"/v", b"2")),
        Ask("dom0", read(b"/v"), b"2"),
        Ask("dom0", directory(b"/v"), names("child")),
        Ask("dom0", directory(b"/v/child"), b""),
    ),
    "dom0's largest value": (
        Ask("dom0", write(b"/v", b"x" * 2048)),
        Ask("dom0", read(b"/v"), b"x" * 2048),
        Ask("dom0", write(b"/v", b"y" * 2049), Differs(OK, E2BIG)),
        Ask("dom0", write(b"/v", b"z" * 4093), Differs(OK, E2BIG)),
        Ask("dom0", read(b"/v"), Differs(b"z" * 4093, b"x" * 2048)),
    ),
    "a guest's largest value": (
        Ask("guest", write(b"data", b"x" * 2015)),
        Ask(
            "guest",
            write(b"data", b"x" * 2016),
            Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)}),
        ),
        Ask(
            "guest",
            write(b"data", b"x" * 2023),
            Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)}),
        ),
        Ask(
            "guest",
            write(b"data", b"x" * 2024),
            Differs[Reply](
                ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD), (4, 22): (ENOSPC, ONE_LESS)}
            ),
        ),
        Ask("guest", write(b"data", b"x" * 2025), Differs[Reply](ENOSPC, OK)),
        Ask("guest", write(b"data", b"x" * 2048), Differs[Reply](ENOSPC, OK)),
        Ask("guest", write(b"data", b"x" * 2049), Differs(ENOSPC, E2BIG)),
        Ask(
            "guest",
            read(b"data"),
            Differs[Reply](
                b"x" * 2015,
                b"x" * 2048,
                {(4, 20): (b"x" * 2024, SMALLER_RECORD), (4, 22): (b"x" * 2023, ONE_LESS)},
            ),
        ),
        Ask("guest", write(b"data", b"")),
        Ask("guest", write(b"data/new", b"x" * 2025), Differs[Reply](ENOSPC, OK)),
        Ask("guest", read(b"data/new"), Differs[Reply](ENOENT, b"x" * 2025)),
    ),
    "more permissions and children leave less room for a guest's value": (
        Ask("dom0", set_perms(b"/local/domain/7/data", "n7 r8")),
        Ask("guest", write(b"data", b"x" * 2007)),
        Ask(
            "guest",
            write(b"data", b"x" * 2008),
            Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)}),
        ),
        Ask(
            "guest",
            write(b"data", b"x" * 2016),
            Differs[Reply](
                ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD), (4, 22): (ENOSPC, ONE_LESS)}
            ),
        ),
        Ask("guest", write(b"data", b"x" * 2017), Differs[Reply](ENOSPC, OK)),
        Ask("guest", write(b"data", b"x" * 2004)),
        Ask(
            "guest", mkdir(b"data/abc"), Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)})
        ),
        Ask("guest", rm(b"data/abc")),
        Ask("guest", mkdir(b"data/ab")),
        Ask(
            "guest",
            set_perms(b"data", "n7 r8 r9"),
            Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)}),
        ),
        Ask("guest", mkdir(b"data/abcdefgh"), Differs[Reply](ENOSPC, OK)),
        Ask("guest", directory(b"data"), Differs(names("ab"), names("ab", "abcdefgh"))),
    ),
    # -- names
    "valid paths": (
        Ask("dom0", write(b"/aZ09-_@/@x", b"")),
        Ask("dom0", directory(b"/aZ09-_@"), names("@x")),
        *(
            Ask("dom0", Request(op, path + b"\0"), EINVAL)
            for path in (b"", b"//", b"/a//b", b"/a/", b"/a.b", b"/.", b"/a b", b"/\xc3\xa4", b"a/")
            for op in (Op.READ, Op.WRITE, Op.MKDIR, Op.RM, Op.DIRECTORY, Op.GET_PERMS)
        ),
        Ask("dom0", set_perms(b"/a.b", "n0"), EINVAL),
        Ask("dom0", part(b"/a.b", 0), of_part(EINVAL)),
    ),
    "the longest name": (
        Ask("dom0", write(b"/" + LONG_NAME, b"1")),
        Ask(
            "dom0",
            write(b"/" + LONG_NAME + b"n", b"1"),
            Differs[Reply](EINVAL, EINVAL, {(4, 20): (OK, GUESTS_PATHS)}),
        ),
        Ask("guest", watch(b"/" + LONG_NAME + b"n", b"t"), Differs[Reply](EINVAL, OK)),
        Told("guest", Differs((), (("/" + LONG_NAME.decode() + "n", "t"),))),
        Ask("dom0", write(b"/" + LONG_NAME[:1000], b"1")),
        Ask("dom0", read(b"/" + LONG_NAME[:1000]), b"1"),
    ),
    "the longest path below a home": (
        Ask(
            "guest",
            write(LONGEST_BELOW_HOME, b"1"),
            changed(EACCES, EINVAL, ONE_LESS, (4, 22)),
        ),
        Ask("dom0", write(LONGEST_BELOW_HOME[:-2], b"1")),
        Ask(
            "dom0",
            write(LONGEST_BELOW_HOME + b"h", b"1"),
            Differs[Reply](EINVAL, EINVAL, {(4, 20): (OK, GUESTS_PATHS)}),
        ),
        Ask(
            "guest",
            write(b"data/" + b"h" * 2043, b"1"),
            Differs[Reply](ENOSPC, OK, {(4, 22): (EINVAL, ONE_LESS)}),
        ),
        Ask("guest", write(b"data/" + b"h" * 2044, b"1"), EINVAL),
        Ask("guest", write(b"data/" + b"h" * 1900, b"1")),
    ),
    "the root": (
        Ask("dom0", mkdir(b"/")),
        Ask("dom0", write(b"/", b"root")),
        Ask("dom0", read(b"/"), b"root"),
        Ask("dom0", get_perms(b"/"), names("n0")),
        Ask("guest", directory(b"/"), EACCES),
        Ask("guest", (Op.RM, b"/\0"), EACCES),
    ),
    "a fresh store": (
        Ask("dom0", directory(b"/tool"), names("xenstored")),
        Ask("dom0", directory(b"/tool/xenstored"), b""),
        Ask("dom0", get_perms(b"/tool/xenstored"), names("n0")),
        Ask(
            "dom0",
            directory(b"/"),
            Differs(
                names("tool", "local"),
                names("@introduceDomain", "@releaseDomain", "local", "tool"),
            ),
        ),
    ),
    "special names are no nodes": (
        Ask("dom0", read(b"@releaseDomain"), Differs[Reply](EINVAL, b"")),
        Ask(
            "dom0",
            get_perms(b"@releaseDomain"),
            Differs[Reply](
                EINVAL,
                names("n0"),
                {(4, 20): (names("n0"), SPECIAL_NODES), (4, 22): (ANYBODY, ALL_DOMAINS)},
            ),
        ),
        Ask(
            "guest",
            get_perms(b"@releaseDomain"),
            Differs[Reply](
                EINVAL,
                EACCES,
                {(4, 20): (EACCES, SPECIAL_NODES), (4, 22): (ANYBODY, ALL_DOMAINS)},
            ),
        ),
        Ask(
            "dom0",
            get_perms(b"@foo"),
            Differs[Reply](EINVAL, ENOENT, {(4, 20): (ENOENT, SPECIAL_NODES)}),
        ),
        Ask("dom0", write(b"@releaseDomain", b"x"), Differs[Reply](EINVAL, OK)),
        # The C daemon refuses SET_PERMS of other special names, and by guests, too, but with the
        # name of whatever error was last.
    ),
    # -- listings
    "children are listed in the order of their creation": (
        *(Ask("dom0", mkdir(b"/l/" + name)) for name in (b"b", b"c", b"a")),
        Ask("dom0", directory(b"/l"), Differs(names("b", "c", "a"), names("a", "b", "c"))),
        Ask("dom0", rm(b"/l/b")),
        Ask("dom0", mkdir(b"/l/b")),
        Ask("dom0", directory(b"/l"), Differs(names("c", "a", "b"), names("a", "b", "c"))),
    ),
    "a listing of 4096 bytes, and one more": (
        Many("dom0", children(b"/l", 819)),
        Ask("dom0", directory(b"/l"), listing(range(819))),
        Ask("dom0", mkdir(b"/l/"), EINVAL),
        Ask("dom0", mkdir(b"/l/0819")),
        Ask(
            "dom0",
            directory(b"/l"),
            Differs[Reply](E2BIG, listing(range(820)), xapi=(E2BIG, PARTS)),
        ),
        Ask("dom0", rm(b"/l/0000")),
        Ask("dom0", directory(b"/l"), listing(range(1, 820))),
    ),
    "a long listing in parts": (
        Many("dom0", children(b"/l", 1000, 8)),
        Ask(
            "dom0",
            directory(b"/l"),
            Differs[Reply](E2BIG, listing(range(1000), 8), xapi=(E2BIG, PARTS)),
        ),
        *(
            Ask("dom0", part(b"/l", offset), of_part(Part(names)))
            for offset, names in (
                (0, listing(range(454), 8)),
                (454 * 9, listing(range(454, 908), 8)),
                (908 * 9, listing(range(908, 1000), 8) + b"\0"),
                (9000, b"\0"),
                (99999, b"\0"),
                (8995, b"0999\0\0"),
            )
        ),
    ),
    "parts of small and missing listings": (
        Ask("dom0", write(b"/l/a", b"")),
        Ask("dom0", part(b"/l", 0), of_part(Part(b"a\0\0"))),
        Ask("dom0", part(b"/l/a", 0), of_part(Part(b"\0"))),
        Ask("dom0", part(b"/l/b", 0), of_part(ENOENT)),
        Ask("guest", part(b"/l", 0), of_part(EACCES, EINVAL)),
        Ask("dom0", (Op.DIRECTORY_PART, b"/l\0"), of_part(EINVAL)),
    ),
    # -- relative paths and domids
    "relative paths are below the home": (
        Ask("guest", read(b"name"), b"g7"),
        Ask("other", read(b"name"), b"g8"),
        Ask("dom0", write(b"name", b"zero")),
        Ask("dom0", read(b"/local/domain/0/name"), b"zero"),
        Ask("guest", write(b"data/x/y", b"1")),
        Ask("dom0", read(b"/local/domain/7/data/x/y"), b"1"),
        Ask("guest", rm(b"data/x")),
        Ask("dom0", read(b"/local/domain/7/data/x/y"), ENOENT),
    ),
    "GET_DOMAIN_PATH prints its argument": (
        Ask("dom0", (Op.GET_DOMAIN_PATH, b"4321\0"), names("/local/domain/4321")),
        Ask("guest", (Op.GET_DOMAIN_PATH, b"0\0"), names("/local/domain/0")),
        Ask(
            "dom0",
            (Op.GET_DOMAIN_PATH, b"abc\0"),
            changed(names("/local/domain/0"), EINVAL, DOMIDS, (4, 22)),
        ),
    ),
    "IS_DOMAIN_INTRODUCED": (
        Ask("dom0", protocol.is_domain_introduced(7), b"T\0"),
        Ask("dom0", protocol.is_domain_introduced(4321), b"F\0"),
        Ask("dom0", protocol.is_domain_introduced(0x7FF0), b"T\0"),
        Ask("dom0", protocol.is_domain_introduced(0), b"T\0"),
        Ask("guest", protocol.is_domain_introduced(7), EACCES),
    ),
    # -- operations
    "unknown operations": (
        *(Ask("dom0", (op, b"/\0"), ENOSYS) for op in (15, 16, 20, 1000)),
        Ask("guest", (20, b"/\0"), ENOSYS),
    ),
    "the features of the daemon": (
        Ask(
            "dom0",
            protocol.get_feature(),
            Differs[Reply](
                ENOSYS,
                ENOSYS,
                {(4, 21): (b"2\0", GET_FEATURE), (4, 22): (b"14\0", MORE_FEATURES)},
            ),
        ),
        Ask(
            "guest",
            protocol.get_feature(),
            Differs[Reply](
                ENOSYS,
                ENOSYS,
                {(4, 21): (EACCES, GET_FEATURE)},
            ),
        ),
    ),
    "requests that a guest must not send": (
        Ask("guest", (Op.INTRODUCE, b"9\x001\x001\0"), EACCES),
        Ask("guest", (Op.RELEASE, b"8\0"), EACCES),
        Ask("guest", (Op.RESUME, b"8\0"), EACCES),
        Ask("guest", (Op.SET_TARGET, b"7\x008\0"), EACCES),
        Ask("guest", (Op.CONTROL, b"print\0x\0"), Differs[Reply](EACCES, OK)),
    ),
    "CONTROL": (
        Ask("dom0", (Op.CONTROL, b"print\0hello\0")),
        Ask("dom0", (Op.CONTROL, b"check\0")),
        Ask("dom0", (Op.CONTROL, b"print\0"), Differs[Reply](EINVAL, OK)),
        Ask("dom0", (Op.CONTROL, b"nonsense\0"), Differs[Reply](EINVAL, OK)),
    ),
    "missing arguments": (
        Ask("dom0", (Op.WRITE, b"/a"), EINVAL),
        Ask("dom0", (Op.WATCH, b"/a\0"), EINVAL),
        Ask("dom0", (Op.WATCH, b"/a\0token\0depth\0"), changed(EINVAL, OK, DEPTH, (4, 22))),
        Told("dom0", Differs[tuple[Event, ...]]((), (), {(4, 22): ((("/a", "token"),), DEPTH)})),
        Ask("dom0", (Op.UNWATCH, b"/a\0"), EINVAL),
        Ask("dom0", (Op.INTRODUCE, b"7\0"), EINVAL),
        Ask("dom0", (Op.INTRODUCE, b"7\x001\x000\0"), EINVAL),
        Ask("dom0", (Op.SET_TARGET, b"7\0"), EINVAL),
        Ask("dom0", (Op.SET_PERMS, b"/\0"), EINVAL),
        Ask("dom0", (Op.TRANSACTION_END, b"x\0"), EINVAL),
    ),
    "the longest request, and one byte more": (
        Ask("dom0", write(b"/v", b"x" * 2048)),
        Ask(
            "dom0",
            (Op.READ, b"/" + b"x" * 4094 + b"\0"),
            Differs[Reply](EINVAL, EINVAL, {(4, 20): (ENOENT, GUESTS_PATHS)}),
        ),
        Oversize("dom0", Differs(True, False)),
        Ask("second", read(b"/v"), b"x" * 2048),
    ),
    # -- writing and removing
    "writing creates the parents, and makes an event for the last node only": (
        Ask("second", watch(b"/w", b"t")),
        told("second", ("/w", "t")),
        Ask("dom0", write(b"/w/a/b", b"1")),
        told("second", ("/w/a/b", "t")),
        Ask("dom0", mkdir(b"/w/c/d")),
        told("second", ("/w/c/d", "t")),
        Ask("dom0", read(b"/w/a"), b""),
    ),
    "MKDIR of an existing node": (
        Ask("dom0", write(b"/m", b"1")),
        Ask("second", watch(b"/m", b"t")),
        told("second", ("/m", "t")),
        Ask("dom0", mkdir(b"/m")),
        Ask("dom0", read(b"/m"), b"1"),
        told("second"),
        Ask("guest", mkdir(b"name"), EACCES),
    ),
    "RM of a missing node": (
        Ask("dom0", rm(b"/missing")),
        Ask("dom0", rm(b"/missing/below"), ENOENT),
        Ask("guest", rm(b"data/missing")),
        Ask("guest", rm(b"data/missing/below"), ENOENT),
        Ask("guest", rm(b"missing"), Differs[Reply](EACCES, OK)),
    ),
    "RM needs the permission to write the node alone": (
        *node(b"/r", "n0"),
        *node(b"/r/mine", "n7"),
        *node(b"/r/mine/not", "n0"),
        Ask("guest", rm(b"/r"), EACCES),
        Ask("guest", rm(b"/r/mine/not"), EACCES),
        Ask("guest", rm(b"/r/mine")),
        Ask("dom0", directory(b"/r"), b""),
    ),
    "making a node needs write permission on the nearest ancestor": (
        *node(b"/c", "w0"),
        *node(b"/d", "r0"),
        Ask("guest", write(b"/c/x/y/z", b"1")),
        Ask("guest", write(b"/d/x/y/z", b"1"), EACCES),
        Ask("guest", mkdir(b"/d/x"), EACCES),
        Ask("guest", write(b"/e", b"1"), EACCES),
    ),
    # -- permissions
    "nodes that a guest may not read": (
        *node(b"/p/hidden", "n0"),
        Ask("guest", read(b"/p/hidden"), EACCES),
        Ask("guest", read(b"/p/missing"), Differs(EACCES, ENOENT)),
        Ask("guest", read(b"/missing"), Differs(EACCES, ENOENT)),
        Ask("guest", directory(b"/local/domain"), EACCES),
        Ask(
            "guest",
            directory(b"/local/domain/7"),
            Differs(names("name", "data"), names("data", "name")),
        ),
        Ask("guest", read(b"missing"), ENOENT),
    ),
    "letters": (
        *node(b"/p/r", "n0 r7", b"v"),
        *node(b"/p/w", "n0 w7", b"v"),
        *node(b"/p/b", "n0 b7", b"v"),
        *node(b"/p/others", "r0", b"v"),
        *node(b"/p/none", "r0 n7", b"v"),
        Ask("guest", read(b"/p/r"), b"v"),
        Ask("guest", write(b"/p/r", b"w"), EACCES),
        Ask("guest", read(b"/p/w"), EACCES),
        Ask("guest", directory(b"/p/w"), EACCES),
        Ask("guest", get_perms(b"/p/w"), EACCES),
        Ask("guest", write(b"/p/w", b"w")),
        Ask("guest", read(b"/p/b"), b"v"),
        Ask("guest", write(b"/p/b", b"w")),
        Ask("guest", read(b"/p/others"), b"v"),
        Ask("guest", read(b"/p/none"), EACCES),
        Ask("guest", get_perms(b"/p/r"), names("n0", "r7")),
    ),
    "of two entries for a domain the first counts": (
        *node(b"/p/first", "n0 n7 r7", b"v"),
        *node(b"/p/second", "n0 r7 n7", b"v"),
        Ask("guest", read(b"/p/first"), EACCES),
        Ask("guest", read(b"/p/second"), b"v"),
    ),
    "the owner of a node that a guest creates": (
        *node(b"/p", "n0 b7 r8"),
        Ask("guest", write(b"/p/new/er", b"1")),
        Ask(
            "dom0", get_perms(b"/p/new"), Differs(names("n7", "b7", "r8"), names("n0", "b7", "r8"))
        ),
        Ask("guest", set_perms(b"/p/new/er", "n7"), Differs[Reply](OK, EACCES)),
        *node(b"/p/theirs", "n7 r8"),
        Ask("dom0", write(b"/p/theirs/x", b"")),
        Ask("dom0", get_perms(b"/p/theirs/x"), names("n7", "r8")),
    ),
    "SET_PERMS": (
        Ask("guest", set_perms(b"data", "r7 w8")),
        Ask("guest", get_perms(b"data"), names("r7", "w8")),
        Ask("guest", set_perms(b"data", "n8"), Differs(Error("EPERM"), EACCES)),
        Ask("guest", set_perms(b"name", "n7"), EACCES),
        Ask("guest", set_perms(b"/missing", "n7"), Differs(EACCES, ENOENT)),
        Ask("guest", set_perms(b"data/missing", "n7"), ENOENT),
        Ask("dom0", set_perms(b"/missing", "n0"), ENOENT),
        Ask("dom0", set_perms(b"/local/domain/7/data", "x7"), EINVAL),
        Ask("dom0", set_perms(b"/local/domain/7/data", "n"), EINVAL),
        Ask("dom0", set_perms(b"/local/domain/7/data", "n7x"), EINVAL),
        Ask("dom0", set_perms(b"/local/domain/7/data", "n99"), Differs[Reply](ENOENT, OK)),
    ),
    "permissions for domains that do not exist": (
        *node(b"/p", "n0 r99"),
        Ask("dom0", get_perms(b"/p"), names("n0", "r99")),
        Ask("dom0", set_perms(b"/p", "n0 r-1"), OK),
    ),
    "domids are numbers as strtol reads them": (
        *node(b"/p", "n0 r0x7"),
        Ask("dom0", get_perms(b"/p"), names("n0", "r7")),
        Ask("guest", read(b"/p"), b""),
    ),
    "numbers that do not fit are cut as strtol and C cut them": (
        Ask("dom0", mkdir(b"/p")),
        Ask("dom0", set_perms(b"/p", "n99999999999999999999"), Differs(ENOENT, EINVAL)),
        *(
            step
            for given, shown in (
                ("n0 r99999999999999999999 w-99999999999999999999", names("n0", "r-1", "w0")),
                (
                    "n0 b4294967303 r0xffffffffffffffffff r-2147483649",
                    names("n0", "b7", "r-1", "r2147483647"),
                ),
            )
            for step in (
                Ask("dom0", set_perms(b"/p", given), Differs[Reply](OK, EINVAL)),
                Ask("dom0", get_perms(b"/p"), Differs(shown, names("n0"))),
            )
        ),
        *(
            Ask(
                "dom0",
                (Op.GET_DOMAIN_PATH, number + b"\0"),
                Differs[Reply](
                    names("/local/domain/" + c),
                    names("/local/domain/" + ocaml),
                    {(4, 22): (EINVAL, DOMIDS)},
                ),
            )
            for number, c, ocaml in (
                (b"99999999999999999999", "4294967295", "7766279631452241919"),
                (b"-99999999999999999999", "0", "7766279631452241919"),
                (b"4294967303", "7", "4294967303"),
                (b"-1", "4294967295", "1"),
            )
        ),
        *(
            Ask("dom0", (Op.INTRODUCE, b"7\x001\0" + port + b"\0"), Differs(reply, EINVAL))
            for port, reply in (
                (b"-1", OK),
                (b"99999999999999999999", OK),
                (b"-99999999999999999999", EINVAL),
                (b"4294967296", EINVAL),
            )
        ),
        Ask(
            "dom0",
            (Op.INTRODUCE, b"4294967303\x001\x001\0"),
            changed(OK, EINVAL, DOMIDS, (4, 22)),
        ),
    ),
    "a guest may set five permissions": (
        Ask("guest", set_perms(b"data", "n7 r1 r2 r3")),
        Ask(
            "guest",
            set_perms(b"data", "n7 r1 r2 r3 r4"),
            changed(OK, ENOSPC, ONE_LESS, (4, 22)),
        ),
        Ask("guest", set_perms(b"data", "n7 r1 r2 r3 r4 r5"), Differs[Reply](ENOSPC, OK)),
        Ask("dom0", set_perms(b"/local/domain/7/data", "n7 r1 r2 r3 r4 r5")),
    ),
    "SET_TARGET gives a domain the permissions of another": (
        *node(b"/p", "n0 r8", b"v"),
        Ask("guest", read(b"/p"), EACCES),
        Ask("guest", read(b"/local/domain/8/data"), EACCES),
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 8)),
        Ask("guest", read(b"/p"), b"v"),
        Ask("guest", read(b"/local/domain/8/data"), b""),
        Ask("other", read(b"/local/domain/7/data"), EACCES),
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 99), Differs[Reply](ENOENT, OK)),
    ),
    "a target stays until the domain that targets it ends": (
        Create(9),
        *node(b"/p", "n0 r9", b"v"),
        *node(b"/q", "n9", b"v"),
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 9)),
        Ask("dom0", watch(b"@releaseDomain", b"r")),
        told("dom0", ("@releaseDomain", "r")),
        DestroyTarget(9),
        Told("dom0", Differs((), (("@releaseDomain", "r"),))),
        Ask("guest", read(b"/p"), Differs[Reply](b"v", EACCES)),
        Ask("guest", read(b"/q"), Differs[Reply](b"v", ENOENT)),
        Ask("dom0", protocol.is_domain_introduced(9), Differs(b"T\0", b"F\0")),
        *(
            Ask("dom0", request, Differs(EINVAL, ocaml))
            for request, ocaml in (
                (protocol.domain_request(Op.RELEASE, 9), EINVAL),
                (protocol.domain_request(Op.RESUME, 9), EINVAL),
                (protocol.domain_request(Op.SET_TARGET, 8, 9), OK),
            )
        ),
        Close("guest"),
        Destroy(7),
        Told("dom0", Differs((("@releaseDomain", "r"),) * 2, (("@releaseDomain", "r"),))),
        Ask("dom0", protocol.is_domain_introduced(9), b"F\0"),
        Ask("dom0", read(b"/q"), ENOENT),
    ),
    "each target stays until the domain that targeted it ends": (
        Create(9),
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 9)),
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 8)),
        DestroyTarget(9),
        Ask("dom0", protocol.is_domain_introduced(9), Differs(b"T\0", b"F\0")),
        Ask("guest", read(b"/local/domain/8/data"), b""),
        Close("guest"),
        Destroy(7),
        Ask("dom0", protocol.is_domain_introduced(9), b"F\0"),
        Ask("dom0", protocol.is_domain_introduced(8), b"T\0"),
    ),
    "RELEASE of a target": (
        Ask("dom0", protocol.domain_request(Op.SET_TARGET, 7, 8)),
        Ask("dom0", protocol.domain_request(Op.RELEASE, 8)),
        Ask("dom0", protocol.is_domain_introduced(8), Differs(b"T\0", b"F\0")),
        Ask("guest", read(b"/local/domain/8/data"), Differs[Reply](b"", ENOENT)),
    ),
    # -- watches
    "the first event follows the reply, and comes for a missing node too": (
        Order("dom0", watch(b"/missing", b"t"), event_first=False),
        Ask("dom0", watch(b"/tool", b"u")),
        told("dom0", ("/tool", "u")),
    ),
    "the event of one's own write": (
        Ask("dom0", watch(b"/w", b"t")),
        told("dom0", ("/w", "t")),
        Order("dom0", write(b"/w", b"1"), event_first=Differs(True, False)),
    ),
    "a watch set twice": (
        Ask("dom0", watch(b"/w", b"t")),
        Ask("dom0", watch(b"/w", b"t"), EEXIST),
        Ask("dom0", watch(b"/w", b"u")),
        Ask("second", watch(b"/w", b"t")),
        told("dom0", ("/w", "t"), ("/w", "u")),
        told("second", ("/w", "t")),
    ),
    "UNWATCH": (
        Ask("dom0", watch(b"/w", b"t")),
        Ask("dom0", watch(b"rel", b"t")),
        told("dom0", ("/w", "t"), ("rel", "t")),
        Ask("dom0", unwatch(b"/w", b"u"), ENOENT),
        Ask("dom0", unwatch(b"/x", b"t"), ENOENT),
        Ask("second", unwatch(b"/w", b"t"), ENOENT),
        Ask("dom0", unwatch(b"/w", b"t")),
        Ask("dom0", unwatch(b"/w", b"t"), ENOENT),
        Ask("dom0", unwatch(b"/local/domain/0/rel", b"t")),
        Ask("second", write(b"/w", b"1")),
        told("dom0"),
    ),
    "paths that can be watched": (
        *(Ask("dom0", watch(path, b"t"), EINVAL) for path in (b"", b"/a//b", b"/a/", b"/a.b")),
        Ask(
            "dom0",
            watch(b"/" + LONG_NAME + b"n", b"t"),
            Differs[Reply](EINVAL, OK, {(4, 20): (OK, GUESTS_PATHS)}),
        ),
        Told(
            "dom0",
            Differs[tuple[Event, ...]]((), LONG_EVENT, {(4, 20): (LONG_EVENT, GUESTS_PATHS)}),
        ),
        Ask(
            "dom0",
            unwatch(b"/a.b", b"t"),
            Differs[Reply](ENOENT, ENOENT, {(4, 20): (EINVAL, BAD_PATHS)}),
        ),
        Ask(
            "dom0", watch(b"@x/", b"t"), Differs[Reply](OK, OK, {(4, 20): (EINVAL, SPECIAL_SLASH)})
        ),
        Told(
            "dom0",
            Differs[tuple[Event, ...]](
                (("@x/", "t"),), (("@x/", "t"),), {(4, 20): ((), SPECIAL_SLASH)}
            ),
        ),
    ),
    "an event for each watch at or above a change": (
        Ask("second", watch(b"/", b"root")),
        Ask("second", watch(b"/w", b"w")),
        Ask("second", watch(b"/w/a", b"a")),
        Ask("second", watch(b"/w/a/b", b"b")),
        Ask("second", watch(b"/w/ab", b"ab")),
        told("second", ("/", "root"), ("/w", "w"), ("/w/a", "a"), ("/w/a/b", "b"), ("/w/ab", "ab")),
        Ask("dom0", write(b"/w/a", b"1")),
        told(
            "second",
            *(("/w/a", token) for token in ("root", "w", "a")),
        ),
        Ask("dom0", write(b"/w/a", b"1")),
        told("second", *(("/w/a", token) for token in ("root", "w", "a"))),
    ),
    "relative watches have relative events": (
        Ask("guest", watch(b"data", b"t")),
        Ask("guest", watch(b"/local/domain/7/data", b"absolute")),
        told("guest", ("data", "t"), ("/local/domain/7/data", "absolute")),
        Ask("guest", write(b"data/x", b"1")),
        Told(
            "guest",
            Differs(
                (("data/x", "t"), ("/local/domain/7/data/x", "absolute")),
                (("/local/domain/7/data/x", "absolute"), ("data/x", "t")),
            ),
        ),
        Ask("dom0", watch(b"a", b"t")),
        Ask("second", write(b"/local/domain/0/a/b", b"")),
        told("dom0", ("a", "t"), ("a/b", "t")),
    ),
    "removal fires the watches of each existing node, the deepest first": (
        Ask("dom0", write(b"/w/a/b", b"")),
        Ask("dom0", write(b"/w/c", b"")),
        Ask("second", watch(b"/w/a/b", b"b")),
        Ask("second", watch(b"/w/a", b"a")),
        Ask("second", watch(b"/w/a/missing", b"m")),
        Ask("second", watch(b"/w", b"w")),
        Ask("second", watch(b"/", b"root")),
        told(
            "second",
            ("/w/a/b", "b"),
            ("/w/a", "a"),
            ("/w/a/missing", "m"),
            ("/w", "w"),
            ("/", "root"),
        ),
        Ask("dom0", rm(b"/w")),
        Told(
            "second",
            Differs(
                (("/w/a/b", "b"), ("/w/a", "a"), ("/w", "w"), ("/w", "root")),
                (
                    ("/w", "root"),
                    ("/w", "w"),
                    ("/w/a", "a"),
                    ("/w/a/b", "b"),
                    ("/w/a/missing", "m"),
                ),
            ),
        ),
    ),
    "a change of permissions makes an event": (
        Ask("dom0", write(b"/w", b"")),
        Ask("second", watch(b"/w", b"t")),
        told("second", ("/w", "t")),
        Ask("dom0", set_perms(b"/w", "n0")),
        told("second", ("/w", "t")),
    ),
    "guests get the events of nodes that they may read": (
        *node(b"/w", "n0"),
        *node(b"/w/mine", "n0 r7"),
        Ask("guest", watch(b"/w", b"t")),
        told("guest", ("/w", "t")),
        Ask("dom0", write(b"/w", b"1")),
        told("guest"),
        Ask("dom0", write(b"/w/mine", b"1")),
        told("guest", ("/w/mine", "t")),
        Ask("dom0", set_perms(b"/w/mine", "n0")),
        told("guest", ("/w/mine", "t")),
        Ask("dom0", write(b"/w/mine", b"2")),
        told("guest"),
        Ask("dom0", set_perms(b"/w/mine", "n0 r7")),
        told("guest", ("/w/mine", "t")),
    ),
    "guests get the events of nodes whose parent they may read": (
        *node(b"/w", "n0 r7"),
        *node(b"/w/hidden", "n0"),
        Ask("guest", watch(b"/w/hidden", b"t")),
        told("guest", ("/w/hidden", "t")),
        Ask("dom0", write(b"/w/hidden", b"1")),
        told("guest", ("/w/hidden", "t")),
        Ask("dom0", rm(b"/w/hidden")),
        told("guest", ("/w/hidden", "t")),
    ),
    "events that are too long are not sent": (
        Ask("dom0", watch(b"/w", b"t" * 4000)),
        told("dom0", ("/w", "t" * 4000)),
        Ask("second", write(b"/w/" + b"x" * 92, b"")),
        Told(
            "dom0",
            Differs((), (("/w/" + "x" * 92, "t" * 4000),), xapi=((("E2BIG", ""),), TOO_LONG)),
        ),
        Ask("second", write(b"/w/" + b"x" * 91, b"")),
        told("dom0", ("/w/" + "x" * 91, "t" * 4000)),
    ),
    "a watch in a transaction": (
        start("guest"),
        Ask("guest", watch(b"data", b"t"), tx="t"),
        told(
            "guest", ("data", "t")
        ),  # C xenstored merges an event with an equal one that is unread
        Ask("guest", write(b"data", b"1")),
        end("guest", commit=False),
        told("guest", ("data", "t")),
    ),
    "a watch of dom0 in a transaction": (
        start("dom0"),
        Ask("dom0", watch(b"/w", b"t"), tx="t"),
        Ask("dom0", unwatch(b"/w", b"t"), tx="t"),
        end("dom0", commit=False),
        told("dom0", ("/w", "t")),
    ),
    "one event for two watches": (
        Ask("dom0", watch(b"/w", b"t")),
        Ask("dom0", watch(b"/w/a", b"t")),
        told("dom0", ("/w", "t"), ("/w/a", "t")),
        Ask("second", write(b"/w/a", b"")),
        Told("dom0", Differs((("/w/a", "t"),), (("/w/a", "t"), ("/w/a", "t")))),
        Ask("dom0", watch(b"@releaseDomain", b"t")),
        told("dom0", ("@releaseDomain", "t")),
        Ask("dom0", unwatch(b"@releaseDomain", b"t")),
        Ask("dom0", watch(b"@releaseDomain", b"t")),
        told("dom0", ("@releaseDomain", "t")),
    ),
    "RESET_WATCHES": (
        Ask("guest", watch(b"data", b"t")),
        start("guest"),
        told("guest", ("data", "t")),
        Ask("guest", (Op.RESET_WATCHES, b"\0")),
        Ask("guest", write(b"data", b"1")),
        told("guest"),
        Ask("guest", watch(b"data", b"t")),
        told("guest", ("data", "t")),
    ),
    "closing ends watches and transactions": (
        Ask("second", watch(b"/w", b"t")),
        start("second"),
        Ask("second", write(b"/w", b"1"), tx="t"),
        Close("second"),
        Ask("dom0", read(b"/w"), ENOENT),
        Ask("dom0", write(b"/w", b"1")),
        told("second"),
    ),
    # -- transactions
    "a transaction shows its own changes, and others nothing": (
        start("dom0"),
        Ask("dom0", write(b"/t/a", b"1"), tx="t"),
        Ask("dom0", read(b"/t/a"), b"1", tx="t"),
        Ask("dom0", directory(b"/t"), names("a"), tx="t"),
        Ask("dom0", read(b"/t/a"), ENOENT),
        Ask("second", read(b"/t/a"), ENOENT),
        end("dom0"),
        Ask("second", read(b"/t/a"), b"1"),
    ),
    "an aborted transaction": (
        Ask("second", watch(b"/t", b"t")),
        start("dom0"),
        Ask("dom0", write(b"/t/a", b"1"), tx="t"),
        end("dom0", commit=False),
        Ask("dom0", read(b"/t/a"), ENOENT),
        told("second", ("/t", "t")),
        end("dom0", Differs(ENOENT, Error("EIO"))),
    ),
    "unknown transactions": (
        start("dom0"),
        Ask("second", read(b"/tool"), Differs(ENOENT, Error("EIO")), tx="t"),
        Ask("dom0", protocol.transaction_start(), EBUSY, tx="t"),
        Ask("dom0", protocol.transaction_end(True), ENOENT),
        end("dom0"),
        Ask("dom0", read(b"/tool"), Differs(ENOENT, Error("EIO")), tx="t"),
        end("dom0", Differs(ENOENT, Error("EIO"))),
    ),
    "two writers in conflict": (
        Ask("dom0", write(b"/t", b"0")),
        start("dom0"),
        Ask("dom0", read(b"/t"), b"0", tx="t"),
        Ask("dom0", write(b"/t", b"1"), tx="t"),
        Ask("second", write(b"/t", b"2")),
        end("dom0", EAGAIN),
        Ask("dom0", read(b"/t"), b"2"),
    ),
    "a write of the same value conflicts": (
        Ask("dom0", write(b"/t", b"0")),
        start("dom0"),
        Ask("dom0", read(b"/t"), b"0", tx="t"),
        Ask("second", write(b"/t", b"0")),
        end("dom0", Differs[Reply](EAGAIN, OK)),
    ),
    "blind writes": (
        Ask("dom0", write(b"/t", b"0")),
        start("dom0"),
        Ask("dom0", write(b"/t", b"1"), tx="t"),
        Ask("second", write(b"/t", b"2")),
        end("dom0", Differs[Reply](EAGAIN, OK)),
        Ask("dom0", read(b"/t"), Differs(b"2", b"1")),
    ),
    "a read-only transaction": (
        Ask("dom0", write(b"/t", b"0")),
        start("dom0"),
        Ask("dom0", read(b"/t"), b"0", tx="t"),
        Ask("second", write(b"/t", b"1")),
        Ask("dom0", read(b"/t"), b"0", tx="t"),
        end("dom0", Differs[Reply](EAGAIN, OK)),
    ),
    "a transaction copies a node when it first accesses the node": (
        Ask("dom0", write(b"/t/a", b"0")),
        Ask("dom0", write(b"/t/b", b"0")),
        start("dom0"),
        Ask("dom0", read(b"/t/a"), b"0", tx="t"),
        Ask("second", write(b"/t/b", b"1")),
        Ask("dom0", read(b"/t/b"), Differs(b"1", b"0"), tx="t"),
        end("dom0"),
    ),
    "a missing node that was created since": (
        start("dom0"),
        Ask("dom0", read(b"/t"), ENOENT, tx="t"),
        Ask("second", write(b"/t", b"1")),
        Ask("dom0", read(b"/t"), ENOENT, tx="t"),
        end("dom0", Differs[Reply](EAGAIN, OK)),
    ),
    "two children made in one node": (
        Ask("dom0", mkdir(b"/t")),
        start("dom0"),
        Ask("dom0", write(b"/t/a", b"1"), tx="t"),
        Ask("second", write(b"/t/b", b"2")),
        end("dom0", Differs[Reply](EAGAIN, OK)),
    ),
    "a directory removed under a transaction": (
        Ask("dom0", write(b"/t/a", b"")),
        start("dom0"),
        Ask("dom0", write(b"/t/a/b", b"1"), tx="t"),
        Ask("second", rm(b"/t/a")),
        end("dom0", Differs[Reply](EAGAIN, OK)),
        Ask("dom0", read(b"/t/a/b"), Differs[Reply](ENOENT, b"1")),
    ),
    "a tree that changes while a transaction removes it": (
        Ask("dom0", write(b"/t/a/b", b"")),
        start("dom0"),
        Ask("dom0", rm(b"/t/a"), tx="t"),
        Ask("second", write(b"/t/a/c", b"")),
        end("dom0", Differs[Reply](EAGAIN, OK)),
        Ask("dom0", directory(b"/t"), Differs(names("a"), b"")),
    ),
    "a child created again in a list that a transaction has copied before": (
        Ask("dom0", write(b"/t/a", b"")),
        Ask("dom0", write(b"/t/b", b"")),
        start("dom0"),
        Ask("dom0", directory(b"/t"), names("a", "b"), tx="t"),
        Ask("second", rm(b"/t/a")),
        Ask("dom0", write(b"/t/a", b""), tx="t"),
        Ask("dom0", directory(b"/t"), Differs(names("a", "b", "a"), names("a", "b")), tx="t"),
        Ask("dom0", rm(b"/t/a"), tx="t"),
        Ask("dom0", directory(b"/t"), Differs(names("b", "a"), names("b")), tx="t"),
        Ask("dom0", rm(b"/t"), Differs[Reply](Error("EIO"), OK), tx="t"),
        end("dom0", EAGAIN),
    ),
    "changes elsewhere do not conflict": (
        Ask("dom0", write(b"/t/a", b"0")),
        Ask("dom0", write(b"/u/b", b"0")),
        start("dom0"),
        Ask("dom0", write(b"/t/a", b"1"), tx="t"),
        Ask("second", write(b"/u/b", b"2")),
        Ask("second", write(b"/u/c", b"2")),
        end("dom0"),
        Ask("dom0", read(b"/t/a"), b"1"),
        Ask("dom0", read(b"/u/b"), b"2"),
    ),
    "the events of a transaction": (
        Ask("second", watch(b"/t", b"t")),
        told("second", ("/t", "t")),
        start("dom0"),
        Ask("dom0", write(b"/t/a", b"1"), tx="t"),
        Ask("dom0", write(b"/t/b", b"1"), tx="t"),
        Ask("dom0", write(b"/t/a", b"2"), tx="t"),
        told("second"),
        end("dom0"),
        Told(
            "second",
            Differs(
                (("/t/a", "t"), ("/t/b", "t")),
                (("/t/a", "t"), ("/t/b", "t"), ("/t/a", "t")),
            ),
        ),
    ),
    "a tree removed in a transaction": (
        Ask("dom0", write(b"/t/a/b", b"")),
        Ask("second", watch(b"/t/a/b", b"b")),
        Ask("second", watch(b"/t", b"t")),
        told("second", ("/t/a/b", "b"), ("/t", "t")),
        start("dom0"),
        Ask("dom0", rm(b"/t/a"), tx="t"),
        Ask("dom0", directory(b"/t"), b"", tx="t"),
        Ask("dom0", directory(b"/t"), names("a")),
        end("dom0"),
        Told(
            "second",
            Differs((("/t/a", "t"), ("/t/a/b", "b")), (("/t/a", "t"), ("/t/a/b", "b"))),
        ),
        Ask("dom0", directory(b"/t"), b""),
    ),
    "made and removed in one transaction": (
        Ask("dom0", mkdir(b"/t")),
        Ask("second", watch(b"/t", b"t")),
        told("second", ("/t", "t")),
        start("dom0"),
        Ask("dom0", write(b"/t/a", b""), tx="t"),
        Ask("dom0", rm(b"/t/a"), tx="t"),
        end("dom0"),
        Ask("dom0", directory(b"/t"), b""),
        Told("second", Differs((), (("/t/a", "t"), ("/t/a", "t")))),
    ),
    # -- quotas
    "a guest's nodes": (
        Many("dom0", children(b"/local/domain/7/data", 399)),
        Many("dom0", tuple(mkdir(b"/local/domain/7/data/0000/%d" % n) for n in range(400))),
        Many("dom0", tuple(mkdir(b"/local/domain/7/data/0001/%d" % n) for n in range(199))),
        Ask("guest", mkdir(b"data/0002/last"), changed(OK, ENOSPC, ONE_LESS, (4, 22))),
        Ask("guest", mkdir(b"data/0002/more"), FULL),
        Ask("dom0", mkdir(b"/local/domain/7/data/0002/dom0"), Differs[Reply](OK, OK)),
        Ask("guest", rm(b"data/0002")),
        Ask("guest", mkdir(b"data/0003/more")),
    ),
    "the names of a guest's children": (
        Many("guest", children(b"data", 403)),
        Ask(
            "guest",
            mkdir(b"data/xxxx"),
            Differs[Reply](ENOSPC, OK, {(4, 20): (OK, SMALLER_RECORD)}),
        ),
        Ask("guest", mkdir(b"data/xxxy"), Differs[Reply](ENOSPC, OK)),
        Ask("guest", rm(b"data/0000")),
        Ask("guest", mkdir(b"data/yyyy")),
    ),
    "a guest's watches": (
        Many("guest", tuple(watch(b"data", b"%d" % n) for n in range(101))),
        Told("guest", tuple(("data", str(n)) for n in range(101))),
        Ask("guest", watch(b"data", b"one more"), Differs[Reply](OK, EQUOTA)),
        Told("guest", Differs((("data", "one more"),), ())),
    ),
    "a guest's watches, as many as the C daemon allows": (
        Many("guest", tuple(watch(b"data", b"%d" % n) for n in range(100))),
        Told("guest", tuple(("data", str(n)) for n in range(100))),
        *(
            Ask(
                "guest",
                watch(b"data", b"x%d" % n),
                Differs[Reply](
                    OK,
                    EQUOTA if n else OK,
                    {(4, 22): (ENOSPC if n >= 27 else OK, ONE_LESS)},
                ),
            )
            for n in range(29)
        ),
        Told(
            "guest",
            Differs(
                tuple(("data", f"x{n}") for n in range(29)),
                (("data", "x0"),),
                {(4, 22): (tuple(("data", f"x{n}") for n in range(27)), ONE_LESS)},
            ),
        ),
        Ask(
            "guest",
            watch(b"data", b"y"),
            Differs[Reply](E2BIG, EQUOTA, {(4, 22): (ENOSPC, FULL_ERROR)}),
        ),
        Ask("guest", unwatch(b"data", b"0")),
        Ask("guest", watch(b"data", b"y")),
        told("guest", ("data", "y")),
    ),
    "a guest's transactions": (
        *(start("guest", f"t{n}") for n in range(9)),
        *(
            replace(start("guest", f"t{n}"), reply=changed(OK, ENOSPC, ONE_LESS, (4, 22)))
            for n in (9, 10)
        ),
        Ask("guest", protocol.transaction_start(), FULL),
        end("guest", name="t0"),
        start("guest", "again"),
        Ask("guest", protocol.transaction_start(), FULL),
    ),
    "a guest's nodes in a transaction": (
        start("guest"),
        Many(
            "guest",
            tuple(read(b"data/%d" % n) for n in range(1022)),
            Error("ENOENT"),
            tx="t",
        ),
        Ask("guest", read(b"data/last"), changed(ENOENT, ENOSPC, ONE_LESS, (4, 22)), tx="t"),
        Ask("guest", read(b"data/more"), Differs[Reply](ENOSPC, ENOENT), tx="t"),
        Ask("guest", read(b"data/yet/more"), FULL, tx="t"),
        end("guest", Differs(Error("ENOMEM"), EQUOTA)),
    ),
    # -- domains
    "special watches": (
        Ask("dom0", watch(b"@introduceDomain", b"i")),
        Ask("dom0", watch(b"@releaseDomain", b"r")),
        Ask("guest", watch(b"@introduceDomain", b"i")),
        Ask("guest", watch(b"@releaseDomain", b"r")),
        told("dom0", ("@introduceDomain", "i"), ("@releaseDomain", "r")),
        told("guest", ("@introduceDomain", "i"), ("@releaseDomain", "r")),
        Create(9),
        told("dom0", ("@introduceDomain", "i")),
        told("guest"),
        Destroy(9),
        told("dom0", ("@releaseDomain", "r")),
        Told("guest", Differs[tuple[Event, ...]]((), (), {(4, 22): (RELEASED, ALL_DOMAINS)})),
        Ask("dom0", set_perms(b"@releaseDomain", "n0 r7")),
        Told("dom0", Differs[tuple[Event, ...]]((), (), {(4, 20): (RELEASED, PERMS_FIRE)})),
        Told("guest", Differs[tuple[Event, ...]]((), (), {(4, 20): (RELEASED, PERMS_FIRE)})),
        Create(9),
        told("dom0", ("@introduceDomain", "i")),
        told("guest"),
        Destroy(9),
        told("dom0", ("@releaseDomain", "r")),
        told("guest", ("@releaseDomain", "r")),
    ),
    "the end of a domain": (
        Create(9),
        *node(b"/a", "n0"),
        *node(b"/a/x", "n9 r7"),
        Ask("dom0", mkdir(b"/a/x/y")),
        *node(b"/a/x/y/z", "n0"),
        *node(b"/b", "n9"),
        *node(b"/c", "n0 r9", b"v"),
        Ask("second", watch(b"/a", b"a")),
        Ask("second", watch(b"/a/x/y", b"y")),
        Ask("second", watch(b"/b", b"b")),
        Ask("second", watch(b"@releaseDomain", b"r")),
        told("second", ("/a", "a"), ("/a/x/y", "y"), ("/b", "b"), ("@releaseDomain", "r")),
        Destroy(9),
        Told(
            "second",
            Differs(
                (("/a/x/y", "y"), ("/a/x", "a"), ("/b", "b"), ("@releaseDomain", "r")),
                (("@releaseDomain", "r"),),
            ),
        ),
        Ask("dom0", directory(b"/a"), b""),
        Ask("dom0", read(b"/b"), ENOENT),
        Ask("dom0", read(b"/c"), b"v"),
        Ask(
            "dom0",
            get_perms(b"/c"),
            Differs(names("n0", "r9"), names("n0"), {(4, 22): (names("n0"), DEAD_DOMAINS)}),
        ),
        Ask("dom0", protocol.is_domain_introduced(9), b"F\0"),
    ),
    "a new domain does not inherit the permissions of its predecessor": (
        Ask("dom0", write(b"/elsewhere", b"")),
        *node(b"/c", "n0 r8", b"v"),
        Ask("other", read(b"/c"), b"v"),
        Close("other"),
        Destroy(8),
        Ask("dom0", write(b"/elsewhere", b"")),
        Create(8),
        Ask("other", read(b"/c"), EACCES),
        Ask("dom0", write(b"/c", b"w")),
        Ask("other", read(b"/c"), EACCES),
        Ask(
            "dom0",
            get_perms(b"/c"),
            Differs(names("n0", "r8"), names("n0"), {(4, 22): (names("n0"), DEAD_DOMAINS)}),
        ),
        Ask("dom0", set_perms(b"/c", "n0 r8")),
        Ask("other", read(b"/c"), b"w"),
    ),
    "RELEASE and RESUME": (
        Ask("dom0", protocol.domain_request(Op.RESUME, 7)),
        Ask("dom0", protocol.domain_request(Op.RESUME, 99), Differs(ENOENT, EINVAL)),
        Ask("dom0", protocol.domain_request(Op.RELEASE, 99), Differs(ENOENT, EINVAL)),
        Ask("dom0", protocol.domain_request(Op.RELEASE, 0), Differs(EINVAL, ENOENT)),
        Ask("dom0", watch(b"@releaseDomain", b"r")),
        told("dom0", ("@releaseDomain", "r")),
        Ask("dom0", protocol.domain_request(Op.RELEASE, 8), Differs[Reply](OK, ENOENT)),
        Told("dom0", Differs((("@releaseDomain", "r"),), ())),
        Ask("dom0", protocol.is_domain_introduced(8), b"F\0"),
        Ask("dom0", read(b"/local/domain/8/data"), ENOENT),
    ),
    "INTRODUCE of an introduced domain": (
        Ask("dom0", watch(b"@introduceDomain", b"i")),
        told("dom0", ("@introduceDomain", "i")),
        Ask("dom0", protocol.domain_request(Op.INTRODUCE, 7, 4103, 1)),
        told("dom0"),
    ),
}
