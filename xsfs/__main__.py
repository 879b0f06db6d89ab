"""`python3 -m xsfs`."""

import sys

from xsfs.cli.main import main

sys.exit(main())
