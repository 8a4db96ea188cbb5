"""Tables of text that fit a terminal."""
WIDTH = 110     # characters of a line


def text_table(header, rows, labels=1, width=WIDTH):
    """A table as a string, its lines at most `width` characters long.  header, rows: lists of cells of any
    type.

    The first `labels` columns name a row.  Where the other columns do not fit side by side, the table is cut
    into blocks below each other, and every block repeats the labels."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    names = list(range(labels))
    blocks, used = [], width
    for i in range(labels, len(header)):
        if not blocks or used + 2 + widths[i] > width:
            blocks.append([*names])
            used = sum(widths[j] + 2 for j in names) - 2
        blocks[-1].append(i)
        used += 2 + widths[i]
    return "\n\n".join("\n".join("  ".join(row[i].ljust(widths[i]) for i in block).rstrip() for row in cells)
                       for block in blocks)
