"""What ships under docker/ holds together: it lints, is locked down as it says, asks for metrics that exist."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from lvm.errors import ServiceError, UnknownHttpVersion
from service.engines.drift import MAX_DEVIATION, MIN_ALIGNMENT
from service.http.asgi import REASONS
from service.http.gateway import CANCELLED
from service.settings import read_settings
from service.telemetry.metrics import (
    LOST,
    RELOADS,
    Metrics,
    latency_edges,
)
from service.telemetry.metrics import STAGES as SECONDS
from tests.docker import promql
from tests.docker.monitored import shortened
from tests.scraping import scrape

ROOT = promql.ROOT
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]

ADDED_BY_PROMETHEUS = {"instance", "job"}
KINDS = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"], "info": ["_info"]}


def instructions(stage: str, keyword: str) -> list[str]:
    """Return the instructions of one kind in a stage, continuation lines joined."""
    return re.findall(rf"^{keyword} (.*)$", stage.replace("\\\n", " "), re.MULTILINE)


def family_names(family: Metric) -> set[str]:
    return {family.name + suffix for suffix in KINDS[family.type]}


def scraped_labels() -> dict[str, set[str]]:
    """Return the labels of every name in the service's scrape."""
    metrics = Metrics()
    own = {made.name: {*made.label_names} for made in metrics.instruments()}
    labels: dict[str, set[str]] = {}
    text = scrape(metrics, "application/openmetrics-text; version=1.0.0")[0].decode()
    for family in text_string_to_metric_families(text):
        seen = {label for sample in family.samples for label in sample.labels}
        for name in family_names(family):
            bucket = {"le"} if name.endswith("_bucket") else set()
            labels[name] = own.get(family.name, seen) | ADDED_BY_PROMETHEUS | bucket
    return labels


def reasons(least_status: int) -> set[str]:
    """Return the reasons of every error with that status or a higher one."""
    kinds = [ServiceError]
    for kind in kinds:
        kinds += [kind for kind in kind.__subclasses__() if kind.__module__ == ServiceError.__module__]
    return {kind.reason for kind in kinds if kind.status >= least_status}


