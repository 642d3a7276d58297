"""The roles' README.md: what is made is as it should be, and what is written by hand works."""

from __future__ import annotations

import re

import pytest
import role_readmes
import yaml
from test_controllers import ansible
from test_roles import PROJECT, spec


@pytest.mark.parametrize("role", role_readmes.roles())
def test_the_table_has_the_variables_of_the_argument_specs(role):
    text = role_readmes.readme(role).read_text()
    assert text == role_readmes.made(role), f"roles/{role}/README.md is not what the specs say; run: make role-readmes"
    rows = re.findall(r"^\| `(\w+)` \|.*\| .+ \|$", text, re.MULTILINE)
    assert rows == list(spec(role))


def test_what_a_row_says():
    options = {
        "a": {"type": "str", "required": True, "description": "A."},
        "b": {"type": "str", "choices": ["off", "mark"], "default": "off", "description": "B | C.\n"},
        "c": {"type": "list", "elements": "str", "default": [], "description": "C."},
        "d": {"type": "str", "default": "INBOX", "description": "D."},
        "e": {"type": "int", "description": "E."},
    }
    assert role_readmes.table(options).splitlines()[2:] == [
        "| `a` | str | required | A. |",
        '| `b` | `"off"`, `mark` | `"off"` | B &#124; C. |',
        "| `c` | list of str | `[]` | C. |",
        "| `d` | str | `INBOX` | D. |",
        "| `e` | int | not set | E. |",
    ]


def test_a_readme_without_marks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(role_readmes, "PROJECT", tmp_path)
    path = tmp_path / "roles/one/README.md"
    path.parent.mkdir(parents=True)
    path.write_text(f"# one\n\n{role_readmes.BEGIN}\n")
    with pytest.raises(ValueError, match=r"^roles/one/README\.md lacks a mark\. Write both, .*to here"):
        role_readmes.made("one")


def example(role: str) -> str:
    [text] = re.findall(r"```yaml\n(.*?)```", role_readmes.readme(role).read_text(), re.DOTALL)
    return str(text)


@pytest.mark.parametrize("role", role_readmes.roles())
def test_the_example_can_be_run(role, tmp_path):
    """As far as ansible-playbook tells without a server; the project is installed as a collection."""
    collection = tmp_path / ".ansible/collections/ansible_collections/zulip_email/gateway"
    collection.parent.mkdir(parents=True)
    collection.symlink_to(PROJECT)
    (tmp_path / "own.yml").write_text(example(role))
    done = ansible(tmp_path, "--syntax-check", "own.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    [play] = yaml.safe_load(example(role))
    assert play["vars"].keys() <= spec("email_gateway").keys() | spec("postfix_localmail").keys()


def test_postfix_is_told_of_zulip_as_by_site_yml():
    [play] = yaml.safe_load(example("postfix_localmail"))
    assert play["vars"] == yaml.safe_load((PROJECT / "playbooks/vars/postfix.yml").read_text())
