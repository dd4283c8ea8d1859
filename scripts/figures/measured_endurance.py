"""Endurance in docs/reference/measurements.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scripts.figures.measured_steps import HOW, measured
from scripts.figures.pages import Passage, result, say, sentence, setting, table


@measured("Endurance")
def endurance() -> Iterator[Passage]:
    """Yield the passages on failed allocations, a neighbour and kills."""
    found = result("endurance")
    parts = ("failures", "neighbour", "kills")
    failures, beside, kills = (found[part] for part in parts)
    yield setting("on two CPU cores", HOW)
    yield table(
        "| part | options |", [[part, f"`{_options(found, part)}`"] for part in ("failures", "neighbour", "kills")]
    )
    yield setting("batches of 8 or 16 images of 64 pixels, in BatchNorm groups of 2", HOW)
    exact, trainings, stock = (failures[name] for name in ("exact", "trainings", "stock"))
    rows = {
        "failures injected": "injected",
        "failures that the summaries of the runs count": "counted",
        "steps with a failure": "disturbed_steps",
        "updates": "updates",
        "updates wanted": "updates_expected",
        "images trained on": "images",
        "images lost": "images_lost",
        "runs that ended": "runs_that_ended",
    }
    header = "| | steps of the engine, float64 | trainings with Ultralytics' trainer, fp32 |"
    cells = [[name, *(say("{:,}", each[key]) for each in (exact, trainings))] for name, key in rows.items()]
    operations = [str(len(each["operations"])) for each in (exact, trainings)]
    yield table(header, [*cells, ["operations of PyTorch that failed", *operations]])
    assert exact["rounds_in_smaller_groups"] == 0
    yield sentence(
        "{} rounds of {} steps were compared with the same steps without failures. "
        "The final weights differ by at most {:.0e} of the distance that training moved them",
        *(exact["rounds_compared"], exact["steps_of_a_round"], exact["largest_difference_of_weights"]),
    )
    yield sentence("Of {} trainings of stock Ultralytics with one failure each", stock["runs"])
    assert stock["injected"] == stock["runs"]
    yield sentence("{} ended with it", stock["runs_that_ended"])
    yield sentence("{:,} of {:,} images were not trained on", stock["images_not_trained"], stock["images_wanted"])
    yield from _failures_on_gpu(exact, trainings)
    ours = beside["ours"]
    assert ours["simulated"]
    yield setting("a simulated card of 16 GiB, on which an image takes 254 MiB and 9 ms", "the simulation")
    yield sentence("up to {:.0f} % of it, and suddenly another amount", 100 * ours["most_of_card"])
    yield setting("every 1 to 5 s of its clock", "the simulation")
    yield sentence("In {:.0f} hours of that clock there are {:,} changes", ours["hours"], ours["changes"])
    yield sentence("The engine made {:,} of {:,} updates of 256 images", ours["updates"], ours["steps"])
    yield setting("updates of 256 images", HOW)
    yield sentence(
        "{:,} allocations failed, {} images were lost, and {} steps were given up",
        *(ours[name] for name in ("out_of_memories", "images_lost", "interruptions")),
    )
    assert ours["out_of_memories"] > ours["retries"] == 0, "the text says that all ran again in smaller micro-batches"
    yield sentence("Micro-batches had {} to {} images", ours["micro_batch_min"], ours["micro_batch_max"])
    on_gpu = result("endurance_gpu")
    run = on_gpu["neighbour"]["ours"]
    yield sentence("with `batch={}` beside", run["batch"])
    yield sentence("holds up to {:.0f} % of the card, another part after", 100 * run["most_of_card"])
    yield sentence("after each {:.3f} s", run["seconds_between_changes"])
    yield sentence("It made {} of {} updates, while", run["updates"], run["updates_expected"])
    yield sentence("process made {:,} changes", run["changes_made"])
    assert (run["out_of_memories"], run["images_lost"], run["exit_status"]) == (0, 0, 0)
    yield sentence("It ran {} to {} images at once", run["micro_batch_min"], run["micro_batch_max"])
    theirs, ours = kills["stock"], kills["ours"]
    yield sentence("A training has {} updates of 8 images in ten epochs", ours["updates_of_a_training"])
    yield setting("updates of 8 images", HOW)
    rows = {
        "kills": "kills",
        "trainings": "trainings",
        "trainings whose weights are bit-equal to those without kills": "bit_equal_weights",
        "images to train on": "images_wanted",
        "images computed again after a kill": "images_computed_again",
    }
    yield table(
        "| | ours | stock |", [[name, say("{:,}", ours[key]), say("{:,}", theirs[key])] for name, key in rows.items()]
    )
    yield sentence("the summaries of ours count {:,} images in the weights", ours["images_in_weights"])


def _failures_on_gpu(*on_cpu: Mapping[str, Any]) -> Iterator[Passage]:
    """Yield the passages on failed allocations on a GPU.

    Args:
        on_cpu: The same on the CPU.
    """
    found = result("endurance_gpu")
    exact, stock = (found["failures"][who] for who in ("exact", "stock"))
    head = found["measured_on"]["failures"]
    options = head["command"].removeprefix("python -m benchmarks endurance --out endurance_gpu.json ")
    yield sentence("torch 2.11.0, with `{}` at commit {}: steps", options, head["commit"])
    assert (exact["model"], exact["dtype"], exact["updates"]) == ("yolov12n.yaml", "float64", exact["updates_expected"])
    assert exact["injected"] == exact["counted"]
    assert not any(exact[key] for key in ("runs_that_ended", "rounds_in_smaller_groups", "images_lost"))
    yield setting("YOLOv12-N at 64 pixels, batches of 16 in BatchNorm groups of 2, in float64", HOW)
    yield sentence("{} failures were injected in {} of {} steps", *(exact[key] for key in _STEPS))
    yield sentence("All {} updates were made, with all {:,} images", exact["updates"], exact["images"])
    compared = (exact["rounds_compared"], exact["steps_of_a_round"], exact["largest_difference_of_weights"])
    yield sentence("In {} rounds of {} steps, the final weights end up to {:.2f} of the distance", *compared)
    moved = exact["difference_by_a_rounding_error"]
    assert moved > exact["largest_difference_of_weights"]
    yield sentence("one weight changed by a rounding error ends {:.2f} of that distance away", moved)
    yield sentence("One failed allocation ended {} of {} trainings of stock", stock["runs_that_ended"], stock["runs"])
    untrained = (stock[key] for key in ("images_not_trained", "images_wanted"))
    yield sentence("there: they did not train on {:,} of {:,} images", *untrained)
    later = result("endurance_more")
    more = [later["failures"][name] for name in ("exact", "trainings")]
    assert all(each["injected"] == each["counted"] for each in more)
    assert not any(each[key] for each in more for key in ("runs_that_ended", "rounds_in_smaller_groups", "images_lost"))
    parts = (on_cpu, more, (exact,))
    counts = [sum(each["injected"] for each in part) for part in parts]
    assert sum(counts) >= 10_000
    yield sentence("{:,} and {} on the CPU and {} on the GPU, {:,} together", *counts, sum(counts))
    small = [more[0][key] for key in ("largest_difference_of_weights", "difference_by_a_rounding_error")]
    yield sentence("{:.0e} in the second run there, in which the changed weight ends {:.0e} away", *small)
    options = later["measured_on"]["failures"]["command"].split(" --device cpu ")[1]
    yield sentence("the second run on the CPU, with `{}`, drew other failures", options)


_STEPS = ("injected", "disturbed_steps", "updates")


def _options(found: Mapping[str, Any], part: str) -> str:
    """Return the options of the run that measured a part."""
    command: str = found["measured_on"][part]["command"]
    before, options = command.split(" --device cpu ")
    assert before == "python -m benchmarks endurance --out endurance.json"
    return options
