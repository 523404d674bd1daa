"""``python -m bench.plots RESULT.json DIR`` draws the figures of a run again."""

from __future__ import annotations

import sys
from pathlib import Path

from bench.plots import draw

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m bench.plots RESULT.json DIR")
    for path in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
