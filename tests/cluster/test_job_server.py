"""The client of a job server against a fake one: what it asks, and one line for everything that goes wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.authentication import AuthenticationProblem, find_token
from cluster.job_server import JobExists, JobServer, JobServerError, NoSuchJob, server_address
from tests.cluster.fake_job_server import FakeJobServer, fake_job_server

SECRET = "4f1a-not-for-logs"


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token, address or proxy of who runs the tests."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def fake() -> Iterator[FakeJobServer]:
    with fake_job_server() as server:
        yield server


def write_token(path: Path, mode: int, text: str = SECRET) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")
    path.chmod(mode)
    return path


def refusal(server: FakeJobServer) -> str:
    with pytest.raises(JobServerError) as caught:
        JobServer(server.url).jobs()
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    return str(caught.value)


def test_jobs__oldest_first_with_drivers_left_out(fake: FakeJobServer) -> None:
    fake.add("a", "SUCCEEDED", driver_exit_code=0, end_time=1_009_000, metadata={"run_id": "a"})
    fake.add("b", "RUNNING")
    first, second = JobServer(fake.url).jobs()
    assert (first.id, first.is_live, first.exit_code, first.ended) == ("a", False, 0, 1009.0)
    assert (second.id, second.is_live, second.exit_code, second.ended) == ("b", True, None, None)
    assert first.metadata == {"run_id": "a"} and first.started == 1000.0


def test_token__is_sent_only_where_it_is_asked_for(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    JobServer(fake.url).jobs()
    assert {header for _, _, header in fake.seen} == {None}
    fake.token = SECRET
    JobServer(fake.url).jobs()
    assert fake.seen[-2:] == [("GET", "/api/authentication_mode", None), ("GET", "/api/jobs/", f"Bearer {SECRET}")]


def test_token__is_asked_for_once_per_client(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.token = SECRET
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    server = JobServer(fake.url)
    server.jobs(), server.versions(), server.jobs()
    assert [path for _, path, _ in fake.seen].count("/api/authentication_mode") == 1


def test_token__missing_names_the_variables_and_the_file(fake: FakeJobServer) -> None:
    fake.token = SECRET
    said = refusal(fake)
    assert said.startswith(
        f"{fake.url} asks for a token, and there is none: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH"
    )
    assert "~/.ray/auth_token (mode 0600)" in said


@pytest.mark.parametrize("source", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"])
def test_token__wrong_names_its_source(
    source: str, fake: FakeJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "another"
    if source == "RAY_AUTH_TOKEN":
        monkeypatch.setenv(source, SECRET)
    elif source == "RAY_AUTH_TOKEN_PATH":
        monkeypatch.setenv(source, str(write_token(tmp_path / "token", 0o640)))
    else:
        write_token(tmp_path / "home/.ray/auth_token", 0o640)
    said = refusal(fake)
    assert f"refuses the token of {source}" in said and "(HTTP 403)" in said
    assert ("(mode 0640)" in said) == (source != "RAY_AUTH_TOKEN")


def test_find_token__in_the_order_of_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_token() is None
    write_token(tmp_path / "home/.ray/auth_token", 0o600, "of-the-home")
    found = find_token()
    assert found is not None and (found.value, found.exposed) == ("of-the-home", "")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(write_token(tmp_path / "token", 0o644, "of-a-file")))
    found = find_token()
    assert found is not None and found.value == "of-a-file"
    assert "has mode 0644: other users can read the token; chmod 600" in found.exposed
    monkeypatch.setenv("RAY_AUTH_TOKEN", f" {SECRET} ")
    found = find_token()
    assert found is not None and (found.value, found.source) == (SECRET, "RAY_AUTH_TOKEN")
    assert SECRET not in repr(found)


@pytest.mark.parametrize("case", ["no file", "empty", "two lines"])
def test_find_token__a_file_that_holds_none_is_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if case != "no file":
        write_token(path, 0o600, "" if case == "empty" else f"{SECRET}\n{SECRET}")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    with pytest.raises(AuthenticationProblem) as caught:
        find_token()
    said = str(caught.value)
    assert said.startswith(f"RAY_AUTH_TOKEN_PATH={path}") and "set RAY_AUTH_TOKEN" in said
    assert SECRET not in said and "\n" not in said


def test_refusal__of_a_proxy_in_front(fake: FakeJobServer) -> None:
    fake.canned["/api/authentication_mode"] = (401, {}, b"login first")
    assert "asks for a token, and there is none" in refusal(fake)


def test_refusal__a_redirect_is_not_followed_with_a_token(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.token = SECRET
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    with fake_job_server() as elsewhere:
        fake.canned["/api/jobs/"] = (302, {"Location": f"{elsewhere.url}/api/jobs/"}, b"")
        assert f"is redirected to {elsewhere.url}/api/jobs/" in refusal(fake)
        assert elsewhere.seen == []


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"", b"[]", b"\xff\xfe"])
def test_refusal__another_web_server(body: bytes, fake: FakeJobServer) -> None:
    fake.canned["/api/authentication_mode"] = (200, {}, body)
    assert "what answers there is no job server of Ray" in refusal(fake)


PAGE = b"<!DOCTYPE HTML>\n<html>\n<p>sorry</p>\n</html>\n"


def test_refusal__a_web_server_without_that_page_is_no_job_server(fake: FakeJobServer) -> None:
    fake.canned["/api/authentication_mode"] = (404, {}, PAGE)
    said = refusal(fake)
    assert said.startswith(f"{fake.url}: what answers there is no job server of Ray") and "</html>" not in said


def test_refusal__a_page_of_a_proxy_is_told_by_its_status(fake: FakeJobServer) -> None:
    fake.canned["/api/jobs/"] = (502, {}, PAGE)
    assert refusal(fake) == f"{fake.url}: HTTP 502: Bad Gateway"


def test_refusal__https_where_there_is_none_names_http(fake: FakeJobServer) -> None:
    address = fake.url.replace("http:", "https:")
    with pytest.raises(JobServerError, match=f"^{address}: no https .* is at http://$"):
        JobServer(address).jobs()


def test_refusal__an_error_of_the_server_is_its_last_line(fake: FakeJobServer) -> None:
    fake.canned["/api/jobs/"] = (500, {}, b"Traceback (most recent call last):\n  ...\nRuntimeError: it hurts\n\n")
    assert refusal(fake) == f"{fake.url}: HTTP 500: RuntimeError: it hurts"


def test_refusal__nothing_listens_and_nothing_answers(fake: FakeJobServer) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(JobServerError, match=r"nothing listens there; .* port 8265"):
        JobServer(closed).jobs()
    fake.canned["/api/authentication_mode"] = None
    with pytest.raises(JobServerError, match=r"no answer within 0\.2 s; .* port 8265"):
        JobServer(fake.url, timeout_s=0.2).jobs()


def test_refusal__what_is_no_http() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def greet() -> None:
            connection, _ = listener.accept()
            connection.recv(1000)
            connection.sendall(b"220 smtp.example.org ESMTP\r\n")
            connection.close()

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(JobServerError, match="no job server of Ray"):
            JobServer(f"http://127.0.0.1:{listener.getsockname()[1]}").jobs()


def test_submit__runs_the_words_as_they_are_and_asks_for_no_resources(fake: FakeJobServer) -> None:
    server = JobServer(fake.url)
    server.submit("a", ["python", "-m", "x", "k=it's $HOME; [1, 2]"], runtime_env={"env_vars": {}}, metadata={"a": "b"})
    record = fake.jobs["a"]
    assert record["entrypoint"] == "exec python -m x 'k=it'\"'\"'s $HOME; [1, 2]'"
    assert not [name for name in record if name.startswith("entrypoint_")]
    with pytest.raises(JobExists, match="job a: the id is taken"):
        server.submit("a", ["true"], runtime_env={}, metadata={})


def test_packages__are_known_once_sent(fake: FakeJobServer) -> None:
    server = JobServer(fake.url)
    assert not server.has_package("_ray_pkg_1.zip")
    server.upload("_ray_pkg_1.zip", b"zip")
    assert server.has_package("_ray_pkg_1.zip") and fake.packages == {"_ray_pkg_1.zip": b"zip"}


def test_job__unknown_and_odd_ids(fake: FakeJobServer) -> None:
    fake.add("a")
    assert JobServer(fake.url).job("a").id == "a"
    with pytest.raises(NoSuchJob, match="Job b does not exist"):
        JobServer(fake.url).job("b")
    with pytest.raises(NoSuchJob):
        JobServer(fake.url).job("../version")
    assert fake.seen[-1][1] == "/api/jobs/..%2Fversion"


def test_versions__what_is_not_told_is_left_out(fake: FakeJobServer) -> None:
    assert JobServer(fake.url).versions() == {"ray": "2.60.0", "python": "3.11.7"}
    fake.canned["/api/v0/cluster_metadata"] = (404, {}, b"404: Not Found")
    assert JobServer(fake.url).versions() == {"ray": "2.60.0"}


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://head:8265", "http://head:8265"),
        ("http://head:8265/", "http://head:8265"),
        ("head:8265", "http://head:8265"),
        ("https://ray.example.org", "https://ray.example.org"),
        ("https://ray.example.org/cluster-a/", "https://ray.example.org/cluster-a"),
        ("http://[::1]:8265", "http://[::1]:8265"),
    ],
)
def test_server_address__forms(given: str, found: str) -> None:
    assert server_address(given) == found


NO_NAME = ["http://h ead:8265", "http://head\t:8265", "http://.:8265", f"http://{'a' * 64}:8265", " "]


@pytest.mark.parametrize(
    "given", ["ray://head:10001", "auto", "http://head", "http://head:port", "http://", "head:x", *NO_NAME]
)
def test_server_address__of_something_else(given: str) -> None:
    with pytest.raises(JobServerError, match=r"expected the job server of a cluster, such as http://HEAD:8265"):
        server_address(given)


@pytest.mark.parametrize("given", ["http://me:{}@head:8265", "http://head:8265/?token={}", "http://head:8265/#{}"])
def test_server_address__password_is_refused_and_not_shown(given: str) -> None:
    with pytest.raises(JobServerError, match="user, password or query") as caught:
        server_address(given.format(SECRET))
    assert SECRET not in str(caught.value)


def test_server_address__from_the_variables_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    with pytest.raises(JobServerError, match="no job server is given; use --address"):
        server_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert server_address(None) == "http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:8265")
    assert server_address(None) == "http://other:8265"
    assert server_address("http://given:8265") == "http://given:8265"


def test_submit__waits_for_the_agent_of_a_head_that_has_just_begun(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.canned["/api/jobs/"] = (500, {}, b"No available agent to submit job, please try again later.")
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            fake.canned.clear()

    monkeypatch.setattr("cluster.job_server.time.sleep", sleep)
    JobServer(fake.url).submit("a", ["true"], runtime_env={}, metadata={})
    assert list(fake.jobs) == ["a"] and len(waited) == 2
    fake.canned["/api/jobs/"] = (500, {}, b"No available agent to submit job, please try again later.")
    monkeypatch.setattr("cluster.job_server.YOUNG_HEAD_S", -1.0)
    with pytest.raises(JobServerError, match="No available agent"):
        JobServer(fake.url).submit("b", ["true"], runtime_env={}, metadata={})
