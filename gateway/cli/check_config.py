"""`gateway check-config`"""

from __future__ import annotations

import argparse

from gateway.cli.common import settings_from


def run(options: argparse.Namespace) -> int:
    from gateway.price_table import PriceTable  # read only where somebody asks

    settings = settings_from(options)
    print(settings.describe().rstrip())
    table = PriceTable.load()
    print(f"# prices not written here: {table.source}, made {table.made_on}")
    for note in settings.notes:
        print(f"# note: {note}")
    return 0