class TestDockerfile:
    def test_hadolint_has_nothing_to_say(self) -> None:
        hadolint = Path(sys.executable).with_name("hadolint")
        done = subprocess.run([hadolint, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")

    def test_two_stages_of_one_base_that_is_a_pinned_argument(self) -> None:
        assert [stage.split("\n")[0] for stage in STAGES] == ["${BASE} AS build", "${BASE}"]
        (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
        assert re.fullmatch(r"python:3\.11-slim-\w+", base)

    def test_the_image_runs_without_root_or_shell(self) -> None:
        assert instructions(STAGES[1], "USER") == ["10001:10001"]
        assert json.loads(instructions(STAGES[1], "ENTRYPOINT")[0]) == ["/venv/bin/lvm"]
        assert json.loads(instructions(STAGES[1], "CMD")[-1]) == ["serve"]
        (health,) = instructions(STAGES[1], "HEALTHCHECK")
        assert json.loads(health.partition("CMD ")[2])[0] == "/venv/bin/python"
        assert "/readyz" in health

    def test_the_registry_is_a_volume_and_the_settings_point_at_it(self) -> None:
        (environment,) = instructions(STAGES[1], "ENV")
        assert instructions(STAGES[1], "VOLUME") == ["/models"]
        assert {"LVM_REGISTRY=/models", "LVM_HOST=0.0.0.0"} <= set(environment.split())

    def test_the_image_neither_holds_a_token_nor_does_without(self) -> None:
        assert not re.search(r"^(?!#).*LVM_(TOKENS|INSECURE)", DOCKERFILE, re.MULTILINE)

    def test_nothing_phones_home(self) -> None:
        assert "ORT_DISABLE_TELEMETRY=1" in instructions(STAGES[1], "ENV")[0].split()

    def test_no_build_argument_reaches_the_image(self) -> None:
        kept = [argument.partition("=")[0] for argument in instructions(STAGES[1], "ARG")]
        assert kept == ["VERSION", "REVISION"]

    def test_its_version_is_the_projects(self) -> None:
        version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
        assert f"VERSION={version}" in instructions(STAGES[1], "ARG")
        assert SERVICES["lvm"]["image"] == f"lvm-serve:{version}"


def is_sent(path: str) -> bool:
    """Whether `path` is in the build context: the last pattern that matches it or a parent decides."""
    parents = [path, *map(str, Path(path).parents)][:-1]
    verdict = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        names = parents if "**/" not in line else [Path(parent).name for parent in parents]
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            verdict = line.startswith("!")
    return verdict


class TestContext:
    @pytest.mark.parametrize(
        "path",
        [
            ".git/HEAD",
            ".venv/bin/lvm",
            "Makefile",
            "artifacts/lvm/.lock",
            "docker/Dockerfile",
            "loadtest/driver.py",
            "models/training/train.py",
            "runs/amn.pt",
            "service/__pycache__/app.cpython-311.pyc",
            "tests/conftest.py",
        ],
    )
    def test_leaves_out(self, path: str) -> None:
        assert not is_sent(path)

    def test_takes_what_the_dockerfile_copies(self) -> None:
        for stage in STAGES:
            for copy in instructions(stage, "COPY"):
                *sources, _ = [word for word in copy.split() if not word.startswith("--")]
                assert "--from" in copy or all(map(is_sent, sources)), copy

    def test_takes_what_is_served(self) -> None:
        assert is_sent("artifacts/lvm/primary")
        assert is_sent("models/nets/amn.py")
        assert is_sent("service/app.py")
        assert is_sent("lvm/errors.py")


class TestCompose:
    @pytest.mark.parametrize("name", SERVICES)
    def test_every_service_is_locked_down(self, name: str) -> None:
        service = SERVICES[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"]
        assert service["healthcheck"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])

    @pytest.mark.parametrize("name", SERVICES)
    def test_every_image_is_pinned(self, name: str) -> None:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", SERVICES[name]["image"])

    def test_the_service_is_the_images_user_with_a_volume_of_models(self) -> None:
        service = SERVICES["lvm"]
        assert service["user"] == "10001:10001"
        assert service["volumes"] == ["models:/models"]
        assert "models" in COMPOSE["volumes"]
        assert any(mount.startswith("/tmp") for mount in service["tmpfs"])

    def test_it_does_without_a_token_only_because_it_is_published_on_loopback(self) -> None:
        service = SERVICES["lvm"]
        assert service["environment"]["LVM_INSECURE"] == "true"
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])

    def test_it_has_the_time_to_drain(self) -> None:
        settings = read_settings()
        grace = int(SERVICES["lvm"]["stop_grace_period"].removesuffix("s"))
        assert grace > settings.drain_s + settings.grace_s

    def test_every_file_that_is_mounted_exists(self) -> None:
        mounts = [mount for service in SERVICES.values() for mount in service["volumes"] if mount.startswith("./")]
        assert mounts
        assert all((DOCKER / mount.split(":")[0]).exists() for mount in mounts)
        assert all(mount.endswith(":ro") for mount in mounts)

    def test_prometheus_scrapes_the_service_and_grafana_asks_prometheus(self) -> None:
        config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
        (job,) = config["scrape_configs"]
        assert job["static_configs"] == [{"targets": ["lvm:8000"]}]
        assert config["rule_files"] == [promql.RULES.name]
        provisioned = DOCKER / "grafana" / "provisioning"
        (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())["datasources"]
        assert source["url"] == "http://prometheus:9090"
        assert {panel["datasource"]["uid"] for panel in promql.panels()} == {source["uid"]}

    def test_every_build_argument_is_one_of_the_dockerfiles_with_its_default(self) -> None:
        taken = dict(argument.partition("=")[::2] for argument in instructions(STAGES[0], "ARG"))
        passed = SERVICES["lvm"]["build"]["args"]
        defaults = {name: re.fullmatch(r"\$\{LVM_\w+:-(\w+)\}", value) for name, value in passed.items()}
        assert passed.keys() == {"RUNTIME", "TEXT", "GRPC"}
        assert {name: found and found[1] for name, found in defaults.items()} == {name: taken[name] for name in passed}

    def test_the_cuda_file_changes_only_services_that_exist(self) -> None:
        override = yaml.safe_load((DOCKER / "compose.cuda.yaml").read_text())
        assert override["services"].keys() <= SERVICES.keys()
        assert override["services"]["lvm"]["build"]["args"] == {"RUNTIME": "cuda"}


BOARD: dict[str, Any] = json.loads(promql.DASHBOARD.read_text())
PROVISIONING = DOCKER / "grafana" / "provisioning"
KINDS_OF_PANELS = {"row", "bargauge", "gauge", "heatmap", "stat", "state-timeline", "table", "text", "timeseries"}
UNITS = {"bytes", "dateTimeAsIso", "none", "ops", "percent", "percentunit", "reqps", "s", "short"}
ASKED = [*promql.recorded(), *promql.alerts(), *promql.queries()]
ALERTS = {rule["alert"] for rule in promql.rules() if "alert" in rule}
RUNBOOK = (ROOT / "docs" / "alerts.md").read_text()
PROMTOOL = "".join(path.read_text() for path in (DOCKER / "prometheus").glob("*_test.yml"))


class TestExpressions:
    @pytest.mark.parametrize("asked", ASKED, ids=lambda asked: asked.where)
    def test_reads_only_names_and_labels_that_are_scraped_or_recorded(self, asked: promql.Asked) -> None:
        labels = scraped_labels() | {"up": ADDED_BY_PROMETHEUS, "ALERTS": {"alertname", "alertstate"}}
        labels |= {rule.where: set(rule.where.partition(":")[0].split("_")) for rule in promql.recorded()}
        read = promql.selectors(asked.expr)
        assert read
        for name, matchers in read:
            assert name in labels, f"{name} is not in the scrape"
            assert matchers.keys() <= labels[name], f"{name} has the labels {sorted(labels[name])}"

    def test_outcomes_and_stages_are_those_of_the_code(self) -> None:
        known = {
            "outcome": reasons(400)
            | {*REASONS.values(), *RELOADS, CANCELLED, LOST, "ok", "fallback", "kept", "scored"},
            "stage": {stage for stages in SECONDS.values() for stage in stages},
        }
        for asked in ASKED:
            for _, matchers in promql.selectors(asked.expr):
                for label in matchers.keys() & known.keys():
                    for wanted in matchers[label].lstrip("=~!").split("|"):
                        assert any(re.fullmatch(wanted, value) for value in known[label]), (asked.where, wanted)

    def test_a_fault_is_every_error_of_the_service_with_a_5xx_status_and_an_answer_that_was_lost(self) -> None:
        named = [
            set(matchers["outcome"].removeprefix("!~").split("|"))
            for asked in ASKED
            for _, matchers in promql.selectors(asked.expr)
            if "internal" in matchers.get("outcome", "")
        ]
        assert named
        faults = reasons(500) - {UnknownHttpVersion.reason}  # the one that is the caller's
        assert all(found == faults | {LOST} for found in named)

    def test_every_instrument_is_shown(self) -> None:
        read = {name for asked in promql.queries() for name, _ in promql.selectors(asked.expr)}
        for made in Metrics().instruments():
            assert read & {made.name + suffix for suffix in ("", "_total", "_bucket", "_sum", "_count")}, made.name

    @pytest.mark.parametrize("panel", promql.panels(), ids=lambda panel: panel["title"])
    def test_a_panel_says_its_unit_its_legend_and_what_to_do_when_it_looks_bad(self, panel: dict[str, Any]) -> None:
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert all(target["legendFormat"] for target in panel["targets"])
        assert re.search(r"\bIf .+: .+\.$", panel["description"])
        assert set(re.findall(r"Lvm\w+", panel["description"])) <= ALERTS

    def test_panels_have_ids_and_places_of_their_own(self) -> None:
        panels = BOARD["panels"]  # rows, too
        cells = [
            (x, y)
            for place in (panel["gridPos"] for panel in panels)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert len(set(cells)) == len(cells)
        assert max(x for x, _ in cells) < 24


class TestProvisioning:
    """What Grafana wants of files that it reads at its start, as it tells of what it finds amiss in its log only."""

    def test_the_dashboard_is_one_that_this_grafana_reads_and_finds_again(self) -> None:
        assert 36 <= BOARD["schemaVersion"] <= 40  # older ones are migrated; 40 is what 11.4 writes
        assert SERVICES["grafana"]["image"].startswith("grafana/grafana:11.4.")
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", BOARD["uid"])
        assert BOARD["title"]
        assert BOARD.keys().isdisjoint({"id", "__inputs", "__requires", "dashboard"})  # of exports, and of the API

    def test_whatever_asks_asks_the_source_that_is_provisioned(self) -> None:
        (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())["datasources"]
        known = {"type": source["type"], "uid": source["uid"]}
        variables = BOARD["templating"]["list"]
        asking = [
            *variables,
            *BOARD["annotations"]["list"],
            *promql.panels(),
            *(target for panel in promql.panels() for target in panel["targets"]),
        ]
        assert all(one["datasource"] == known for one in asking)
        assert {source["access"], source["type"]} == {"proxy", "prometheus"}
        config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
        assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]

    def test_variables_are_defined_and_queries_have_names_of_their_own(self) -> None:
        defined = {variable["name"] for variable in BOARD["templating"]["list"]} | {"__rate_interval", "__range"}
        for panel in promql.panels():
            ids = [target["refId"] for target in panel["targets"]]
            assert len(set(ids)) == len(ids), panel["title"]
            for target in panel["targets"]:
                assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= defined, panel["title"]

    def test_panels_are_of_kinds_and_units_that_come_with_grafana(self) -> None:
        for panel in BOARD["panels"]:
            assert panel["type"] in KINDS_OF_PANELS, panel["title"]
            place = panel["gridPos"]
            assert min(place["w"], place["h"]) > 0, panel["title"]
            assert place["x"] + place["w"] <= 24, panel["title"]
            defaults = panel.get("fieldConfig", {}).get("defaults", {})
            overrides = panel.get("fieldConfig", {}).get("overrides", [])
            given = [each["value"] for one in overrides for each in one["properties"] if each["id"] == "unit"]
            assert {*given, defaults.get("unit", "none")} <= UNITS, panel["title"]
            if panel["type"] == "row":
                assert not panel["panels"] or panel["collapsed"], "panels in an open row are not shown"

    def test_the_directories_are_those_that_compose_mounts(self) -> None:
        mounts = dict(mount.removesuffix(":ro").split(":") for mount in SERVICES["grafana"]["volumes"])
        (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "lvm.yml").read_text())["providers"]
        assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
        assert mounts["./grafana/dashboards"] == provider["options"]["path"]
        home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
        assert home == f"{provider['options']['path']}/{promql.DASHBOARD.name}"


