"""Dockerfile, compose file and the commands of docs/deployment.md, as far as they can be checked without building."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.manifests.kuberay import USER
from cluster.secret_names import holds_secret
from pretrain.cli.main import main
from pretrain.config.load import load_plan

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


def program(name: str) -> str:
    """A program of the development environment."""
    found = shutil.which(name) or shutil.which(name, path=Path(sys.executable).parent)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def commands(begin: str) -> list[str]:
    """Indented lines of the page that begin so, with those they go on in."""
    page = PAGE.replace(" \\\n       ", "")
    return [line.strip() for line in page.splitlines() if line.startswith(f"    {begin}")]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return content


def test_dockerfile__passes_hadolint() -> None:
    found = subprocess.run([program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_dockerfile__ends_as_the_user_of_the_manifests_and_copies_what_is_there() -> None:
    """A missing USER is not noticed by hadolint."""
    lines = DOCKERFILE.read_text().splitlines()
    last_stage = lines[max(index for index, line in enumerate(lines) if line.startswith("FROM ")) :]
    assert f"USER {USER}:{USER}" in last_stage
    sources = [source for line in lines if re.match(r"COPY (?!--from)", line) for source in line.split()[1:-1]]
    packages = {
        f"{name}/" for name in ("backbones", "cluster", "data_pipelines", "evaluation", "objectives", "pretrain")
    }
    assert packages <= set(sources) and all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[0] == "*" and {f"!{source}" for source in sources} <= set(ignored)


def test_image__has_the_versions_that_are_tested() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines() if "==" in line
    )
    lines = (ROOT / "deploy" / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if not line.startswith("#")]
    assert f"ray[default]=={pinned['ray']}" in wanted
    assert {re.split(r"[\[=]", line)[0] for line in wanted} <= pinned.keys()


def test_compose__ports_are_local_images_are_tagged_and_no_password_is_written(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert all(str(port).startswith("127.0.0.1:") for port in service["ports"]), name
        assert re.search(r":(?!latest)[\w.-]+$", service["image"]), name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        for variable, value in service.get("environment", {}).items():
            if holds_secret(variable, str(value)) or variable.startswith("AWS_ACCESS"):
                assert re.fullmatch(r"\$\{[A-Z_]+:\?.+\}", value), variable
    identities = compose["configs"]["store"]["content"]
    assert re.findall(r'"(?:accessKey|secretKey)": "(\$\{[A-Z_]+:\?)', identities) == [
        "${STORE_ACCESS_KEY:?",
        "${STORE_SECRET_KEY:?",
    ]
    head = compose["services"]["ray"]
    assert head["environment"]["RAY_AUTH_MODE"] == "token" and head["shm_size"] == "4gb"


def test_compose__the_command_of_the_page_draws_every_password(compose: dict[str, Any], tmp_path: Path) -> None:
    program("openssl")
    (command,) = commands("(umask")
    (tmp_path / "deploy").mkdir()
    subprocess.run(["bash", "-euc", command], cwd=tmp_path, check=True)
    file = tmp_path / "deploy" / ".env"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    drawn = dict(line.split("=") for line in file.read_text().splitlines())
    needed = set(re.findall(r"\$\{([A-Z_]+):\?", (ROOT / "deploy" / "compose.yaml").read_text()))
    assert drawn.keys() == needed and len(set(drawn.values())) == 3 and all(len(v) == 48 for v in drawn.values())
    assert "deploy/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_page__manifest_commands_work_as_they_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = set()
    for command in commands("pretrain manifest"):
        arguments = shlex.split(command.replace("REGISTRY", "registry.example").replace("CLAIM", "claim"))[1:]
        kinds.add(arguments[arguments.index("--kind") + 1])
        assert main(arguments) == 0, command
        assert capsys.readouterr().out or "--output" in arguments
    assert kinds == {"rayjob", "raycluster", "raycronjob", "slurm", "ray-up"}
    assert {path.name for path in tmp_path.iterdir()} == {"cluster.yaml", "job.yaml", "job.sh"}


def test_page__recipes_of_runs_load_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stated = [*commands("pretrain run"), *(line for line in commands("docker compose") if " pretrain run " in line)]
    assert len(stated) == 5
    for command in stated:
        words = shlex.split(command.replace("HEAD", "ray-head"))
        recipe = words[words.index("run") + 1]
        settings = [word for word in words if "=" in word and not word.startswith(("storage=", "--"))]
        assert load_plan(recipe, settings, check_files=False).recipe.name == recipe
