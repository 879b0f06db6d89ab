"""Check xsfs on real Xen: `python -m tests.system.xen [CONFIGURATION...] [-- ARGUMENT OF PYTEST...]`.

Builds the lab's image where it is missing ($XSFS_XEN_CACHE, default /var/cache/xsfs-xen: 1 GB), boots
each configuration, and prints what its checks say.  Without any it runs all.  See
docs/dev/real-xen.md.
"""

from __future__ import annotations

import argparse
import signal
import sys

from tests.system.xen.lab import CONFIGURATIONS, LabError, build, printer, run


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no machine is left running
    arguments = sys.argv[1:]
    for_pytest: list[str] = []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, for_pytest = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(prog="python -m tests.system.xen", description=__doc__)
    parser.add_argument("configuration", nargs="*", help=", ".join(CONFIGURATIONS))
    names = parser.parse_args(arguments).configuration or list(CONFIGURATIONS)
    if unknown := set(names) - set(CONFIGURATIONS):
        parser.error(f"no such configuration: {', '.join(sorted(unknown))}")
    try:
        build()
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    good = True
    for name in names:
        outcome = run(CONFIGURATIONS[name], printer(name), for_pytest)
        print(f"{name}: {outcome}", flush=True)
        good = good and outcome.good
    return 0 if good else 1


sys.exit(main())
