"""The program's own configuration."""

from detect_train.config import Config, parse

__all__ = ["Config", "parse"]
