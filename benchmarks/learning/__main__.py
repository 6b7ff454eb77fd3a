"""The figures of docs/learning.md.

    python -m benchmarks.learning carried --models tests/data/shakespeare-ttt-linear --texts heart-of-darkness.txt
    python -m benchmarks.learning play
    python -m benchmarks.learning freeze --texts tests/data/tempest.txt heart-of-darkness.txt

Writes a figure and prints its numbers. A text is a file in UTF-8. A model is a model directory, or a checkpoint, which
is converted first. `bundled` is the model that comes with the package.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .figures import FIGURES
from .reading import BUNDLED, Reader
from .style import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=FIGURES, help="; ".join(f"{n}: {f.__doc__}" for n, f in FIGURES.items()))
    parser.add_argument("--models", nargs="+", default=[BUNDLED], metavar="DIR", help="the bundled model by default")
    parser.add_argument("--texts", nargs="+", default=["tests/data/tempest.txt"], metavar="FILE")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FILE", help="an .svg or .png; docs/images/FIGURE.svg by default"
    )
    options = parser.parse_args()
    drawn, numbers = FIGURES[options.figure]([Reader(path) for path in options.models], options.texts)
    save(drawn, options.out or Path(f"docs/images/{options.figure}.svg"))
    print(numbers)


if __name__ == "__main__":
    main()
