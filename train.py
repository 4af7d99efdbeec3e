"""Runs a recipe: ``python train.py recipe=int8_prune50``; ``python train.py --help`` shows the
settings.
"""

from qat_tricks.cli.main import train

if __name__ == "__main__":
    train()
