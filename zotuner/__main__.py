"""`python -m zotuner`."""

import sys

from zotuner.cli import main

sys.exit(main())
