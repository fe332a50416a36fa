"""What Prometheus is asked under docker/: the expressions of the rules and of the dashboard, and what they read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
RULES = ROOT / "docker" / "prometheus" / "rules.yml"
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "lvm.json"

_STRING = r"\"[^\"]*\""
_NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"  # possessive with a + behind it
_SELECTOR = re.compile(
    rf"(?<![\w.:])({_NAME}+)\s*+(\{{(?:[^}}\"]|{_STRING})*+\}})?+(?!\()"
)  # a name before ( is a function
_MATCHER = re.compile(rf"({_NAME})\s*(=~|!~|!=|=)\s*({_STRING})")
_GROUPING = re.compile(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORDS = {"or", "and", "unless", "offset", "bool", "inf", "nan"}


@dataclass(frozen=True)
class Asked:
    """One expression, where it stands, and what its lines are called."""

    where: str
    expr: str
    legend: str = ""

    def filled_in(self, window: str) -> str:
        """Return the expression with Grafana's variables given values."""
        return self.expr.replace("$__rate_interval", window).replace("$instance", ".*")


def rules() -> list[dict[str, Any]]:
    """Return every rule, recording or alerting."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def recorded() -> list[Asked]:
    """Return the expressions that are stored under a name of their own."""
    return [Asked(rule["record"], rule["expr"]) for rule in rules() if "record" in rule]


def alerts() -> list[Asked]:
    """Return the expressions that wake somebody."""
    return [
        Asked(f"{rule['alert']} {rule['labels'].get('window', '')}".strip(), rule["expr"])
        for rule in rules()
        if "alert" in rule
    ]


def panels() -> list[dict[str, Any]]:
    """Return every panel of the dashboard that shows something; rows are headings."""
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def queries() -> list[Asked]:
    """Return every query of the dashboard."""
    return [
        Asked(f"{panel['title']} {target['refId']}", target["expr"], target["legendFormat"])
        for panel in panels()
        for target in panel["targets"]
    ]


def selectors(expr: str) -> list[tuple[str, dict[str, str]]]:
    """Return the metrics that `expr` reads, each with its matchers as written, operator and all."""
    bare = re.sub(r"\[[^\]]*\]", "", _GROUPING.sub("", expr))
    bare = re.sub(r"\boffset\s+\w+", "", bare)
    found = [(match[1], match[2] or "") for match in _SELECTOR.finditer(bare)]
    return [
        (name, {label: operator + value.strip('"') for label, operator, value in _MATCHER.findall(matchers)})
        for name, matchers in found
        if name.lower() not in _WORDS
    ]
