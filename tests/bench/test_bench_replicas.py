"""The counts and output of `bench.replicas`; it starts a cluster only when it is run."""

from bench_package import import_bench

replicas = import_bench("replicas")

QUESTIONS = [replicas.Question("a", {}, "one two"), replicas.Question("b", {}, "three")]


def answer(question, sent, times, text, error=None):
    return replicas.Answer(question, sent, list(times), text, error)


def test_what_is_lost(capsys):
    """An error, a gap and another question's text count; a complete answer does not."""
    whole = [answer(0, 0.0, [1.0, 1.1], "one two"), answer(1, 0.0, [2.0], "three")]
    assert replicas.count_lost(whole, QUESTIONS) == 0
    lost = [
        answer(0, 0.0, [1.0], "one", "APIError: gone"),
        answer(0, 0.0, [1.0], "one two", "APIError: late"),
        answer(0, 0.0, [1.0, 1.1], "one  two"),
        answer(1, 0.0, [1.0], "one two"),
        answer(1, 0.0, [], ""),
    ]
    assert replicas.count_lost([*whole, *lost], QUESTIONS) == len(lost)
    said = capsys.readouterr().err
    assert said.count("lost: ") == len(lost) and "APIError: late" in said


def test_the_table():
    """Milliseconds, of all requests and of those in progress at the kill."""
    before = answer(1, 0.0, [0.1, 0.2], "three")
    in_work = answer(0, 1.0, [2.0, 2.04, 5.04], "one two")
    rows = replicas.report([before, in_work], 2.5).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0][:2] == ["all", "2"] and cells[0][-1] == "3000"
    assert cells[1] == ["in work at the kill", "1", "1000", "1000", "1520", "2970", "3000"]
    assert len(replicas.report([before], None).splitlines()) == 3
