"""What lies in deploy/: every expression asks for metrics that a server has, and every rule does what it says."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.dashboard import FILE, panels, text
from server.ground.families import FAMILIES
from tests.api.conftest import Gate, Live, eventually
from tests.deploy import expressions
from tests.deploy.prometheus import CONFIG, DEPLOY, ROOT, RULES, program, promtool

NEEDS_PROMTOOL = pytest.mark.skipif(
    program("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)
OF_PROMETHEUS = {"up", "instance", "job", "le"}


def test_the_dashboard_is_written_from_the_code() -> None:
    """When it is not: `python -m deploy.dashboard`."""
    assert FILE.read_text(encoding="utf-8") == text()


def test_panels_have_places_of_their_own_and_queries() -> None:
    drawn = json.loads(text())["panels"]
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (p["gridPos"] for p in drawn)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel.queries for panel in panels())


def test_names_and_labels_are_found_in_expressions() -> None:
    expr = 'sum by (instance, le) (rate(graft_a_bucket{x="graft_no", y=~".*"}[5m])) / on (z) graft:b:ratio5m > up'
    assert expressions.names_in(expr) == {"graft_a_bucket", "graft:b:ratio5m", "up"}
    assert expressions.labels_in(expr) == {"instance", "le", "x", "y", "z"}


def scrape_at_work(live: Live, gate: Gate) -> str:
    """The metrics of a server that has answered, refused, and has a sequence of an adapter in flight."""
    gate.allow(10)
    live.post("/v1/completions", prompt="Hi", max_tokens=2, adapter="first").raise_for_status()
    assert live.post("/v1/completions", prompt="Hi", adapter="no-such").status_code == 404
    with live.send("/v1/completions", prompt="Hi", max_tokens=100, ignore_eos=True, adapter="first"):
        eventually(lambda: live.server.engine.stats().num_running == 1)
        return live.http.get("/metrics").text


@pytest.mark.parametrize("source", ["dashboard", "rules"])
def test_every_expression_asks_for_metrics_and_labels_that_a_live_server_has(
    live: Live, gate: Gate, source: str
) -> None:
    text = scrape_at_work(live, gate)
    asked = expressions.of_dashboard() if source == "dashboard" else expressions.of_rules()
    for expr in asked:
        names = expressions.names_in(expr)
        assert names, expr
        for name in names - expressions.recorded() - OF_PROMETHEUS:
            assert f"\n{name} " in text or f"\n{name}{{" in text, f"{name} in {expr}"
        labels = {label for family in FAMILIES.values() for label in family.labels} | OF_PROMETHEUS
        assert expressions.labels_in(expr) <= labels, expr


def test_every_alert_says_what_to_do_and_has_a_unit_test_for_both_sides() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]
    for rule in rules:
        if "alert" in rule:
            assert rule["annotations"].keys() == {"summary", "action"}
            assert rule["labels"]["severity"] in ("page", "ticket", "info")
    cases = yaml.safe_load((DEPLOY / "prometheus" / "rules_test.yml").read_text(encoding="utf-8"))["tests"]
    assert {case["name"] for case in cases} == expressions.alerts()
    for case in cases:
        before, after = (told["exp_samples"] for told in case["promql_expr_test"])
        assert before == []
        assert [sample["labels"] for sample in after] == [f'{{alertname="{case["name"]}"}}']


def test_the_page_names_every_alert_and_no_other() -> None:
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `Graft")}
    assert listed == expressions.alerts()


def test_compose_names_files_that_are_there() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text(encoding="utf-8"))["services"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service["volumes"]]
    here = [path for path in mounted if path.startswith(".")]
    assert here
    assert all((DEPLOY / path).exists() for path in here)
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service.get("ports", ()))


def test_the_key_that_may_do_everything_goes_to_the_server_alone() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text(encoding="utf-8"))["services"]
    assert [name for name, service in services.items() if "GRAFT_API_KEY" in json.dumps(service)] == ["graft"]
    (job,) = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["scrape_configs"]
    folder = str(Path(job["authorization"]["credentials_file"]).parent)
    volumes = {name: [volume.split(":")[:2] for volume in service["volumes"]] for name, service in services.items()}
    assert ["metrics-key", folder] in volumes["prometheus"]
    assert [name for name, mounted in volumes.items() if "metrics-key" in dict(mounted)] == ["keys", "prometheus"]
    assert "--scope metrics --api-keys" in services["keys"]["command"][0]


@NEEDS_PROMTOOL
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    for arguments in (("check", "config", "--syntax-only", CONFIG), ("check", "rules", RULES)):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_PROMTOOL
def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"q{number}", "expr": expr} for number, expr in enumerate(expressions.of_dashboard())]
    path = tmp_path / "dashboard-as-rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}), encoding="utf-8")
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_PROMTOOL
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    done = promtool("test", "rules", DEPLOY / "prometheus" / "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_PROMTOOL
def test_promtool_has_nothing_to_say_about_the_metrics(live: Live) -> None:
    found = program("promtool")
    assert found is not None
    text = live.http.get("/metrics").content
    done = subprocess.run([found, "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
