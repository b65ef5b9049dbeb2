"""The program's own configuration."""

from ssl_train.config import Config, parse

__all__ = ["Config", "parse"]
