"""What a cluster is told under docker/kubernetes holds to Kubernetes' schemas, to itself, and to the service."""

from __future__ import annotations

import copy
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from models.registry.registry import Registry
from service.app import create_app
from service.http.auth import PROBES
from service.settings import Settings, read_settings
from tests.docker import promql
from tests.docker.test_docker import STAGES, instructions, scraped_labels

ROOT = promql.ROOT
KUBERNETES = ROOT / "docker" / "kubernetes"
CRDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("crds.yaml").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SCRAPED_BY = {"namespace", "pod"}  # labels that the operator's Prometheus adds
Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((KUBERNETES / name).read_text())
    return manifest


FILES = sorted(str(path.relative_to(KUBERNETES)) for path in KUBERNETES.rglob("*.yaml"))
KUSTOMIZATIONS = [name for name in FILES if Path(name).name == "kustomization.yaml"]
MANIFESTS = {name: read(name) for name in FILES if name not in KUSTOMIZATIONS and name != "adapter.yaml"}
DEPLOYMENT, SERVICE, SCALER = MANIFESTS["deployment.yaml"], MANIFESTS["service.yaml"], MANIFESTS["autoscaler.yaml"]
MONITOR, POLICY = MANIFESTS["monitor.yaml"], MANIFESTS["network.yaml"]
RUNTIME, INFERENCE = MANIFESTS["kserve/runtime.yaml"]["spec"], MANIFESTS["kserve/inference.yaml"]["spec"]["predictor"]
OF_KSERVE = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "model"}


def pods() -> dict[str, Manifest]:
    """Return the pod that each manifest asks for; KServe makes one of the runtime's fields and the service's."""
    templates = {name: made.get("spec", {}).get("template") for name, made in MANIFESTS.items()}
    found = {name: template["spec"] for name, template in templates.items() if template}
    own = {field: value for field, value in INFERENCE.items() if field not in OF_KSERVE}
    return found | {"kserve": {"containers": RUNTIME["containers"], "volumes": RUNTIME["volumes"], **own}}


PODS = pods()
SERVERS = ["deployment.yaml", "kserve"]


def environment(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container.get("env", ()) if "value" in entry}


def check(manifest: Manifest) -> None:
    """Hold a manifest to the schema of its kind; the fields of pods within custom resources to a pod's."""
    if manifest["kind"] not in CRDS:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(manifest, CRDS[manifest["kind"]])
    pod = PODS["kserve"] if manifest["kind"] == "ServingRuntime" else {"containers": [{"name": "any"}]}
    if manifest["kind"] == "InferenceService":
        predictor = manifest["spec"]["predictor"]
        pod |= {field: value for field, value in predictor.items() if field not in OF_KSERVE}
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "any"}, "spec": pod})


class TestSchemas:
    @pytest.mark.parametrize("name", MANIFESTS)
    def test_every_manifest_is_what_its_kind_allows(self, name: str) -> None:
        check(MANIFESTS[name])

    @pytest.mark.parametrize("name", MANIFESTS)
    def test_a_field_that_the_kind_has_not_is_found(self, name: str) -> None:
        wrong = copy.deepcopy(MANIFESTS[name])
        (wrong["spec"]["predictor"] if name == "kserve/inference.yaml" else wrong.setdefault("spec", {}))["no"] = 1
        with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
            check(wrong)

    def test_every_file_is_asked_for_and_every_file_asked_for_is_there(self) -> None:
        asked = [KUBERNETES / Path(name).parent / made for name in KUSTOMIZATIONS for made in read(name)["resources"]]
        applied = {path.resolve() for path in asked if path.suffix == ".yaml"}
        assert all(path.exists() for path in asked)
        assert {KUBERNETES / name for name in MANIFESTS if not name.startswith("jobs/")} == applied


