"""The program, with every step written down."""

from ssl_train import train
from tests.chaos.pretrain.config import parse
from tests.chaos.record import recorded

main = recorded(train.main, parse)
