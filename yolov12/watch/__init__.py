"""`yolov12 watch data=line.yaml inbox=folder model=best.pt` trains by itself when labelled images arrive.

data=line.yaml          the data set that the model was trained with; its images are replayed
inbox=folder            new images: name.jpg with name.txt, or in images/ and labels/; the names of their classes are in
                        classes.txt or data.yaml there, otherwise those of data=
model=best.pt           the serving model; a candidate that is promoted takes its place in one step
work=folder             collected images, history and state; by default NAME-watch beside the model
min_images=20           an attempt begins as soon as a class has this many new images
every=24h               an attempt begins after this time, too, if there are new images; default: never
margin=0.02             a candidate is promoted if the AP50-95 of no known class falls by more, and the mean of all
                        classes does not fall
val_fraction=0.2        fraction of the collected images that is for validation
export=onnx             export what was promoted, beside the model: onnx, engine or torchscript; default: no export
settle=10s              a file is complete if it has not changed for this time
poll=5s                 time between two looks at the inbox
restarts=5              a training that fails is started again this many times without a new step
--once                  end when nothing is left to do

All other arguments are those of the training, such as epochs=50 batch=128 imgsz=640 mem_limit=16GiB device=0: see
`yolov12 train --help`. `replay_fraction` is 0.3. The guide docs/guides/watch.md explains the folders.

Exit status: 0 after --once, if no attempt failed; 1 if another watch uses the folders, and after --once, if an attempt
or an export failed, a file had to stay in the inbox, the disk is full, or the data set or the inbox is away; 2 if an
argument, the data set or the model cannot be used; 143 after SIGTERM and 130 after Ctrl-C, which both let a training
save its state. The next start continues where this one ended, also after a kill or a power loss.
"""

from __future__ import annotations

__all__ = ["main"]


def main(args: list[str]) -> int:
    """Watch an inbox until the end of this process, or until nothing is left to do.

    Args:
        args: The words after `yolov12 watch`.

    Returns:
        The exit status.

    Raises:
        ConfigError: An argument is unknown, malformed or missing.
        DataError: The work folder is damaged.
        FolderInUseError: Another watch uses the work folder or the inbox.
    """
    from yolov12.watch.command import main as run

    return run(args)
