"""The import hook among others: however many there are and in whichever order, each module is joined exactly once.

A small package stands in for Ultralytics, with places of the same names: sixty orders of hooks take two seconds.
"""

import json
import shutil
import textwrap
from pathlib import Path

import pytest

HERE = Path(__file__).parent

STAND_IN = {
    "__init__.py": "",
    "utils/__init__.py": """
        import logging
        from types import SimpleNamespace
        __version__ = "8.4.190"
        LOGGER = logging.getLogger(__name__)
        DEFAULT_CFG_DICT, DEFAULT_CFG = {}, SimpleNamespace()
    """,
    "cfg/__init__.py": """
        import gate
        CFG_BOOL_KEYS = frozenset()
        gate.pass_through()
        def get_cfg(cfg=None, overrides=None):
            return "stock"
        def get_save_dir(args, name=None):
            return "stock"
        gate.at_the_end()
    """,
    "engine/__init__.py": "",
    "engine/model.py": """
        from ultralytics.cfg import get_cfg
        class Model:
            def train(self, trainer=None, **kwargs):
                return "stock"
            def save(self, filename="saved_model.pt"):
                return "stock"
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the stand-in, and with what scripts beside it use."""
    root = tmp_path_factory.mktemp("hooks")
    for name, text in STAND_IN.items():
        file = root / "ultralytics" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    for name in ("support.py", "hooks.py"):
        shutil.copy(HERE / name, root)
    return root


@pytest.fixture
def run(run_python, folder):
    """Run a script beside the stand-in; what it prints last."""

    def run(script: str, **environment: str) -> str:
        file = folder / "script.py"
        file.write_text("import os, sys\nfrom support import *\nfrom hooks import *\n" + textwrap.dedent(script))
        done = run_python(str(file), **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    return run


def test_whatever_stands_before_or_behind_modules_are_joined_once(run):
    found = json.loads(run((HERE / "orders.py").read_text()))
    assert len(found) == 60
    assert {order: outcome for order, outcome in found.items() if outcome != [[1] * 6, True]} == {}


@pytest.mark.parametrize("place", [0, 1], ids=["front", "back"])
def test_a_finder_that_delegates_to_all_others_ends(run, place):
    """It is asked for each module once, too."""
    script = f"sys.meta_path.insert({place}, hook := Delegate()); print(joins(), hook.asked.count('ultralytics.cfg'))"
    assert run(script) == "[1, 1, 1] 1"


def test_a_second_copy_of_the_hook_is_no_second_hook(run):
    script = """
        import importlib
        from yolov12 import autopatch
        importlib.reload(autopatch).install()
        del sys.modules["yolov12.autopatch"]
        import yolov12.autopatch
        yolov12.autopatch.apply()
        print(joins())
    """
    assert run(script) == "[1, 1, 1]"


def test_a_loader_that_serves_many_modules_joins_only_ours(run):
    script = """
        sys.meta_path.insert(1, Shared())
        import importlib.util
        for _ in range(sys.getrecursionlimit()):
            importlib.util.find_spec("ultralytics.cfg")
        print(joins(), hasattr(__import__("colorsys"), "__yolov12_joined__"))
    """
    assert run(script) == "[1, 1, 1] False"


def test_a_module_that_another_hook_took_is_joined_with_the_next(run):
    script = """
        sys.meta_path.insert(0, hook := Hook("PathFinder", "nothing"))
        import ultralytics.cfg
        from ultralytics.cfg import get_cfg
        sys.meta_path.remove(hook)
        import ultralytics.engine.model
        print(joins())
    """
    assert run(script) == "[1, 1, 1]"


def test_what_others_took_is_joined_when_asked_for(run):
    script = """
        sys.meta_path.insert(0, Hook("PathFinder", "attribute"))
        before = joins()
        from yolov12 import autopatch
        for _ in range(2):
            autopatch.apply()
        print(before, joins())
    """
    assert run(script) == "[0, 0, 0] [1, 1, 1]"


def test_a_module_that_fails_is_joined_when_it_runs_again(run):
    script = """
        import importlib, ultralytics.cfg as cfg, ultralytics.engine.model as model
        gate.at_the_end = lambda: sys.exit("fails")
        try:
            importlib.reload(cfg)
        except SystemExit:
            del gate.at_the_end
        from yolov12 import autopatch
        autopatch.apply()
        first = joins()
        importlib.reload(cfg)
        importlib.reload(model)
        print(first, joins())
    """
    assert run(script) == "[1, 1, 1] [1, 1, 1]"


def test_threads_that_import_at_once(run):
    script = """
        import importlib
        names = ["ultralytics.cfg", "ultralytics.engine.model", "ultralytics.utils", "ultralytics"] * 4
        start, errors = threading.Barrier(len(names)), []
        def load(name):
            start.wait()
            try:
                importlib.import_module(name)
            except BaseException as error:
                errors.append(error)
        threads = [threading.Thread(target=load, args=[name]) for name in names]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(joins(), errors)
    """
    assert run(script) == "[1, 1, 1] []"


@pytest.mark.parametrize("switch", ["0", ""], ids=["stock until asked", "joined from the start"])
def test_asking_while_another_thread_is_in_the_middle_of_an_import(run, switch):
    script = """
        from yolov12 import autopatch
        gate.shut, errors = True, []
        def watched(function):
            def run():
                try:
                    function()
                except BaseException as error:
                    errors.append(repr(error))
            thread = threading.Thread(target=run)
            thread.start()
            return thread
        def load():
            import ultralytics.engine.model
        loading = watched(load)
        gate.reached.wait(60)
        asking = watched(autopatch.apply)
        asking.join(0.2)  # it waits for the other thread, or goes on without that module: either is in order
        gate.opened.set()
        loading.join()
        asking.join()
        print(joins(), errors)
    """
    assert run(script, YOLOV12_AUTOPATCH=switch) == "[1, 1, 1] []"


def test_asking_in_the_middle_of_an_import(run):
    """In the same thread, as where a module of the user's is imported by Ultralytics."""
    script = """
        from yolov12 import autopatch
        gate.pass_through = autopatch.apply
        print(joins())
    """
    assert run(script, YOLOV12_AUTOPATCH="0") == "[1, 1, 1]"


@pytest.mark.parametrize("switch", ["0", "false", "OFF"])
def test_switched_off_before_python_starts_or_in_it(run, switch):
    look = "import yolov12; print(joins(), 'yolov12.seams' in sys.modules)"
    ask = "from yolov12 import autopatch; autopatch.apply(); print(joins(), 'YOLOV12_AUTOPATCH' in os.environ)"
    in_it = f"os.environ['YOLOV12_AUTOPATCH'] = {switch!r}; {look}"
    assert run(look, YOLOV12_AUTOPATCH=switch) == run(in_it) == "[0, 0, 0] False"
    assert run(f"{look}; {ask}", YOLOV12_AUTOPATCH=switch) == run(f"{in_it}; {ask}") == "[1, 1, 1] False"


def test_the_switch_is_read_once(run):
    """What is imported later is joined as what was imported before, or not joined as that was not."""
    late = "; os.environ['YOLOV12_AUTOPATCH'] = {!r}; import ultralytics.engine.model; print(joins())"
    assert run("import ultralytics.cfg" + late.format("0")) == "[1, 1, 1]"
    off = "os.environ['YOLOV12_AUTOPATCH'] = '0'; import ultralytics.cfg"
    assert run(off + late.format("1")) == "[0, 0, 0]"
