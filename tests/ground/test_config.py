"""Settings: one definition, four sources, and sentences that say what to do."""

import re
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.ground import config
from server.ground.config import Flag, NamedAdapter, Settings, load
from server.ground.errors import StartupRefused


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "graft.yaml"


def refusal(**flags: object) -> str:
    with pytest.raises(StartupRefused) as caught:
        load({"model": "m", **flags})
    return caught.value.message


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(
    monkeypatch: pytest.MonkeyPatch, yaml_file: Path
) -> None:
    assert load({"model": "m"}).port == 8000
    yaml_file.write_text("port: 8001")
    flags = {"model": "m", "config": str(yaml_file)}
    assert load(flags).port == 8001
    monkeypatch.setenv("GRAFT_PORT", "8002")
    assert load(flags).port == 8002
    assert load({**flags, "port": "8003"}).port == 8003


def test_the_file_may_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, yaml_file: Path) -> None:
    yaml_file.write_text("model: from-file")
    monkeypatch.setenv("GRAFT_CONFIG", str(yaml_file))
    assert load({}).model == "from-file"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "")
    monkeypatch.setenv("GRAFT_MAX_CONTEXT", "")
    settings = load({"model": "m"})
    assert settings.api_key is None
    assert settings.max_context is None


def test_yaml_keys_may_be_spelled_like_the_flags(yaml_file: Path) -> None:
    yaml_file.write_text("max-context: 512\nmax_queued: 3")
    settings = load({"model": "m", "config": yaml_file})
    assert (settings.max_context, settings.max_queued) == (512, 3)


@pytest.mark.parametrize(("word", "value"), [("on", "on"), ("off", "off"), ('"off"', "off"), ("false", "off")])
def test_on_and_off_mean_what_they_say_in_yaml_too(yaml_file: Path, word: str, value: str) -> None:
    """YAML reads a bare `off` as false."""
    yaml_file.write_text(f"prefix-reuse: {word}\n", encoding="utf-8")
    assert load({"config": str(yaml_file)}).prefix_reuse == value


@pytest.mark.parametrize(("text", "seconds"), [("30", 30.0), ("0.5", 0.5)])
def test_time_limits_are_seconds(text: str, seconds: float) -> None:
    settings = load({"queue_timeout": text, "request_timeout": text})
    assert (settings.queue_timeout, settings.request_timeout) == (seconds, seconds)
    assert load({}).queue_timeout is load({}).request_timeout is None


def test_an_empty_file_changes_nothing(yaml_file: Path) -> None:
    yaml_file.write_text("# nothing yet\n")
    assert load({"model": "m", "config": yaml_file}).port == 8000


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("1024", 1024)],
)
def test_sizes_are_written_as_people_write_them(text: str, num_bytes: int) -> None:
    assert load({"model": "m", "kv_memory": text}).kv_memory == num_bytes


@given(st.integers(min_value=1, max_value=2**40))
def test_a_plain_number_of_bytes_is_itself(num_bytes: int) -> None:
    assert load({"model": "m", "host_memory": str(num_bytes)}).host_memory == num_bytes


