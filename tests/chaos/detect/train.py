"""The program, with every step written down."""

from detect_train import train
from tests.chaos.detect.config import parse
from tests.chaos.record import recorded

main = recorded(train.main, parse)
