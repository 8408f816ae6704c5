"""What is written: files whole or absent, folders of one run, rows of JSON, the ledger, and errors in one line."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zotuner.errors import ZotunerError, unknown
from zotuner.files import RUN_MARKS, built_aside, check_out, claim_out, locked, write_atomically
from zotuner.ledger import MAGIC, MAX_HEADER, Ledger, Record, read_ledger
from zotuner.metrics import MetricsLog, jsonable, keep_rows, read_rows

HEADER = {"method": "mezo", "seed": 3, "losses": 2}
RECORDS = tuple(Record(step, 1e-6 / (step + 1), (0.5 + step, 0.25 - step)) for step in range(5))
MEZO_RECORD = 4 + 8 + 2 * 4 + 4  # bytes: step, lr, two losses, CRC


def refuse(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("content", ["text: é\n", b"\x00\xff", ""])
def test_an_atomic_write_leaves_the_content_and_nothing_else(tmp_path: Path, content: str | bytes) -> None:
    write_atomically(tmp_path / "a.txt", content)
    assert tree(tmp_path) == {"a.txt": content.encode() if isinstance(content, str) else content}


def test_an_atomic_write_replaces_and_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old, and longer")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("old", ["old", None])
def test_a_write_that_fails_midway_leaves_what_was_there_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: str | None
) -> None:
    path = tmp_path / "a.txt"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "new")
    assert tree(tmp_path) == ({} if old is None else {"a.txt": b"old"})


def test_an_atomic_write_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])
    write_atomically(tmp_path / "a.txt", "new")
    assert calls == ["fsync", "replace"]


def test_a_folder_built_aside_appears_whole_and_in_place_of_the_old(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "folder"
    for name in ("old", "new"):
        with built_aside(target) as aside:
            (aside / f"{name}.txt").write_text(name)
            assert not (target / f"{name}.txt").exists()
    assert tree(tmp_path) == {"deep/folder/new.txt": b"new"}
    assert target.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in target.parent.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_folder_whose_building_fails_never_appears(tmp_path: Path, error: type[BaseException]) -> None:
    def build() -> None:
        with built_aside(tmp_path / "folder") as aside:
            (aside / "half.txt").write_text("half")
            raise error

    with pytest.raises(error):
        build()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_whose_building_fails_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")

    def build() -> None:
        with built_aside(target) as aside:
            (aside / "half.txt").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    assert tree(tmp_path) == {"folder/old.txt": b"old"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with built_aside(tmp_path / "link") as aside:
        (aside / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert tree(tmp_path / "real") == {"new.txt": b"new"}


@pytest.mark.parametrize("name", ["folder", "new"])
def test_a_folder_that_cannot_be_exchanged_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.txt").write_text("old")
    rename = Path.rename

    def build() -> None:
        with built_aside(tmp_path / "folder"):
            monkeypatch.setattr(Path, "rename", lambda path, to: refuse() if path.name == name else rename(path, to))

    with pytest.raises(OSError, match="no space"):
        build()
    assert tree(tmp_path) == {"folder/old.txt": b"old"}


def made(out: Path, kind: str) -> None:
    """Puts something at `out`."""
    if kind == "file":
        out.write_text("mine")
    elif kind != "nothing":
        out.mkdir()
    if kind == "run":
        for mark in RUN_MARKS:
            (out / mark).write_text("steps: 1\n")
        (out / "model").mkdir()
        (out / "model" / "weights").write_text("w")
    if kind == "foreign":
        (out / "thesis.tex").write_text("mine")


@pytest.mark.parametrize("kind", ["nothing", "empty"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_new_or_empty_folder_is_claimed(tmp_path: Path, kind: str, overwrite: bool) -> None:
    out = tmp_path / "out"
    made(out, kind)
    check_out(out, overwrite)
    assert out.exists() is (kind == "empty")
    claim_out(out, overwrite, "steps: 2\n")
    assert tree(out) == {"config.yaml": b"steps: 2\n", "metrics.jsonl": b""}


@pytest.mark.parametrize(
    ("kind", "overwrite", "says"),
    [
        ("run", False, "holds another run; choose another --out, or pass --overwrite"),
        ("foreign", False, "expected an empty folder or a run, found other files"),
        ("foreign", True, "expected an empty folder or a run, found other files"),
        ("file", False, "expected a folder for the run, found a file"),
        ("file", True, "expected a folder for the run, found a file"),
    ],
)
@pytest.mark.parametrize("act", [check_out, partial(claim_out, config="steps: 2\n")])
def test_a_folder_that_holds_something_is_refused_and_kept(
    tmp_path: Path, act: Any, kind: str, overwrite: bool, says: str
) -> None:
    out = tmp_path / "out"
    made(out, kind)
    before = tree(tmp_path)
    with pytest.raises(ZotunerError) as caught:
        act(out, overwrite)
    assert str(caught.value).startswith(f"{out}: {says}")
    assert tree(tmp_path) == before
    assert before


def test_overwriting_a_run_removes_all_of_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "run")
    check_out(out, overwrite=True)
    assert (out / "model" / "weights").exists()
    claim_out(out, True, "steps: 2\n")
    assert tree(out) == {"config.yaml": b"steps: 2\n", "metrics.jsonl": b""}


def test_a_folder_with_a_config_of_its_own_is_no_run(tmp_path: Path) -> None:
    out = tmp_path / "project"
    (out / "src").mkdir(parents=True)
    (out / "config.yaml").write_text("mine: true\n")
    with pytest.raises(ZotunerError, match="found other files"):
        check_out(out, overwrite=True)


def test_a_run_that_is_read_from_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(out, "run")
    with pytest.raises(ZotunerError, match="model: lies in --out"):
        check_out(out, True, [tmp_path / "elsewhere", None, out / "model"])


def test_an_empty_folder_behind_a_link_is_filled_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    claim_out(tmp_path / "out", False, "steps: 2\n")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "scratch" / "config.yaml").exists()


def test_folders_above_the_output_are_made(tmp_path: Path) -> None:
    claim_out(tmp_path / "a" / "b" / "out", False, "steps: 2\n")
    assert (tmp_path / "a" / "b" / "out").is_dir()


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ZotunerError, match="file"):
        check_out(tmp_path / "file" / "out", overwrite=False)


# -------------------------------------------------------------------------------------------------------- metrics


def test_rows_round_trip_and_numbers_that_json_has_not_become_null(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with MetricsLog(path) as log:
        log.write(step=0, loss=math.nan, coefficients=(1.5, -math.inf), note="é\u2028\n")
        log.write(step=1, loss=1e-30, nested={"a": [math.inf, None, True], 2: "b"})
    assert path.read_text().count("\n") == 2
    assert "NaN" not in path.read_text()
    assert "Infinity" not in path.read_text()
    assert read_rows(path) == [
        {"step": 0, "loss": None, "coefficients": [1.5, None], "note": "é\u2028\n"},
        {"step": 1, "loss": 1e-30, "nested": {"a": [None, None, True], "2": "b"}},
    ]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "rows.jsonl") as log:
        log.write(step=0)
        assert read_rows(tmp_path / "rows.jsonl") == [{"step": 0}]


def test_a_log_is_continued(tmp_path: Path) -> None:
    for step in range(2):
        with MetricsLog(tmp_path / "rows.jsonl") as log:
            log.write(step=step)
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 0}, {"step": 1}]


def test_what_json_has_is_kept_as_it_is() -> None:
    value = {"a": [1, 2.5, "x", None, False], "b": {"c": -0.0}}
    assert jsonable(value) == value
    assert isinstance(jsonable((1, 2)), list)


@pytest.mark.parametrize(("line", "number"), [("{", 1), ("3", 1), ('{"a": 1}\n\n[]', 3), ("[" * 100_000, 1)])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str, number: int) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    with pytest.raises(ZotunerError) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path}, line {number}: expected one JSON object, got ")
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("kind", ["missing", "folder", "binary"])
def test_rows_that_cannot_be_read_are_one_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    if kind == "folder":
        path.mkdir()
    if kind == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ZotunerError, match=r"rows\.jsonl: (no such file|expected a UTF-8 text file)"):
        read_rows(path)


# --------------------------------------------------------------------------------------------------------- errors


def test_an_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    assert unknown("task", "cop", ["copa", "sst2"]) == "unknown task 'cop'; did you mean 'copa'? Known: copa, sst2"


def test_a_name_unlike_all_others_suggests_nothing() -> None:
    assert unknown("task", "zzz", iter(["copa", "sst2"])) == "unknown task 'zzz'; known: copa, sst2"


def test_a_name_with_a_line_break_stays_on_one_line() -> None:
    assert "\n" not in unknown("task", "co\npa", ["copa"])


# --------------------------------------------------------------------------------------------------------- ledger


def write_ledger(
    path: Path, records: Sequence[Record] = RECORDS, header: dict[str, Any] | None = None
) -> tuple[bytes, int]:
    """The bytes of a ledger, and where its records begin."""
    with Ledger(path, header or HEADER) as ledger:
        start = path.stat().st_size
        for record in records:
            ledger.write(record.step, record.lr, record.losses)
    return path.read_bytes(), start


@pytest.fixture
def ledger_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a test puts its ledger; records are not synced, for speed."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return tmp_path / "ledger.bin"


def test_a_ledger_round_trips(ledger_path: Path) -> None:
    write_ledger(ledger_path)
    header, records = read_ledger(ledger_path)
    assert header.items() >= HEADER.items()
    assert header["format_version"] == 1
    assert tuple(records) == RECORDS


def test_a_ledger_without_records_has_none(ledger_path: Path) -> None:
    write_ledger(ledger_path, ())
    assert read_ledger(ledger_path)[1] == []


def test_losses_are_kept_in_float32_and_lr_in_float64(ledger_path: Path) -> None:
    losses = (0.1, math.inf, 3.0)
    write_ledger(ledger_path, [Record(2**32 - 1, 0.1, losses)], {"losses": 3, "tuner": None, "name": "é"})
    header, (record,) = read_ledger(ledger_path)
    assert header["name"] == "é"
    assert record.step == 2**32 - 1
    assert record.lr == 0.1
    assert record.losses[0] != 0.1
    assert record.losses == pytest.approx(losses)


def test_a_loss_that_is_no_number_is_kept(ledger_path: Path) -> None:
    write_ledger(ledger_path, [Record(0, 1.0, (math.nan, -math.inf))])
    (record,) = read_ledger(ledger_path)[1]
    assert math.isnan(record.losses[0])
    assert record.losses[1] == -math.inf


def test_every_record_is_synced_before_write_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    with Ledger(tmp_path / "ledger.bin", HEADER) as ledger:
        ledger.write(0, 1.0, (1.0, 2.0))
        ledger.write(1, 1.0, (1.0, 2.0))
    assert len(synced) == 3
    assert synced[1] - synced[0] == synced[2] - synced[1] == MEZO_RECORD


def test_a_ledger_never_replaces_another(ledger_path: Path) -> None:
    before, _ = write_ledger(ledger_path)
    with pytest.raises(FileExistsError):
        Ledger(ledger_path, HEADER)
    assert ledger_path.read_bytes() == before


def test_a_torn_last_record_is_dropped_at_every_length(ledger_path: Path) -> None:
    data, _ = write_ledger(ledger_path)
    for cut in range(1, MEZO_RECORD + 1):
        ledger_path.write_bytes(data[:-cut])
        assert tuple(read_ledger(ledger_path)[1]) == RECORDS[:-1], f"{cut} bytes missing"


def test_a_ledger_torn_anywhere_gives_its_whole_records(ledger_path: Path) -> None:
    data, start = write_ledger(ledger_path)
    for length in range(start, len(data)):
        ledger_path.write_bytes(data[:length])
        assert tuple(read_ledger(ledger_path)[1]) == RECORDS[: (length - start) // MEZO_RECORD]


def test_a_header_torn_anywhere_is_an_error(ledger_path: Path) -> None:
    data, start = write_ledger(ledger_path, ())
    for length in range(start):
        ledger_path.write_bytes(data[:length])
        with pytest.raises(ZotunerError, match=r"ledger\.bin: (expected a zotuner ledger|damaged at offset)"):
            read_ledger(ledger_path)


def test_a_flipped_bit_in_the_magic_is_no_ledger(ledger_path: Path) -> None:
    data, _ = write_ledger(ledger_path)
    for bit in range(8 * len(MAGIC)):
        ledger_path.write_bytes(flipped(data, bit))
        with pytest.raises(ZotunerError, match="expected a zotuner ledger, which begins with ZOLEDGER"):
            read_ledger(ledger_path)


def flipped(data: bytes, bit: int) -> bytes:
    """The same bytes with one bit changed."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_a_flipped_bit_in_the_header_is_named_with_its_offset(ledger_path: Path) -> None:
    data, start = write_ledger(ledger_path)
    text = len(MAGIC) + 4
    for bit in range(8 * len(MAGIC), 8 * start):
        ledger_path.write_bytes(flipped(data, bit))
        with pytest.raises(ZotunerError) as caught:
            read_ledger(ledger_path)
        offsets = (text,) if bit >= 8 * text else (len(MAGIC), text)  # a wrong length shows in either place
        assert any(f"damaged at offset {offset}:" in str(caught.value) for offset in offsets)