def test_repeatable_settings_read_alike_from_flags_variables_and_files(
    monkeypatch: pytest.MonkeyPatch, yaml_file: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    pairs = [f"x={tmp_path / 'a'}", f"y={tmp_path / 'b'}"]
    wanted = (NamedAdapter("x", tmp_path / "a"), NamedAdapter("y", tmp_path / "b"))

    assert load({"model": "m", "adapter": pairs}).adapter == wanted
    yaml_file.write_text(f"adapter:\n  x: {tmp_path / 'a'}\n  y: {tmp_path / 'b'}\n")
    assert load({"model": "m", "config": yaml_file}).adapter == wanted
    yaml_file.write_text(f"adapter: {pairs}")
    assert load({"model": "m", "config": yaml_file}).adapter == wanted
    monkeypatch.setenv("GRAFT_ADAPTER", ", ".join(pairs))
    assert load({"model": "m"}).adapter == wanted


def test_a_comma_in_a_repeated_flag_belongs_to_its_value(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    assert load({"model": "m", "adapter": [f"x={tmp_path}/a,b"]}).adapter[0].path == tmp_path / "a,b"


def test_a_home_folder_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = load({"model": "~/base", "store": "~/store", "adapters": "~"})
    assert settings.model == str(tmp_path / "base")
    assert settings.store == tmp_path / "store"
    assert settings.adapters == tmp_path


def test_settings_cannot_be_changed() -> None:
    settings = load({"model": "m"})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1


def test_the_api_key_is_not_shown() -> None:
    settings = load({"model": "m", "api_key": "sesame"})
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sesame"
    assert "sesame" not in repr(settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert load({"model": "m", "host": host}).is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_a_bind_beyond_loopback_without_a_key_is_refused(host: str) -> None:
    assert {"GRAFT_API_KEY", "--api-keys", "--insecure-public"} <= set(re.findall(r"[\w-]+", refusal(host=host)))
    for allowing in ({"api_key": "k"}, {"api_keys": "keys.yaml"}, {"insecure_public": True}):
        assert not load({"model": "m", "host": host, **allowing}).is_loopback


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("localhost", "http://localhost:8000"),
    ],
)
def test_the_url_is_one_that_this_machine_can_open(host: str, url: str) -> None:
    assert load({"model": "m", "host": host, "api_key": "k"}).url == url


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "70000"}, ["--port", "'70000'", "65535"]),
        ({"quantize": "nf5"}, ["--quantize", "'nf5'", "'nf4', 'int8' or 'none'"]),
        ({"kv_memory": "5 bananas"}, ["--kv-memory", "5 bananas", "512MiB"]),
        ({"kv_memory": "0"}, ["--kv-memory", "greater than 0"]),
        ({"max_context": "0"}, ["--max-context", "greater than or equal to 1"]),
        ({"queue_timeout": "0"}, ["--queue-timeout", "greater than 0"]),
        ({"request_timeout": "inf"}, ["--request-timeout", "finite"]),
        ({"block_size": "12"}, ["--block-size", "multiple of 8"]),
        ({"block_size": "2048"}, ["--block-size", "1024"]),
        ({"prefix_reuse": "maybe"}, ["--prefix-reuse", "'on' or 'off'"]),
        ({"adapter": ["legal"]}, ["--adapter", "'legal'", "NAME=PATH"]),
        ({"adapter": ["legal=/no/such/folder"]}, ["--adapter", "'legal'", "/no/such/folder", "correct the path"]),
        ({"adapter": ["a=.", "a=.."]}, ["--adapter", "'a'", "more than once"]),
        ({"adapters": "/no/such/folder"}, ["--adapters", "/no/such/folder", "create it"]),
        ({"max_batch_tokens": "8", "max_sequences": "9"}, ["max_batch_tokens (8)", "max_sequences (9)", "Raise"]),
        ({"model": " "}, ["MODEL", "graft serve MODEL"]),
    ],
)
def test_a_refusal_names_the_setting_the_value_and_the_remedy(flags: dict[str, object], words: list[str]) -> None:
    message = refusal(**flags)
    assert [word for word in words if word not in message] == []


def test_every_problem_is_told_at_once() -> None:
    assert len(refusal(port="x", max_queued="-1", device="tpu").splitlines()) == 3


def test_every_problem_is_told_at_once_wherever_it_is(monkeypatch: pytest.MonkeyPatch, yaml_file: Path) -> None:
    """From a flag, a variable and the file: bad values, keys that are none, and settings that clash with others."""
    yaml_file.write_text("max_queue: 7\nblock_size: 12\nmax_sequences: 64\nprot: 1\n")
    monkeypatch.setenv("GRAFT_QUEUE_TIMEOUT", "soon")
    message = refusal(config=yaml_file, port="x", max_batch_tokens="8", host="0.0.0.0")
    expected = [
        f"max_queue in {yaml_file} is not a setting; did you mean max_queued?",
        f"prot in {yaml_file} is not a setting; did you mean port?",
        "--port is 'x'",
        f"block_size in {yaml_file} is 12",
        "GRAFT_QUEUE_TIMEOUT is 'soon'",
        "max_batch_tokens (8) must be at least max_sequences (64)",
        "host '0.0.0.0' can be reached from other machines",
    ]
    assert [words for words in expected if words not in message] == []
    assert len(message.splitlines()) == len(expected)


