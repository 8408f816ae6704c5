"""Meta-train a tuner for a base model: `python meta_train.py --help`."""

import sys

from zotuner.cli import main

if __name__ == "__main__":
    sys.exit(main(["meta-train", *sys.argv[1:]]))
