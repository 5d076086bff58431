"""`python -m mmadapt` is the `mmadapt` command."""

import sys

from mmadapt.cli import main

sys.exit(main())
