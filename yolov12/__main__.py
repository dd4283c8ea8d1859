"""`python -m yolov12 ...` is `yolov12 ...`, as `torchrun -m` needs it."""

import sys

from yolov12.cli import main

sys.exit(main())
