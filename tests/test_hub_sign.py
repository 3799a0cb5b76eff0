"""`hub sign` and `hub verify --signature`: what holds, what does not, and what the OpenSSF library's own command says of it."""
from __future__ import annotations

import base64
import datetime
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from fsdl_devinfra.hub import Signer, Trust, WrongSignature, check_signature, lock, sign
from fsdl_devinfra.hub.locks import ModelLock

PEM, PKCS8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8


def key_pair(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    shut = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(PEM, PKCS8, shut))
    public.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def certificate(folder: Path, name: str, above: tuple | None = None) -> tuple:
    """(key, certificate, their files): a root, or one that `above` signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime(2026, 1, 1)
    usage = dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
                           "crl_sign", "encipher_only", "decipher_only"), False) | {"digital_signature": True, "key_cert_sign": above is None}
    made = (x509.CertificateBuilder().subject_name(subject).issuer_name(above[1].subject if above else subject).public_key(key.public_key())
            .serial_number(x509.random_serial_number()).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=3650))
            .add_extension(x509.BasicConstraints(ca=above is None, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True).sign(above[0] if above else key, hashes.SHA256()))
    files = folder / f"{name}.key", folder / f"{name}.crt"
    files[0].write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    files[1].write_bytes(made.public_bytes(PEM))
    return key, made, *files


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A folder with a model, its lock beside it, two key pairs, and a signature with the first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (folder / "sub" / "ünï code.txt").write_text("a name that is not ASCII")
    lock(folder).save(tmp_path / "model.lock.json")
    key_pair(tmp_path, "mine")
    key_pair(tmp_path, "theirs")
    sign(tmp_path / "model.lock.json", Signer(tmp_path / "mine.pem"))
    return folder


def verified(cli, tmp_path: Path, *more: object, key: str = "mine"):
    return cli("hub", "verify", tmp_path / "model.lock.json", tmp_path / "model", "--signature", tmp_path / "model.lock.json.sig",
               "--public-key", tmp_path / f"{key}.pub", *more, env={"HF_HOME": str(tmp_path / "home")})


def test_a_signature_that_holds(model, tmp_path, cli):
    ran = verified(cli, tmp_path, "--json")
    assert ran.status == 0 and ran.json["ok"] and ran.json["signature"]["files"] == 3
    assert verified(cli, tmp_path).out.startswith("The signature by the key mine.pub")


def their_command(*argv: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "model_signing", *map(str, argv)], capture_output=True, text=True, timeout=120)


def test_the_library_s_own_command_agrees(model, tmp_path):
    """Nobody here wrote it: it hashes the folder itself and compares with what we signed."""
    check = ["verify", "key", "--signature", tmp_path / "model.lock.json.sig", "--public_key", tmp_path / "mine.pub", model]
    assert their_command(*check).returncode == 0
    wrong = their_command("verify", "key", "--signature", tmp_path / "model.lock.json.sig", "--public_key", tmp_path / "theirs.pub", model)
    assert wrong.returncode == 1
    (model / "config.json").write_text('{"model_type": "mamba"}')
    changed = their_command(*check)
    assert changed.returncode == 1 and "config.json" in changed.stdout + changed.stderr


def test_a_signature_that_the_library_s_own_command_made(model, tmp_path):
    theirs = their_command("sign", "key", "--private_key", tmp_path / "mine.pem", "--signature", tmp_path / "theirs.sig", model)
    assert theirs.returncode == 0, theirs.stderr
    assert check_signature(tmp_path / "model.lock.json", tmp_path / "theirs.sig", Trust(tmp_path / "mine.pub")).files == 3
    (model / "config.json").write_text("{}")
    with pytest.raises(WrongSignature, match=r"config\.json has another hash"):
        check_signature(lock(model), tmp_path / "theirs.sig", Trust(tmp_path / "mine.pub"))


def _edit_lock(tmp_path: Path, change) -> None:
    file = tmp_path / "model.lock.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def _edit_payload(tmp_path: Path, change) -> None:
    file = tmp_path / "model.lock.json.sig"
    bundle = json.loads(file.read_text())
    statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    change(statement)
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    file.write_text(json.dumps(bundle))


def _edit_signature(tmp_path: Path) -> None:
    file = tmp_path / "model.lock.json.sig"
    bundle = json.loads(file.read_text())
    raw = bytearray(base64.b64decode(bundle["dsseEnvelope"]["signatures"][0]["sig"]))
    raw[-1] ^= 1
    bundle["dsseEnvelope"]["signatures"][0]["sig"] = base64.b64encode(bytes(raw)).decode()
    file.write_text(json.dumps(bundle))


def _tampered(document: dict) -> None: document["files"][0]["sha256"] = "0" * 64
def _fewer(document: dict) -> None: document["files"].pop()
def _more(document: dict) -> None: document["files"].append({"path": "more.py", "size_bytes": 1, "sha256": "1" * 64})
def _statement(document: dict) -> None: document["predicate"]["resources"][0]["digest"] = "0" * 64


TAMPERED = {
    "a hash of the lock": (lambda t: _edit_lock(t, _tampered), "has another hash"),
    "a file left out of the lock": (lambda t: _edit_lock(t, _fewer), "was signed and is not in the lock"),
    "a file added to the lock": (lambda t: _edit_lock(t, _more), "is in the lock and was not signed"),
    "the signed list": (lambda t: _edit_payload(t, _statement), "is not a valid signature"),
    "the signature": (_edit_signature, "is not a valid signature"),
    "half of the signature's file": (lambda t: (t / "model.lock.json.sig").write_text('{"verificationMaterial": '), "is not a model signature"),
    "a file": (lambda t: (t / "model" / "config.json").write_text('{"model_type": "llamb"}'), "the bytes are not those that were locked"),
    "a further file": (lambda t: (t / "model" / "modeling_x.py").write_text("1"), "a loader would read it"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_what_was_tampered_with_is_found(what, model, tmp_path, cli):
    change, words = TAMPERED[what]
    change(tmp_path)
    ran = verified(cli, tmp_path)
    assert ran.status == 1 and words in " ".join((ran.out + ran.err).split()), ran.out + ran.err


def test_another_key_and_another_signer(model, tmp_path, cli):
    assert verified(cli, tmp_path, key="theirs").status == 1
    sign(tmp_path / "model.lock.json", Signer(tmp_path / "theirs.pem"))
    assert verified(cli, tmp_path).status == 1 and verified(cli, tmp_path, key="theirs").status == 0


def test_a_signature_of_another_repository(tmp_path):
    files = [{"path": "config.json", "size_bytes": 2, "sha256": "a" * 64}]
    one, other = (ModelLock.from_dict({"repo": r, "commit": "c" * 40, "files": files}) for r in ("org/one", "org/other"))
    private, public = key_pair(tmp_path, "k")
    sign(one, Signer(private), tmp_path / "one.sig")
    assert check_signature(one, tmp_path / "one.sig", Trust(public)).subject == f"org/one@{'c' * 40}"
    with pytest.raises(WrongSignature, match="it is of org/one@"): check_signature(other, tmp_path / "one.sig", Trust(public))


def test_what_could_not_be_checked(model, tmp_path, cli):
    file, sig = tmp_path / "model.lock.json", tmp_path / "model.lock.json.sig"
    lines = {
        "none was given": ["verify", file, model, "--signature", sig],
        "there is no signature": ["verify", file, model, "--signature", tmp_path / "no.sig", "--public-key", tmp_path / "mine.pub"],
        "there is no public key": ["verify", file, model, "--signature", sig, "--public-key", tmp_path / "no.pub"],
        "cannot be read": ["verify", file, model, "--signature", sig, "--public-key", tmp_path / "model.lock.json"],
        "there is no private key": ["sign", file, "--private-key", tmp_path / "no.pem"],
        "cannot sign": ["sign", file, "--private-key", tmp_path / "mine.pub"],
        "there is no file": ["sign", tmp_path / "no.json", "--private-key", tmp_path / "mine.pem"],
        "Sigstore was not asked": ["sign", file],
        "the signature holds, and the files were not checked": ["verify", file, tmp_path / "gone", "--signature", sig, "--public-key", tmp_path / "mine.pub"],
    }
    for words, argv in lines.items():
        ran = cli("hub", *argv, env={"HF_HOME": str(tmp_path / "home")})
        assert ran.status == 2 and words in ran.sentence(), (argv, ran.out, ran.err)


def test_other_kinds_of_keys(model, tmp_path, cli, monkeypatch):
    private, public = key_pair(tmp_path, "shut", "secret")
    ran = cli("hub", "sign", tmp_path / "model.lock.json", "--private-key", private, "--password-env", "THE_PASSWORD", "--json", env={"THE_PASSWORD": "secret"})
    assert ran.status == 0 and ran.json["method"] == "key" and ran.json["files"] == 3 and verified(cli, tmp_path, key="shut").status == 0
    wrong = cli("hub", "sign", tmp_path / "model.lock.json", "--private-key", private, "--password-env", "THE_PASSWORD", env={"THE_PASSWORD": "wrong"})
    assert wrong.status == 2 and "cannot sign" in wrong.sentence()
    (tmp_path / "rsa.pem").write_bytes(rsa.generate_private_key(65537, 2048).private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    assert cli("hub", "sign", tmp_path / "model.lock.json", "--private-key", tmp_path / "rsa.pem").status == 2


def test_certificates(model, tmp_path, cli):
    root = certificate(tmp_path, "root")
    leaf, other = certificate(tmp_path, "leaf", root), certificate(tmp_path, "elsewhere")
    file, sig = tmp_path / "model.lock.json", tmp_path / "model.lock.json.sig"
    ran = cli("hub", "sign", file, "--private-key", leaf[2], "--signing-certificate", leaf[3], "--certificate-chain", root[3])
    assert ran.status == 0, ran.err
    check = ["hub", "verify", file, model, "--signature", sig, "--certificate-chain"]
    assert cli(*check, root[3]).status == 0 and cli(*check, other[3]).status == 1
    assert their_command("verify", "certificate", "--signature", sig, "--certificate_chain", root[3], model).returncode == 0
    mixed = cli("hub", "sign", file, "--private-key", other[2], "--signing-certificate", leaf[3])
    assert mixed.status == 2 and "cannot sign" in mixed.sentence()


def test_without_the_library_the_line_that_installs_it(model, tmp_path, cli):
    hidden = tmp_path / "hidden"
    (hidden / "OpenSSL").mkdir(parents=True)
    (hidden / "OpenSSL" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'OpenSSL'\", name='OpenSSL')")
    ran = cli("hub", "sign", tmp_path / "model.lock.json", "--private-key", tmp_path / "mine.pem", env={"PYTHONPATH": str(hidden)})
    assert ran.status == 2 and "pip install 'fsdl-devinfra[sign]'" in ran.sentence()
    shutil.rmtree(hidden)
    assert cli("hub", "sign", tmp_path / "model.lock.json", "--private-key", tmp_path / "mine.pem", env={"PYTHONPATH": str(hidden)}).status == 0


def command(capsys, *argv: object) -> tuple[int, str]:
    from fsdl_devinfra.cli import main
    status = main([str(a) for a in argv])
    said = capsys.readouterr()
    return status, said.out + said.err


def test_a_signer_without_a_signature_is_not_passed_over(model, capsys):
    lock_file = model.parent / "model.lock.json"
    assert command(capsys, "hub", "verify", lock_file, model)[0] == 0
    for trust in (["--public-key", model.parent / "mine.pub"], ["--identity", "me@example.org"], ["--certificate-chain", "root.pem"]):
        status, said = command(capsys, "hub", "verify", lock_file, model, *trust)
        assert status == 2 and "--signature" in said


def test_a_key_that_is_not_elliptic_is_a_sentence(model, tmp_path, capsys):
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    (tmp_path / "rsa.pem").write_bytes(key.private_bytes(PEM, PKCS8, serialization.NoEncryption()))
    (tmp_path / "rsa.pub").write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    lock_file = tmp_path / "model.lock.json"
    status, said = command(capsys, "hub", "sign", lock_file, "--private-key", tmp_path / "rsa.pem")
    assert status == 2 and "elliptic" in said and "unexpected" not in said
    assert command(capsys, "hub", "sign", lock_file, "--private-key", tmp_path / "mine.pem")[0] == 0
    status, said = command(capsys, "hub", "verify", lock_file, model, "--signature", f"{lock_file}.sig", "--public-key", tmp_path / "rsa.pub")
    assert status == 2 and "elliptic" in said and "unexpected" not in said


@pytest.mark.parametrize("name", ["model.lock.json", "mine.pem"])
def test_a_signature_is_not_written_over_what_it_is_made_from(model, tmp_path, capsys, name):
    before = (tmp_path / name).read_bytes()
    status, said = command(capsys, "hub", "sign", tmp_path / "model.lock.json", "--private-key", tmp_path / "mine.pem", "-o", tmp_path / name)
    assert status == 2 and "written over" in said and (tmp_path / name).read_bytes() == before


def test_a_password_variable_that_is_not_set_is_said(model, tmp_path, capsys, monkeypatch):
    key_pair(tmp_path, "shut", "secret")
    sign_it = ("hub", "sign", tmp_path / "model.lock.json", "--private-key", tmp_path / "shut.pem", "--password-env", "KEY_PASSWORD")
    monkeypatch.delenv("KEY_PASSWORD", raising=False)
    status, said = command(capsys, *sign_it)
    assert status == 2 and "KEY_PASSWORD holds nothing" in said
    monkeypatch.setenv("KEY_PASSWORD", "secret")
    assert command(capsys, *sign_it)[0] == 0
