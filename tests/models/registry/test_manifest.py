"""The files of a manifest are read complete and unaltered, or rejected with the name of the wrong file."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.registry import manifest

FILES = {"a.bin": b"\x00" * 40, "README.md": b"# hello\n", "z-1.x": b""}
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(
    lambda name: name != manifest.CHECKSUMS_FILE
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    manifest.write_files(tmp_path / "sealed", FILES)
    return tmp_path / "sealed"


def test_reads_what_was_written(directory: Path) -> None:
    assert manifest.read_files(directory) == FILES


@given(st.dictionaries(names, st.binary(max_size=50), min_size=1, max_size=5))
def test_any_files_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    if len({name.lower() for name in files}) < len(files):
        return  # a file system may hold them to be one
    directory = tmp_path_factory.mktemp("any") / "sealed"
    seal = manifest.write_files(directory, files)
    assert manifest.read_files(directory) == files
    assert manifest.read_digest(directory) == seal


def test_the_digest_depends_on_names_and_bytes_only(tmp_path: Path) -> None:
    first = manifest.write_files(tmp_path / "1", FILES)
    assert manifest.write_files(tmp_path / "2", dict(reversed(FILES.items()))) == first
    assert manifest.write_files(tmp_path / "3", {**FILES, "z-1.x": b"1"}) != first
    assert manifest.write_files(tmp_path / "4", {"b.bin" if n == "a.bin" else n: d for n, d in FILES.items()}) != first


def test_sha256sum_accepts_it(directory: Path) -> None:
    check = subprocess.run(
        ["sha256sum", "--strict", "-c", manifest.CHECKSUMS_FILE], cwd=directory, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    assert check.stdout.count(": OK") == len(FILES)


def test_an_existing_directory_is_never_written_into(directory: Path) -> None:
    with pytest.raises(FileExistsError):
        manifest.write_files(directory, {"new": b""})
    assert manifest.read_files(directory) == FILES


@pytest.mark.parametrize("name", FILES)
def test_rejects_a_flipped_bit_by_file_name(directory: Path, name: str) -> None:
    data = bytearray(FILES[name] or b"\x00")
    data[len(data) // 2] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(manifest.Corrupt, match=f"{name} was altered"):
        manifest.read_files(directory)


@pytest.mark.parametrize("name", ["a.bin", "README.md"])
def test_rejects_a_truncated_file_by_name(directory: Path, name: str) -> None:
    (directory / name).write_bytes(FILES[name][:-1])
    with pytest.raises(manifest.Corrupt, match=f"{name} was altered"):
        manifest.read_files(directory)


@pytest.mark.parametrize("name", [*FILES, manifest.CHECKSUMS_FILE])
def test_rejects_a_missing_file_by_name(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(manifest.Corrupt, match=f"{name}: No such file"):
        manifest.read_files(directory)


@pytest.mark.parametrize("name", [*FILES, manifest.CHECKSUMS_FILE])
def test_rejects_a_link_even_to_the_right_bytes(directory: Path, tmp_path: Path, name: str) -> None:
    (directory / name).rename(tmp_path / name)
    (directory / name).symlink_to(tmp_path / name)
    with pytest.raises(manifest.Corrupt, match=f"{name}: is a symbolic link, expected a regular file"):
        manifest.read_files(directory)


def test_rejects_a_directory_in_place_of_a_file(directory: Path) -> None:
    (directory / "a.bin").unlink()
    (directory / "a.bin").mkdir()
    with pytest.raises(manifest.Corrupt, match=r"a\.bin: is a directory, expected a regular file"):
        manifest.read_files(directory)


@pytest.mark.parametrize(
    "sums",
    [
        "",
        "\n",
        "garbage",
        "0" * 64 + "  ../a.bin\n",
        "0" * 64 + "  /etc/passwd\n",
        "0" * 64 + "  .hidden\n",
        "0" * 63 + "  a.bin\n",
        "0" * 64 + " *a.bin\n",
        "0" * 64 + "  a.bin\x00\n",
        "0" * 64 + "  ä.bin\n",
    ],
)
def test_rejects_malformed_checksums_and_paths(directory: Path, sums: str) -> None:
    (directory / manifest.CHECKSUMS_FILE).write_text(sums, encoding="latin-1")
    with pytest.raises(manifest.Corrupt, match="is not a list of checksums"):
        manifest.read_files(directory)


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_rejects_a_flipped_bit_in_the_manifest(directory: Path, position: int) -> None:
    sums = bytearray((directory / manifest.CHECKSUMS_FILE).read_bytes())
    sums[position % len(sums)] ^= 1
    (directory / manifest.CHECKSUMS_FILE).write_bytes(sums)
    with pytest.raises(manifest.Corrupt):
        manifest.read_files(directory)


def test_ignores_files_outside_the_manifest(directory: Path) -> None:
    """Files outside the manifest are not loaded, and are no error."""
    (directory / "stray.py").write_text("raise SystemExit")
    assert manifest.read_files(directory) == FILES


# Mapped


def test_mapped_files_equal_read_files(directory: Path) -> None:
    assert {name: bytes(data) for name, data in manifest.map_files(directory).items()} == FILES
    assert manifest.file_names(directory) == FILES.keys()


def test_copies_a_file_given_as_a_path(directory: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * 9000)
    seal = manifest.write_files(tmp_path / "1", {"big": big, "small": b"x"})
    assert manifest.read_files(tmp_path / "1") == {"big": big.read_bytes(), "small": b"x"}
    assert manifest.write_files(tmp_path / "2", {"small": b"x", "big": big.read_bytes()}) == seal


@pytest.mark.parametrize("name", FILES)
def test_never_maps_an_altered_file(directory: Path, name: str) -> None:
    (directory / name).write_bytes(FILES[name] + b"x")
    with pytest.raises(manifest.Corrupt, match=f"{name} was altered"):
        manifest.map_files(directory)


def test_never_maps_a_link(directory: Path, tmp_path: Path) -> None:
    (directory / "a.bin").rename(tmp_path / "a.bin")
    (directory / "a.bin").symlink_to(tmp_path / "a.bin")
    with pytest.raises(manifest.Corrupt, match=r"a\.bin: is a symbolic link"):
        manifest.map_files(directory)


def test_replacing_a_mapped_file_changes_nothing(directory: Path, tmp_path: Path) -> None:
    files = manifest.map_files(directory)
    (tmp_path / "other").write_bytes(b"evil" * 10)
    (tmp_path / "other").rename(directory / "a.bin")
    (directory / "README.md").unlink()
    assert {name: bytes(data) for name, data in files.items()} == FILES


def test_a_mapping_cannot_be_written(directory: Path) -> None:
    with pytest.raises(TypeError):
        manifest.map_files(directory)["a.bin"][0] = 1  # type: ignore[index]
