"""Endurance in docs/reference/measurements.md."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.endurance_neighbour import MOST
from scripts.figures.measured_steps import HOW, measured
from scripts.figures.pages import Passage, result, say, sentence, setting, table


@measured("Endurance")
def endurance() -> Iterator[Passage]:
    """Yield the passages on failed allocations, a neighbour and kills."""
    found = result("endurance")
    failures, beside, kills = (found[part] for part in ("failures", "neighbour", "kills"))
    yield setting("on two CPU cores", HOW)
    yield setting("batches of 8 or 16 images of 64 pixels, in BatchNorm groups of 2", HOW)
    exact, trainings, stock = (failures[name] for name in ("exact", "trainings", "stock"))
    rows = {
        "failures injected": "injected",
        "failures that the summaries of the runs count": "counted",
        "steps with a failure": "disturbed_steps",
        "operations of PyTorch in which they were": "operations",
        "updates": "updates",
        "updates wanted": "updates_expected",
        "images trained on": "images",
        "images lost": "images_lost",
        "runs that ended": "runs_that_ended",
    }
    header = "| | steps of the engine, float64 | trainings with Ultralytics' trainer, fp32 |"
    yield table(
        header, [[name, *(say("{:,}", each[key]) for each in (exact, trainings))] for name, key in rows.items()]
    )
    yield sentence(
        "Rounds of {} steps compared with those without failures: {}. The weights end where those end, to {:.0e}",
        *(exact["steps_of_a_round"], exact["rounds_compared"], exact["largest_difference_of_weights"]),
    )
    yield sentence("Of {} trainings of stock Ultralytics with one failure each", stock["runs"])
    assert stock["injected"] == stock["runs"]
    yield sentence("{} ended with it", stock["runs_that_ended"])
    yield sentence("{:,} of {:,} images were not trained on", stock["images_not_trained"], stock["images_wanted"])
    ours = beside["ours"]
    assert ours["simulated"]
    yield setting("a simulated card of 16 GiB, on which an image takes 254 MiB and 9 ms", "the simulation")
    yield sentence("up to {:.0f} % of it, another amount every 1 to 5 s of its clock", 100 * MOST)
    yield setting("another amount every 1 to 5 s of its clock", "the simulation")
    yield sentence("In {:.0f} hours of that clock there are {:,} changes", ours["hours"], ours["changes"])
    yield sentence("The engine made {:,} of {:,} updates of 256 images", ours["updates"], ours["steps"])
    yield setting("updates of 256 images", HOW)
    yield sentence(
        "{:,} allocations failed, {} images were lost, and {} steps were given up",
        *(ours[name] for name in ("out_of_memories", "images_lost", "interruptions")),
    )
    yield sentence("Micro-batches had {} to {} images", ours["micro_batch_min"], ours["micro_batch_max"])
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
