"""A helper of the tests: rows of documents, built slowly from the definition."""

NAMES = ("tokens", "targets", "positions", "segments", "weights")


def slow_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing in the plainest way; among rows with equal room, the row that was changed last is taken."""
    rows: list[list[int]] = []
    recent: list[int] = []  # rows, the one changed last at the end
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = {r: capacity - sum(lengths[i] for i in rows[r]) for r in recent}
        fitting = [r for r in recent if room[r] >= lengths[piece]]
        if fitting:
            least = min(room[r] for r in fitting)
            row = [r for r in fitting if room[r] == least][-1]
            recent.remove(row)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(piece)
        recent.append(row)
    return sorted(map(sorted, rows))


def slow_rows(
    documents: list[tuple[list[int], list[bool]]], length: int, everything: bool, together: int = 1
) -> list[dict[str, list]]:
    """Packed rows built from the definition: pieces of documents, the rows that they share, one prediction at a time.

    This is the oracle for `data.packing.WholeRows`.

    Args:
        documents: ids and mask of each document.
        length: tokens a row.
        everything: True gives every prediction a weight, and not only those in the mask.
        together: number of consecutive pieces that stay in one row (2 for pairs).
    """
    pieces = []
    for ids, mask in documents:
        for start in range(0, max(len(ids) - 1, 1), length - 1) if len(ids) > length else [0]:
            pieces.append((ids[start : start + length], mask[start : start + length]))
    rows = []
    units = [range(i, i + together) for i in range(0, len(pieces), together)]
    fitted = slow_best_fit([sum(len(pieces[i][0]) for i in unit) for unit in units], length)
    for members in ([i for unit in row for i in units[unit]] for row in fitted):
        row: dict[str, list] = {name: [] for name in NAMES}
        for segment, member in enumerate(members, start=1):
            ids, mask = pieces[member]
            for i, token in enumerate(ids):
                last = i + 1 == len(ids)
                row["tokens"].append(token)
                row["targets"].append(0 if last else ids[i + 1])
                row["positions"].append(i)
                row["segments"].append(segment)
                row["weights"].append(float(not last and (everything or mask[i + 1])))
        rows.append({name: values + [0] * (length - len(values)) for name, values in row.items()})
    return rows
