"""What scripts beside the stand-in for Ultralytics use: a place to stop in the middle of an import, counted calls."""

import sys
import threading
import types


class Gate:
    """In the middle of `ultralytics.cfg`, and at its end."""

    shut, reached, opened = False, threading.Event(), threading.Event()

    def pass_through(self):
        if self.shut:
            self.reached.set()
            self.opened.wait(60)

    def at_the_end(self):
        pass


gate = sys.modules["gate"] = Gate()
calls = []


def stands_in(name, function):
    """Put a function that counts its calls in the place of one that is called around a stock function."""

    def called(stock, *args, **kwargs):
        calls.append(name)
        return stock(*args, **kwargs)

    sys.modules[name] = types.SimpleNamespace(**{function: called})


stands_in("yolov12.cfg.configuration", "get_cfg")
stands_in("yolov12.training.run.session", "train")


def joins():
    """How often each of three places is joined, found by calling it."""
    import ultralytics.cfg
    import ultralytics.engine.model as model

    counts = []
    for call in (ultralytics.cfg.get_cfg, model.get_cfg, model.Model().train):
        calls.clear()
        assert call() == "stock"
        counts.append(len(calls))
    return counts
