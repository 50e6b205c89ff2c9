# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""`deltamem codec`: what coding cold tokens loses on a real model, by reference and number of bits."""
