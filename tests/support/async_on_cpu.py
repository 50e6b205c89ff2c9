# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Lets vLLM's asynchronous scheduler and model runner V2 run on a machine without a GPU, for tests only."""

from __future__ import annotations

from typing import Any


class _Event:
    """A device event on a device that has finished everything already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait(self, *args: Any, **kwargs: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    """A stream whose work is done when it is issued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def wait_stream(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_event(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, *args: Any, **kwargs: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None:
        pass


def force_async_scheduling() -> None:
    """Undo the CPU platform's decision against asynchronous scheduling.

    The platform decides after arguments were validated, so the scheduler class has to follow here. CPU work
    is done in the order it is issued, like work on one device stream, so the order of events is that of a
    GPU.
    """
    import torch
    from vllm.platforms.cpu import CpuPlatform

    decide = CpuPlatform.check_and_update_config.__func__

    def decide_for_async(cls: type, vllm_config: Any) -> None:
        decide(cls, vllm_config)
        scheduler = vllm_config.scheduler_config
        scheduler.async_scheduling = True
        if isinstance(scheduler.scheduler_cls, str):
            scheduler.scheduler_cls = scheduler.scheduler_cls.replace(".DeltaMemScheduler", ".DeltaMemAsyncScheduler")
        elif scheduler.scheduler_cls is not None and scheduler.scheduler_cls.__name__ == "DeltaMemScheduler":
            from deltamem_vllm.integration.scheduler import DeltaMemAsyncScheduler

            scheduler.scheduler_cls = DeltaMemAsyncScheduler

    CpuPlatform.check_and_update_config = classmethod(decide_for_async)
    torch.Event = torch.cuda.Event = _Event
    torch.cuda.Stream = _Stream
    torch.cuda.stream = torch.cuda.current_stream = lambda *args, **kwargs: _Stream()
    torch.accelerator.current_stream = lambda *args, **kwargs: _Stream()
