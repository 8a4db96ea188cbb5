"""Tables fit a line, whatever their number of columns."""
from common.tables import text_table


def test_a_table_is_aligned():
    assert text_table(["a", "bb"], [["ccc", 1], ["d", None]]) == "a    bb\nccc  1\nd    None"


def test_a_wide_table_becomes_blocks_that_repeat_the_labels():
    header = ["policy", "T", *(f"measure {i}" for i in range(7))]
    rows = [["sft", 1.0, *range(7)], ["ppo", .7, *(f"{i}.000 [0.000, 9.999]" for i in range(7))]]
    text = text_table(header, rows, labels=2, width=60)
    blocks = text.split("\n\n")
    assert len(blocks) == 4 and max(map(len, text.splitlines())) <= 60
    assert all(b.splitlines()[1].startswith("sft     1.0") and len(b.splitlines()) == 3 for b in blocks)
    assert [w for b in blocks for w in b.splitlines()[0].split()[2:] if w != "measure"] == [*"0123456"]
