"""`pretrain submit`, `jobs`, `status`, `logs` and `stop` against a fake job server, and with local runs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import cluster.job_package as job_package
import pretrain.cli.jobs as commands
from cluster.job_package import PackageTooLarge, files_below, packed
from cluster.job_server import JobServer
from pretrain.cli.main import main
from pretrain.config.load import load_plan
from pretrain.config.recipe_files import recipe_content
from pretrain.config.stages import plan_yaml
from pretrain.errors import RequestError
from pretrain.jobs.environment import read_environment
from pretrain.jobs.listing import is_stopping, row_of_job, told_by_log
from pretrain.record.events import CheckpointPublished, Evaluated, Event, Failed, Finished, Metrics, Start, Stopped
from pretrain.record.journal import Journal
from pretrain.record.lock import hold
from pretrain.record.run_dir import SIGNALLED, RunDir
from pretrain.record.standing import newest_checkpoint, standing_of
from pretrain.reporting.terminal import Terminal
from pretrain.screen import escaping_console
from pretrain.sweeps.grid import sweep_id
from tests.cluster.fake_job_server import FakeJobServer, fake_job_server

SECRET = "hunter2-of-mine"
RECIPE = """
name: mine
objective: {name: mae}
backbone: {name: vit_tiny_patch16_224, image_size: 32, patch_size: 8, options: {depth: 2, embed_dim: 48, num_heads: 3}}
data: {train: "/shards/train-{000..003}.tar"}
optimizer: {base_lr: 2.0e-3, warmup_steps: 2}
train: {steps: 20, checkpoint_every: 5, global_batch_size: 32, workers: 2}
evaluation: {enabled: false}
"""


@pytest.fixture(autouse=True)
def nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fake() -> Iterator[FakeJobServer]:
    with fake_job_server() as server:
        yield server


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return str(path)


def submitted(fake: FakeJobServer, recipe: str, *more: str) -> int:
    return main(["submit", recipe, "storage=/shared/runs", "--address", fake.url, *more])


# --- submit


def test_submit__ships_recipe_and_code_and_prints_the_id(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(fake, recipe, "train.steps=30", "--run-id", "a") == 0
    said = capsys.readouterr()
    assert said.out == "a\n" and "/shared/runs/a in the cluster" in said.err
    job = fake.jobs["a"]
    run = "-m pretrain run mine.yaml train.steps=30 storage=/shared/runs cluster.address=null"
    assert job["entrypoint"] == (
        f"exec python -m pretrain.jobs.supervisor --run-dir /shared/runs/a -- {run} --run-id a"
    )
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}
    assert {key: job["metadata"][key] for key in ("run_id", "run_dir", "attempt")} == {
        "run_id": "a",
        "run_dir": "/shared/runs/a",
        "attempt": "1",
    }
    ((name, content),) = fake.packages.items()
    assert job["runtime_env"]["working_dir"] == f"gcs://{name}"
    names = set(zipfile.ZipFile(io.BytesIO(content)).namelist())
    assert {"mine.yaml", "pretrain/worker.py", "cluster/connect.py", "pretrain/recipes/demo.yaml"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_submit__the_shipped_code_runs_by_itself(fake: FakeJobServer, recipe: str, tmp_path: Path) -> None:
    """Nothing that the command needs is left behind."""
    assert submitted(fake, recipe, "--run-id", "a") == 0
    (content,) = fake.packages.values()
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path / "node")
    code = "import pretrain; from pretrain.cli.main import main; print(pretrain.__file__); main(['recipes', 'demo'])"
    environment = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "node", env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path / "node/pretrain/__init__.py")), done.stderr
    assert "name: demo" in done.stdout or "objective" in done.stdout


def test_submit__a_recipe_by_name_and_paths_of_the_package_need_no_file(
    fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(commands.__file__).parents[2])  # a checkout, where those paths lie below the current folder
    assert submitted(fake, "demo", "--run-id", "a") == 0
    assert " run demo storage=/shared/runs " in fake.jobs["a"]["entrypoint"]


def test_submit__the_same_live_run_is_one_job(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [submitted(fake, recipe, "--run-id", "a") for _ in range(2)] == [0, 0]
    said = capsys.readouterr()
    assert list(fake.jobs) == ["a"] and said.out == "a\na\n" and "at work already" in said.err
    puts = [path for method, path, _ in fake.seen if method == "PUT"]
    assert len(puts) == 1


def test_submit__to_a_job_that_is_stopping_says_so(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray calls a job running until it has ended, which may take minutes after a stop."""
    submitted(fake, recipe, "--run-id", "a")
    fake.jobs["a"]["status"], fake.logs["a"] = "RUNNING", "run a: not stopping after the next step\n"
    assert submitted(fake, recipe, "--run-id", "a") == 0
    fake.logs["a"] += "stopping after the next step, with a checkpoint; again to end at once\n"
    capsys.readouterr()
    for more in ((), ("train.steps=99",)):  # what it differs in matters not: it ends
        assert submitted(fake, recipe, "--run-id", "a", *more) == 75
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("job a was asked to stop and is about to end, so nothing was")
        assert f"pretrain logs -f a --address {fake.url}" in told.err and len(told.err.splitlines()) == 1
    assert list(fake.jobs) == ["a"]


