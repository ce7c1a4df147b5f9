"""A figure is ok only when it was measured on this very code and keeps to its bound."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import claims, figures, registry
from benchmarks.registry import Figure, Reading
from benchmarks.results import Result, code_commit, load, store


def _figure(name: str = "topic.row", *, measure=lambda: 5.0, bound: str | None = "<= 10", cls="quick") -> Figure:
    return Figure(name=name, unit="ms", bound=bound, cls=cls, claim="A claim.", measure=measure)


def _result(value: float = 5.0, commit: str = "aaaa") -> Result:
    return Result(value=value, low=None, high=None, seconds=0.1, commit=commit, date="2026-01-01", machine="m")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The runner on rows of our own, with results in a scratch file and a known commit."""
    path = tmp_path / "results.json"
    monkeypatch.setattr(figures, "load", lambda: load(path))
    monkeypatch.setattr(figures, "store", lambda results: store(results, path))
    monkeypatch.setattr(figures, "code_commit", lambda: "cccc")

    def run(rows: list[Figure], *arguments: str) -> int:
        monkeypatch.setattr(figures, "discover", lambda: rows)
        return figures.main(list(arguments))

    run.path = path
    return run


@pytest.mark.parametrize(
    ("bound", "value", "holds"),
    [("<= 3", 3, True), ("<= 3", 3.1, False), (">= 0.6", 0.6, True), (">= 0.6", 0.59, False), ("== 0", 1, False)],
)
def test_bounds_mean_what_they_say(bound: str, value: float, holds: bool) -> None:
    """A value on the bound is inside for <= and >=, and == is exact."""
    assert _figure(bound=bound).holds(value) is holds


def test_a_bound_that_cannot_be_read_is_refused() -> None:
    """A typing error in a bound stops at registration instead of passing every value."""
    with pytest.raises(ValueError, match="a bound reads like"):
        registry.figure("planted.bad", unit="1", bound="≤ 3")


def test_a_stored_value_of_other_code_is_stale_whatever_it_says() -> None:
    """Neither ok nor short is said about code that was not measured."""
    for value in (5.0, 50.0):
        stored = _result(value, commit="aaaa")
        assert figures.verdict(_figure(), stored, commit="bbbb", measured_now=False) == "stale"
    assert figures.verdict(_figure(), _result(commit="bbbb"), commit="bbbb", measured_now=False) == "ok"


def test_a_value_from_uncommitted_code_is_stale_afterwards() -> None:
    """Two different uncommitted states have the same name, so neither speaks for the other."""
    changed = "bbbb+changes"
    assert figures.verdict(_figure(), _result(commit=changed), commit=changed, measured_now=False) == "stale"
    assert figures.verdict(_figure(), _result(commit=changed), commit=changed, measured_now=True) == "ok"