def test_a_flipped_bit_in_a_record_is_named_with_its_offset(ledger_path: Path) -> None:
    data, start = write_ledger(ledger_path)
    for bit in range(8 * start, 8 * (len(data) - MEZO_RECORD)):
        ledger_path.write_bytes(flipped(data, bit))
        number = (bit // 8 - start) // MEZO_RECORD
        offset = start + number * MEZO_RECORD
        with pytest.raises(ZotunerError, match=rf"damaged at offset {offset}: the checksum of record {number} is"):
            read_ledger(ledger_path)


def test_a_flipped_bit_in_the_last_record_drops_it(ledger_path: Path) -> None:
    data, _ = write_ledger(ledger_path)
    for bit in range(8 * (len(data) - MEZO_RECORD), 8 * len(data)):
        ledger_path.write_bytes(flipped(data, bit))
        assert tuple(read_ledger(ledger_path)[1]) == RECORDS[:-1]


def test_a_header_of_absurd_length_is_refused_without_reading_on(ledger_path: Path) -> None:
    ledger_path.write_bytes(MAGIC + (MAX_HEADER + 1).to_bytes(4, "little") + b"x" * 100)
    with pytest.raises(ZotunerError, match="damaged at offset 8"):
        read_ledger(ledger_path)


def test_another_format_version_is_refused(ledger_path: Path) -> None:
    write_ledger(ledger_path, (), HEADER | {"format_version": 2})
    with pytest.raises(ZotunerError, match="expected ledger format 1, got 2"):
        read_ledger(ledger_path)


@pytest.mark.parametrize("content", [b"", b"ZO", b"hello", json.dumps(HEADER).encode() * 20])
def test_another_file_is_no_ledger(ledger_path: Path, content: bytes) -> None:
    ledger_path.write_bytes(content)
    with pytest.raises(ZotunerError, match=r"ledger\.bin: expected a zotuner ledger"):
        read_ledger(ledger_path)


def test_a_missing_ledger_is_one_error(ledger_path: Path) -> None:
    with pytest.raises(ZotunerError, match=r"ledger\.bin"):
        read_ledger(ledger_path)


def test_twenty_thousand_mezo_steps_stay_below_half_a_megabyte(ledger_path: Path) -> None:
    random_ = random.Random(0)
    records = [Record(step, 1e-6, (random_.random(), random_.random())) for step in range(20_000)]
    data, start = write_ledger(ledger_path, records)
    assert len(data) == start + 20_000 * MEZO_RECORD
    assert len(data) < 500_000
    came = read_ledger(ledger_path)[1]
    assert len(came) == 20_000
    assert came[-1].step == 19_999


# ------------------------------------------------------------------------------------------------- going on with files


def test_a_ledger_goes_on_behind_its_last_whole_record(ledger_path: Path) -> None:
    write_ledger(ledger_path)
    whole = ledger_path.read_bytes()
    for cut in range(1, MEZO_RECORD):
        ledger_path.write_bytes(whole[:-cut])
        with Ledger(ledger_path, None) as ledger:
            assert tuple(ledger.records) == RECORDS[:-1]
            ledger.write(RECORDS[-1].step, RECORDS[-1].lr, RECORDS[-1].losses)
        assert ledger_path.read_bytes() == whole


def test_a_ledger_is_synced_as_often_as_asked_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    with Ledger(tmp_path / "ledger.bin", HEADER, sync_every=3) as ledger:
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
        start = (tmp_path / "ledger.bin").stat().st_size
        for step in range(7):
            ledger.write(step, 1.0, (1.0, 2.0))
    assert synced == [start + n * MEZO_RECORD for n in (3, 6, 7)]


def test_rows_are_cut_before_the_first_that_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert keep_rows(path, lambda _: True) == []
    assert not path.exists()
    path.write_text('{"step": 0, "loss": 0.1}\n{"step": 1, "loss": null}\n{"step": 2}\n{"step": 3, "lo')
    assert keep_rows(path, lambda row: row["step"] < 9) == [
        {"step": 0, "loss": 0.1},
        {"step": 1, "loss": None},
        {"step": 2},
    ]
    assert path.read_text() == '{"step": 0, "loss": 0.1}\n{"step": 1, "loss": null}\n{"step": 2}\n'
    assert keep_rows(path, lambda row: row["step"] != 1) == [{"step": 0, "loss": 0.1}]
    assert path.read_text() == '{"step": 0, "loss": 0.1}\n'


def test_a_lock_is_refused_to_others_and_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with locked(out):
        assert out.is_dir()
        with pytest.raises(ZotunerError, match=f"process {os.getpid()} is writing to it"), locked(out):
            pass
        (out / "work").write_text("x")
    assert [path.name for path in out.iterdir()] == ["work"]
    with pytest.raises(RuntimeError), locked(tmp_path / "failed"):
        raise RuntimeError
    assert not (tmp_path / "failed").exists()
    with pytest.raises(RuntimeError), locked(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_done_to_a_ledger_it_is_read_or_refused_in_one_line(ledger_path: Path, data: st.DataObject) -> None:
    ledger_path.unlink(missing_ok=True)
    whole, _ = write_ledger(ledger_path)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(damaged) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "double"]))
        if kind == "set":
            damaged[place] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[place : place + data.draw(st.integers(1, 40))]
            damaged += b"" if damaged else b"x"
        else:
            damaged[place:place] = damaged[place : place + data.draw(st.integers(1, 40))]
    ledger_path.write_bytes(damaged)
    header, records, refusal = {"losses": 2}, [], str(ledger_path)
    try:
        header, records = read_ledger(ledger_path)
    except ZotunerError as error:
        refusal = str(error)
    assert header["losses"] == 2
    assert set(records) <= set(RECORDS)
    assert str(ledger_path) in refusal
    assert "\n" not in refusal


def test_what_was_built_aside_can_be_read_by_others(tmp_path: Path) -> None:
    with built_aside(tmp_path / "model") as aside:
        (aside / "deep").mkdir(mode=0o700)
        (aside / "deep" / "weights").touch(mode=0o600)
    assert [
        oct((tmp_path / name).stat().st_mode & 0o777) for name in ("model", "model/deep", "model/deep/weights")
    ] == [
        "0o755",
        "0o755",
        "0o644",
    ]
