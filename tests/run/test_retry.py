"""``retry``: what did not finish goes on from its folder alone."""

import re

import pytest
import yaml

from hipexp.config.schema import ConfigError, Pipeline
from hipexp.run import retry
from hipexp.run.ledger import locked, read_json, read_rows
from hipexp.run.point import execute, folder_of, stored


@pytest.fixture
def failed(fake, experiment):
    """A run that ran out of memory after two of eight samples, one that was interrupted at once, and one that is done."""

    def after(error, samples, one):
        calls = fake.calls
        execute_until(one, samples, error, fake)
        fake.fail = None
        assert fake.calls == calls + samples + 1
        return folder_of(one)

    memory, stopped, done = experiment(), experiment(Pipeline("streaming", "streaming")), experiment(samples=1)
    execute(done)
    folders = after(MemoryError("9 GB"), 2, memory), after(KeyboardInterrupt(), 0, stopped), folder_of(done)
    return folders, (memory, stopped, done)


def execute_until(one, samples, error, fake):
    """Run, and fail after ``samples``."""
    from hipexp.run import ledger

    append, count = ledger.Ledger.append, [0]

    def counting(self, row):
        append(self, row)
        count[0] += 1
        if count[0] == samples:
            fake.fail = error

    if samples == 0:
        fake.fail = error
    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(ledger.Ledger, "append", counting)
        execute(one)


def test_all_that_failed_is_finished_and_nothing_done_twice(failed, fake, capsys):
    (memory, stopped, _), experiments = failed
    assert read_json(memory / "status.json")["class"] == "out_of_memory" and read_json(memory / "status.json")["of"] == 8
    before, calls = read_rows(memory), fake.calls
    assert retry.main([]) == 0
    assert all(map(stored, experiments))
    assert fake.calls - calls == 6 + 8
    assert read_rows(memory)[:2] == before
    text = capsys.readouterr().out
    assert f"infbench/{memory.name}: failed: out_of_memory, 2 sample(s) finished\n  done: average 100" in text
    assert f"infbench/{stopped.name}: failed: interrupted" in text and text.count("[") == 2
    assert retry.main([]) == 0
    assert "nothing to retry" in capsys.readouterr().out and fake.calls - calls == 14


def test_a_dry_run_lists_and_runs_nothing(failed, fake, capsys):
    (memory, stopped, done), _ = failed
    calls = fake.calls
    assert retry.main(["--dry-run"]) == 0
    text = capsys.readouterr().out
    assert memory.name in text and stopped.name in text and done.name not in text and fake.calls == calls


def test_only_what_is_chosen(failed, fake, capsys):
    (memory, stopped, done), (one, other, _) = failed
    assert retry.main(["class=out_of_memory"]) == 0
    assert stored(one) and not stored(other)
    assert retry.main([done.name, str(stopped)]) == 0
    assert stored(other)
    assert f"[1/2] infbench/{done.name}: done" in capsys.readouterr().out
    assert read_json(memory / "status.json")["state"] == "done"


def test_one_that_fails_again_does_not_stop_the_others(failed, fake, monkeypatch, capsys):
    (memory, _, _), (one, other, _) = failed
    real = retry.execute

    def execute_or_fail(experiment, load):
        if experiment.pipeline is None:
            fake.fail = RuntimeError("broken\nfor good")
        try:
            return real(experiment, load)
        finally:
            fake.fail = None

    monkeypatch.setattr(retry, "execute", execute_or_fail)
    assert retry.main([]) == 1
    assert not stored(one) and stored(other)
    assert "  error: broken for good\n" in capsys.readouterr().out
    assert read_json(memory / "status.json")["class"] == "error" and len(read_rows(memory)) == 2


def test_being_stopped_stops_all(failed, fake):
    fake.fail = KeyboardInterrupt()
    calls = fake.calls
    with pytest.raises(KeyboardInterrupt):
        retry.main([])
    assert fake.calls == calls + 1


def test_what_another_process_runs_is_left_to_it(failed, fake, capsys):
    (memory, _, _), (one, other, _) = failed
    with locked(memory / ".lock"):
        assert retry.main([]) == 0
    assert not stored(one) and stored(other)
    assert "skipped: another process is running it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config: config["task"].update(colour="red"), r"bad_config: .*config\.yaml is nothing that this version of hipexp can run: task\.colour is unknown"),
        (lambda config: config.update(seed=7), r"bad_config: .*config\.yaml stands for another run now"),
        (lambda config: config.clear(), r"bad_config: .*config\.yaml is missing or no YAML"),
    ],
)
def test_a_config_that_is_not_of_this_version_is_told(failed, capsys, change, message):
    (memory, _, _), (one, other, _) = failed
    config = yaml.safe_load((memory / "config.yaml").read_text())
    change(config)
    (memory / "config.yaml").write_text(yaml.safe_dump(config))
    assert retry.main([]) == 1
    assert re.search(message, capsys.readouterr().out)
    assert not stored(one) and stored(other) and len(read_rows(memory)) == 2


@pytest.mark.parametrize("words, message", [(["--loud"], "retry takes no --loud"), (["infbench", "class=error"], "leave one of them out"), (["nothing"], "is no run folder")])
def test_wrong_words(fake, words, message):
    with pytest.raises(ConfigError, match=message):
        retry.main(words)