def test_short_rows_fail_the_run_and_are_kept(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A row outside its bound is printed as short, stored as measured, and makes the exit code 1."""
    assert bench([_figure(measure=lambda: 11.0)]) == 1
    assert "short" in capsys.readouterr().out
    assert json.loads(bench.path.read_text())["topic.row"]["value"] == 11.0


def test_a_short_row_of_another_class_fails_no_run_of_its_own_code(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A check that measures the quick rows is not stopped by a dear one that it did not measure, and shows it."""
    rows = [_figure("a.quick"), _figure("b.dear", measure=lambda: 11.0, cls="full")]
    assert bench(rows, "--class", "full") == 1
    capsys.readouterr()
    assert bench(rows, "--class", "quick") == 0
    assert [" short " in line for line in capsys.readouterr().out.splitlines() if line.startswith("b.dear")] == [True]


def test_a_row_that_raises_hides_no_other(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows after a broken one are measured, the broken one is an error, and the exit code says so."""
    rows = [_figure("a.broken", measure=lambda: 1 / 0), _figure("b.fine")]
    assert bench(rows) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out
    assert [" ok " in line for line in out.splitlines() if line.startswith("b.fine")] == [True]


def test_a_broken_row_is_no_longer_vouched_for_by_its_stored_value(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that raised is an error even when an earlier run of the same code stored a good value."""
    assert bench([_figure()]) == 0
    assert bench([_figure(measure=lambda: 1 / 0)]) == 1
    assert "error" in capsys.readouterr().out


def test_only_and_class_choose_rows(bench, capsys: pytest.CaptureFixture[str]) -> None:
    """Cheaper classes are contained in dearer ones, and a prefix narrows them."""
    rows = [_figure("a.x"), _figure("a.y", cls="full"), _figure("b.z", cls="long")]
    assert [row.name for row in registry.select(rows, cls="quick")] == ["a.x"]
    assert [row.name for row in registry.select(rows, cls="full")] == ["a.x", "a.y"]
    assert [row.name for row in registry.select(rows, cls="long", only="b")] == ["b.z"]
    assert bench(rows, "--only", "nothing") == 2


def test_a_reading_is_the_median_with_its_range() -> None:
    """One slow repeat does not move the value and is not hidden either."""
    assert Reading.of([1.0, 2.0, 90.0]) == Reading(value=2.0, low=1.0, high=90.0)


def test_the_readme_table_is_made_from_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new value or a hand-edited cell is out of date until the table is written again; the prose stays."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{claims.BEGIN}\n{claims.END}\nafter\n")
    rows, results = [_figure(), _figure("b.new")], {"topic.row": _result(value=12.0)}
    assert claims.check(rows, results, "aaaa", readme) == 1
    assert "--readme" in capsys.readouterr().err
    claims.write(rows, results, "aaaa", readme)
    assert claims.check(rows, results, "aaaa", readme) == 0
    text = readme.read_text()
    assert "| A claim. | 12 ms | ≤ 10 ms | **short** | aaaa, 2026-01-01 | `topic.row` |" in text
    assert "not measured" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")


@pytest.mark.parametrize("measured", ["aaaa", "bbbb+changes"])
def test_the_readme_table_calls_no_value_of_other_code_ok(measured: str) -> None:
    """Inside or outside its bound, with a bound or without: a value of another commit, or of none, is stale."""
    rows = [_figure("a.in"), _figure("b.out"), _figure("c.free", bound=None)]
    results = {row.name: _result(value, commit=measured) for row, value in zip(rows, (5.0, 50.0, 5.0), strict=True)}
    for commit in ("bbbb", "bbbb+changes"):
        lines = claims.table(rows, results, commit).splitlines()[2:]
        assert [line.split(" | ")[3] for line in lines] == ["stale"] * 3


def test_a_written_table_is_right_in_its_own_commit_and_in_a_clone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Committing results and table together keeps the table, here and in a fresh clone; the next code outdates it."""
    home, clone = tmp_path / "home", tmp_path / "clone"
    (home / "benchmarks").mkdir(parents=True)

    def git(*arguments: str | Path) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", home, *arguments], check=True)

    def commit() -> None:
        git("add", "-A")
        git("commit", "-q", "-m", "c")

    def table_holds(root: Path) -> bool:
        stored = load(root / "benchmarks/results.json")
        holds = claims.check(rows, stored, code_commit(root), root / "README.md") == 0
        return holds and "speaks for other code" not in capsys.readouterr().err

    git("init", "-q")
    (home / "code.py").write_text("1")
    (home / "README.md").write_text(f"{claims.BEGIN}\n{claims.END}\n")
    commit()
    rows = [_figure()]
    store({"topic.row": _result(commit=code_commit(home))}, home / "benchmarks/results.json")
    claims.write(rows, load(home / "benchmarks/results.json"), code_commit(home), home / "README.md")
    assert "| ok |" in (home / "README.md").read_text()
    assert table_holds(home)
    commit()
    assert table_holds(home)
    subprocess.run(["git", "clone", "-q", home, clone], check=True)
    assert table_holds(clone)
    (home / "code.py").write_text("2")
    assert not table_holds(home)
    claims.write(rows, load(home / "benchmarks/results.json"), code_commit(home), home / "README.md")
    assert "| stale |" in (home / "README.md").read_text()
    commit()
    assert table_holds(home)


def test_results_and_prose_do_not_make_a_value_stale(tmp_path: Path) -> None:
    """Committing the measured results leaves them valid; a change of code does not, nor does an uncommitted one."""

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments], check=True)

    def commit(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        git("add", name)
        git("commit", "-q", "-m", name)
        return code_commit(tmp_path)

    git("init", "-q")
    first = commit("code.py", "1")
    assert commit("benchmarks/results.json", "{}") == first
    assert commit("README.md", "prose") == first
    assert commit("code.py", "2") != first
    (tmp_path / "new.py").touch()
    assert code_commit(tmp_path).endswith("+changes")
