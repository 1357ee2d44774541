"""The numbers that flags take: counts and shares, and how a bad one is refused.

Knows nothing about what they are counts and shares of.
"""

import argparse
import math


def count(text: str) -> int:
    """A whole number, at least 1. Raises argparse.ArgumentTypeError."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} must be a whole number, at least 1")
    return int(text)


def share(text: str) -> float:
    """A number above 0 and at most 1. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} must be a share above 0 and at most 1, such as 0.5")
    return value
