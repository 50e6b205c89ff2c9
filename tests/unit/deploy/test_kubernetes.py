# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""docker/kubernetes/*.yaml against the schemas of Kubernetes and of the Prometheus operator, and their promises."""

from __future__ import annotations

import copy
from typing import Any

import kubernetes_validate
import pytest

import deltamem_vllm
from tests.support.deploy import DOCKER, ROOT, read_yaml

FOLDER = DOCKER / "kubernetes"
LABELS = {"app.kubernetes.io/name": "deltamem", "app.kubernetes.io/component": "server"}
VERSIONS = ("1.31", "1.37")
"""The oldest and the newest Kubernetes that the manifests are checked against."""


def manifest(name: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(FOLDER / f"{name}.yaml")
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = manifest("deployment")["spec"]["template"]["spec"]
    return found


def server() -> dict[str, Any]:
    (container,) = pod()["containers"]
    found: dict[str, Any] = container
    return found


def monitored(document: dict[str, Any]) -> dict[str, Any]:
    """The document after the operator's own types have read it: what they do not know is gone."""
    from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor

    known: dict[str, Any] = ServiceMonitor.model_validate(document).model_dump(
        by_alias=True, exclude_unset=True, mode="json"
    )
    return known


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["deployment", "service"])
def test_the_schema_of_kubernetes_holds(name: str, version: str) -> None:
    assert kubernetes_validate.validate(manifest(name), version, strict=True) == version


@pytest.mark.parametrize(("key", "value"), [("runAsNonroot", True), ("runAsUser", "root")])
def test_the_schema_would_refuse_a_mistake(key: str, value: object) -> None:
    broken = copy.deepcopy(manifest("deployment"))
    broken["spec"]["template"]["spec"]["securityContext"][key] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSIONS[-1], strict=True)


def test_the_operators_schema_holds() -> None:
    document = manifest("servicemonitor")
    assert monitored(document) == document


def test_the_operators_schema_would_refuse_a_mistake() -> None:
    misspelt = copy.deepcopy(manifest("servicemonitor"))
    misspelt["spec"]["endpoints"][0]["intervall"] = "15s"
    assert monitored(misspelt) != misspelt
    wrong = copy.deepcopy(manifest("servicemonitor"))
    wrong["spec"]["endpoints"][0]["interval"] = "15 seconds"
    with pytest.raises(ValueError, match="interval"):
        monitored(wrong)


def test_kustomize_is_given_every_manifest_and_replaces_the_image() -> None:
    # There is no schema to be had for it; these are all the fields that it uses.
    document = manifest("kustomization")
    assert set(document) == {"apiVersion", "kind", "resources", "images"}
    assert (document["apiVersion"], document["kind"]) == ("kustomize.config.k8s.io/v1beta1", "Kustomization")
    assert set(document["resources"]) == {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml"}
    (image,) = document["images"]
    assert set(image) == {"name", "newName", "newTag"}
    assert image["name"] == server()["image"]
    assert image["newTag"] == f"{deltamem_vllm.__version__}-vllm0.32.0"


def test_selectors_meet_the_labels() -> None:
    deployment = manifest("deployment")["spec"]
    assert deployment["selector"]["matchLabels"] == LABELS == deployment["template"]["metadata"]["labels"]
    assert manifest("service")["spec"]["selector"] == LABELS
    monitor, service = manifest("servicemonitor")["spec"], manifest("service")
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    (port,), (endpoint,) = service["spec"]["ports"], monitor["endpoints"]
    assert endpoint["port"] == port["name"]
    assert port["targetPort"] in [entry["name"] for entry in server()["ports"]]


def test_the_job_is_called_as_rules_and_panels_ask() -> None:
    (scrape,) = read_yaml(DOCKER / "prometheus" / "prometheus.yml")["scrape_configs"]
    monitor = manifest("servicemonitor")["spec"]
    assert manifest("service")["metadata"]["labels"][monitor["jobLabel"]] == scrape["job_name"]
    assert monitor["endpoints"][0]["interval"] == "15s"
    (dropped,) = monitor["endpoints"][0]["metricRelabelings"]
    (same,) = scrape["metric_relabel_configs"]
    assert (dropped["sourceLabels"], dropped["regex"], dropped["action"]) == tuple(
        same[key] for key in ("source_labels", "regex", "action")
    )


def test_the_pod_has_no_right_that_it_does_not_need() -> None:
    # What the Pod Security Standard "restricted" asks for, and a read-only root besides.
    inside, outside = server()["securityContext"], pod()["securityContext"]
    assert outside["runAsNonRoot"] is True and outside["runAsUser"] == 10001 != 0
    assert outside["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["readOnlyRootFilesystem"] is True
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert pod()["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod())
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod()["volumes"])


def test_everything_that_the_server_writes_to_is_mounted() -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in server()["volumeMounts"]}
    assert set(mounts) == {"/home/deltamem/.cache", "/tmp", "/dev/shm"}
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod()["volumes"]}
    assert set(volumes) == set(mounts.values())
    assert volumes[mounts["/dev/shm"]]["medium"] == "Memory"


def test_secrets_are_references_and_optional() -> None:
    for variable in server()["env"]:
        assert "value" not in variable
        assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


def test_a_gpu_is_asked_for_and_memory_has_a_limit() -> None:
    resources = server()["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
    assert "memory" in resources["limits"] and "cpu" not in resources["limits"]


def test_probes_wait_for_the_model_and_then_watch_the_engine() -> None:
    probes = {name: server()[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {probe["httpGet"]["path"] for probe in probes.values()} == {"/health"}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"http"}
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] >= 1800
    assert manifest("deployment")["spec"]["progressDeadlineSeconds"] >= 1800


def test_a_pod_that_ends_first_finishes_its_requests() -> None:
    wait = int(server()["lifecycle"]["preStop"]["exec"]["command"][1])
    name = next(word for word in server()["args"] if word.endswith(".yaml")).rsplit("/", 1)[1]
    drain = read_yaml(ROOT / "configs" / "serve" / name)["shutdown-timeout"]
    assert pod()["terminationGracePeriodSeconds"] > wait + drain


def test_no_variable_of_a_service_can_reach_vllm() -> None:
    # A service called vllm would set VLLM_PORT to an address, and vLLM reads it as a number.
    assert pod()["enableServiceLinks"] is False
