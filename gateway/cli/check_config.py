"""`gateway check-config`"""

from __future__ import annotations

import argparse

from gateway.cli.common import settings_from


def run(options: argparse.Namespace) -> int:
    settings = settings_from(options)
    print(settings.describe().rstrip())
    for note in settings.notes:
        print(f"# note: {note}")
    return 0
