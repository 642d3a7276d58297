"""The certificate that senders are shown."""

from __future__ import annotations

import subprocess
import time

import pytest
from email_gateway import certificate, postfix

NEW = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 5 -subj /CN=x"


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "zulip.crt"
    made = f"{NEW} -keyout /dev/null -out {file}"
    names = "subjectAltName=DNS:mx.example.com,DNS:*.mail.example.com"
    subprocess.run((*made.split(), "-addext", names), check=True, capture_output=True)
    return file


def test_until_when_and_for_whom(path):
    found = certificate.read(str(path))
    assert certificate.good_until(found) == pytest.approx(time.time() + 5 * 86400, abs=60)
    assert certificate.is_for(found, "mx.example.com") and certificate.is_for(found, "a.mail.example.com")
    assert not certificate.is_for(found, "example.com")


def test_none(tmp_path):
    path = tmp_path / "zulip.crt"
    path.write_text("nothing")
    assert certificate.read(str(path)) == certificate.read("/nowhere") == ""
    assert certificate.good_until("") == 0 and not certificate.is_for("", "x")


def test_which_files_main_cf_names(tmp_path, monkeypatch):
    main_cf = tmp_path / "main.cf"
    monkeypatch.setattr(postfix, "MAIN_CF", main_cf)
    assert not postfix.is_ours()
    main_cf.write_text("smtpd_tls_chain_files = /a.key, /a.crt\n")
    assert not postfix.is_ours()
    main_cf.write_text("# Zulip email gateway\nsmtpd_tls_chain_files =\n    /a.key\n    /a.crt\nx = y\n")
    assert certificate.files_of(postfix.main_cf()) == ("/a.key", "/a.crt")
    assert certificate.files_of("") == ("", "")


def test_a_key_of_another_certificate(tmp_path):
    files = [certificate.Files(str(tmp_path / f"{name}.key"), str(tmp_path / f"{name}.crt")) for name in "ab"]
    for key, chain in files:
        made = f"{NEW} -keyout {key} -out {chain}"
        subprocess.run(made.split(), check=True, capture_output=True)
        assert certificate.key_fits(certificate.Files(key, chain))
    assert not certificate.key_fits(certificate.Files(files[0].key, files[1].chain))
    assert not certificate.key_fits(certificate.Files("/nowhere", "/nowhere"))
