"""These take minutes, and are run by scripts/smoke.sh only."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    if "smoke" not in config.option.markexpr:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="scripts/smoke.sh runs these"))
