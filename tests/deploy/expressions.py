"""Every expression of deploy/: of the dashboard, the alerts and the recording rules; and the names in one.

Owns where they stand, and what Grafana would put in the places of its variables.
"""

import json
import re
from collections.abc import Iterator

import yaml

from deploy.dashboard import FILE
from tests.deploy.prometheus import RULES

_VARIABLES = {"$__rate_interval": "1m", "$instance": ".*", "$adapter": ".*"}
_NAME = re.compile(r"\b(?:graft|vllm|process|up)(?:[_:][a-z0-9_:]+)?\b(?=\s*[{\[<>=)]|\s|$)")
_SELECTOR = re.compile(r"([a-z_:][a-z0-9_:]*)\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


def of_dashboard() -> list[str]:
    """From the file that Grafana reads."""
    panels = json.loads(FILE.read_text(encoding="utf-8"))["panels"]
    return [filled(target["expr"]) for panel in panels for target in panel.get("targets", ())]


def of_rules() -> list[str]:
    return [rule["expr"] for rule in _rules()]


def recorded() -> set[str]:
    """The names that recording rules make."""
    return {rule["record"] for rule in _rules() if "record" in rule}


def alerts() -> set[str]:
    return {rule["alert"] for rule in _rules() if "alert" in rule}


def _rules() -> Iterator[dict[str, str]]:
    for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]:
        yield from group["rules"]


def filled(expr: str) -> str:
    for variable, value in _VARIABLES.items():
        expr = expr.replace(variable, value)
    return expr


def names_in(expr: str) -> set[str]:
    """The metrics that it reads."""
    bare = re.sub(r'"[^"]*"', '""', expr)
    return set(_NAME.findall(bare))


def labels_in(expr: str) -> set[str]:
    """The labels that it selects or groups by."""
    matched = {
        part.strip() for _, inside in _SELECTOR.findall(re.sub(r'"[^"]*"', '""', expr)) for part in inside.split(",")
    }
    grouped = {part.strip() for inside in _GROUPING.findall(expr) for part in inside.split(",")}
    return {re.split(r"[=!]", part)[0] for part in matched | grouped} - {""}