@pytest.mark.parametrize(
    ("status", "said", "state"),
    [
        ("RUNNING", "stopping all runs, with a checkpoint each; again to end at once", "stopping"),
        ("RUNNING", "ending at once, as asked: closing what is open", "stopping"),
        ("RUNNING", "stopping the service: what is at work ends", "stopping"),
        ("RUNNING", "1/2 x=1: stopping after the next step", "running"),
        ("STOPPED", "stopping after the next step, with a checkpoint; again to end at once", "stopped"),
    ],
)
def test_row_of_job__stopping_until_it_has_ended(status: str, said: str, state: str, fake: FakeJobServer) -> None:
    fake.add("a", status, log=f"step 3/20: loss 1.0\n{said}\n", metadata={"run_id": "a"})
    server = JobServer(fake.url)
    assert row_of_job(server, server.job("a")).state == state
    assert is_stopping(server, server.job("a")) == (state == "stopping")


def test_submit__to_a_job_whose_run_is_seen_to_be_stopping(
    fake: FakeJobServer, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path / "runs", "a")
    command = ["submit", recipe, f"storage={run.path.parent}", "--run-id", "a", "--address", fake.url]
    assert main(command) == 0
    fake.jobs["a"]["status"] = "RUNNING"
    run.stop_request.touch()  # of an attempt that has ended
    assert main(command) == 0
    lock = hold(run.driver_lock)
    assert lock is not None
    with lock:
        assert main(command) == 75
    assert "is about to end" in capsys.readouterr().err


