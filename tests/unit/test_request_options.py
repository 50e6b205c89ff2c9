# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""What a request may say about its KV memory."""

from __future__ import annotations

import re
from typing import Any, get_args

import pytest

from deltamem_vllm.config import DeltaMemConfig
from deltamem_vllm.request_options import DEALINGS, MODES, RequestOptionError, RequestOptions

CONFIG = DeltaMemConfig(keep_ratio=0.25, min_tokens=100, scorer="tova", request_scorers=["keydiff"])
DEFAULTS = RequestOptions(
    enabled=True,
    mode="pressure",
    keep_ratio=0.25,
    keep_tokens=None,
    coverage=None,
    dealing="global",
    min_tokens=100,
    cold=False,
    scorer="tova",
)


@pytest.mark.parametrize("extra_args", [None, {}, {"other_plugin": 1}])
def test_what_a_request_leaves_out_comes_from_the_server(extra_args: dict[str, Any] | None) -> None:
    assert RequestOptions.from_extra_args(extra_args, CONFIG) == DEFAULTS


def test_a_request_can_set_everything() -> None:
    given = {"deltamem_policy": "off", "deltamem_keep_ratio": 1, "deltamem_min_tokens": 0.0}
    given |= {"deltamem_scorer": "keydiff", "deltamem_mode": "always", "deltamem_dealing": "profile"}
    given["deltamem_coverage"] = 1
    options = RequestOptions.from_extra_args(given, CONFIG)
    assert options == RequestOptions(
        enabled=False,
        mode="always",
        keep_ratio=1.0,
        keep_tokens=None,
        coverage=1.0,
        dealing="profile",
        min_tokens=0,
        cold=False,
        scorer="keydiff",
    )
    assert isinstance(options.keep_ratio, float)
    assert isinstance(options.coverage, float)
    assert isinstance(options.min_tokens, int)


@pytest.mark.parametrize(
    ("bits", "given", "cold"),
    [
        (4, {}, True),
        (4, {"deltamem_cold": "on"}, True),
        (4, {"deltamem_cold": "off"}, False),
        (4, {"deltamem_dealing": "equal"}, False),
        (0, {}, False),
        (0, {"deltamem_cold": "off"}, False),
    ],
)
def test_cold_pages_are_the_servers_and_a_request_may_decline(bits: Any, given: dict[str, Any], cold: bool) -> None:
    config = DeltaMemConfig(cold_bits=bits)
    assert RequestOptions.from_extra_args(given, config).cold is cold


@pytest.mark.parametrize(
    ("bits", "given", "allowed"),
    [
        (0, {"deltamem_cold": "on"}, "'off' on this server, which has cold_bits=0"),
        (4, {"deltamem_cold": "on", "deltamem_dealing": "equal"}, "'off' where deltamem_dealing is 'equal'"),
        (4, {"deltamem_cold": 1}, "'on' or 'off'"),
    ],
)
def test_cold_pages_that_cannot_be_had_are_refused(bits: Any, given: dict[str, Any], allowed: str) -> None:
    with pytest.raises(RequestOptionError, match=re.escape(allowed)):
        RequestOptions.from_extra_args(given, DeltaMemConfig(cold_bits=bits))


def test_the_choices_are_those_of_the_configuration() -> None:
    fields = DeltaMemConfig.model_fields
    assert get_args(fields["mode"].annotation) == MODES
    assert get_args(fields["dealing"].annotation) == DEALINGS


def test_a_share_and_a_number_of_tokens_replace_each_other() -> None:
    assert RequestOptions.from_extra_args({"deltamem_keep_tokens": 512.0}, CONFIG).keep_tokens == 512
    server = DeltaMemConfig(keep_tokens=100)
    assert RequestOptions.from_extra_args({}, server).keep_tokens == 100
    assert RequestOptions.from_extra_args({"deltamem_keep_ratio": 0.5}, server).keep_tokens is None
    with pytest.raises(
        RequestOptionError, match=r"deltamem_keep_tokens: got 9, .*deltamem_keep_ratio \(0.5\), not both"
    ):
        RequestOptions.from_extra_args({"deltamem_keep_ratio": 0.5, "deltamem_keep_tokens": 9}, CONFIG)


