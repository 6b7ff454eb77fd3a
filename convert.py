"""python convert.py mlx SOURCE OUT: see --help."""

from mlx_ttt.cli import convert

if __name__ == "__main__":
    convert()
