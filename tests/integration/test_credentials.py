"""Credentials in the URLs of data: a run uses them and keeps them nowhere, and a resume asks for them."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from pretrain.config.load import load_for_resume
from pretrain.config.paths import absolute
from pretrain.errors import RequestError
from pretrain.record.events import Resumed
from pretrain.record.journal import read_events

pytestmark = pytest.mark.integration

USER, PASSWORD, SIGNATURE = "somebody", "pa/ss@word", "not-to-be-kept"


class Guarded(SimpleHTTPRequestHandler):
    """Files for who has the password and the signature."""

    def do_GET(self) -> None:
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {login}" and f"signature={SIGNATURE}" in self.path:
            super().do_GET()
        else:
            self.send_error(401)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "PRETRAIN_URLS", "PRETRAIN_URLS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    handler = partial(Guarded, directory=absolute("package:demo_data/grocery"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        login = f"{USER}:{quote(PASSWORD, safe='')}"
        yield f"http://{login}@127.0.0.1:{server.server_port}/train-000000.tar?signature={SIGNATURE}"
        server.shutdown()


def test_credentials__are_used_kept_nowhere_and_asked_for(
    shard: str, launch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("train.workers=1", "train.checkpoint_every=4", "evaluation.baseline=false")
    first = launch("guarded", f"data.train={shard}", *settings, "train.steps=4", ranks=1)
    first.wait()
    kept = [path for path in first.run_dir.rglob("*") if path.is_file()]
    assert len(kept) > 5
    for secret in (USER, PASSWORD, quote(PASSWORD, safe=""), SIGNATURE):
        assert [path.name for path in kept if secret.encode() in path.read_bytes()] == []

    saved = first.run_dir / "checkpoints/step-00000004/recipe.yaml"
    stored = f"http://***@127.0.0.1:{shard.partition('@127.0.0.1:')[2].partition('?')[0]}?***"
    with pytest.raises(RequestError) as refused:
        load_for_resume(saved, ())
    (line,) = refused.value.mistakes
    assert f"{stored}: credentials are not stored; put the whole URL into PRETRAIN_URLS" in line
    monkeypatch.setenv("PRETRAIN_URLS", shard)
    assert load_for_resume(saved, ()).recipe.data.train == stored

    again = launch("guarded", f"data.train={stored}", *settings, "train.steps=6", ranks=1)
    again.wait()
    resumed = [event for event in read_events(first.run_dir / "journal.jsonl")[0] if isinstance(event, Resumed)]
    assert [event.step for event in resumed] == [4]
