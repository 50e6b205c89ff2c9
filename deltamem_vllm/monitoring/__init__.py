# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What is watched in production, as data: panels, recording rules and alerts over `telemetry.METRICS`.

`scripts/monitoring.py` writes the Grafana dashboard, the Prometheus files and the tables of
`docs/guides/monitoring.md` from it. Nothing here imports vLLM or runs in a server.
"""
