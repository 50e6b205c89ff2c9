# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""docker/compose.yaml as Docker Compose reads it, and what it promises about security."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.deploy import DOCKER, read_yaml, tool

COMPOSE = DOCKER / "compose.yaml"
PROFILES = ("cpu", "h100", "rtx4090")
PASSWORD = {"GRAFANA_ADMIN_PASSWORD": "given-by-the-test"}
profiles = pytest.mark.parametrize("profile", PROFILES)


def resolved(profile: str, **environment: str) -> dict[str, Any]:
    """The services that a profile starts, by name, with everything filled in by Compose itself."""
    done = tool(
        "docker-compose", "-f", COMPOSE, "--profile", profile, "config", "--format", "json",
        environment=PASSWORD | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = json.loads(done.stdout)["services"]
    return services


@profiles
def test_a_profile_is_one_server_with_prometheus_and_grafana(profile: str) -> None:
    assert set(resolved(profile)) == {profile, "prometheus", "grafana"}


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("read_only: true", "read_onli: true", "read_onli"),
        ("init: true", "init: sometimes", "init"),
        ("    count: 1", "    count: one", "count"),
    ],
)
def test_compose_holds_the_file_to_its_schema(tmp_path: Path, before: str, after: str, words: str) -> None:
    # Compose checks against the schema of the Compose specification first; without it a misspelling would pass.
    text = COMPOSE.read_text()
    assert before in text
    broken = tmp_path / "compose.yaml"
    broken.write_text(text.replace(before, after))
    done = tool("docker-compose", "-f", broken, "--profile", "h100", "config", environment=PASSWORD)
    assert done.returncode != 0
    assert words in done.stderr


@profiles
def test_there_is_no_default_password(profile: str) -> None:
    for given in ({}, {"GRAFANA_ADMIN_PASSWORD": ""}):
        done = tool("docker-compose", "-f", COMPOSE, "--profile", profile, "config", environment=given)
        assert done.returncode != 0
        assert "GRAFANA_ADMIN_PASSWORD" in done.stderr
    assert resolved(profile)["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "given-by-the-test"


@profiles
def test_every_port_is_this_machines_own(profile: str) -> None:
    ports = [port for service in resolved(profile).values() for port in service["ports"]]
    assert len(ports) == 3
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}


@profiles
def test_containers_have_as_few_rights_as_they_can_do_with(profile: str) -> None:
    for name, service in resolved(profile).items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service.get("cap_add", []) in ([], ["SYS_NICE"]), name
        assert not {"privileged", "network_mode", "pid", "ipc", "user"} & set(service), name
        mounts = [mount for mount in service["volumes"] if mount["type"] == "bind"]
        assert all(mount["read_only"] for mount in mounts), name


@profiles
def test_images_are_pinned_or_built_here(profile: str) -> None:
    for name, service in resolved(profile).items():
        if "build" in service:
            assert (Path(service["build"]["context"]) / service["build"]["dockerfile"]).is_file(), name
        else:
            assert re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", service["image"]), name


@profiles
def test_every_service_says_whether_it_is_healthy(profile: str) -> None:
    services = resolved(profile)
    assert all("healthcheck" in services[name] for name in ("prometheus", "grafana"))
    # The server's is in its image (test_dockerfiles.py) and is not turned off here.
    assert "healthcheck" not in services[profile]
    assert services["grafana"]["depends_on"]["prometheus"]["condition"] == "service_healthy"


@pytest.mark.parametrize("profile", ["h100", "rtx4090"])
def test_a_gpu_is_reserved(profile: str) -> None:
    (device,) = resolved(profile)[profile]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


def test_the_cpu_profile_asks_for_no_gpu() -> None:
    assert "deploy" not in resolved("cpu")["cpu"]


@profiles
def test_secrets_are_passed_on_and_never_written(profile: str) -> None:
    assert {name for name, value in resolved(profile)[profile]["environment"].items() if value} == set()
    given = resolved(profile, HF_TOKEN="token", VLLM_API_KEY="key")[profile]["environment"]
    assert given == {"HF_TOKEN": "token", "VLLM_API_KEY": "key"}


@profiles
def test_prometheus_finds_the_server_and_grafana_finds_both(profile: str) -> None:
    services = resolved(profile)
    (scrape,) = read_yaml(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"]
    (target,) = scrape["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert services[profile]["networks"]["default"]["aliases"] == [name]
    assert [entry["target"] for entry in services[profile]["ports"]] == [int(port)]
    (source,) = read_yaml(DOCKER / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"]
    assert source["url"] == f"http://prometheus:{services['prometheus']['ports'][0]['target']}"
    mounts = {mount["target"]: Path(mount["source"]) for mount in services["grafana"]["volumes"]}
    (provider,) = read_yaml(DOCKER / "grafana" / "provisioning" / "dashboards" / "deltamem.yaml")["providers"]
    assert list(mounts[provider["options"]["path"]].glob("*.json"))
    assert mounts["/etc/grafana/provisioning"] == DOCKER / "grafana" / "provisioning"


@profiles
def test_prometheus_is_given_the_rules_that_it_names(profile: str) -> None:
    (mounted,) = [
        Path(mount["source"])
        for mount in resolved(profile)["prometheus"]["volumes"]
        if mount["target"] == "/etc/prometheus"
    ]
    for rules in read_yaml(mounted / "prometheus.yml")["rule_files"]:
        assert (mounted / rules).is_file()


@profiles
def test_a_server_that_is_stopped_has_time_to_finish(profile: str) -> None:
    grace = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", resolved(profile)[profile]["stop_grace_period"])
    assert grace is not None
    seconds = 60 * int(grace[1] or 0) + int(grace[2] or 0)
    for path in (DOCKER.parent / "configs" / "serve").glob("*gb.yaml"):
        if path.stem.startswith(profile):
            assert seconds > read_yaml(path)["shutdown-timeout"]
