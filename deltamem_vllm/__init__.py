# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""deltamem: a vLLM server that holds far more context in the same KV memory.

Importing this package imports neither torch nor vLLM; the plugin entry points do, when vLLM calls them.
"""

__version__ = "0.1.0"
