#!/usr/bin/python3
"""The command of the Debian package, with the pyfuse3 that came with it, if one did."""

import sys

sys.path.insert(0, "/usr/lib/xsfs")

from xsfs.cli.main import main

sys.exit(main())
