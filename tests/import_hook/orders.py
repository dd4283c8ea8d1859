"""Each kind of hook before ours, behind it, and on both sides: how often places are joined, whether it took part."""

import importlib
import itertools
import json
import sys

from hooks import Hook
from support import joins

from yolov12 import autopatch

stock_path, found = list(sys.meta_path), {}
for asks, wraps, place in itertools.product(
    ("others", "behind", "util"),
    ("nothing", "attribute", "loader", "proxy", "fixed"),
    ("before", "behind", "both", "two before"),
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
        del sys.modules[name]
    first, second = hooks = Hook(asks, wraps), Hook(asks, wraps)
    sys.meta_path[:] = [finder for finder in stock_path if type(finder).__name__ != "_Finder"]
    if place in ("behind", "both"):
        sys.meta_path.insert(0, second)
    autopatch.install()
    if place != "behind":
        sys.meta_path.insert(0, first)
    if place == "two before":
        sys.meta_path.insert(0, second)
    try:
        counts = joins()
        for name in ("ultralytics.cfg", "ultralytics.engine.model"):
            importlib.reload(sys.modules[name])
        counts += joins()
    except Exception as error:
        counts = repr(error)
    ran = wraps == "nothing" or all("ultralytics.cfg" in hook.ran for hook in hooks if hook in sys.meta_path)
    found[f"asks {asks}, wraps {wraps}, stands {place}"] = [counts, ran]
print(json.dumps(found))
