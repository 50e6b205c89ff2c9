# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What can go wrong while an embedded model is prepared; every message says how to go on."""

from __future__ import annotations


class ModelError(RuntimeError):
    """An embedded model cannot be provided. The message is meant for the user as it is."""


class UnknownModel(ModelError):
    """The name is not one of the embedded models."""


class SourceMissing(ModelError):
    """A Python package with the weights, or one needed to read them, is not installed."""


class SourceChanged(ModelError):
    """The weights found are not the ones this version of deltamem was tested with."""


class CacheDamaged(ModelError):
    """A finished cache entry no longer matches its own manifest."""


class CacheBusy(ModelError):
    """Another process has been preparing the same model for too long."""


class NoSpace(ModelError):
    """The cache's file system is too full for the converted model."""
