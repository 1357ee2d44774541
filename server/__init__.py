"""Graftserve: many adapters of any method at once on one quantized base model."""

__version__ = "0.1.0"
