"""Fine-tune a model on a task: `python finetune.py --help`."""

import sys

from zotuner.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
