# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""From the user's flags to vLLM's configuration.

The flags end in ``additional_config["deltamem"]``, where the offline API puts it, so that every process that
gets the parsed arguments or the ``VllmConfig`` knows the policy. `create_engine_config` is the one gate
behind which everything starts: versions, ledger, configuration and refusals are checked there, before a
worker exists.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.utils.import_utils import resolve_obj_by_qualname

from deltamem_vllm import __version__
from deltamem_vllm.config import CONFIG_KEY, ConfigError, DeltaMemConfig, is_active
from deltamem_vllm.integration import cli_args, ledger, logs
from deltamem_vllm.versions import check_vllm_version

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs

logger = logging.getLogger(__name__)

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_SCHEDULER = "deltamem_vllm.integration.scheduler"
_WORKER = "deltamem_vllm.integration.worker"

CPU_PAGE_TOKENS = 32
"""Block size on a CPU unless one is given: the smallest its kernels take. Heads are dealt whole pages, and vLLM's own
default of 128 tokens would leave most heads of a short prompt with one."""


def install() -> None:
    """Teach ``EngineArgs`` our flags. Safe to call again; changes nothing for who does not use them."""
    ledger.apply(f"{_ARGS}.add_cli_args", _make_add_cli_args)
    ledger.apply(f"{_ARGS}.from_cli_args", _make_from_cli_args)
    ledger.apply(f"{_ARGS}.create_engine_config", _make_create_engine_config)


def _make_add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        cli_args.add_flags(parser)
        return parser

    return add_cli_args


def _make_from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def from_cli_args(cls: Any, args: Any, *rest: Any, **kwargs: Any) -> Any:
        # Parsed arguments were already folded; a namespace made by hand was not.
        cli_args.fold(args)
        return original(cls, args, *rest, **kwargs)

    return from_cli_args


def _make_create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
        if not is_active(self.additional_config):
            _watch_requests(required=False)
            vllm_config: VllmConfig = original(self, *args, **kwargs)
            return vllm_config
        config = _prepare(self)
        vllm_config = original(self, *args, **kwargs)
        _finish(vllm_config, config)
        return vllm_config

    return create_engine_config


def _prepare(engine_args: EngineArgs) -> DeltaMemConfig:
    """Check that the policy can run at all, and write it into the engine arguments."""
    from vllm import __version__ as vllm_version
    from vllm.platforms import current_platform

    check_vllm_version(vllm_version)
    ledger.verify_ledger()
    config = DeltaMemConfig.from_additional_config(engine_args.additional_config)
    config.check_scorers()
    _check_scheduler(engine_args.scheduler_cls)
    engine_args.worker_cls = worker_path(engine_args.worker_cls)
    if config.dealing != "equal" and engine_args.block_size is None and current_platform.is_cpu():
        engine_args.block_size = CPU_PAGE_TOKENS
    # A new dict: the given one may be a caller's, or shared with the parsed arguments.
    engine_args.additional_config = {**engine_args.additional_config, CONFIG_KEY: config.to_json_dict()}
    _watch_requests(required=True)
    return config


def _finish(vllm_config: VllmConfig, config: DeltaMemConfig) -> None:
    """Refuse what is not served exactly, choose the scheduler, and say what is active."""
    from deltamem_vllm.integration import calibrations, refusals
    from deltamem_vllm.integration.cold_support import why_no_cold

    refusals.check_supported(vllm_config)
    found = calibrations.find_calibration(vllm_config, config)
    # Every process uses what was found here, and requests are told when there is none.
    has_predictor = found is not None and found.predictor is not None
    no_cold = why_no_cold(vllm_config, config)
    folder = str(found.folder) if found is not None else None
    config = config.resolved(folder, predictor=has_predictor, cold=no_cold is None)
    assert isinstance(vllm_config.additional_config, dict), "made by _prepare"
    vllm_config.additional_config[CONFIG_KEY] = config.to_json_dict()
    vllm_config.scheduler_config.scheduler_cls = scheduler_path(vllm_config)
    ledger.apply("vllm.v1.engine.async_llm:load_stat_logger_plugin_factories", _with_our_stat_logger)
    logs.attach_vllm_handlers()
    # Each of several API servers builds this configuration too; the launcher's line is enough.
    parallel = vllm_config.parallel_config
    if parallel._api_process_count == 1 or parallel._api_process_rank < 0:
        settings = " ".join(f"{name}={value}" for name, value in config.to_json_dict().items())
        logger.info(
            "deltamem %s is active: %s (scheduler %s, worker %s)",
            __version__,
            settings,
            vllm_config.scheduler_config.scheduler_cls,
            parallel.worker_cls,
        )
        if config.dealing != "equal":
            logger.info(
                "deltamem deals pages %s",
                f"with the calibration in {found.folder}"
                if found is not None
                else "by live scores alone: no calibration (see `deltamem calibrate`)",
            )
        if no_cold is not None:
            logger.info("deltamem writes no cold pages (cold_bits=0): %s", no_cold)


def _with_our_stat_logger(load: Callable[[], list[Any]]) -> Callable[[], list[Any]]:
    @functools.wraps(load)
    def load_stat_logger_plugin_factories() -> list[Any]:
        from deltamem_vllm.integration.metrics import DeltaMemStatLogger

        return [*load(), DeltaMemStatLogger]

    return load_stat_logger_plugin_factories


def scheduler_path(vllm_config: VllmConfig) -> str | type[object]:
    """The scheduler class: a user's subclass of ours, or ours for the kind of scheduling vLLM decided on.

    Asked after vLLM's platform had the last word on ``async_scheduling`` (it turns it off on CPU).
    """
    given: str | type[object] | None = vllm_config.scheduler_config.scheduler_cls
    if given is not None:
        return given
    kind = "DeltaMemAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "DeltaMemScheduler"
    return f"{_SCHEDULER}.{kind}"


def worker_path(given: str) -> str:
    """The worker class: a user's subclass of ours, or ours for this platform."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        ours = f"{_WORKER}.DeltaMemCPUWorker"
    elif current_platform.is_cuda_alike():
        ours = f"{_WORKER}.DeltaMemGPUWorker"
    else:
        raise ConfigError(
            f"deltamem does not run on platform {current_platform.device_type!r}; supported: CPU, CUDA "
            "and ROCm. Use one of them, or start without --kv-cache-policy deltamem."
        )
    if given in ("auto", ours):
        return ours
    _check_subclass("worker_cls", given, ours)
    return given


def _check_scheduler(given: str | type[object] | None) -> None:
    if given is not None:
        _check_subclass("scheduler_cls", given, f"{_SCHEDULER}.DeltaMemSchedulerMixin")


def _check_subclass(option: str, given: object, ours: str) -> None:
    found = resolve_obj_by_qualname(given) if isinstance(given, str) else given
    if not (isinstance(found, type) and issubclass(found, resolve_obj_by_qualname(ours))):
        flag = "--" + option.replace("_", "-")
        raise ConfigError(
            f"deltamem needs its own {option}, but got {given!r}; allowed: a subclass of {ours}. "
            f"Derive yours from it, drop {flag}, or start without --kv-cache-policy deltamem."
        )


def _watch_requests(required: bool) -> None:
    """Check requests in this process, which is the one that will build them.

    Also without the policy: a request that asks for it must not be served as if it had got it.
    """
    from deltamem_vllm.integration import request_validation

    try:
        request_validation.install()
    except (ImportError, AttributeError, KeyError):
        if required:
            raise
        logger.warning("deltamem cannot watch requests in this vLLM; keys of ours in vllm_xargs go unnoticed")
