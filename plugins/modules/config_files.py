#!/usr/bin/python
"""Ansible module: the files of one configuration, checked together before any is replaced.

ansible.builtin.template checks one file at a time, against others that are still the
former ones, and takes half a second for each.
"""

from __future__ import annotations

import grp
import hashlib
import os
import pwd
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: config_files
short_description: Write the files of one configuration, all or none
description:
  - Puts all files into a temporary folder, checks them there, and then writes those that differ, each in one step, in
    the order given. Folders come first, then secrets, files, and what is to be absent.
  - What exists already has its owner, group and mode corrected.
options:
  files:
    description: Absolute paths and contents; two files must not have the same name.
    type: dict
    default: {}
  secrets:
    description: The same for files whose contents are never shown, nor checked by O(validate).
    type: dict
    default: {}
  folders:
    description: Absolute paths of folders that have to be there.
    type: list
    elements: path
    default: []
  absent:
    description: Absolute paths of files that must not be there.
    type: list
    elements: path
    default: []
  access:
    description:
      - By path, owner, group and mode (octal digits) where they differ from root, root and 0644; of secrets, from
        0600; of folders, from 0755.
    type: dict
    default: {}
  checksums:
    description:
      - Path of a file for the checksums of O(files), as sha256sum(1) writes and reads it, so that it can be seen on
        the host whether somebody has changed them.
    type: path
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
    secrets:
      /etc/postfix/password: "{{ password }}"
    access:
      /etc/postfix/password: {group: postfix, mode: "0640"}
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


class Access(NamedTuple):
    """Who owns something, and who may read and change it."""

    owner: str
    group: str
    mode: int

    def is_right(self, status: os.stat_result) -> bool:
        try:
            ids = pwd.getpwnam(self.owner).pw_uid, grp.getgrnam(self.group).gr_gid
        except KeyError:  # a user that is not there yet, in check mode
            return False
        return (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (*ids, self.mode)

    def apply(self, descriptor: int) -> None:
        """Give it to an open file or folder. Raises LookupError if there is no such user or group."""
        os.fchown(descriptor, pwd.getpwnam(self.owner).pw_uid, grp.getgrnam(self.group).gr_gid)
        os.fchmod(descriptor, self.mode)


def access_of(path: str, wanted: Mapping[str, Mapping[str, str]], mode: str) -> Access:
    here = wanted.get(path, {})
    return Access(here.get("owner", "root"), here.get("group", "root"), int(here.get("mode", mode), 8))


def is_right(path: Path, content: str, access: Access) -> bool:
    """Whether a file has this content and this access, and is no link."""
    status = path.lstat() if path.exists() else None
    if status is None or not stat.S_ISREG(status.st_mode):
        return False
    return access.is_right(status) and path.read_bytes() == content.encode()


def look_settled(file: Path | int) -> None:
    """Have a file, by its path or descriptor, look two seconds old: each of Postfix's programs waits so long until it
    believes one that has just changed, as it may be half written (load_file.c, dict.c). Ours never are."""
    then = time.time() - 2
    os.utime(file, (then, then))


def make_folder(path: Path, access: Access) -> None:
    if not path.exists():
        path.mkdir(mode=0o700)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        access.apply(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, content: str, access: Access) -> None:
    """Replace a file in one step; nobody sees half of it, nor what is not for him."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)  # of a run that was interrupted
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            access.apply(file.fileno())
            look_settled(file.fileno())
        draft.replace(path)
    except OSError as error:  # a full disk names no file
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def difference(path: str, content: str) -> dict[str, str]:
    """For --diff."""
    before = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).is_file() else ""
    return {"before_header": path, "after_header": path, "before": before, "after": content}


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "files": {"type": "dict", "default": {}},
            "secrets": {"type": "dict", "default": {}, "no_log": True},
            "folders": {"type": "list", "elements": "path", "default": []},
            "absent": {"type": "list", "elements": "path", "default": []},
            "access": {"type": "dict", "default": {}},
            "checksums": {"type": "path", "no_log": False},
            "validate": {"type": "str"},
        },
        supports_check_mode=True,
    )
    options = module.params
    files, secrets, wanted = dict(options["files"]), options["secrets"], options["access"]
    if options["checksums"]:
        files[options["checksums"]] = "".join(
            f"{hashlib.sha256(content.encode()).hexdigest()}  {path}\n" for path, content in files.items()
        )
    access = {path: access_of(path, wanted, "0755") for path in options["folders"]}
    access |= {path: access_of(path, wanted, "0600") for path in secrets}
    access |= {path: access_of(path, wanted, "0644") for path in files}
    try:
        folders = [
            path for path in options["folders"] if not (Path(path).is_dir() and access[path].is_right(os.stat(path)))
        ]
        replaced = [path for path, text in {**secrets, **files}.items() if not is_right(Path(path), text, access[path])]
        absent = [path for path in options["absent"] if os.path.lexists(path)]
        diff = [difference(path, files[path]) for path in replaced if path in files]
        diff += [{"before_header": path, "before": f"{path}\n", "after": ""} for path in absent]
        diff += [{"after_header": path, "before": "", "after": f"{path}\n"} for path in folders]
        if replaced and options["validate"]:
            with tempfile.TemporaryDirectory() as draft:
                os.chmod(draft, 0o755)
                for path, content in files.items():
                    copy = Path(draft, Path(path).name)
                    copy.write_text(content, encoding="utf-8")
                    copy.chmod(0o644)
                    look_settled(copy)
                status, out, err = module.run_command(["sh", "-ec", options["validate"], "sh", draft])
            if status:
                module.fail_json(
                    msg=f"the new configuration is wrong, nothing was replaced: {err or out}".strip(), diff=diff
                )
        if not module.check_mode:
            for path in folders:
                make_folder(Path(path), access[path])
            for path in replaced:
                write(Path(path), {**secrets, **files}[path], access[path])
            for path in absent:
                os.unlink(path)
    except OSError as error:
        module.fail_json(msg=f"cannot write {error.filename}: {error.strerror}")
    except LookupError as error:
        module.fail_json(msg=f"cannot give a file to its owner: {error}")
    module.exit_json(changed=bool(folders or replaced or absent), replaced=replaced, diff=diff)


if __name__ == "__main__":
    main()
