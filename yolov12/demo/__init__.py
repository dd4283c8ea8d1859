"""The embedded data set `data=demo`: images of an electronics inspection line, drawn on first use.

>>> ensure("demo:images=400,seed=1", Path("datasets"))      # doctest: +SKIP
PosixPath('datasets/yolov12-demo-v2-400-320-s1-val0.2/data.yaml')
"""

from yolov12.demo.dataset import DemoSpec, ensure, is_demo, parse

__all__ = ["DemoSpec", "ensure", "is_demo", "parse"]
