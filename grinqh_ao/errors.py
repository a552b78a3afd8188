"""Errors to be told from those of a wrong argument."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A saved model's files are not what they claim to be; the message names file and tensor."""


class ModelNotFoundError(ValueError):
    """There is no such model."""
