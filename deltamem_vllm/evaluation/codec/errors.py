# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What can go wrong while codecs are measured."""

from __future__ import annotations


class CodecError(ValueError):
    """A setting or a model that cannot be measured: what was given, what is allowed, how to fix it."""
