# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is learned of a model once, offline: `deltamem calibrate` writes it, a server loads it at start.

`run` makes an artifact, `artifact` stores and finds it, `fingerprint` says whether it belongs to a model.
"""
