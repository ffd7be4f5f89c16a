"""``python -m crem.cli``."""

from __future__ import annotations

import sys

from crem.cli import main

sys.exit(main())
