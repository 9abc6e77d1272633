"""Hides matplotlib from the interpreters that launchers' tests start: drawing takes longer than their runs."""

import sys

sys.modules["matplotlib"] = None  # type: ignore[assignment]
