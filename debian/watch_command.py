#!/usr/bin/python3
"""The command xsfs-watch of the Debian package."""

import sys

from xsfs.cli.watch import main

sys.exit(main())
