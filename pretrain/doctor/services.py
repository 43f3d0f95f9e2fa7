"""Who answers: Ray's token and cluster, MLflow. Asked by plain HTTP, so neither library is imported.

How a cluster answers, or does not, `cluster.job_server` says.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import stat
import urllib.error
import urllib.request
from importlib import metadata
from pathlib import Path

from cluster.authentication import HOME_FILE
from cluster.job_server import JobServer, JobServerError
from cluster.redirects import opener_without_redirects
from data_pipelines.storage.locations import redact
from pretrain.doctor.finding import ANSWER_S, Finding
from pretrain.errors import last_line

__all__ = ["mlflow", "ray_cluster", "ray_token"]


def ray_token() -> Finding:
    """Who can read the token of Ray, which lets its owner run anything."""
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "disabled":
        remedy = "unset it, or set RAY_AUTH_MODE=token: without a token everybody in the network may run code"
        return Finding("ray token", "fail", "RAY_AUTH_MODE=disabled", remedy)
    said = f"RAY_AUTH_MODE={'not set' if mode is None else mode}"
    if mode not in (None, "token"):
        return Finding("ray token", "fail", said, "expected token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return Finding("ray token", "ok", f"{said}, token in the environment")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or HOME_FILE).expanduser()
    try:
        permissions = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        if named or mode == "token":
            remedy = "write the token of the cluster there, mode 0600"
            return Finding("ray token", "fail", f"{said}, and there is no {path}", remedy)
        return Finding("ray token", "ok", f"{said}, no token file: a private Ray draws its own")
    if permissions & 0o077:
        return Finding(
            "ray token", "fail", f"{path} has mode {permissions:04o}: others can read it", f"chmod 600 {path}"
        )
    return Finding("ray token", "ok", f"{said}, {path} has mode {permissions:04o}")


def ray_cluster(address: str | None) -> Finding:
    """Whether the dashboard of a cluster answers, to our token, and with our version of Ray."""
    if address is None:
        return Finding("ray cluster", "ok", "none asked for (--address): a run starts its own Ray")
    server = JobServer(address.rstrip("/"), ANSWER_S)
    try:
        token, versions = server.token, server.versions()
    except JobServerError as error:  # a line with its remedy
        remedy = "a dashboard that is not reachable from here: kubectl port-forward or ssh -L bring it here"
        return Finding("ray cluster", "fail", str(error), remedy)
    theirs, ours = versions.get("ray", "of no version"), metadata.version("ray")
    text = f"{server.address}: Ray {theirs}, authentication {'disabled' if token is None else 'by token'}"
    if theirs != ours:
        return Finding("ray cluster", "fail", f"{text}; here is {ours}", f"install ray=={theirs} here, or {ours} there")
    if token is None:
        return Finding("ray cluster", "warn", text, "set RAY_AUTH_MODE=token where the cluster is started")
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return Finding(
            "ray cluster", "warn", f"{text}, and RAY_AUTH_MODE is not set here", "export RAY_AUTH_MODE=token"
        )
    return Finding("ray cluster", "ok", text)


def mlflow() -> Finding:
    """Whether the tracking server takes our credentials."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return Finding("mlflow", "ok", "MLFLOW_TRACKING_URI is not set: a database beside the runs")
    if not uri.startswith(("http://", "https://")):
        return Finding("mlflow", "ok", f"{redact(uri)}: no server to ask")
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        login = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    url, shown = uri.rstrip("/"), redact(uri.rstrip("/"))
    try:
        _require_json(f"{url}/api/2.0/mlflow/experiments/search?max_results=1", headers)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            remedy = "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            return Finding("mlflow", "fail", f"{shown}: refuses our credentials (HTTP {error.code})", remedy)
        return Finding("mlflow", "fail", f"{shown}: HTTP {error.code}", "is this an MLflow server?")
    except (OSError, ValueError) as error:
        remedy = "is it up and reachable? Training goes on without it, and the record catches up"
        return Finding("mlflow", "fail", f"{shown}: {_reason(error)}", remedy)
    return Finding("mlflow", "ok", f"{shown}: answers" + (" to our credentials" if "Authorization" in headers else ""))


def _require_json(url: str, headers: dict[str, str]) -> None:
    """Ask a server for a JSON object.

    Raises:
        urllib.error.HTTPError, OSError, ValueError: It does not answer with one.
    """
    context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() == "true":
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = opener_without_redirects(urllib.request.HTTPSHandler(context=context))
    with opener.open(urllib.request.Request(url, headers=headers), timeout=ANSWER_S) as r:
        answer = json.loads(r.read(1 << 20))
    if not isinstance(answer, dict):
        raise ValueError("answers something else than a JSON object")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or last_line(cause if isinstance(cause, Exception) else error))