@pytest.mark.parametrize("name", PODS)
class TestPods:
    def test_is_locked_down(self, name: str) -> None:
        pod = PODS[name]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]

    def test_is_the_images_user_and_version(self, name: str) -> None:
        (user,) = instructions(STAGES[1], "USER")
        context = PODS[name]["securityContext"]
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == user
        image = PODS[name]["containers"][0]["image"]
        assert image in {"lvm-serve", f"lvm-serve:{VERSION}"}
        assert read("kustomization.yaml")["images"] == [{"name": "lvm-serve", "newTag": VERSION}]

    def test_hears_nothing_of_other_services_in_its_environment(self, name: str) -> None:
        assert SERVICE["metadata"]["name"] == "lvm"  # whose port would come as LVM_PORT=tcp://...
        assert PODS[name]["enableServiceLinks"] is False

    def test_sets_what_the_service_knows_to_what_it_takes(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        names = [entry["name"].removeprefix("LVM_").lower() for entry in container.get("env", ())]
        assert set(names) <= Settings.model_fields.keys()
        read_settings(**{key.removeprefix("LVM_").lower(): value for key, value in environment(container).items()})

    def test_mounts_what_it_has(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            made["name"] for made in PODS[name]["volumes"]
        }


@pytest.mark.parametrize("name", SERVERS)
class TestServers:
    def test_has_the_time_to_drain(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        known = environment(container)
        needed = float(known["LVM_DRAIN_S"]) + float(known["LVM_GRACE_S"])
        assert PODS[name]["terminationGracePeriodSeconds"] > needed
        assert "lifecycle" not in container

    def test_listens_where_it_is_probed_by_paths_that_want_no_token(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        (port,) = container["ports"]
        assert port["containerPort"] == int(environment(container)["LVM_PORT"])
        asked = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        assert all(probe["port"] == port["name"] and probe["path"] in PROBES for probe in asked)
        assert [Path(probe["path"]).name.removesuffix("z") for probe in asked] == ["live", "live", "ready"]

    def test_is_not_killed_while_it_may_still_get_going(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] >= 60

    def test_reads_the_tokens_from_the_secret(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        path = Path(environment(container)["LVM_TOKENS_FILE"])
        (secret,) = [made["secret"] for made in PODS[name]["volumes"] if "secret" in made]
        (mount,) = [made for made in container["volumeMounts"] if made["name"] == "tokens"]
        assert path == Path(mount["mountPath"]) / secret["items"][0]["path"]
        assert not {entry["name"] for entry in container["env"]} & {"LVM_TOKENS", "LVM_INSECURE"}

    def test_cannot_write_its_registry(self, name: str) -> None:
        (container,) = PODS[name]["containers"]
        registry = environment(container)["LVM_REGISTRY"]
        if name == "kserve":  # mounts pvc:// read-only, and there
            assert (registry, INFERENCE["model"]["storageUri"]) == ("/mnt/models", "pvc://lvm-registry")
        else:
            (mount,) = [made for made in container["volumeMounts"] if made["mountPath"] == registry]
            (volume,) = [made for made in PODS[name]["volumes"] if made["name"] == mount["name"]]
            assert mount["readOnly"] is True
            assert volume["persistentVolumeClaim"] == {"claimName": "lvm-registry", "readOnly": True}

    def test_runs_as_the_other_does(self, name: str) -> None:
        ours, others = (PODS[each]["containers"][0] for each in (name, "deployment.yaml"))
        assert ours["resources"] == others["resources"]
        assert {**environment(ours), "LVM_REGISTRY": ""} == {**environment(others), "LVM_REGISTRY": ""}


class TestTogether:
    def test_all_select_the_pods_of_the_deployment(self) -> None:
        labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"].items()
        selectors = [
            DEPLOYMENT["spec"]["selector"]["matchLabels"],
            DEPLOYMENT["spec"]["template"]["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
            SERVICE["spec"]["selector"],
            MANIFESTS["disruption.yaml"]["spec"]["selector"]["matchLabels"],
        ]
        assert all(selector.items() == labels for selector in selectors)
        assert POLICY["spec"]["podSelector"]["matchLabels"].items() <= labels

    def test_the_service_the_policy_and_the_monitor_mean_the_port_of_the_pods(self) -> None:
        (port,) = PODS["deployment.yaml"]["containers"][0]["ports"]
        (served,) = SERVICE["spec"]["ports"]
        assert (served["targetPort"], served["port"]) == (port["name"], port["containerPort"])
        assert MONITOR["spec"]["endpoints"][0]["port"] == served["name"]
        assert [rule["ports"] for rule in POLICY["spec"]["ingress"]] == [[{"port": port["name"]}]]
        assert RUNTIME["annotations"]["prometheus.kserve.io/port"] == str(port["containerPort"])

    def test_nothing_goes_out(self) -> None:
        assert set(POLICY["spec"]["policyTypes"]) == {"Ingress", "Egress"}
        assert "egress" not in POLICY["spec"]

    def test_a_rollout_and_a_drained_node_leave_somebody(self) -> None:
        assert DEPLOYMENT["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        assert MANIFESTS["disruption.yaml"]["spec"]["maxUnavailable"] < SCALER["spec"]["minReplicas"]

    def test_the_autoscaler_alone_says_how_many(self) -> None:
        target = SCALER["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (DEPLOYMENT["kind"], DEPLOYMENT["metadata"]["name"])
        assert "replicas" not in DEPLOYMENT["spec"]


class TestMetrics:
    def test_the_autoscaler_asks_for_what_the_adapter_makes(self) -> None:
        made = {rule["name"]["as"] for rule in read("adapter.yaml")["rules"]["custom"]}
        assert {metric["pods"]["metric"]["name"] for metric in SCALER["spec"]["metrics"]} == made

    @pytest.mark.parametrize("rule", read("adapter.yaml")["rules"]["custom"], ids=lambda rule: rule["name"]["as"])
    def test_the_adapter_reads_names_and_labels_that_are_scraped(self, rule: Manifest) -> None:
        query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod=~"a|b"')
        assert "<<" not in query
        labels = scraped_labels()
        read_ = [*promql.selectors(query), *promql.selectors(rule["seriesQuery"])]
        assert len(read_) == 3
        for name, matchers in read_:
            assert matchers.keys() <= labels[name] | SCRAPED_BY, name
            assert matchers.get("stage", "=queue") == "=queue"

    def test_the_monitor_scrapes_with_a_token_under_the_job_of_the_rules(self) -> None:
        (endpoint,) = MONITOR["spec"]["endpoints"]
        app = create_app(read_settings(registry=ROOT / "artifacts" / "lvm"))
        assert endpoint["path"] in {getattr(route, "path", None) for route in app.routes}
        assert endpoint["authorization"]["credentials"]["name"] == "lvm-tokens"
        assert MONITOR["spec"]["selector"]["matchLabels"].items() <= SERVICE["metadata"]["labels"].items()
        jobs = set(re.findall(r'job="(\w+)"', promql.RULES.read_text()))
        assert {SERVICE["metadata"]["labels"][MONITOR["spec"]["jobLabel"]]} == jobs


class TestJobs:
    def test_promotes_a_version_that_ships(self) -> None:
        command, alias, version, *_ = PODS["jobs/promote.yaml"]["containers"][0]["args"]
        registry = Registry(ROOT / "artifacts" / "lvm")
        assert (command, alias in registry.aliases()) == ("promote", True)
        assert registry.find(version).id == version

    def test_filling_again_repairs_versions_and_leaves_aliases_alone(self, tmp_path: Path) -> None:
        image, registry = tmp_path / "image", tmp_path / "registry"
        (image / "models" / "amn" / "1").mkdir(parents=True)
        (image / "models" / "amn" / "1" / "weights").write_text("whole")
        (image / "primary").symlink_to("models/amn/1")
        registry.mkdir()
        (script,) = PODS["jobs/fill.yaml"]["containers"][0]["args"]
        script = script.replace("/models/", f"{image}/", 1).replace(" /models/.", f" {image}/.")
        script = script.replace("/registry/", f"{registry}/")
        subprocess.run(["sh", "-c", script], check=True)
        assert (registry / "primary" / "weights").read_text() == "whole"
        (registry / "models" / "amn" / "1" / "weights").write_text("half")
        (registry / "primary").unlink()
        (registry / "primary").symlink_to("models/gmn/2")
        with open(registry / "models" / "amn" / "1" / "weights") as mapped:
            subprocess.run(["sh", "-c", script], check=True)
            assert mapped.read() == "half"  # replaced, not written to: a service may have it mapped
        assert (registry / "models" / "amn" / "1" / "weights").read_text() == "whole"
        assert (registry / "primary").readlink() == Path("models/gmn/2")


def patched() -> dict[str, Manifest]:
    """Return the manifests that docker/kubernetes/grpc patches, by kind, each with an item more at the end of lists."""
    made = {each["kind"]: copy.deepcopy(each) for each in (DEPLOYMENT, SERVICE, POLICY)}
    for patch in read("grpc/kustomization.yaml")["patches"]:
        for step in yaml.safe_load(patch["patch"]):
            place: Any = made[patch["target"]["kind"]]
            *path, end = step["path"].strip("/").split("/")
            assert (step["op"], end) == ("add", "-")
            for part in path:
                place = place[int(part) if isinstance(place, list) else part]
            place.append(step["value"])
    return made


class TestGrpc:
    def test_what_is_patched_is_what_its_kind_allows(self) -> None:
        for manifest in patched().values():
            check(manifest)

    def test_the_port_is_that_of_the_setting_the_image_and_the_service(self) -> None:
        made = patched()
        (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
        _, port = container["ports"]
        _, served = made["Service"]["spec"]["ports"]
        assert environment(container)["LVM_GRPC_PORT"] == str(port["containerPort"])
        assert str(port["containerPort"]) in instructions(STAGES[1], "EXPOSE")[0].split()
        assert (served["targetPort"], served["appProtocol"]) == (port["name"], "grpc")
        assert {"port": port["name"]} in made["NetworkPolicy"]["spec"]["ingress"][0]["ports"]