def test_submit__another_recipe_under_a_live_name_is_refused(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(fake, recipe, "--run-id", "a")
    assert submitted(fake, recipe, "train.steps=99", "--run-id", "a") == 2
    assert "error: --run-id a: job a of that run is at work with another recipe" in capsys.readouterr().err
    assert list(fake.jobs) == ["a"]


def test_submit__an_ended_run_goes_on_as_the_next_attempt(fake: FakeJobServer, recipe: str) -> None:
    for end in ("STOPPED", "FAILED", "SUCCEEDED"):
        submitted(fake, recipe, "--run-id", "a")
        list(fake.jobs.values())[-1]["status"] = end
    submitted(fake, recipe, "--run-id", "a", "train.steps=99")
    assert list(fake.jobs) == ["a", "a.2", "a.3", "a.4"]
    assert [job["metadata"]["attempt"] for job in fake.jobs.values()] == ["1", "2", "3", "4"]
    assert all(" --run-id a" in job["entrypoint"] for job in fake.jobs.values())


def test_submit__an_id_of_somebody_elses_job_is_passed_over(fake: FakeJobServer, recipe: str) -> None:
    fake.add("a")
    assert submitted(fake, recipe, "--run-id", "a") == 0
    assert list(fake.jobs) == ["a", "a.2"]


def test_submit__sent_twice_at_the_same_moment_is_one_job(
    fake: FakeJobServer, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list of jobs that the second one has read is from before the first was sent."""
    submitted(fake, recipe, "--run-id", "a")
    read = JobServer.jobs
    lists = iter([[]])
    monkeypatch.setattr(JobServer, "jobs", lambda server: next(lists, None) or read(server))
    assert submitted(fake, recipe, "--run-id", "a") == 0
    assert list(fake.jobs) == ["a"] and "at work already" in capsys.readouterr().err


def swept(fake: FakeJobServer, recipe: str, *more: str) -> int:
    return submitted(fake, recipe, "--sweep", "optimizer.base_lr=1e-3,2e-3", "train.seed=1,2", *more)


def test_submit_sweep__is_one_job_which_runs_it_there(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert swept(fake, recipe, "--parallel", "2", "--env", "LC_ALL=C", "--retries", "3") == 0
    ((job_id, job),) = fake.jobs.items()
    said = capsys.readouterr()
    assert said.out == f"{job_id}\n" and f"the sweep is /shared/runs/sweeps/{job_id} in the cluster" in said.err
    settings = ["optimizer.base_lr=1e-3,2e-3", "train.seed=1,2"]
    there = [*settings, "storage=/shared/runs", "cluster.address=null"]
    assert job["entrypoint"] == (
        f"exec python -m pretrain.jobs.supervisor --run-dir /shared/runs/sweeps/{job_id} --retries 3 --sweep "
        f"-- -m pretrain run mine.yaml --sweep {' '.join(there)} --parallel 2 --retries 3"
    )
    # The folder is that which the command makes there.
    assert job_id == sweep_id("mine", "mine.yaml", recipe_content(recipe), there)
    assert (job["metadata"]["work"], job["metadata"]["run_id"]) == ("sweep", job_id)
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600", "LC_ALL": "C"}
    (content,) = fake.packages.values()
    assert "mine.yaml" in zipfile.ZipFile(io.BytesIO(content)).namelist()


def test_submit_sweep__the_same_request_is_one_job_and_goes_on(
    fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [swept(fake, recipe) for _ in range(2)] == [0, 0]
    (job_id,) = fake.jobs
    assert "at work already" in capsys.readouterr().err
    assert swept(fake, recipe, "--parallel", "2") == 2
    assert f"job {job_id} runs that sweep with another --parallel" in capsys.readouterr().err
    fake.jobs[job_id]["status"] = "STOPPED"
    assert swept(fake, recipe, "--parallel", "2") == 0 and list(fake.jobs) == [job_id, f"{job_id}.2"]
    assert swept(fake, recipe, "train.steps=30") == 0 and len(fake.jobs) == 3  # another sweep


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["train.seed=1"], "no setting has several values"),
        (["train.seed=1,x"], "train.seed=x: expected a whole number"),
        (["train.seed=1,2", "storage=runs"], "storage: runs is relative to the current folder of this machine"),
        (["train.seed=1,2", "data.train=https://me:pw@host/x.tar"], "data.train: a user, password or query"),
        (["train.seed=1,2", "--env", "MLFLOW_TRACKING_TOKEN=" + SECRET], "looks like a secret"),
        (["train.seed=1,2", "--run-id", "a"], "--run-id a: a sweep has a run for each combination"),
    ],
)
def test_submit_sweep__a_wrong_request_is_refused_before_anything_is_asked(
    more: list[str], said: str, fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(fake, recipe, "--sweep", *more) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and SECRET not in complaint and "pw@" not in complaint
    assert fake.seen == [] and fake.jobs == {}


def test_submit__parallel_without_a_sweep(fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert submitted(fake, recipe, "--parallel", "2") == 2
    assert "--parallel 2: is how many runs of a sweep there are" in capsys.readouterr().err and fake.seen == []


def served(fake: FakeJobServer, *more: str) -> int:
    return main(["schedule", "serve", "--as-job", "--address", fake.url, *more])


def test_serve__as_job_is_one_for_each_storage(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    env = ["--env", "ALERT_URL", "--env", "ALERT_SECRET=@/run/alert"]
    assert served(fake, "--storage", "/shared/runs", *env) == 0
    assert served(fake, "--storage", "/shared/x/../runs/", *env) == 0
    said = capsys.readouterr()
    ((job_id, job),) = fake.jobs.items()
    assert said.out == f"{job_id}\n{job_id}\n" and "at work already" in said.err
    assert job["entrypoint"] == (
        "exec python -m pretrain.jobs.supervisor --run-dir /shared/runs/schedules --need ALERT_URL "
        "--file ALERT_SECRET=/run/alert -- -m pretrain schedule serve --storage /shared/runs"
    )
    assert job["metadata"]["work"] == "schedules"
    fake.jobs[job_id]["status"] = "FAILED"  # the head was started anew
    assert served(fake, "--storage", "/shared/runs") == 0 and served(fake, "--storage", "/other") == 0
    assert list(fake.jobs)[1] == f"{job_id}.2" and len(fake.jobs) == 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ([], "--storage runs: is relative to the current folder of this machine"),
        (["--storage", "/shared", "--once"], "--once: a job serves until it is stopped"),
        (["--storage", "/shared", "--env", "ALERT_SECRET=" + SECRET], "--env ALERT_SECRET: looks like a secret"),
    ],
)
def test_serve__as_job_refuses(
    more: list[str], said: str, fake: FakeJobServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert served(fake, *more) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and SECRET not in complaint and fake.seen == []


def test_serve__options_of_a_job_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--address", "http://head:8265"], ["--env", "X=1"]):
        assert main(["schedule", "serve", *option]) == 2
        assert f"{option[0]}: is of a job; add --as-job" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["storage=runs"], "storage: runs is relative to the current folder of this machine"),
        (["data.train=mine/x-{0..3}.tar"], "data.train: mine/x-{0..3}.tar is relative"),
        (["data.train=https://me:pw@host/x.tar"], "data.train: a user, password or query in a URL would be readable"),
        ([f"description=ghp_{SECRET}-and-more"], "description: looks like a secret"),
        (["train.stepz=3"], "train.stepz=3: unknown setting"),
        (["--run-id", "a/b"], "--run-id a/b: expected a letter or digit"),
        (["--env", "MLFLOW_TRACKING_TOKEN=" + SECRET], "--env MLFLOW_TRACKING_TOKEN: looks like a secret"),
        (["--env", "MLFLOW_TRACKING_URI=https://me:pw@host"], "--env MLFLOW_TRACKING_URI: holds a URL with user"),
    ],
)
def test_submit__a_wrong_request_is_refused_before_anything_is_asked(
    more: list[str], said: str, fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submitted(fake, recipe, *more) == 2
    complaint = capsys.readouterr().err
    assert said in complaint and SECRET not in complaint and "pw@" not in complaint
    assert fake.seen == [] and fake.jobs == {}


def test_submit__credentials_in_a_recipe_are_refused_with_their_line(
    fake: FakeJobServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE.replace("/shards/", f"https://me:{SECRET}@host/"))
    assert submitted(fake, str(path)) == 2
    said = capsys.readouterr().err
    assert "x.yaml, line 5: a user, password or query" in said and "PRETRAIN_URLS" in said and SECRET not in said
    path.write_text(f"{RECIPE}# glpat-{SECRET}-and-more\n")
    assert submitted(fake, str(path)) == 2
    said = capsys.readouterr().err
    assert "x.yaml, line " in said and "looks like a secret" in said and SECRET not in said and fake.jobs == {}


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"ray": "2.50.1"}, "has Ray 2.50.1, and jobs need 2.60 or later (here is 2."),
        ({"ray": "3.0.0"}, "has Ray 3.0.0"),
        ({"python": "3.9.18"}, "has Python 3.9.18, and jobs need 3.11 or later"),
    ],
)
def test_submit__a_cluster_of_other_versions_is_refused(
    versions: dict[str, str], said: str, fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.versions |= versions
    assert submitted(fake, recipe) == 2
    assert said in capsys.readouterr().err and fake.jobs == {} and fake.packages == {}


def test_submit__warns_of_a_token_that_others_can_read(
    fake: FakeJobServer, recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.token = SECRET
    path = tmp_path / "home/.ray/auth_token"
    path.parent.mkdir(parents=True)
    path.write_text(SECRET)
    path.chmod(0o644)
    assert submitted(fake, recipe, "--run-id", "a") == 0
    said = capsys.readouterr()
    assert "warning: ~/.ray/auth_token has mode 0644" in said.err and SECRET not in said.err + said.out
    assert SECRET not in json.dumps(fake.jobs)


def test_submit__a_missing_token_is_2(fake: FakeJobServer, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    fake.token = SECRET
    assert submitted(fake, recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {fake.url} asks for a token, and there is none: set RAY_AUTH_TOKEN")


def test_submit__ships_plugins_with_their_entry_points(
    fake: FakeJobServer, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    (site / "my_plugin").mkdir(parents=True)
    (site / "my_plugin/__init__.py").write_text("ANSWER = 42\n")
    (site / "my_plugin-1.2.dist-info").mkdir()
    (site / "my_plugin-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: my-plugin\nVersion: 1.2\n")
    entries = "[console_scripts]\nx = my_plugin:x\n\n[pretrain.evaluations]\nmine = my_plugin:Mine\n"
    (site / "my_plugin-1.2.dist-info/entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(str(site))
    assert submitted(fake, recipe, "--run-id", "a") == 0
    (content,) = fake.packages.values()
    zipfile.ZipFile(io.BytesIO(content)).extractall(tmp_path / "node")
    code = (
        "from importlib.metadata import entry_points as e; print([p.load() for p in e(group='pretrain.evaluations')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("Mine", "ANSWER")],
        cwd=tmp_path / "node",
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert "module 'my_plugin' has no attribute 'Mine'" in done.stderr  # found, and imported from there
    assert str(tmp_path / "node") in done.stderr or "AttributeError" in done.stderr
    assert not (tmp_path / "node/my_plugin-1.2.dist-info/entry_points.txt").read_text().count("console_scripts")


# --- what is shipped


def test_packed__equal_files_make_equal_packages(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    first = packed({"a.py": tmp_path / "a.py", "b": b"2"})
    (tmp_path / "a.py").touch()
    again = packed({"b": b"2", "a.py": tmp_path / "a.py"})
    assert first == again and first.uri == f"gcs://{first.name}" and first.name.startswith("_ray_pkg_")
    assert packed({"a.py": b"1", "b": b"3"}).name != first.name


def test_packed__too_much_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stray.bin").open("wb") as file:
        file.truncate(120 * 2**20)
    (tmp_path / "a.py").write_text("1")
    monkeypatch.setattr(job_package.zipfile, "ZipFile", None)
    with pytest.raises(PackageTooLarge) as refused:
        packed(files_below(tmp_path, "x"))
    said = str(refused.value)
    assert "has 120 MiB, and at most 90 are shipped" in said and f"{tmp_path}/stray.bin (120.0 MiB)" in said


def test_files_below__without_caches_hidden_files_and_links_to_folders(tmp_path: Path) -> None:
    for name in ("a.py", "b/c.yaml", "b/__pycache__/c.pyc", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/up").symlink_to(tmp_path)
    assert sorted(files_below(tmp_path, "x")) == ["x/a.py", "x/b/c.yaml"]


def test_read_environment__names_values_and_files() -> None:
    found = read_environment(["HF_TOKEN", "A=b=c", "X_TOKEN=@/run/secrets/x", "AWS_SHARED_CREDENTIALS_FILE=/mnt/aws"])
    assert found.needed == ("HF_TOKEN",)
    assert found.values == {"A": "b=c", "AWS_SHARED_CREDENTIALS_FILE": "/mnt/aws"}
    assert found.files == {"X_TOKEN": "/run/secrets/x"}


@pytest.mark.parametrize(
    "text",
    [
        f"WANDB_API_KEY={SECRET}",
        f"my_password={SECRET}",
        f"HfToken={SECRET}",
        f"DB_DSN={SECRET}",
        f"AWS_SECRET_ACCESS_KEY={SECRET}",
        f"TOKEN_FILE={SECRET}",
        f"URL=https://me:{SECRET}@host/x",
        f"URL=https://host/x?sig={SECRET}",
        f"GH=ghp_{SECRET}-and-more",
        f"X={SECRET.replace('-', '').upper()}abcdefghij0123456789",
        f"a b={SECRET}",
        "X=@relative",
        "RAY_ADDRESS=head:6379",
        "1X",
        "=x",
    ],
)
def test_read_environment__refuses_without_showing(text: str) -> None:
    with pytest.raises(RequestError) as refused:
        read_environment([text])
    (line,) = refused.value.mistakes
    assert line.startswith("--env ") and SECRET not in line


def test_read_environment__twice_is_refused() -> None:
    with pytest.raises(RequestError, match="--env A: is given twice"):
        read_environment(["A=1", "A"])


# --- jobs, status, logs, stop

LOG = """training on 2 x cpu, steps 0 to 20
step 5/20  loss 0.5
evaluation of step 5: knn/photos/top1 34.0% (known)
checkpoint at step 10: checkpoints/step-00000010
step 12/20  loss 0.25
"""


def test_jobs__states_progress_and_scores(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    of = {"metadata": {"run_id": "a", "run_dir": "/shared/runs/a", "attempt": "1"}}
    fake.add("somebody-elses")
    fake.add("a", "RUNNING", LOG, **of)
    fake.add("b", "PENDING", message="Job has not started yet.", **of)
    fake.add("c", "FAILED", LOG, driver_exit_code=75, **of)
    fake.add("d", "FAILED", LOG, driver_exit_code=2, message="...\nerror: it is wrong\n", **of)
    assert main(["jobs", "--address", fake.url]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines[1:5]] == [["a", "running"], ["b", "waiting"], ["c", "stopped"], ["d", "failed"]]
    assert lines[1][2:4] == ["step", "12/20"] and lines[1][-4:] == ["knn/photos/top1", "34.0%", "(step", "5)"]
    assert [" ".join(line) for line in lines[5:]] == [
        "b: Job has not started yet.",
        "d: exit code 2: error: it is wrong",
    ]


def test_jobs__one_whose_log_is_gone_hides_no_other(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "RUNNING", LOG, metadata={"run_id": "a"})
    fake.add("b", "RUNNING", LOG, metadata={"run_id": "b"})
    fake.canned["/api/jobs/a/logs"] = (500, {}, b"Traceback\nConnectionError: the node is gone")
    assert main(["jobs", "--address", fake.url]) == 0
    said = capsys.readouterr().out
    assert "step 12/20" in said and "a: its log cannot be read: " in said and "the node is gone" in said


def test_jobs__of_local_runs_where_the_environment_names_a_cluster_but_no_job_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    assert main(["jobs"]) == 0
    assert capsys.readouterr().out.startswith("no run in /")


def test_submit__at_home_is_where_the_home_is_here(fake: FakeJobServer, recipe: str, tmp_path: Path) -> None:
    assert main(["submit", recipe, "storage=~/runs", "--address", fake.url, "--run-id", "a"]) == 0
    assert f" storage={tmp_path}/home/runs cluster.address=null " in fake.jobs["a"]["entrypoint"]
    assert fake.jobs["a"]["metadata"]["run_dir"] == f"{tmp_path}/home/runs/a"


def test_told_by_log__the_last_word_counts() -> None:
    assert told_by_log(LOG) == ("step 12/20", "knn/photos/top1 34.0% (step 5)")
    assert told_by_log(LOG + "stopped after step 13\n") == ("step 13/20", "knn/photos/top1 34.0% (step 5)")
    assert told_by_log("connecting\n") == ("", "")


def test_told_by_log__of_a_sweep_counts_runs() -> None:
    log = "sweep x-1 in /s/sweeps/x-1: 4 runs, 4 to do, at most 2 at a time; output in logs/\n1/4 train.seed=1: run a\n"
    assert told_by_log(log) == ("0/4 runs", "")
    log += "1/4 train.seed=1: done\n2/4 train.seed=2: run b\n2/4 train.seed=2: failed: error: done\n"
    assert told_by_log(log) == ("1/4 runs", "")
    log += "sweep x-1 in /s/sweeps/x-1: 4 runs, 3 to do, at most 2 at a time; output in logs/\n2/4 train.seed=2: done\n"
    assert told_by_log(log) == ("2/4 runs", "")


def test_told_by_log__reads_what_a_driver_prints() -> None:
    written = io.StringIO()
    console = escaping_console(written, soft_wrap=True)
    terminal = Terminal(load_plan("demo", ["train.steps=20", "optimizer.warmup_steps=2"], check_files=False), console)
    said = []
    for event in (START, metrics(7), EVALUATED, CheckpointPublished(step=8, path="checkpoints/x"), Stopped(step=9)):
        terminal.show(event)
        said.append(told_by_log(written.getvalue())[0])
    assert said == ["", "step 7/20", "step 7/20", "step 8/20", "step 9/20"]
    assert told_by_log(written.getvalue())[1] == "knn/photos/top1 34.0% (step 5)"


def test_status__of_the_last_attempt_or_of_one(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    for number, state in ((1, "STOPPED"), (2, "RUNNING")):
        job_id = "a" if number == 1 else f"a.{number}"
        fake.add(job_id, state, LOG, metadata={"run_id": "a", "run_dir": "/shared/a", "attempt": str(number)})
    assert main(["status", "a", "--address", fake.url]) == 0
    assert "id          a.2\n" in capsys.readouterr().out
    assert main(["status", "a.2", "--address", fake.url]) == 0
    assert "state       running\n" in capsys.readouterr().out
    assert main(["status", "aa", "--address", fake.url]) == 2
    assert f"error: job aa: not in {fake.url}" in capsys.readouterr().err


def test_logs__of_a_job(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "SUCCEEDED", "one\n\x1b[31mtwo")
    assert main(["logs", "a", "--address", fake.url]) == 0
    assert capsys.readouterr().out == "one\n\\x1b[31mtwo\n"


def test_log_lines__as_they_come_whole_and_once(fake: FakeJobServer) -> None:
    fake.add("a", "RUNNING", "one\ntw")
    steps = iter([("one\ntwo\nth", "RUNNING"), ("one\ntwo\nth", "RUNNING"), ("one\ntwo\nthree", "SUCCEEDED")])

    def wait(seconds: float) -> None:
        fake.logs["a"], fake.jobs["a"]["status"] = next(steps)

    server = JobServer(fake.url)
    assert list(commands._log_lines(server, server.job("a"), True, wait)) == ["one", "two", "three"]


def test_stop__gracefully_and_twice(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "RUNNING", metadata={"run_id": "a"})
    assert main(["stop", "a", "--address", fake.url]) == 0
    assert fake.jobs["a"]["status"] == "STOPPED"
    assert capsys.readouterr().out == "asked job a to end after the step at work, with a checkpoint\n"
    assert main(["stop", "a", "--address", fake.url]) == 0
    assert "nothing to stop, it is stopped" in capsys.readouterr().err


def test_stop__now_writes_a_file_where_the_run_is(fake: FakeJobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("a", "RUNNING", metadata={"run_id": "a", "run_dir": "/shared/it's/a"})
    commands_run: list[str] = []

    def submit(server: JobServer, job_id: str, words: list[str], **options: object) -> None:
        commands_run.append(words)
        fake.add(job_id, "SUCCEEDED")

    monkeypatch.setattr(JobServer, "submit", submit)
    assert main(["stop", "a", "--now", "--address", fake.url]) == 0
    assert commands_run == [["touch", "/shared/it's/a/stop-now"]]
    assert list(fake.jobs) == ["a"] and fake.jobs["a"]["status"] == "STOPPED"


def test_stop__now_is_written_here_too_where_the_run_is_seen(
    fake: FakeJobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the job that writes it in the cluster has begun, which may take half a minute."""
    run = run_with(tmp_path / "runs", "a")
    fake.add("a", "RUNNING", metadata={"run_id": "a", "run_dir": str(run.path)})
    written: list[bool] = []

    def submit(server: JobServer, job_id: str, words: list[str], **options: object) -> None:
        written.append(run.stop_now_request.exists())
        fake.add(job_id, "SUCCEEDED")

    monkeypatch.setattr(JobServer, "submit", submit)
    assert main(["stop", "a", "--now", "--address", fake.url]) == 0
    assert written == [True]


def test_stop__now_is_not_for_a_service(fake: FakeJobServer, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("s", "RUNNING", metadata={"run_id": "s", "run_dir": "/shared/runs/schedules", "work": "schedules"})
    assert main(["stop", "s", "--now", "--address", fake.url]) == 2
    assert "a service ends what is at work in any case; stop it without --now" in capsys.readouterr().err
    assert list(fake.jobs) == ["s"] and fake.jobs["s"]["status"] == "RUNNING"


# --- local runs


def run_with(storage: Path, name: str, *events: Event) -> RunDir:
    run = RunDir(storage / name)
    run.path.mkdir(parents=True)
    plan = load_plan("demo", [f"storage={storage}"], check_files=False)
    run.recipe.write_text(plan_yaml(plan))
    with Journal(run.journal) as journal:
        for event in events:
            journal.write(event)
    return run


START = Start(step=0, total_steps=20, world_size=1, device="cpu", time=1000.0)


EVALUATED = Evaluated(
    step=5, protocol="knn", data="photos", metrics={"top1": 0.34, "k": 20.0}, key="x", seconds=1.0, cached=True
)


def metrics(step: int) -> Metrics:
    return Metrics(step=step, values={"loss": 0.5}, time=1000.0 + step)


@pytest.mark.parametrize(
    ("events", "state", "step"),
    [
        ([START, metrics(7)], "failed", 7),
        ([START, metrics(7), Stopped(step=8)], "stopped", 8),
        ([START, metrics(20), Finished(step=20)], "finished", 20),
        ([START, metrics(3), Failed(error="it broke")], "failed", 3),
        ([START, metrics(3), Failed(error="it broke"), START, metrics(9)], "failed", 9),
        ([START, metrics(3), Stopped(step=3), START, metrics(20), Finished(step=20)], "finished", 20),
        ([START, CheckpointPublished(step=4, path="checkpoints/step-4")], "failed", 4),
    ],
)
def test_standing_of__by_what_happened_last(events: list[Event], state: str, step: int, tmp_path: Path) -> None:
    found = standing_of(run_with(tmp_path, "a", *events))
    assert (found.state, found.step, found.total_steps) == (state, step, 20)
    assert (found.note == "it broke") == (events[-1] == Failed(error="it broke", time=events[-1].time))


def test_standing_of__running_while_the_lock_is_held(tmp_path: Path) -> None:
    run = run_with(tmp_path, "a", START, metrics(3))
    lock = hold(run.driver_lock)
    assert lock is not None
    assert standing_of(run).state == "running"
    run.stop_request.touch()
    assert standing_of(run).state == "stopping"
    assert hold(run.driver_lock) is None
    lock.close()
    assert standing_of(run).state == "failed"


def test_standing_of__a_torn_last_line_and_texts_that_look_like_events(tmp_path: Path) -> None:
    run = run_with(tmp_path, "a", START, metrics(3), Failed(error='{"kind": "finished", "step": 9}'))
    with run.journal.open("a") as file:
        file.write('{"time": 1, "kind": "finished", "st')
    found = standing_of(run)
    assert found.state == "failed" and found.note.startswith("{")
    assert newest_checkpoint(run) == ""


def test_jobs__of_a_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "runs", "a", START, metrics(7), Stopped(step=8))
    with Journal(run.evaluations) as journal:
        journal.write(EVALUATED)
    run_with(tmp_path / "runs", "b", START, metrics(2), Failed(error="it broke"))
    assert main(["jobs"]) == 0
    out = capsys.readouterr().out
    assert "stopped  step 8/20" in out and "knn/photos/top1 34.0% (step 5)" in out and "b: it broke" in out
    assert main(["jobs", "--storage", "nowhere"]) == 2
    assert main(["jobs", "--storage", "runs", "--address", "http://h:1"]) == 2


def test_logs__of_a_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(tmp_path / "runs", "a", START, metrics(7), Stopped(step=8))
    assert main(["logs", "-f", "a"]) == 0
    said = capsys.readouterr()
    assert "step 7/700  loss 0.5000\nstopped after step 8\n" in said.out and said.err == "run a: stopped\n"


@pytest.mark.parametrize("at_once", [False, True])
def test_stop__of_a_local_run(at_once: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with(tmp_path / "runs", "a", START)
    flags = ["--now"] if at_once else []
    assert main(["stop", "a", *flags]) == 0
    assert "nothing to stop, it is failed" in capsys.readouterr().err and not run.stop_request.exists()
    lock = hold(run.driver_lock)
    assert lock is not None
    with lock:
        assert main(["stop", "a", *flags]) == 0
    assert (run.stop_request.exists(), run.stop_now_request.exists()) == (not at_once, at_once)
    assert run.is_stop_wanted
    run.stop_request.write_text(SIGNALLED)
    assert run.is_stop_wanted == at_once
