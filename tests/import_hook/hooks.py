"""Import hooks as others write them: how they look for a module, and how they take part when it runs."""

import importlib.machinery
import importlib.util
import sys


class Hook:
    """Guards against being asked while it asks, as hooks that chain have to."""

    def __init__(self, asks, wraps):
        self.asks, self.wraps, self.busy, self.ran = asks, wraps, set(), []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "ultralytics" or name in self.busy:
            return None
        self.busy.add(name)
        try:
            spec = self.search(name, path, target)
        finally:
            self.busy.discard(name)
        if spec is not None:
            self.take_part(spec)
        return spec

    def search(self, name, path, target):
        if self.asks == "util":
            return importlib.util.find_spec(name)
        if self.asks == "PathFinder":
            return importlib.machinery.PathFinder.find_spec(name, path, target)
        start = sys.meta_path.index(self) + 1 if self.asks == "behind" else 0
        others = [finder for finder in sys.meta_path[start:] if finder is not self]
        return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)

    def take_part(self, spec):
        ran, inner = self.ran, spec.loader

        def exec_module(module, execute=inner.exec_module):
            ran.append(module.__name__)
            execute(module)

        class Loader:
            def create_module(self, spec):
                return inner.create_module(spec)

            def exec_module(self, module):
                exec_module(module)

        class Proxy(Loader):
            def __getattr__(self, name):
                return getattr(inner, name)

        class Fixed:
            __slots__ = ()
            create_module, exec_module = Loader.create_module, Loader.exec_module

        if self.wraps == "attribute":
            inner.exec_module = exec_module
        elif self.wraps != "nothing":
            spec.loader = {"loader": Loader, "proxy": Proxy, "fixed": Fixed}[self.wraps]()


class Delegate:
    """Has no guard of its own, and asks all others."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] != "ultralytics":
            return None
        self.asked.append(name)
        others = [finder for finder in sys.meta_path if finder is not self]
        return next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)


class Shared:
    """One loader for all modules, as `zipimport` has it."""

    def __init__(self):
        self.inner = {}

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and name.startswith(("ultralytics", "colorsys")):
            self.inner[name], spec.loader = spec.loader, self
            return spec
        return None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        self.inner[module.__name__].exec_module(module)
