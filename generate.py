"""python generate.py --prompt TEXT: see --help."""

from mlx_ttt.cli import generate

if __name__ == "__main__":
    generate()
