"""What benchmarks/serving.py measured, as Markdown, and what of it the project promises."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.serving_contenders import KSERVE, MLFLOW, NULL, OURS
from benchmarks.serving_load import Load
from benchmarks.serving_wire import BINARY, JSON

FEW = 300  # requests in all rounds, below which a 99th percentile says little
MB = 1e6  # bytes
DASH, TIMES = "\u2013", "\u00d7"


@dataclass(frozen=True)
class Cell:
    """A kind of load.

    Attributes:
        form: of the tensors.
        images: a request.
        connections: each with one request at a time.
    """

    form: str
    images: int
    connections: int

    def __str__(self) -> str:
        plural = "" if self.images == 1 else "s"
        return f"{self.form}, {self.images} image{plural}, c={self.connections}"


@dataclass(frozen=True)
class Measured:
    """One round of one cell.

    Attributes:
        load: what wrk saw.
        cpu: seconds that the server's processes had the core.
        others: seconds that anything else had it.
    """

    load: Load
    cpu: float
    others: float


@dataclass
class Result:
    """All that was measured of a server.

    Attributes:
        what: package and version.
        forms: that it speaks.
        packages: beyond the core install; None: it is not Python's.
        starts: seconds from start to first answer, one a round.
        memory: bytes that are resident after a round's load.
        cells: what each round of a cell gave.
        missing: why it is not measured, or not to the end.
    """

    what: str
    forms: tuple[str, ...] = ()
    packages: int | None = None
    starts: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    cells: dict[Cell, list[Measured]] = field(default_factory=dict)
    missing: str | None = None

    def errors(self, cell: Cell) -> dict[str, int]:
        """Return how many requests of a cell failed, by kind."""
        total: dict[str, int] = {}
        for one in self.cells.get(cell, ()):
            for kind, count in one.load.errors.items():
                total[kind] = total.get(kind, 0) + count
        return total

    def median(self, cell: Cell, value: Callable[[Measured], float]) -> float | None:
        """Return the median over the rounds.

        None if there is none, a request failed, or a round was too short for one answer.
        """
        rounds = self.cells.get(cell, [])
        answered = all(one.load.requests for one in rounds)
        if not rounds or not answered or self.missing or self.errors(cell):
            return None
        return statistics.median(map(value, rounds))

    def requests(self, cell: Cell) -> int:
        """Return how many requests a cell answered in all rounds."""
        return sum(one.load.requests for one in self.cells.get(cell, ()))


Results = Mapping[str, Result]


def rate(one: Measured) -> float:
    """Return the requests a second."""
    return one.load.requests / one.load.seconds


def cpu_per_request(one: Measured) -> float:
    """Return the CPU time of a request, in microseconds."""
    return one.cpu / one.load.requests * 1e6


# --- tables ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; all columns but the first are of numbers."""
    rule = ["---", *["--:"] * (len(head) - 1)]
    lines = [" | ".join(row) for row in (head, rule, *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def absent(result: Result, cell: Cell) -> str:
    """Say why a cell has no figure."""
    if cell.form not in result.forms:
        return DASH
    if errors := result.errors(cell):
        return "**failed**: " + ", ".join(f"{count} {kind}" for kind, count in errors.items())
    return "no answer in time" if cell in result.cells else "not measured"


def cells_table(
    results: Results, show: Callable[[Result, Cell], str | None], without: str = ""
) -> str:
    """Write a table of a row a cell and a column a server, but for one."""
    measured = {
        name: result for name, result in results.items() if not result.missing and name != without
    }
    if not measured:
        return "nothing was measured"
    cells = list(dict.fromkeys(cell for result in measured.values() for cell in result.cells))
    cells.sort(key=lambda cell: (cell.form != JSON, cell.images, cell.connections))
    rows = [
        [str(cell), *(show(result, cell) or absent(result, cell) for result in measured.values())]
        for cell in cells
    ]
    return table(["", *measured], rows)


def show_rate(result: Result, cell: Cell) -> str | None:
    """Write the requests a second."""
    value = result.median(cell, rate)
    return None if value is None else f"{value:,.0f}"


def show_latency(result: Result, cell: Cell) -> str | None:
    """Write both percentiles."""
    p50 = result.median(cell, lambda one: one.load.p50)
    p99 = result.median(cell, lambda one: one.load.p99)
    if p50 is None or p99 is None:
        return None
    return f"{p50:.2f} / {p99:.2f}{' ¹' if result.requests(cell) < FEW else ''}"


def show_cpu(result: Result, cell: Cell) -> str | None:
    """Write the CPU time of a request."""
    value = result.median(cell, cpu_per_request)
    return None if value is None else f"{value:,.0f}"


def times(value: float | None, base: float | None) -> float | None:
    """Return a quotient, if there are both."""
    return value / base if value is not None and base else None


def ratio(results: Results, cell: Cell, base: str) -> float | None:
    """Return this server's requests a second for each of another's."""
    if OURS not in results or base not in results:
        return None
    return times(results[OURS].median(cell, rate), results[base].median(cell, rate))


def show_ratio(results: Results) -> Callable[[Result, Cell], str | None]:
    """Return what writes this server's requests a second for each of the column's."""
    names = {id(result): name for name, result in results.items()}

    def show(result: Result, cell: Cell) -> str | None:
        value = ratio(results, cell, names[id(result)])
        return (
            None
            if value is None
            else f"{value:.2f}{TIMES}"
            if value < 10
            else f"{value:.0f}{TIMES}"
        )

    return show


def servers_table(results: Results) -> str:
    """Write what each server is, and costs without load."""
    rows = []
    for name, result in results.items():
        figures = ["", "", ""]
        if not result.missing:
            packages = DASH if result.packages is None else str(result.packages)
            start, memory = statistics.median(result.starts), statistics.median(result.memory)
            figures = [f"{start:.2f}", f"{memory / MB:.0f}", packages]
        said = f"**not measured: {result.missing}**" if result.missing else ""
        rows.append([name, " ".join(filter(None, (result.what, said))), *figures])
    head = ["server", "what", "start to first answer, s", "resident, MB", "packages ²"]
    text = table(head, rows)
    return text.replace("| --- | --: |", "| --- | --- |", 1)


# --- what is promised -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A figure that the project promises.

    Attributes:
        figure: what it is.
        bound: the least it may be, or the most.
        unit: written after the figure.
        least: whether the bound is the least.
        value: reads it; None: it was not measured.
    """

    figure: str
    bound: float
    unit: str
    least: bool
    value: Callable[[Results], float | None]

    def row(self, results: Results) -> list[str]:
        """Return its row of the table."""
        value = self.value(results)
        promised = f"{'≥' if self.least else '≤'} {self.bound:g}{self.unit}"
        if value is None:
            return [self.figure, promised, "", "not measured"]
        met = value >= self.bound if self.least else value <= self.bound
        return [self.figure, promised, f"{value:.3g}{self.unit}", "pass" if met else "**miss**"]


def promised_ratio(cell: Cell, base: str, bound: float) -> Target:
    """Return a target for this server's requests a second."""
    return Target(
        f"{cell}: to {base}", bound, TIMES, True, lambda results: ratio(results, cell, base)
    )


def of_ours(value: Callable[[Result], float | None]) -> Callable[[Results], float | None]:
    """Return what reads a figure of this server's."""

    def read(results: Results) -> float | None:
        result = results.get(OURS)
        return None if result is None or result.missing else value(result)

    return read


CROWDED = Cell(JSON, 1, 64)
TARGETS = (
    *(
        promised_ratio(Cell(JSON, 1, connections), base, bound)
        for connections in (8, 64)
        for base, bound in ((NULL, 0.35), (KSERVE, 8), (MLFLOW, 12))
    ),
    promised_ratio(Cell(JSON, 32, 8), NULL, 0.25),
    promised_ratio(Cell(JSON, 32, 8), MLFLOW, 10),
    promised_ratio(Cell(BINARY, 1, 64), NULL, 0.45),
    promised_ratio(Cell(BINARY, 1, 64), KSERVE, 12),
    Target(
        f"{CROWDED}: p99",
        8,
        " ms",
        False,
        of_ours(lambda result: result.median(CROWDED, lambda one: one.load.p99)),
    ),
    Target(
        "start to first answer",
        1,
        " s",
        False,
        of_ours(lambda result: statistics.median(result.starts)),
    ),
    Target(
        "resident memory",
        150,
        " MB",
        False,
        of_ours(lambda result: statistics.median(result.memory) / MB),
    ),
)


def targets_table(results: Results) -> str:
    """Write what is promised beside what was measured."""
    head = ["figure", "promised", "measured", ""]
    rows = [target.row(results) for target in TARGETS]
    if OURS in results and not results[OURS].missing:
        rows.append(["packages beyond the core install", "few", str(results[OURS].packages), ""])
    return table(head, rows)


# --- the whole ------------------------------------------------------------------------------------

NOTES = """\
{dash} it does not speak this form. ¹ fewer than {few} requests in all rounds. ² that it needs \
beyond the core install of this project.

All serve one ONNX file on one thread of ONNX Runtime, and each answered as ONNX Runtime does \
in-process before it was timed. The load is a closed loop of wrk's on another core. Null uvicorn \
reads the body and answers as many bytes, computing nothing."""


def disturbance(results: Results) -> tuple[float, float]:
    """Return what share of the servers' core others had, in the median cell and in the worst."""
    shares = [
        max(one.others, 0.0) / one.load.seconds
        for result in results.values()
        for rounds in result.cells.values()
        for one in rounds
    ]
    if not shares:
        return 0.0, 0.0
    return statistics.median(shares), max(shares)


def report(results: Results) -> str:
    """Write all tables."""
    parts = [
        ("Requests a second", cells_table(results, show_rate)),
        (
            "This server's requests a second, to each",
            cells_table(results, show_ratio(results), without=OURS),
        ),
        ("Latency, ms, p50 / p99", cells_table(results, show_latency)),
        ("CPU time of the server a request, µs", cells_table(results, show_cpu)),
        ("Servers", servers_table(results)),
        ("Promised", targets_table(results)),
    ]
    text = "\n\n".join(f"{title}:\n\n{body}" for title, body in parts)
    return f"{text}\n\n{NOTES.format(few=FEW, dash=DASH)}"