def test_of_a_bad_value_nobody_says_that_it_clashes_with_another() -> None:
    message = refusal(max_sequences="many", max_batch_tokens="8")
    assert message.startswith("--max-sequences is 'many'")
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read_hides_no_bad_flag(tmp_path: Path) -> None:
    message = refusal(config=tmp_path / "none.yaml", port="x")
    assert "none.yaml cannot be read as YAML" in message
    assert "--port is 'x'" in message


def test_a_refusal_names_the_source(monkeypatch: pytest.MonkeyPatch, yaml_file: Path) -> None:
    yaml_file.write_text("max_queued: many")
    assert refusal(config=yaml_file).startswith(f"max_queued in {yaml_file} is 'many'")
    monkeypatch.setenv("GRAFT_MAX_QUEUED", "lots")
    assert refusal(config=yaml_file).startswith("GRAFT_MAX_QUEUED is 'lots'")


@pytest.mark.parametrize("key", ["two words", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    message = refusal(api_key=key)
    assert "--api-key" in message
    assert key not in message


def test_a_key_of_nothing_does_not_count_as_no_key(monkeypatch: pytest.MonkeyPatch, yaml_file: Path) -> None:
    assert "--api-key" in refusal(api_key="", host="0.0.0.0")
    yaml_file.write_text('api_key: ""')
    assert "api_key" in refusal(config=yaml_file)
    monkeypatch.setenv("GRAFT_API_KEY", "")  # an empty variable is as good as none
    assert load({"model": "m"}).api_key is None


def test_a_key_that_yaml_reads_as_a_number_is_refused_without_being_shown(yaml_file: Path) -> None:
    yaml_file.write_text("api_key: 12345")
    message = refusal(config=yaml_file)
    assert "api_key" in message
    assert "12345" not in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("max_contex: 1", ["max_contex", "did you mean max_context?"]),
        ("zebra: 1", ["zebra", "--help"]),
        ("config: other.yaml", ["config", "not a setting"]),
        ("- port", ["key: value"]),
        ("port: [", ["cannot be read as YAML"]),
    ],
)
def test_a_file_with_anything_else_is_refused(yaml_file: Path, content: str, words: list[str]) -> None:
    yaml_file.write_text(content)
    message = refusal(config=yaml_file)
    assert [word for word in words if word not in message] == []


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(config=tmp_path / "none.yaml")


def test_the_port_variable_that_kubernetes_sets_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_PORT", "tcp://10.0.0.1:8000")
    assert "enableServiceLinks" in refusal()


def test_a_misspelled_variable_is_told_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_MAX_CONTEX", "1")
    monkeypatch.setenv("GRAFT_SERVICE_HOST", "10.0.0.1")
    told = list(config.unknown_variables())
    assert len(told) == 1
    assert "did you mean GRAFT_MAX_CONTEXT?" in told[0]


def test_origins_say_where_each_value_came_from(monkeypatch: pytest.MonkeyPatch, yaml_file: Path) -> None:
    yaml_file.write_text("max_queued: 5\nport: 1")
    monkeypatch.setenv("GRAFT_DEVICE", "cpu")
    found = config.origins({"port": "2", "config": str(yaml_file)})
    assert found["port"] == "--port"
    assert found["device"] == "GRAFT_DEVICE"
    assert found["max_queued"] == f"max_queued in {yaml_file}"
    assert found["host"] == "default"


def test_outside_a_checkout_the_model_must_be_named_and_the_store_is_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "_CHECKOUT", tmp_path)
    with pytest.raises(StartupRefused, match="graft serve MODEL"):
        load({})
    assert load({"model": "m"}).store == Path("adapters_store")


def test_in_a_checkout_the_demo_and_its_store_are_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config, "_CHECKOUT", tmp_path)
    (tmp_path / "demo" / "base").mkdir(parents=True)
    (tmp_path / "adapters_store").mkdir()
    settings = load({})
    assert settings.model == str(tmp_path / "demo" / "base")
    assert settings.store == tmp_path / "adapters_store"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described(name: str) -> None:
    (flag,) = [item for item in Settings.model_fields[name].metadata if isinstance(item, Flag)]
    assert flag.help[0] in string.ascii_letters
    assert not flag.help.endswith(".")
