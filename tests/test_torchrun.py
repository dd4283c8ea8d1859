"""`python -m yolov12.torchrun` tells a wrong argument, a failure and a signal apart, as PyTorch's own does not."""

import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import yolov12
from yolov12 import torchrun

LAUNCHER = Path(yolov12.__file__).parent / "torchrun.py"
# Ranks share a pipe, and with `python -u`, which starts them, `print` writes the end of a line by itself.
STATUS = (
    "import os, sys, time; sys.stdout.write(f\"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}\\n\"); "
    "status = sys.argv[1 + int(os.environ['RANK'])]; "
    "time.sleep(3600) if status == 'stays' else sys.exit(int(status))"
)
WAITS = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    "sys.stdout.write('started\\n'); time.sleep(3600)"
)


@pytest.fixture
def launch(start_script, reserve_port, tmp_path):
    """Start a launcher; the ranks run a script, or the words that follow `-m`."""

    def start(*words, script=None, restarts=0):
        options = ["--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.05"]
        if script:
            (tmp_path / "rank.py").write_text(script)
            words = (tmp_path / "rank.py", *words)
        # A forked process has no executable of its own that torchrun could find.
        environment = {"PYTHON_EXEC": sys.executable, "PYTHONPATH": str(LAUNCHER.parents[1])}
        return start_script(LAUNCHER, *options, f"--master-port={reserve_port()}", *words, **environment)

    return start


@pytest.mark.parametrize(
    ("ranks", "status", "attempts"),
    [((2, "stays"), 2, {"0"}), ((1, 1), 1, {"0", "1"}), ((0, 0), 0, {"0"})],
    ids=["refused", "failed", "good"],
)
def test_only_a_failure_is_tried_again(launch, ranks, status, attempts):
    run = launch(*ranks, script=STATUS, restarts=1)
    output, _ = run.communicate()
    assert (run.returncode, set(re.findall(r"attempt (\d)", output))) == (status, attempts), output


def test_one_rank_that_refuses_is_enough():
    """The launcher looks now and then, and may find that one rank has refused and others have failed."""
    statuses = {(2, 1): True, (1, 2): True, (1, 1): False, (-15, 2): True, (): False}
    for found, refused in statuses.items():
        failures = {rank: SimpleNamespace(exitcode=status) for rank, status in enumerate(found)}
        assert torchrun._has_refused(failures) is refused


def test_a_signal_is_handed_on_and_has_its_status(launch):
    run = launch(script=WAITS)
    lines = []
    while lines.count("started\n") < 2:
        lines.append(run.stdout.readline())
        assert lines[-1], lines
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate()
    assert run.returncode == 128 + signal.SIGTERM, output


def test_the_command_of_the_manifests_refuses_its_arguments_once(launch):
    run = launch("-m", "yolov12", "trian", restarts=100)
    output, _ = run.communicate()
    assert run.returncode == 2, output
    assert 1 <= output.count("unknown command 'trian'") <= 2  # the other rank may be ended before it says so
