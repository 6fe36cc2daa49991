"""Columns of plain text."""

from rich.cells import cell_len

from mllm_shapx.reporting.grid import cut, grid, names, numbers, words


def test_columns_of_names_give_way_to_the_others() -> None:
    """Numbers stay whole; the long name is cut with an ellipsis."""
    header, line = grid([*names("name"), *numbers("count")], [["a_rather_long_name", "12"]], 20)
    assert header == "name           count"
    assert line == "a_rather_lon…     12"


def test_nothing_is_wider_than_asked_even_when_nothing_may_shrink() -> None:
    """Where no column gives way, the line's end is cut."""
    lines = grid(words("a", "b"), [["x" * 30, "y" * 30]], 40)
    assert max(map(cell_len, lines)) == 40


def test_wide_signs_count_as_two_cells() -> None:
    """East Asian text lines up: its signs take two cells."""
    lines = grid(words("a", "b"), [["中文", "1"], ["ab", "2"]], 40)
    assert lines[1:] == ["中文  1", "ab    2"]
    assert cut("中文字", 4).startswith("中")
    assert cell_len(cut("中文字", 4)) <= 4


def test_cells_are_text_and_nothing_else() -> None:
    """What looks like markup or like a terminal's escapes is shown as it is, in one line."""
    (_, line) = grid(words("a", "b"), [["[red]x[/red]", "1\x1b[2J\n2\u20283"]], 80)
    assert line == "[red]x[/red]  1\\x1b[2J 2 3"
