#!/usr/bin/python
"""Ansible module: the files of one configuration, checked together before any is replaced.

ansible.builtin.template checks one file at a time, against others that are still the
former ones, and takes half a second for each.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: config_files
short_description: Write the files of one configuration, all or none
description:
  - Puts all files into a temporary folder, checks them there, and then moves those that differ into their places, in
    the order given. They belong to root and everybody can read them.
  - Their checksums are written as well, so that it can be seen on the host whether somebody has changed them.
options:
  files:
    description: Absolute paths and contents; two files must not have the same name.
    type: dict
    required: true
  checksums:
    description: Path of a file for their checksums, as sha256sum(1) writes and reads it.
    type: path
    required: true
  validate:
    description:
      - A shell script that ends with another status than 0 if the files in the folder $1 are wrong.
    type: str
author: The Zulip email gateway maintainers
"""

EXAMPLES = r"""
- name: Write the configuration
  config_files:
    files:
      /etc/postfix/master.cf: "{{ lookup('ansible.builtin.template', 'master.cf.j2') }}"
      /etc/postfix/main.cf: "{{ lookup('ansible.builtin.template', 'main.cf.j2') }}"
    checksums: /etc/postfix/ours.sha256
    validate: postfix -c "$1" check
"""

RETURN = r"""
replaced:
  description: Paths of the files that were new or different.
  type: list
  elements: str
  returned: always
"""


def is_right(path: Path, content: str) -> bool:
    """Whether a file has this content, root as its owner, and mode 0644."""
    if not path.is_file() or path.is_symlink():
        return False
    status = path.stat()
    return (status.st_mode & 0o7777, status.st_uid, status.st_gid, path.read_bytes()) == (0o644, 0, 0, content.encode())


def difference(path: str, content: str) -> dict[str, str]:
    """For --diff."""
    before = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""
    return {"before_header": path, "after_header": path, "before": before, "after": content}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "required": True},
            "checksums": {"type": "path", "required": True},
            "validate": {"type": "str"},
        },
        supports_check_mode=True,
    )
    files, validate = dict(module.params["files"]), module.params["validate"]
    files[module.params["checksums"]] = "".join(
        f"{hashlib.sha256(content.encode()).hexdigest()}  {path}\n" for path, content in files.items()
    )
    wrong = {path: content for path, content in files.items() if not is_right(Path(path), content)}
    diff = [difference(path, content) for path, content in wrong.items()]
    if not wrong:
        module.exit_json(changed=False, replaced=[])
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        for path, content in files.items():
            draft = Path(folder) / Path(path).name
            draft.write_text(content, encoding="utf-8")
            draft.chmod(0o644)
        if validate:
            status, out, err = module.run_command(["sh", "-ec", validate, "sh", folder])
            if status:
                module.fail_json(
                    msg=f"the new configuration is wrong, nothing was replaced: {err or out}".strip(), diff=diff
                )
        if not module.check_mode:
            for path in wrong:
                os.chown(Path(folder) / Path(path).name, 0, 0)
                module.atomic_move(str(Path(folder) / Path(path).name), path)
                os.chmod(path, 0o644)
                os.chown(path, 0, 0)
    module.exit_json(changed=True, replaced=list(wrong), diff=diff)


if __name__ == "__main__":
    main()
