"""When a file was last changed, as git knows it."""

import os
import subprocess

import pytest

from ragkit.experiment import provenance


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """A checkout with one commit of one file."""
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "package")
    who = {
        f"GIT_{role}_{what}": "a" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    day = {"GIT_AUTHOR_DATE": "2024-03-02T12:00:00Z", "GIT_COMMITTER_DATE": "2024-03-02T12:00:00Z"}
    file = tmp_path / "package" / "rules.yaml"
    file.write_text("a: 1\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "rules"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, env=os.environ | who | day)
    return file


def test_the_commit_that_last_changed_a_file_is_named(rules):
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=rules.parent, capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    assert provenance.changed_at(rules) == f"{head}, 2024-03-02"
    rules.write_text("a: 2\n")
    assert provenance.changed_at(rules) == f"{head}, 2024-03-02, and changed since"


def test_what_git_does_not_know_is_unknown(rules, tmp_path, monkeypatch):
    other = rules.with_name("other.yaml")
    other.write_text("b")
    assert provenance.changed_at(other) == "unknown"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git here
    assert provenance.changed_at(rules) == "unknown"


def test_outside_a_checkout_all_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "package")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "package").mkdir()
    assert provenance.changed_at(tmp_path / "package") == "unknown"
