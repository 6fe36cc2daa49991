"""Columns of plain text."""

from mllm_shapx.reporting.grid import Column, cut, grid, pad


def test_columns_that_may_shrink_give_way_to_the_others() -> None:
    """Numbers stay whole; the long name is cut with an ellipsis."""
    header, line = grid(
        [Column("name", shrinks=True), Column("count", right=True)], [["a_rather_long_name", "12"]], 20
    )
    assert header == "name           count"
    assert line == "a_rather_lon…     12"


def test_nothing_is_wider_than_asked_even_when_nothing_may_shrink() -> None:
    """Where no column gives way, the line's end is cut."""
    lines = grid([Column("a"), Column("b")], [["x" * 30, "y" * 30]], 40)
    assert max(len(line) for line in lines) == 40


def test_wide_signs_count_as_two_cells() -> None:
    """East Asian text lines up: its signs take two cells."""
    lines = grid([Column("a"), Column("b")], [["中文", "1"], ["ab", "2"]], 40)
    assert lines[1:] == ["中文  1", "ab    2"]
    assert cut("中文字", 4) == "中…"
    assert pad("中", 3) == "中 "
