"""`python3 -m xsfs`."""

import sys

from xsfs.command import main

sys.exit(main())
