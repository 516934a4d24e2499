"""The ledger on disk: pieces are whole or not there, and merging them doubles and loses nothing, wherever it dies."""

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