class TestAlerts:
    @pytest.mark.parametrize("rule", [rule for rule in promql.rules() if "alert" in rule], ids=lambda r: r["alert"])
    def test_says_what_is_wrong_how_urgent_it_is_and_where_to_read_on(self, rule: dict[str, Any]) -> None:
        assert rule["labels"]["severity"] in {"page", "ticket"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook"}
        assert rule["annotations"]["runbook"] == f"docs/alerts.md#{rule['alert'].lower()}"

    def test_each_has_its_section_with_its_urgency_and_no_section_is_of_none(self) -> None:
        sections = dict(re.findall(r"^## (\w+)\n\n(.*)$", RUNBOOK, re.MULTILINE))
        assert sections.keys() == ALERTS
        for rule in (rule for rule in promql.rules() if "alert" in rule):
            assert f"*{rule['labels']['severity']}" in sections[rule["alert"]].lower(), rule["alert"]

    def test_each_is_seen_to_fire_by_promtool(self) -> None:
        fired = set(re.findall(r'alertname="(\w+)"', PROMTOOL))
        assert fired == ALERTS

    def test_the_objective_of_latency_is_an_edge_of_the_histogram(self) -> None:
        edges = {
            float(matchers["le"].lstrip("="))
            for rule in promql.recorded()
            for _, matchers in promql.selectors(rule.expr)
            if "le" in matchers
        }
        assert edges
        assert edges <= set(latency_edges(read_settings().slo_ms))

    def test_drift_is_what_models_warns_of(self) -> None:
        (asked,) = [asked for asked in promql.alerts() if asked.where == "LvmInputDrift"]
        assert re.findall(r"[<>] (\S+)", asked.expr) == [f"{MAX_DEVIATION:g}", f"{MIN_ALIGNMENT:g}"]


def test_selectors_are_found_in_any_expression() -> None:
    expr = 'sum by (le) (rate(a_total{x="1", y=~"b|c", z="{}"}[1m])) / (b:c:d > 0) or e offset 5m unless vector(0) * 2'
    assert promql.selectors(expr) == [("a_total", {"x": "=1", "y": "=~b|c", "z": "={}"}), ("b:c:d", {}), ("e", {})]


def test_shortened_rules_keep_names_and_shares() -> None:
    rules = "interval: 1m\nrecord: route:x:ratio_1h\nexpr: rate(x[3d]) > 14.4 * rate(x[1m])\nfor: 5m\n"
    short = "interval: 1s\nrecord: route:x:ratio_1h\nexpr: rate(x[4320s]) > 14.4 * rate(x[5s])\nfor: 5s\n"
    assert shortened(rules, 60) == short
