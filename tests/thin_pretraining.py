"""`ssl_train.train` with a ResNet that XLA compiles in seconds: `-m tests.thin_pretraining`."""

from __future__ import annotations

import torchvision

from ssl_train import train
from tests.thin_detector import Thin
from utils.errors import cli

if __name__ == "__main__":
    torchvision.models.get_model = Thin
    cli(train.main)
