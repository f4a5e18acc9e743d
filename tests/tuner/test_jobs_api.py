import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tuner.errors import ClusterError
from tuner.jobs_api import JobsApi, find_address


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PWISER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def refusal(address: str | None) -> str:
    with pytest.raises(ClusterError) as caught:
        find_address(address)
    return str(caught.value)


def test_what_is_given_comes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:8265")
    assert find_address(None) == "http://ray:8265"
    monkeypatch.setenv("PWISER_ADDRESS", "https://pwiser:443/ray")
    assert find_address(None) == "https://pwiser:443/ray"
    assert find_address("http://given") == "http://given"


def test_an_empty_variable_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWISER_ADDRESS", "")
    monkeypatch.setenv("RAY_ADDRESS", "http://ray:8265")
    assert find_address(None) == "http://ray:8265"


def test_a_slash_at_the_end_is_left_out() -> None:
    assert find_address("http://head:8265/") == "http://head:8265"


def test_no_address_is_told() -> None:
    assert refusal(None) == (
        "--address: no cluster is named; give the URL of its Ray dashboard, such as "
        "http://HEAD:8265, here or in PWISER_ADDRESS"
    )


@pytest.mark.parametrize(
    "address",
    [
        "auto",
        "10.0.0.1:6379",
        "ray://head:10001",
        "http://",
        "http://[",
        "http://h:x",
        "http://h:0",
    ],
)
def test_what_is_no_url_of_a_dashboard_is_told(address: str) -> None:
    assert refusal(address) == (
        f"--address {address}: is not the URL of a Ray dashboard; give one such as http://HEAD:8265"
    )


def test_the_source_of_a_wrong_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert refusal(None).startswith("RAY_ADDRESS auto: is not the URL")


@pytest.mark.parametrize(
    "address",
    [
        "http://user:secret@head:8265",
        "ray://:secret@head",
        "user:secret@head",
        "http://u:sec/ret@h",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("PWISER_ADDRESS", address)
    assert refusal(None) == (
        "PWISER_ADDRESS: holds a password; give the token in RAY_AUTH_TOKEN instead"
    )


def test_a_cluster_that_does_not_answer_is_told() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ClusterError) as caught:
            JobsApi(address)
    assert str(caught.value) == (
        f"--address {address}: the cluster does not answer as it should (Failed to connect to Ray "
        f"at address: {address}.); is this the address of its Ray dashboard?"
    )


class OldRay(BaseHTTPRequestHandler):
    """Answers what a client asks first, and knows nothing else."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/version" else 404)
        self.end_headers()
        self.wfile.write(b'{"ray_version": "2.60.0"}')

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def old_ray() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), OldRay) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_what_the_cluster_cannot_do_is_told(old_ray: HTTPServer) -> None:
    address = f"http://127.0.0.1:{old_ray.server_port}"
    api = JobsApi(address)
    told = []
    for ask in (api.list, lambda: api.logs("a"), lambda: list(api.follow_logs("a"))):
        with pytest.raises(ClusterError) as caught:
            ask()
        told.append(str(caught.value))
    start = f"--address {address}: the cluster does not answer as it should ("
    assert all(message.startswith(start) for message in told)
    assert not any("\n" in message for message in told)


def test_a_cluster_that_goes_away_is_told_to_those_who_follow(old_ray: HTTPServer) -> None:
    address = f"http://127.0.0.1:{old_ray.server_port}"
    api = JobsApi(address)
    old_ray.socket.close()
    with pytest.raises(ClusterError) as caught:
        list(api.follow_logs("a"))
    assert str(caught.value).startswith(
        f"--address {address}: the cluster does not answer as it should (Cannot connect to host "
    )
