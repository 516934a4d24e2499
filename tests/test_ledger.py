"""The ledger on disk: pieces are whole or not there, and merging them doubles and loses nothing, wherever it dies."""

import contextlib
import shutil

from sdft_ray.store import ledger


def line(row_id: str, sample: int = 0, text: str = "made") -> ledger.Line:
    return ledger.Line(row_id, sample, text, "stop", prompt_tokens=5, tokens=3, sampling_seed=2**32 - 1)


def write_some(directory) -> list[ledger.Line]:
    lines = [line(f"{i:016x}", sample=i % 3, text=f"text {i}") for i in range(12)]
    for start in range(0, 12, 3):
        ledger.write_piece(directory, f"batch{start % 2}", lines[start : start + 3])
    return lines


def everything(directory) -> list[ledger.Line]:
    parts = ledger.parts_of(directory, 5)
    return sorted(line for part in parts for line in ledger.to_lines(ledger.read_part(directory, part)))


def test_ledger_gives_back_what_was_written_in_parts(tmp_path):
    lines = write_some(tmp_path)
    assert everything(tmp_path) == lines


def test_ledger_keeps_the_pieces_of_a_batch_together(tmp_path):
    lines = write_some(tmp_path)
    found = sorted(each.id for piece in ledger.read_batch(tmp_path, "batch1") for each in piece)
    assert found == [each.id for each in lines[3:6] + lines[9:12]]


def test_compact_makes_one_file_of_the_same_lines(tmp_path):
    lines = write_some(tmp_path)
    for _ in range(2):
        ledger.compact(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        assert everything(tmp_path) == lines
    ledger.write_piece(tmp_path, "more", [line("000000000000000c")])
    ledger.compact(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert everything(tmp_path) == [*lines, line("000000000000000c")]


def test_compact_that_dies_before_it_has_deleted_doubles_nothing(tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    once.mkdir()
    lines = write_some(once)
    # As a kill leaves it: the merged piece, some of the pieces that it holds, and the beginning of a write.
    shutil.copytree(once, twice)
    ledger.compact(once)
    for path in once.iterdir():
        shutil.copy(path, twice)
    for path in sorted(twice.glob("part-batch*"))[:2]:
        path.unlink()
    (twice / ".part-merged-1234.parquet.tmp").write_bytes(b"PAR1")
    assert everything(twice) == lines
    # A second merge dies in the same way: now the first merged piece and its remains are held by the new one.
    ledger.write_piece(twice, "more", [line("000000000000000c")])
    thrice = tmp_path / "thrice"
    shutil.copytree(twice, thrice)
    ledger.compact(thrice)
    for path in thrice.iterdir():
        shutil.copy(path, twice)
    assert everything(twice) == [*lines, line("000000000000000c")]
    ledger.compact(twice)
    assert everything(twice) == [*lines, line("000000000000000c")]
    assert len(list(twice.iterdir())) == 1


def test_compact_takes_the_name_of_its_batch_even_from_a_lone_piece(tmp_path):
    lines = write_some(tmp_path)[3:6]
    for path in tmp_path.iterdir():
        path.unlink()
    ledger.write_piece(tmp_path, "batch1", lines)
    for _ in range(2):
        ledger.compact(tmp_path)
        assert everything(tmp_path) == lines and len(list(tmp_path.iterdir())) == 1
        assert not list(ledger.read_batch(tmp_path, "batch1")), "a batch of a later run counts its own attempts"


def test_compact_leaves_full_pieces_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_FULL_LINES", 5)
    lines = write_some(tmp_path)
    ledger.compact(tmp_path)
    full = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(full) == 2 and everything(tmp_path) == lines
    ledger.write_piece(tmp_path, "more", [line("000000000000000c")])
    ledger.write_piece(tmp_path, "yet", [line("000000000000000d")])
    ledger.compact(tmp_path)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert full.items() < after.items() and len(after) == 3
    assert everything(tmp_path) == [*lines, line("000000000000000c"), line("000000000000000d")]


def test_compact_that_dies_between_two_merges_doubles_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_FULL_LINES", 5)
    lines = write_some(tmp_path)
    before = tmp_path / "before"
    shutil.copytree(tmp_path, before)
    merge, merged = ledger._merge, []

    def die_after_two(*arguments):
        merged.append(merge(*arguments))
        if len(merged) == 2:
            raise KeyboardInterrupt
        return merged[-1]

    monkeypatch.setattr(ledger, "_merge", die_after_two)
    with contextlib.suppress(KeyboardInterrupt):
        ledger.compact(tmp_path)
    shutil.rmtree(before)
    assert len(merged) == 2 and len(list(tmp_path.iterdir())) == 4, "the second merge has deleted nothing yet"
    assert everything(tmp_path) == lines
    ledger.compact(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and everything(tmp_path) == lines


def test_merge_batch_makes_one_piece_of_a_batch_and_leaves_the_others(tmp_path):
    lines = write_some(tmp_path)
    merged, held = ledger.merge_batch(tmp_path, "batch1")
    # As a kill leaves it: nothing is deleted, and a batch that is asked for again counts its pieces as before.
    assert everything(tmp_path) == lines
    found = list(ledger.read_batch(tmp_path, "batch1"))
    assert len(found) == 3 and sorted(each.id for piece in found for each in piece) == [
        each.id for each in lines[3:6] + lines[9:12]
    ]
    assert ledger.merge_batch(tmp_path, "batch1") == (None, held)
    for path in held:
        path.unlink()
    assert merged in tmp_path.iterdir() and len(list(tmp_path.iterdir())) == 3
    assert everything(tmp_path) == lines
    assert len(list(ledger.read_batch(tmp_path, "batch1"))) == 3
    ledger.compact(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and everything(tmp_path) == lines
