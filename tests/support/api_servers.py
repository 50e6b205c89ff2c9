# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Play two API servers that hear different steps of two engines; print what `/metrics` shows.

A script of its own, because prometheus_client decides at import whether values live in files
(PROMETHEUS_MULTIPROC_DIR). Reads the servers' shares from standard input:
`[[engine, {carrier}], ...]` for each server. Prints one scrape after each server has heard its share and
one more, taken when the second server has started but heard nothing yet: `[scrape, late_start, scrape]`.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from types import SimpleNamespace

from prometheus_client import generate_latest
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.prometheus import get_prometheus_registry
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from deltamem_vllm.integration.metrics import DeltaMemStatLogger

CONFIG = {"mode": "always", "keep_ratio": 0.25, "scorer": "delta"}


def serve(share: list[tuple[int, dict[str, int]]], results: Connection) -> None:
    """Be one API server from start to end."""
    vllm_config = SimpleNamespace(
        additional_config={"deltamem": CONFIG}, model_config=SimpleNamespace(served_model_name="tiny")
    )
    logger = DeltaMemStatLogger(vllm_config=vllm_config, engine_indexes=[0, 1])
    results.send(scrape())
    for engine, carried in share:
        sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(num_kv_fetch_reqs_by_stage=carried))
        heard = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent))
        logger.record(scheduler_stats=heard.scheduler_stats, iteration_stats=None, engine_idx=engine)
    results.send(scrape())


def scrape() -> str:
    """Return what vLLM's /metrics route would answer."""
    return generate_latest(get_prometheus_registry()).decode()


def main() -> None:
    """Run the servers one after the other; their files stay, as those of live processes do."""
    scrapes = []
    fork = multiprocessing.get_context("fork")  # one import of vLLM for both
    for share in json.load(sys.stdin):
        receiver, sender = fork.Pipe(duplex=False)
        server = fork.Process(target=serve, args=(share, sender))
        server.start()
        scrapes += [receiver.recv(), receiver.recv()]
        server.join()
        if server.exitcode:
            raise SystemExit(f"server exited with {server.exitcode}")
    json.dump(scrapes[1:], sys.stdout)


if __name__ == "__main__":
    main()