def test_coverage_can_be_switched_off_for_a_request() -> None:
    server = DeltaMemConfig(coverage=0.99)
    assert RequestOptions.from_extra_args({}, server).coverage == 0.99
    assert RequestOptions.from_extra_args({"deltamem_coverage": "off"}, server).coverage is None
    options = RequestOptions.from_extra_args({"deltamem_coverage": "off", "deltamem_dealing": "equal"}, server)
    assert (options.coverage, options.dealing) == (None, "equal")


@pytest.mark.parametrize(
    ("given", "server", "message"),
    [
        (
            {"deltamem_dealing": "equal"},
            {"coverage": 0.99},
            "deltamem_dealing: got 'equal', allowed: .*coverage=0.99; or send deltamem_coverage 'off'",
        ),
        ({"deltamem_coverage": 0.9}, {"dealing": "equal"}, "deltamem_coverage: got 0.9, allowed: 'off' where"),
        ({"deltamem_dealing": "profile"}, {"calibration": "none"}, "deltamem_dealing: got 'profile'.*no calibration"),
        (
            {"deltamem_keep_ratio": 0.5},
            {"coverage": 0.9, "max_keep_ratio": 0.25},
            "deltamem_keep_ratio: got 0.5, .*max_keep_ratio=0.25",
        ),
        (
            {"deltamem_coverage": 0.9},
            {"keep_ratio": 0.5, "max_keep_ratio": 0.25},
            "deltamem_coverage: got 0.9, .*max_keep_ratio=0.25",
        ),
    ],
)
def test_keys_that_do_not_go_together(given: dict[str, Any], server: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestOptionError, match=message):
        RequestOptions.from_extra_args(given, DeltaMemConfig(**server))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("deltamem_policy", True),
        ("deltamem_policy", "ON"),
        ("deltamem_policy", []),
        ("deltamem_keep_ratio", 0),
        ("deltamem_keep_ratio", -0.1),
        ("deltamem_keep_ratio", 1.0001),
        ("deltamem_keep_ratio", "0.5"),
        ("deltamem_keep_ratio", True),
        ("deltamem_keep_ratio", float("nan")),
        ("deltamem_keep_ratio", float("inf")),
        ("deltamem_mode", "off"),
        ("deltamem_mode", ["always"]),
        ("deltamem_keep_tokens", 0),
        ("deltamem_keep_tokens", 0.5),
        ("deltamem_keep_tokens", True),
        ("deltamem_coverage", 0),
        ("deltamem_coverage", 99),
        ("deltamem_coverage", "none"),
        ("deltamem_coverage", True),
        ("deltamem_dealing", "static"),
        ("deltamem_min_tokens", -1),
        ("deltamem_min_tokens", 1.5),
        ("deltamem_min_tokens", "1"),
        ("deltamem_min_tokens", False),
        ("deltamem_scorer", "snapkv"),
        ("deltamem_scorer", 1),
        ("deltamem_scorer", ["keydiff"]),
        ("deltamem_keep_ration", 0.5),
        ("deltamem", "on"),
    ],
)
def test_bad_options_say_what_is_allowed(key: str, value: object) -> None:
    with pytest.raises(RequestOptionError) as error:
        RequestOptions.from_extra_args({key: value}, CONFIG)
    assert str(error.value).startswith(f"{key}: got {value!r}, allowed: ")
    assert (error.value.key, error.value.value == value or value != value) == (key, True)


def test_an_unknown_key_gets_a_hint() -> None:
    with pytest.raises(RequestOptionError, match="did you mean 'deltamem_keep_ratio'"):
        RequestOptions.from_extra_args({"deltamem_keepratio": 0.5}, CONFIG)


def test_pages_cannot_be_dealt_on_a_server_that_deals_none() -> None:
    config = DeltaMemConfig(dealing="equal")
    with pytest.raises(RequestOptionError, match="deltamem_dealing: got 'global'.*'equal' on this server"):
        RequestOptions.from_extra_args({"deltamem_dealing": "global"}, config)
    assert RequestOptions.from_extra_args({"deltamem_dealing": "equal"}, DeltaMemConfig()).dealing == "equal"
