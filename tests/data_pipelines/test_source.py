"""What a recipe may say about where its shards are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.shards.source import check_source, expand_source, missing_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "train-000000.tar.index.npz").touch()
    return tmp_path


def names(source: object) -> list[str]:
    return [Path(path).name for path in expand_source(source)]  # type: ignore[arg-type]


def test_expand_source__directory_glob_braces_file_and_list_are_sorted_and_absolute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert names(str(folder)) == [*train, "val-000000.tar"]
    assert names(folder / "train-*") == train
    assert names(f"{folder}/train-{{000001..000002}}.tar") == train[1:]
    assert names(f"{folder}/{{val,train}}-000000.tar") == [train[0], "val-000000.tar"]
    assert names(f"{folder}/{{val,train}}-*.tar") == [*train, "val-000000.tar"]
    assert names(f"file://{folder}/train-*.tar") == train
    assert names([folder / "val-000000.tar", f"{folder}/train-000000.tar"]) == [train[0], "val-000000.tar"]
    monkeypatch.chdir(folder)
    assert expand_source("val-*.tar") == (str(folder / "val-000000.tar"),)


def test_expand_source__existing_path_is_taken_literally(tmp_path: Path) -> None:
    odd = tmp_path / "run[1]{a}"
    odd.mkdir()
    (odd / "x.tar").touch()
    assert names(odd) == ["x.tar"]
    assert names(odd / "x.tar") == ["x.tar"]


@pytest.mark.parametrize("source", ["pipe:echo x > {0}/owned; cat a.tar", "PIPE:cat a.tar"])
def test_expand_source__commands_are_refused_unless_allowed(folder: Path, source: str) -> None:
    source = source.replace("{0}", str(folder))
    for ask in (expand_source, check_source):
        with pytest.raises(DataError, match=r"is a command and is not run; set data.allow_pipe=true to allow it"):
            ask(source)
        assert expand_source(source, allow_pipe=True) == (source,)
    assert not (folder / "owned").exists()


def test_expand_source__of_a_command_only_number_ranges_are_expanded() -> None:
    source = "pipe:tar c {08..10} | awk '{print $1,$2}'"
    assert expand_source(source, allow_pipe=True) == tuple(
        f"pipe:tar c {number} | awk '{{print $1,$2}}'" for number in ("08", "09", "10")
    )


@pytest.mark.parametrize("source", ["hf://d/a.tar", "ftp://h/a.tar", "s3:b", "http:/h/a.tar"])
def test_expand_source__other_schemes_are_refused_with_what_is_allowed(source: str) -> None:
    scheme = source.partition(":")[0]
    with pytest.raises(
        DataError, match=rf"scheme '{scheme}' is not supported; allowed are local paths and file://"
    ) as c:
        expand_source(source)
    assert "s3://" in str(c.value) and "\n" not in str(c.value)


def test_expand_source__urls_by_name_and_braces_need_no_network() -> None:
    source = [
        "https://h/d/train-{000009..000011}.tar?sig=x",
        "s3://b/{train,val}-0.tar",
        "gs://b/a.tar",
        "gcs://b/c.tar",
    ]
    check_source(source)
    assert expand_source(source) == (
        "gcs://b/c.tar",
        "gs://b/a.tar",
        "https://h/d/train-000009.tar?sig=x",
        "https://h/d/train-000010.tar?sig=x",
        "https://h/d/train-000011.tar?sig=x",
        "s3://b/train-0.tar",
        "s3://b/val-0.tar",
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://h/train-*.tar", "a web server cannot be listed; name the shards, as in train-{000000..000012}.tar"),
        ("http://h/data", "http://h/data ends neither in .tar, as shards do, nor in '/', as directories do"),
        ("https://me:secret@h/a.tgz?token=secret", "https://h/a.tgz ends neither in .tar"),
        ("s3://b/train-*", "a glob names shards, as in train-*.tar"),
        ("s3://key:secret@b/a.tar", "s3://b/a.tar: credentials do not belong into a s3:// URL"),
        ("https://me:secret@h/a-{3..1}.tar", "runs backwards"),
        ("https://me:secret@h/a-{3..1.tar", "cannot read the braces of https://h/a-{3..1.tar"),
        ("http://h/{0..99999999999}.tar", "names more than 1000000 shards"),
        (["https://me:secret@h/a.tar", "https://me:secret@h/a.tar"], "shard https://h/a.tar is named twice"),
    ],
)
def test_check_source__wrong_urls_are_named_without_secrets(source: str | list[str], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_source(source)
    assert message in str(caught.value)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_check_source__knows_local_files_and_leaves_remote_stores_alone(folder: Path) -> None:
    check_source([str(folder), "s3://b/prefix/", "http://h/d/", "s3://b/train-*.tar"])
    with pytest.raises(DataError, match=r"no such shard: .*train-000009.tar"):
        check_source(["s3://b/prefix/", f"{folder}/train-000009.tar"])


class Listing:
    """A store that knows one `dataset.json` and one listing."""

    def __init__(self, manifest: object = None) -> None:
        self.manifest, self.asked = manifest, []  # type: object, list[str]

    def read_file(self, location: str, limit: int) -> bytes | None:
        self.asked.append(location)
        return None if self.manifest is None else json.dumps(self.manifest).encode()

    def glob(self, pattern: str) -> list[str]:
        self.asked.append(pattern)
        return [pattern.replace("*", "9"), pattern.replace("*", "8")]


def manifest(*names: str) -> dict[str, object]:
    entry = {"samples": 1, "bytes": 2048, "sha256": "0" * 64, "index_digest": "0" * 64}
    shards = [{"name": name, **entry} for name in names]
    split = {"samples": len(shards), "digest": "0" * 64, "shards": shards}
    return {"format": "pretrain-dataset/1", "name": "x", "fields": {"jpg": "image"}, "splits": {"train": split}}


def test_expand_source__remote_directory_is_listed_by_its_manifest() -> None:
    store = Listing(manifest("train-1.tar", "train-0.tar"))
    found = expand_source("https://h/d/?sig=x", store=store)  # type: ignore[arg-type]
    assert found == ("https://h/d/train-0.tar?sig=x", "https://h/d/train-1.tar?sig=x")
    assert store.asked == ["https://h/d/dataset.json?sig=x"]
    for name in ("../a.tar", "http://elsewhere/a.tar", "a.zip"):
        with pytest.raises(
            DataError, match=r"https://h/d/dataset.json lists .*, which is not the file name of a shard"
        ):
            expand_source("https://h/d/", store=Listing(manifest(name)))  # type: ignore[arg-type]


def test_expand_source__bucket_without_manifest_is_listed() -> None:
    for foreign in (None, {"classes": []}):
        store = Listing(foreign)
        assert expand_source("s3://b/d/", store=store) == ("s3://b/d/8.tar", "s3://b/d/9.tar")  # type: ignore[arg-type]
        assert store.asked == ["s3://b/d/dataset.json", "s3://b/d/*.tar"]


def test_expand_source__webdataset_variables_play_no_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", "http://h/=pipe:cat ")
    monkeypatch.setenv("WDS_REWRITE", "http://h/=pipe:cat ")
    assert expand_source("http://h/a.tar") == ("http://h/a.tar",)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0}/trian-*.tar", "no .tar shard matches {0}/trian-*.tar"),
        ("{0}/train-000009.tar", "no such shard: {0}/train-000009.tar; did you mean 'train-000002.tar'?"),
        ("{0}/train-{{000002..000004}}.tar", "no such shard: {0}/train-000003.tar"),
        ("{0}/train-{{000002..000001}}.tar", "runs backwards"),
        ("{0}/train-{{x}}.tar", "cannot read braces '{{x}}'"),
        ("{0}/empty", "no .tar shard in directory {0}/empty"),
        ("{0}/missing/a.tar", "there is no directory {0}/missing"),
        ("{0}/notes.txt", "{0}/notes.txt is not a .tar shard (suffix '.txt'); rename it"),
        (
            "{0}/train.tar.gz",
            "{0}/train.tar.gz is not a .tar shard (suffix '.gz'); unpack it, or set data.unindexed=stream",
        ),
        ("file://otherhost{0}/train-000000.tar", "is not a local file URL"),
        (" ", "an empty string is not a data source"),
    ],
)
def test_expand_source__wrong_sources_are_named_in_one_line(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "train.tar.gz").touch()
    with pytest.raises(DataError) as caught:
        expand_source(source.format(folder))
    assert message.format(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_expand_source__nothing_and_duplicates(folder: Path) -> None:
    with pytest.raises(DataError, match="the data source is empty"):
        expand_source([])
    with pytest.raises(DataError, match=r"train-000000.tar is named twice"):
        expand_source([str(folder), f"{folder}/train-000000.tar"])


def test_expand_source__compressed_shards_only_when_asked_for(folder: Path) -> None:
    plain = expand_source(folder)
    (folder / "more.tar.gz").touch()
    (folder / "more.tgz").touch()
    assert expand_source(folder) == plain
    assert set(expand_source(folder, compressed=True)) - set(plain) == {f"{folder}/more.tar.gz", f"{folder}/more.tgz"}
    assert expand_source("http://h/a-{0..1}.tar.gz", compressed=True) == ("http://h/a-0.tar.gz", "http://h/a-1.tar.gz")
    with pytest.raises(DataError, match=r"http://h/a.tar.gz ends neither in .tar, as"):
        expand_source("http://h/a.tar.gz")


def test_source__imports_nothing_heavy() -> None:
    heavy = ("torch", "numpy", "PIL", "fsspec", "asyncio")
    code = f"import sys, data_pipelines.shards.source; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["[2024] photos", "a{b}c", "photos: 2024", "what?", "100%25 #2", "~photos", "*"])
def test_expand_source__folders_that_exist_are_no_patterns(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for number in range(2):
        (folder / f"train-00000{number}.tar").touch()
    (tmp_path / "2 photos").mkdir()  # what the pattern [2024] would match
    (tmp_path / "2 photos" / "train-000009.tar").touch()
    both = [str(folder / "train-000000.tar"), str(folder / "train-000001.tar")]
    monkeypatch.chdir(tmp_path)
    for beginning in (name, str(folder), f"file://{folder}"):
        for end in ("", "/train-*.tar", "/train-{000000..000001}.tar", "/{train,train}-00000[01].tar"):
            if "{train" in end:
                with pytest.raises(DataError, match="named twice"):
                    expand_source(beginning + end)
            else:
                assert list(expand_source(beginning + end)) == both
                check_source(beginning + end)
        with pytest.raises(DataError, match=r"no such shard: .*train-000002.tar; did you mean 'train-00000"):
            check_source(f"{beginning}/train-000002.tar")


def test_expand_source__braces_may_lead_into_such_folders(tmp_path: Path) -> None:
    for name in ("[a]", "[b]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.tar").touch()
    assert expand_source(f"{tmp_path}/{{[a],[b]}}/*.tar") == (f"{tmp_path}/[a]/0.tar", f"{tmp_path}/[b]/0.tar")


def test_expand_source__of_any_length(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"train-{number:06d}.tar").touch()
    braces = "train-{" + ",".join(f"{number:06d}" for number in range(60)) + "}.tar"
    assert len(braces) > 400 and len(expand_source(f"{tmp_path}/{braces}")) == 60
    for source in (f"{tmp_path}/{'x' * 300}.tar", f"{tmp_path}/{'x' * 300}*.tar", f"{'y' * 5000}/a.tar", "a\0b.tar"):
        with pytest.raises(DataError, match=r"no such shard|no \.tar shard matches"):
            expand_source(source)
    with pytest.raises(DataError, match="names more than 1000000 shards"):
        expand_source(f"{tmp_path}/{{0..99999999999}}*.tar")


def test_expand_source__shards_that_are_listed_but_gone_are_counted_and_named(tmp_path: Path) -> None:
    listed = [f"{split}-00000{number}.tar" for split in ("train", "test") for number in range(4)]
    for name in listed:
        (tmp_path / name).touch()
    (tmp_path / "dataset.json").write_text(json.dumps(manifest(*listed)))
    assert names(tmp_path) == sorted(listed)
    gone = listed[:3]
    for name in gone:
        (tmp_path / name).unlink()
    for source in (tmp_path, f"{tmp_path}/train-*.tar", f"{tmp_path}/{{train,test}}-*.tar", f"file://{tmp_path}"):
        for ask in (expand_source, check_source):
            with pytest.raises(
                DataError, match=r"3 of the [48] shards that .*/dataset.json lists are missing: train-0"
            ):
                ask(source)
    (tmp_path / listed[3]).unlink()
    with pytest.raises(DataError, match=r"4 of the 4 shards .* missing: train-.*-000002.tar and 1 more; copy them ag"):
        expand_source(f"{tmp_path}/train-*.tar")
    assert (
        len(expand_source(f"{tmp_path}/test-*.tar"))
        == len(expand_source(f"{tmp_path}/test-{{000000..000003}}.tar"))
        == 4
    )
    assert missing_shards([f"{tmp_path}/train-*.tar"]) == [str(tmp_path / name) for name in listed[:4]]


def test_expand_source__of_other_peoples_description_counts_what_it_lists(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    for content in ({"splits": {"train": {"shards": [{"file": "b.tar"}]}}}, [1], {"splits": [2]}, {"splits": {"x": 3}}):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        assert missing_shards(tmp_path) == ([f"{tmp_path}/b.tar"] if "b.tar" in str(content) else [])
    (tmp_path / "dataset.json").write_text("no JSON")
    assert names(tmp_path) == ["a.tar"]


def test_expand_source__hidden_files_are_no_shards_and_that_is_said(folder: Path) -> None:
    before = names(folder)
    (folder / "._train-000000.tar").touch()
    with pytest.warns(UserWarning, match=r"left out hidden files of .*, such as \._train-000000\.tar"):
        assert names(folder) == before
    assert names(folder / "*.tar") == before
    assert names(folder / "._train-000000.tar") == ["._train-000000.tar"]  # what is named is meant
