"""`verify` names every damage by shard, sample and offset, and goes on behind it."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.inspection.verify import Finding, verify
from data_pipelines.shards.index import scan_shard, sidecar

Members = Sequence[tuple[str, bytes]]
WriteTar = Callable[[Path, Members], Path]

SAMPLES = 6


def png(seed: int, shape: tuple[int, ...] = (16, 16, 3)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def describe(folder: Path, shards: Sequence[Path], name: str = "name", **more: object) -> None:
    """Write a `dataset.json`; `name` is `file` in those of other people."""
    entries = [
        {
            name: shard.name,
            "samples": SAMPLES,
            "bytes": shard.stat().st_size,
            "sha256": hashlib.sha256(shard.read_bytes()).hexdigest(),
        }
        for shard in shards
    ]
    (folder / "dataset.json").write_text(json.dumps({"splits": {"train": {"shards": entries}}, **more}))


@pytest.fixture
def shards(tmp_path: Path, write_tar: WriteTar) -> list[Path]:
    """Three shards of six samples (`png`, `cls`), without index and description."""
    return [
        write_tar(
            tmp_path / f"train-{shard:06d}.tar",
            [
                member
                for number in range(shard * SAMPLES, (shard + 1) * SAMPLES)
                for member in ((f"{number:03d}.cls", b"%d" % (number % 4)), (f"{number:03d}.png", png(number)))
            ],
        )
        for shard in range(3)
    ]


@pytest.fixture
def described(shards: list[Path]) -> list[Path]:
    """The same with a sidecar index each and a `dataset.json`."""
    for shard in shards:
        scan_shard(shard).save(Path(sidecar(str(shard))))
    describe(shards[0].parent, shards, classes=list("abcd"))
    return shards


def member_offset(shard: Path, name: str) -> int:
    with tarfile.open(shard) as archive:
        return archive.getmember(name).offset


def test_verify__whole_data_have_no_findings(described: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(described[0].parent, progress=lambda done, total: seen.append((done, total)))
    assert report.findings == []
    assert (report.num_shards, report.num_samples) == (3, 18)
    assert report.num_bytes == sum(shard.stat().st_size for shard in described)
    assert report.fields == {"cls": 18, "png": 18}
    assert report.unknown == report.never_read == frozenset()
    assert seen == [(1, 3), (2, 3), (3, 3)]


def cut_inside_a_member(content: bytes, header: int) -> bytes:
    return content[: header + 512 + 100]


def cut_at_a_header(content: bytes, header: int) -> bytes:
    return content[:header]


def cut_inside_a_header(content: bytes, header: int) -> bytes:
    return content[: header + 200]


def bad_header_checksum(content: bytes, header: int) -> bytes:
    return content[: header + 148] + b"7" + content[header + 149 :]


def zeroed_header(content: bytes, header: int) -> bytes:
    return content[:header] + bytes(512) + content[header + 512 :]


def flipped_byte(content: bytes, header: int) -> bytes:
    at = header + 512 + 300
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def emptied(content: bytes, header: int) -> bytes:
    return b""


def html_page(content: bytes, header: int) -> bytes:
    return b"<!DOCTYPE html><title>503</title>" * 100


DAMAGES: dict[str, tuple[Callable[[bytes, int], bytes], int | None, str, int]] = {
    # name: what is done, offset of the finding (None: of the damaged header), what it says, samples found in the shard
    "cut inside a member": (cut_inside_a_member, None, "member '008.png' needs the bytes up to", 3),
    "cut at a header": (cut_at_a_header, None, "no end of archive after member '008.cls'", 3),
    "cut inside a header": (cut_inside_a_header, None, "damaged or cut header after member '008.cls'", 3),
    "bad header checksum": (bad_header_checksum, None, "damaged header after member '008.cls'; the next readable", 6),
    "zeroed header": (zeroed_header, None, "zeroed header after member '008.cls'; the next readable", 6),
    "empty file": (emptied, 0, "the file is empty (0 bytes)", 0),
    "HTML page": (html_page, 0, "not a plain tar: begins with b'<!DOCTYPE html><'", 0),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_verify__names_shard_and_offset_of_a_damage(name: str, shards: list[Path]) -> None:
    """Nothing but the tar says what is wrong: there is neither an index nor a `dataset.json`."""
    damage, offset, said, found = DAMAGES[name]
    damaged = shards[1]
    header = member_offset(damaged, "008.png")
    damaged.write_bytes(damage(damaged.read_bytes(), header))
    report = verify(shards[0].parent, decode=False)
    (finding,) = report.findings
    assert (finding.shard, finding.offset) == (str(damaged), header if offset is None else offset)
    assert finding.problem.startswith(said)
    assert str(finding).startswith(f"{damaged}") and f" at offset {finding.offset}: " in str(finding)
    assert report.num_samples == 2 * SAMPLES + found


@pytest.mark.parametrize("name", [*DAMAGES, "flipped byte"])
def test_verify__index_and_description_tell_more(name: str, described: list[Path]) -> None:
    """The samples that a damage hits are named by their CRC; a flipped byte is found by nothing else."""
    damage, _, said, found = DAMAGES.get(name, (flipped_byte, None, "CRC-32 of", SAMPLES))
    damaged = described[1]
    header, sample = member_offset(damaged, "008.png"), member_offset(damaged, "008.cls")
    damaged.write_bytes(damage(damaged.read_bytes(), header))
    report = verify(described[0].parent, decode=False)
    problems = [finding.problem for finding in report.findings]
    assert {finding.shard for finding in report.findings} == {str(damaged)}
    assert any(problem.startswith(said) for problem in problems)
    assert any(problem.startswith("SHA-256 is") for problem in problems)
    assert any(problem == f"{found} samples, dataset.json says 6" for problem in problems) == (found != SAMPLES)
    is_longer_or_shorter = len(damaged.read_bytes()) != described[0].stat().st_size
    assert any("bytes, dataset.json says" in problem for problem in problems) == is_longer_or_shorter
    hit = [finding for finding in report.findings if finding.key == "008"]
    assert [finding.offset for finding in hit if finding.problem.startswith(("CRC-32", "needs"))] == [sample]


def test_verify__every_damage_of_a_shard_is_found(described: list[Path]) -> None:
    """Two zeroed headers, two undecodable members and one label that is no class, in one shard."""
    content = bytearray(described[2].read_bytes())
    for name in ("012.png", "015.cls"):
        offset = member_offset(described[2], name)
        content[offset : offset + 512] = bytes(512)
    for name in ("013.png", "017.png"):
        offset = member_offset(described[2], name) + 512
        content[offset : offset + 300] = bytes(300)
    content[member_offset(described[2], "016.cls") + 512] = ord("9")
    described[2].write_bytes(content)
    report = verify(described, decode=True)
    assert all(finding.shard == str(described[2]) for finding in report.findings)
    said = {(finding.key, finding.problem.split(";")[0].split(":")[0]) for finding in report.findings}
    assert said >= {
        (None, "zeroed header after member '012.cls'"),
        (None, "zeroed header after member '014.png'"),
        ("013", "field png (image)"),
        ("017", "field png (image)"),
        ("016", "field cls (label)"),
    }
    crc_of = [finding.key for finding in report.findings if finding.problem.startswith("CRC-32")]
    assert crc_of == ["012", "013", "015", "016", "017"]
    offsets = [finding.offset for finding in report.findings if finding.offset is not None]
    assert offsets == sorted(offsets)


def is_whole(content: bytes) -> bool:
    """Whether these bytes are USTAR members with true checksums and then zeros; written without `tarfile`."""
    begin = 0
    while any(header := content[begin : begin + 512]):
        try:
            size, checksum = (int(header[at:end].split(b"\0")[0], 8) for at, end in ((124, 136), (148, 156)))
        except ValueError:
            return False
        if len(header) < 512 or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
            return False
        begin += 512 + -(-size // 512) * 512
    return len(content) - begin >= 1024 and not any(content[begin:])


def test_verify__as_strict_as_the_scan_and_never_at_a_loss(shards: list[Path], tmp_path: Path) -> None:
    """Whatever is done to a tar: `scan_shard` refuses it and `verify` names its damage just when it is not whole."""
    content, draw = shards[0].read_bytes(), random.Random(0)
    folder = tmp_path / "fuzzed"
    folder.mkdir()
    shard, refused = folder / "train-000000.tar", 0
    for trial in range(150):
        damaged = bytearray(content[: draw.randrange(len(content))] if trial % 3 == 0 else content)
        for _ in range(draw.randrange(4) if damaged else 0):
            at = draw.randrange(0, len(damaged), 512) + draw.randrange(160)  # headers are hit more often than data
            damaged[min(at, len(damaged) - 1)] ^= 1 << draw.randrange(8)
        shard.write_bytes(damaged)
        try:
            scan_shard(shard)
            is_refused = False
        except DataError as error:
            is_refused = True
            assert str(error).startswith(f"shard {shard}") and " at offset " in str(error)
        report = verify(shard, decode=trial % 10 == 0)
        structural = [finding for finding in report.findings if not finding.problem.startswith("field ")]
        whole = is_whole(bytes(damaged))
        assert (not is_refused, not structural) == (whole, whole), (trial, report.findings)
        refused += is_refused
    assert 50 < refused < 150


@pytest.mark.parametrize(
    ("members", "key", "said"),
    [
        ([("a.cls", b"1"), ("b.cls", b"1"), ("a.png", b"")], "a", "sample was begun at offset 0 already"),
        ([("a.cls", b"1"), ("a.cls", b"2")], "a", "repeats field 'cls'"),
        ([("a.CLS", b"1"), ("a.cls", b"2")], "a", "repeats field 'cls'"),
        ([("caf\udce9.cls", b"1"), ("a.cls", b"2")], None, "member 'caf\\udce9.cls' has a name that is not UTF-8"),
        ([], None, "the tar holds no sample (10240 bytes)"),
    ],
)
def test_verify__samples_that_are_none(
    members: Members, key: str | None, said: str, tmp_path: Path, write_tar: WriteTar
) -> None:
    (finding,) = verify(write_tar(tmp_path / "a.tar", members), decode=False).findings
    assert finding.key == key and finding.problem.startswith(said)


def test_verify__links_are_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = tarfile.TarInfo("a.cls")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    (finding,) = verify(tmp_path / "a.tar").findings
    assert (finding.key, finding.offset) == ("a", 0) and "regular files only" in finding.problem


class Payload:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize(
    ("field", "data", "said"),
    [
        ("jpg", b"GIF89a...", "field jpg (image): not a JPEG or PNG or WEBP image"),
        ("png", png(1)[:-200], "field png (image): cannot decode image"),
        ("seg.png", png(1), "field seg.png (mask): mask has 3 channels"),
        ("depth.png", b"", "field depth.png (depth): not a PNG image"),
        ("cls", b"cat", "field cls (label): label b'cat' is not an integer"),
        ("cls", b"-1", "field cls (label): -1 is outside 0..1, the classes of dataset.json"),
        ("cls", b"2", "field cls (label): 2 is outside 0..1, the classes of dataset.json"),
        ("json", b'{"a": ', "field json (json): not valid JSON"),
        ("txt", b"\xff\xfe", "field txt (text): not UTF-8 text"),
        ("points.npy", npy(np.zeros((5, 3)))[:-1], "field points.npy (points): array of shape (5, 3)"),
        ("npz", b"PK\x03\x04 no archive", "field npz (array): cannot decode array"),
        ("x.npy", b"", "field x.npy (array): "),
    ],
)
def test_verify__members_that_do_not_decode(
    field: str, data: bytes, said: str, tmp_path: Path, write_tar: WriteTar
) -> None:
    (tmp_path / "dataset.json").write_text('{"classes": ["cat", "dog"], "fields": {"jpg": "photos, by hand"}}')
    shard = write_tar(tmp_path / "a.tar", [("one.cls", b"0"), (f"two.{field}", data), ("three.cls", b"1")])
    (finding,) = verify(shard).findings
    assert (finding.key, finding.offset) == ("two", member_offset(shard, f"two.{field}"))
    assert finding.problem.startswith(said)
    assert verify(shard, decode=False).findings == []


def test_verify__pickles_are_never_read(tmp_path: Path, write_tar: WriteTar) -> None:
    trace = tmp_path / "executed"
    objects = np.empty(1, object)
    objects[0] = Payload(trace)
    code = pickle.dumps(Payload(trace))
    pickles = [(f"a.{field}", code) for field in ("pkl", "pickle", "pyd", "pth", "pt", "pkl.gz")]
    shard = write_tar(tmp_path / "a.tar", [*pickles, ("a.npy", npy(objects)), ("a.flac", b"?")])
    report = verify(shard)
    assert not trace.exists()
    assert report.never_read == {"pkl", "pickle", "pyd", "pth", "pt", "pkl.gz"} and report.unknown == {"flac"}
    (finding,) = report.findings
    assert finding.key == "a" and "Python objects" in finding.problem


def test_verify__kinds_of_the_description_count(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "a.tar", [("a.left.bin", png(0)), ("a.water.bin", png(0))])
    assert verify(shard).unknown == {"left.bin", "water.bin"}
    (tmp_path / "dataset.json").write_text('{"fields": {"left.bin": "image", "water.bin": "mask"}}')
    report = verify(shard)
    assert report.unknown == frozenset()
    assert [finding.problem.split(":")[0] for finding in report.findings] == ["field water.bin (mask)"]


@pytest.mark.parametrize("name", ["name", "file"])
def test_verify__description_of_other_shards(name: str, shards: list[Path], write_tar: WriteTar) -> None:
    """A shard replaced by a good one, and one that is gone."""
    folder = shards[0].parent
    describe(folder, shards, name)
    write_tar(shards[0], [("a.cls", b"1")])
    shards[2].unlink()
    findings = verify(folder).findings
    assert findings[0] == Finding(str(shards[2]), None, None, "missing, though dataset.json lists it")
    assert {finding.shard for finding in findings[1:]} == {str(shards[0])}
    assert [finding.problem.split(" says ")[0].split(" is ")[0] for finding in findings[1:]] == [
        "10240 bytes, dataset.json",
        "1 samples, dataset.json",
        "SHA-256",
    ]
    assert verify(f"{folder}/*-00000[12].tar").findings == findings[:1]
    assert verify(shards[1]).findings == []  # the others were not asked for


def test_verify__description_that_is_none(shards: list[Path]) -> None:
    path = shards[0].with_name("dataset.json")
    path.write_text("{,")
    (finding,) = verify(shards[0]).findings
    assert finding.shard == str(path) and finding.problem.startswith("not valid: ")
    path.write_text('["of other people"]')
    assert verify(shards[0]).findings == []


def test_verify__index_of_another_file(described: list[Path]) -> None:
    """One index of a shard of the same size but other content, one that is no index."""
    Path(sidecar(str(described[0]))).write_bytes(Path(sidecar(str(described[1]))).read_bytes())
    Path(sidecar(str(described[2]))).write_bytes(b"nothing")
    same_size = described[0].stat().st_size == described[1].stat().st_size
    first, *_, last = verify(described).findings
    assert (first.shard, last.shard) == (str(described[0]), str(described[2]))
    assert same_size and first.problem.startswith("CRC-32 of")
    assert last.problem.startswith("the sidecar index is damaged or of another file")


def test_verify__processes_find_the_same(described: list[Path]) -> None:
    for shard, name in ((described[0], "001.png"), (described[2], "013.png")):
        shard.write_bytes(zeroed_header(shard.read_bytes(), member_offset(shard, name)))
    alone, together = verify(described), verify(described, workers=2)
    assert len(alone.findings) >= 6
    assert alone == together


def test_verify__remote_shards(fault_server: Any, described: list[Path]) -> None:
    header = member_offset(described[1], "008.png")
    described[1].write_bytes(flipped_byte(described[1].read_bytes(), header))
    described[2].unlink()
    fault_server.files = {f"/{path.name}": path.read_bytes() for path in described[0].parent.iterdir()}
    url = fault_server.root
    findings = verify([f"{url}/train-{{000000..000002}}.tar?token=secret"]).findings
    assert {finding.shard for finding in findings} == {f"{url}/train-000001.tar", f"{url}/train-000002.tar"}
    assert [finding.key for finding in findings if finding.problem.startswith("CRC-32")] == ["008"]
    assert findings[-1].problem.startswith("cannot be fetched: ") and "404" in findings[-1].problem
    assert not any("secret" in str(finding) for finding in findings)


def test_verify__wrong_sources_are_errors_not_findings(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.tar shard"):
        verify(tmp_path)


@pytest.mark.parametrize("name", ["points_psb", "volumes_hippocampus", "rgbd_7scenes"])
def test_verify__real_data(name: str, shared_data: Path) -> None:
    report = verify(shared_data / name)
    assert report.findings == [] and report.unknown == frozenset() and report.num_samples > 100


def test_verify__real_masks_and_damage(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_bytes((shared_data / "camvid" / "dataset.json").read_bytes())
    shard = tmp_path / "val-000000.tar"
    shard.write_bytes((shared_data / "camvid" / shard.name).read_bytes())
    assert verify(shard).findings == []
    with tarfile.open(shard) as archive:
        member = archive.getmembers()[51]
    assert member.name.endswith(".seg.png")
    content = bytearray(shard.read_bytes())
    content[member.offset_data + member.size // 2] ^= 0x10
    shard.write_bytes(content)
    key = member.name.split(".")[0]
    digest, *decoded = verify(shard).findings
    assert digest.problem.startswith("SHA-256 is ")
    assert [(finding.key, finding.offset) for finding in decoded] == [(key, member.offset)]


def test_verify__samples_without_a_picture_are_named(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", png(1)), ("2.cls", b"2"), ("3.png", png(3))])
    write_tar(tmp_path / "b.tar", [("4.cls", b"1")])
    first, second = verify(tmp_path).findings
    assert (first.key, first.problem) == ("2", "has no picture, 2 samples of the shard have; it has cls")
    assert second.shard.endswith("b.tar") and "no sample has a picture" in second.problem


def test_verify__labels_of_other_classes_are_found_by_name(tmp_path: Path, write_tar: WriteTar) -> None:
    """Shards of `val` packed by itself, put beside those of `train`: fox is 1 there and 2 here."""
    members = [("1.png", png(1)), ("1.cls", b"1"), ("1.json", b'{"class_name":"fox"}')]
    write_tar(tmp_path / "val-000000.tar", members)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog", "fox"]}))
    (finding,) = verify(tmp_path).findings
    assert finding.key == "1" and finding.problem.startswith(
        "class 1, but its class_name 'fox' is class 2 of dataset.json"
    )
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["cat", "fox"]}))
    assert verify(tmp_path).findings == []


def test_verify__warns_of_copies_and_of_names_with_dots(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", [("1.png", png(1)), ("2.png", png(2))])
    write_tar(tmp_path / "test-0.tar", [("3.png", png(3)), ("4.png", png(2))])
    for decode in (True, False):
        with pytest.warns(
            UserWarning, match="^1 sample of test has the content of one of train, the first is number 1"
        ):
            assert verify(tmp_path, decode=decode).findings == []
    dotted = write_tar(tmp_path / "names.tar", [("cat.0.jpg", png(1)), ("cat.1.jpg", png(2))])
    with pytest.warns(UserWarning, match=r"fields 0\.jpg, 1\.jpg look like rests of names with dots"):
        assert verify(dotted).findings == []
