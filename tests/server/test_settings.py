"""Settings: flags over environment over defaults; what is wrong stops the start and names the fix."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cbp_server.settings import Settings, ignored_variables, load_settings

DOCS = Path(__file__).parents[2] / "docs" / "operations.md"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    import os

    for name in [name for name in os.environ if name.startswith("CBP_")]:
        monkeypatch.delenv(name)


def failure(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load_settings(list(arguments))
    text = caught.value.code if isinstance(caught.value.code, str) else capsys.readouterr().err
    assert caught.value.code != 0
    return text


def test_flags_win_over_the_environment(monkeypatch):
    monkeypatch.setenv("CBP_GRPC_PORT", "6000")
    monkeypatch.setenv("CBP_HTTP_PORT", "6001")
    settings = load_settings(["--grpc-port", "7000"])
    assert (settings.grpc_port, settings.http_port, settings.host) == (7000, 6001, "127.0.0.1")


def test_it_listens_on_loopback_unless_told_otherwise():
    assert load_settings([]).host == "127.0.0.1"


@pytest.mark.parametrize(
    ("variable", "value", "texts"),
    [
        ("CBP_GRPC_PRT", "1", ["CBP_GRPC_PRT", "did you mean CBP_GRPC_PORT?"]),
        ("CBP_LOGLEVEL", "debug", ["CBP_LOGLEVEL", "did you mean CBP_LOG_LEVEL?"]),
        ("CBP_GRPC_PORT", "many", ["--grpc-port", "CBP_GRPC_PORT", "integer", "'many'"]),
        ("CBP_DEVICE", "tpu", ["--device", "'auto', 'cpu' or 'cuda'"]),
    ],
)
def test_a_wrong_variable_names_itself_and_the_fix(monkeypatch, capsys, variable, value, texts):
    monkeypatch.setenv(variable, value)
    message = failure(capsys)
    for text in texts:
        assert text in message


def service_links(service: str, port: int) -> dict[str, str]:
    """What Kubernetes sets in every pod of a namespace that has the service."""
    name, address = service.upper().replace("-", "_"), "10.96.12.7"
    url = f"tcp://{address}:{port}"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": str(port),
        f"{name}_SERVICE_PORT_GRPC": str(port),
        f"{name}_PORT": url,
        f"{name}_PORT_{port}_TCP": url,
        f"{name}_PORT_{port}_TCP_PROTO": "tcp",
        f"{name}_PORT_{port}_TCP_PORT": str(port),
        f"{name}_PORT_{port}_TCP_ADDR": address,
    }


def set_all(monkeypatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("service", ["cbp", "cbp-server", "cbp-metrics", "cbp-engine", "cbp-max-learners"])
def test_services_called_like_this_one_do_not_stop_the_start(monkeypatch, service):
    set_all(monkeypatch, service_links(service, 50051))
    assert load_settings([]) == Settings()
    assert ignored_variables() == []


@pytest.mark.parametrize(("service", "setting"), [("cbp-grpc", "grpc_port"), ("cbp-http", "http_port")])
def test_a_service_whose_variable_has_a_settings_name_does_not_count_and_is_told(monkeypatch, service, setting):
    set_all(monkeypatch, service_links(service, 1234))
    assert getattr(load_settings([]), setting) == Settings.model_fields[setting].default
    assert getattr(load_settings([f"--{service.removeprefix('cbp-')}-port", "77"]), setting) == 77
    [ignored] = ignored_variables()
    assert ignored.name == f"CBP_{setting.upper()}"
    assert "tcp://10.96.12.7:1234" in ignored.reason
    assert "enableServiceLinks" in ignored.reason


@pytest.mark.parametrize(
    ("name", "hint"),
    [("CBP_NONSENSE_XYZ", "--help"), ("CBP_PORT", "did you mean CBP_"), ("cbp_dir", "CBP_DATA_DIR")],
)
def test_a_strangers_variable_is_told_and_does_not_stop_the_start(monkeypatch, name, hint):
    monkeypatch.setenv(name, "secret")
    assert load_settings([]) == Settings()
    [ignored] = ignored_variables()
    assert ignored.name == name
    assert hint in ignored.reason
    assert "secret" not in ignored.reason


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--no-such-flag", "1"], ["--no-such-flag"]),
        (["--checkpoint-interval", "0"], ["--checkpoint-interval", "greater than 0"]),
        (["--grpc-port", "70000"], ["--grpc-port", "65535"]),
        (["--grpc-port", "5000", "--http-port", "5000"], ["grpc_port", "http_port", "different"]),
        (["--data-dir", __file__], ["data_dir", "is a file"]),
    ],
)
def test_a_wrong_flag_names_itself_and_the_fix(capsys, arguments, texts):
    message = failure(capsys, *arguments)
    for text in texts:
        assert text in message


def test_two_free_ports_do_not_contradict():
    assert load_settings(["--grpc-port", "0", "--http-port", "0"]).grpc_port == 0


def test_help_and_the_operations_guide_know_every_setting():
    shown = subprocess.run([sys.executable, "-m", "cbp_server", "--help"], capture_output=True, text=True, check=True)
    documented = set(re.findall(r"`--([a-z-]+)`", DOCS.read_text()))
    for name, field in Settings.model_fields.items():
        flag = name.replace("_", "-")
        assert f"--{flag}" in shown.stdout
        assert field.description
        assert flag in documented, f"docs/operations.md does not mention --{flag}"


@pytest.mark.parametrize(
    ("flags", "text"),
    [(["--grpc-port", "{taken}"], "cannot listen"), (["--http-port", "{taken}"], "choose another --http-port")],
)
def test_a_taken_port_stops_the_start(server, tmp_path, flags, text):
    taken = server.http_url.rpartition(":")[2]
    ports = {"--grpc-port": "0", "--http-port": "0"}
    ports[flags[0]] = flags[1].format(taken=taken)
    command = [sys.executable, "-m", "cbp_server", "--data-dir", str(tmp_path / "data")]
    result = subprocess.run(
        [*command, *(part for pair in ports.items() for part in pair)], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert text in result.stderr.splitlines()[-1]
    assert taken in result.stderr.splitlines()[-1]


def test_a_data_directory_serves_one_server(server):
    command = [sys.executable, "-m", "cbp_server", "--grpc-port", "0", "--http-port", "0"]
    result = subprocess.run([*command, "--data-dir", str(server.data_dir)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "in use by another server" in result.stderr
