"""Code survives redaction, secrets in code do not; captures beside each other; a run laid out again; a node that is not fit."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fsdl_devinfra.cli import main
from fsdl_devinfra.env import Environment, capture, diff
from fsdl_devinfra.env.environment import _finished
from fsdl_devinfra.env.redaction import redact_code, redact_patch, redact_text
from fsdl_devinfra.env.source import source

sys.path.insert(0, str(Path(__file__).parent / "studies"))
import env_languages as languages  # noqa: E402
import env_patches as patches  # noqa: E402
import env_secrets as secrets  # noqa: E402

sys.path.pop(0)

CODE = ["if token:\n    break", "token = tokens[0]", "f(auth=auth, token=token)", "password: SecretStr", "api_key: Optional[str] = None",
        "with auth:\n    yield", "auth = HTTPBasicAuth(user, pw)", "x.session_id == y.session_id", 'trigger_token = "sks"', 'eos_token = "</s>"',
        'bos_token = "<|begin_of_text|>"', 'token = os.getenv("HF_TOKEN")', "token = self.embed(token)", "jwt = None", 'auth = "none"']
SECRETS = ['password = "{}"', "connect(user='me', password='{}')", 'd = {{"api_key": "{}"}}', 'os.environ["HF_TOKEN"] = "{}"', '# password = "{}"',
           'x = os.environ.get("DB_PASSWORD", "{}")', 'self.auth_token: str | None = "{}"', 'url = "https://me:{}@example.org/x"',
           'run("mysql --password={}")', 'headers = {{"Authorization": "Bearer {}"}}', 'secret = ("{}"\n          "more")']


@pytest.mark.parametrize("code", CODE)
def test_code_is_kept(code): assert redact_code(code, "a.py") == code


@pytest.mark.parametrize("line", SECRETS)
def test_secret_in_a_hunk_goes_and_the_patch_applies(line):
    text = line.format("Zq8Lw3Rt5Yp9")
    clean = redact_patch(patches.patch_of("a.py", (text + "\n").encode()))
    assert "Zq8Lw3Rt5Yp9" not in clean
    assert patches.applied(clean, "a.py") is not None


@pytest.mark.parametrize("seed", [2, 5])
def test_ways_of_writing_leak_nothing_and_look_alikes_stay(seed):
    found = secrets.study(seed, count=500, look_alikes=300)
    assert not found["leaks"] and not found["damaged"]


@pytest.mark.parametrize("seed", [880011, 991102])
def test_ways_of_writing_leak_nothing_inside_other_texts(seed):
    assert not secrets.study(seed, count=300, look_alikes=0, vary=True)["leaks"]


#: files of installed packages and manuals that a fresh seed of the study found changed: nothing in them is secret
NO_SECRETS = [("a.js", "if (typeof proxy.custom_auth_request_handler !== 'function') {"), ("a.pl", "d_pwpasswd='define'"), ("a.py", '"pwd": "IPython.core.magics.osm:OSMagics",'),
              ("a.py", 'basic_auth_encoding: str = "latin-1",'), ("a.py", '"""\nwith context(\n    session_id="session-123",\n):\n"""'), ("a.py", 'os.environ["HF_TOKEN"] = "hf_example"'),
              ("a.py", 'def f(\n) -> Callable[..., BasicAuthProtocol]:\n    """\n    Protocol that enforces authorization.\n\n        credentials=("hello", "iloveyou"),\n    """'),
              ("a.rst", '"ARN": "arn:aws:secretsmanager:us-west-2:123456789012:secret:MyTestSecret-a1b2c3"'), ("a.py", "# “urn:ietf:params:oauth:token-type:saml2”"),
              ("a.rst", '"IdempotencyToken": "527c5358-2a1a-4b9e-b1b9-7293b0ddff42",'), ("a.rst", '"S3Key": "AKIAIOSFODNN7EXAMPLE"'), ("a.rst", ".. automodule:: google.oauth2.credentials\n   :members:"),
              ("a.py", 'creds = (\n    f" (tracking URI: {uri!r}, "\n    f"profile: {profile_of(uri)!r})"\n)'),
              ("a.sh", "tool sign model.lock.json --private-key key.pem"), ("a.sh", "# the password is read from the terminal"),
              ("a.py", 'SOURCE = """\\\nuint64_t __security_cookie = 0x00002B992DDFA232ULL;\n"""'), ("a.py", 'SM_SECRETS = "secrets.env"'), ("a.py", '_SSH_KEY_FORMATS = (\n    b"ssh-ed25519",\n)'),
              ("a.py", '"""\nx+y://user:pass@host:port[/db][?service_name=<service>[&key=value&key=value...]]\n"""'), ("a.py", '"dsn": "host:port/service?transport_timeout=30&expire_time=60",'),
              ("a.py", '_HEX_PAT = "[0-9A-Fa-f]{1,4}"'), ("a.py", 'storage_key = "cond_frame_outputs" if first else "other"'), ("a.py", "# (https://forum.example.org/t/t5-finetuning-tips/684/3)"), ("a.py", 'url = URL("HTTPS://jo%40example.com:a%20secret@example.org:1234/a")')]


@pytest.mark.parametrize("file, text", NO_SECRETS)
def test_what_is_no_secret_stays(file, text):
    patch = patches.patch_of(file, (text + "\n").encode())
    assert redact_patch(patch) == patch


#: beside each of them: the same place with a secret
BESIDE = [("a.js", "custom_auth_token = 'Zq8Lw3Rt5Yp9'"), ("a.pl", "d_pwpasswd='Zq8Lw3Rt5Yp9'"), ("a.py", '"pwd": "Zq8Lw3Rt5Yp9",'), ("a.py", 'def f() -> Auth:\n    password = "Zq8Lw3Rt5Yp9"'),
          ("a.rst", '"Secret": "Zq8Lw3Rt5Yp9"'), ("a.rst", '"S3Key": "AKIAZq8Lw3Rt5Yp9ABCD"'.replace("Zq8Lw3Rt5Yp9", "ZQ8LW3RT5YP9")), ("a.sh", "tool --private-key Zq8Lw3Rt5Yp9.x7"),
          ("a.sh", "# PASSWORD=Zq8Lw3Rt5Yp9"), ("a.sh", "#define PASSWORD \"Zq8Lw3Rt5Yp9\""), ("a.txt", "note: HF_TOKEN=Zq8Lw3Rt5Yp9"),
          ("a.py", 'SOURCE = """\\\nchar *session_cookie = Zq8Lw3Rt5Yp9;\n"""'), ("a.py", 'SM_SECRETS = "Zq8Lw3Rt5Yp9.x"'), ("a.py", 'ssh_key = (\n    b"Zq8Lw3Rt5Yp9",\n)'),
          ("a.py", '"""\nx+y://host:port[/db][?key=Zq8Lw3Rt5Yp9&key=value...]\n"""'), ("a.py", '"dsn": "me/Zq8Lw3Rt5Yp9@host:port/service",'), ("a.py", '"dsn": "host:port/service?password=Zq8Lw3Rt5Yp9",'), ("a.py", 'url = URL("HTTPS://jo%40example.com:a%20secretZq8Lw3Rt5Yp9@example.org:1234/a")'), ("mail.txt", "> - name: DB_PASSWORD\n>   value: Zq8Lw3Rt5Yp9a7x2\n> "), ("a.py", 'AZURE_PAT = "Zq8Lw3Rt5Yp9x2c4v6b8"'), ("a.py", 'storage_key = "Zq8Lw3Rt5Yp9"'), ("a.txt", "https://conda.example.org/t/or-Zq8Lw3Rt5Yp9xx/main"),
          ("run.log", "srun --export=ALL app.password: |\n  Zq8Lw3Rt5Yp9"), ("notes.txt", "app.motdepasse: |\r\n  Zq8Lw3Rt5Yp9\r\n"), ("run.log", '"{\\"m\\": \\"setenv AdminPass Zq8Lw3Rt5Yp9/mNb4Vc6X/sgiI5jsGP\\"}"')]


@pytest.mark.parametrize("file, text", BESIDE)
def test_what_is_a_secret_goes(file, text): assert "ZQ8LW3RT5YP9" not in redact_patch(patches.patch_of(file, (text + "\n").encode())).upper()


@pytest.mark.parametrize("seed", [1, 9])
def test_files_of_many_languages_leak_nothing_and_look_alikes_stay(seed):
    found = languages.study(seed, count=400, look_alikes=300)
    assert not found["leaks"] and not found["damaged"]


def test_the_head_of_a_key_takes_only_the_key():
    """Code that names the head of a key stays; a body goes, line by line, and the lines after it stay."""
    code = 'HEAD = "-----BEGIN RSA PRIVATE KEY-----"\nif HEAD in text:\n    raise ValueError("a key")\n'
    assert redact_code(code, "a.py") == code
    body = "MIIEpAIBAAKCAQEA7x1Zq8Lw3Rt5Yp9MIIEpAIBAAKCAQEA7x1Zq8Lw3Rt5Yp9"
    for end in (f"{body}\n-----END RSA PRIVATE KEY-----", body):
        clean = redact_patch(patches.patch_of("a.py", f'KEY = """-----BEGIN RSA PRIVATE KEY-----\n{body}\n{end}\n"""\nvalue = f(1)\n'.encode()))
        assert body not in clean and "+value = f(1)\n" in clean


def test_two_literals_of_one_value_are_one(): assert "px7qq7UKzs" not in redact_text('auth_token = ("TwpdLX"\n    "px7qq7UKzs")')


HOMOGLYPH = "p\u0430ssword"


@pytest.mark.parametrize("text", [f'{HOMOGLYPH} = "Zq8Lw3Rt5"', "next=https%3A%2F%2Fme%3AZq8Lw3Rt5%40example.org%2Fa", "openssl rsa -passin pass:Zq8Lw3Rt5 -in k"])
def test_hidden_ways_leak_nothing(text): assert "Zq8Lw3Rt5" not in redact_text(text)


@pytest.mark.parametrize("text", ["https://user@example.org", "ssh -p 2222 host", "python train.py -p config.yaml -k 5", "unzip -P $PASSWORD a.zip", "HF_TOKEN=$(cat /run/secrets/hf)", "next=https%3A%2F%2Fexample.org%2Fa"])
def test_what_hides_nothing_stays(text): assert redact_text(text) == text


def test_detectors_that_are_read_are_those_that_are_imported(tmp_path, monkeypatch):
    """Their modules run without an HTTP client; one that cannot run so makes all of them be imported."""
    from fsdl_devinfra.env import redaction
    imported = redaction._imported_detectors()
    folder = Path(sys.modules["detect_secrets.plugins"].__path__[0])
    read = redaction._read_detectors(folder)
    assert list(read) == list(imported) and all(tuple(read[n].denylist) == tuple(v.denylist) and read[n].secret_type == v.secret_type for n, v in imported.items())
    (tmp_path / "other.py").write_text("from .base import RegexBasedDetector\nclass Other(RegexBasedDetector):\n    secret_type, denylist = RegexBasedDetector.described()\n")
    with pytest.raises(AttributeError): redaction._read_detectors(tmp_path)
    monkeypatch.setattr(redaction, "_read_detectors", lambda _: redaction.__dict__["_no_such"])
    assert redaction._found_detectors() == imported
    code = "import sys\nfrom fsdl_devinfra.env import redaction\nassert redaction._detectors()\nprint([m for m in ('requests', 'detect_secrets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_detectors_of_detect_secrets_are_used(monkeypatch):
    from fsdl_devinfra.env import redaction
    text = "see SuperCloud-0123456789abcdef now"
    assert len(redaction._detectors()) > 15 and redact_text(text) == text
    monkeypatch.setattr(redaction, "_detectors", lambda: (("super-cloud", re.compile(r"SuperCloud-[0-9a-f]{16}")),))
    assert "<removed:super-cloud#" in redact_text(text)


def test_real_files_apply_and_parse():
    found = patches.study(seed=11, count=60)
    assert len(found["files"]) == 60 and not found["not applied"] and not found["broken"]
    assert len(found["changed"]) <= 3


def repository(folder, files):
    folder.mkdir(exist_ok=True)
    for args in (["init", "-q"], ["config", "user.email", "a@example.org"], ["config", "user.name", "a"]): subprocess.run(["git", *args], cwd=folder, check=True)
    for name, raw in files.items(): (folder / name).write_bytes(raw)
    subprocess.run(["git", "add", "."], cwd=folder, check=True)
    subprocess.run(["git", "commit", "-qm", "1"], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize("name,before,after", [("latin.py", b"x = 1\n", "s = 'ä'\n".encode("latin-1")), ("weights.bin", bytes(range(256)), bytes(range(255, -1, -1)) * 9),
                                               ("large.py", b"x = 1\n", b"".join(b"value_%d = %d\n" % (i, i) for i in range(60_000)))])
def test_changes_come_back_byte_for_byte(tmp_path, name, before, after):
    repo = repository(tmp_path / "r", {name: before})
    (repo / name).write_bytes(after)
    _finished({"source": source(repo)}).save(tmp_path / "env.json")
    env = Environment.load(tmp_path / "env.json")
    subprocess.run(["git", "checkout", "-q", "."], cwd=repo, check=True)
    subprocess.run(["git", "apply", "--whitespace=nowarn", "-"], cwd=repo, input=env.patch().encode("utf-8", "surrogateescape"), check=True)
    assert (repo / name).read_bytes() == after
    assert (tmp_path / "env.patch").exists() == (name != "weights.bin")


def test_untracked_and_ignored_inputs_count(tmp_path):
    repo = repository(tmp_path / "r", {".gitignore": b"local_*\n*.log\n"})
    documents = []
    for text in ("a", "b"):
        for name in ("conf.yaml", "local_settings.py", "run.log"): (repo / name).write_text(text)
        documents.append(_finished({"source": source(repo)}))
    assert {d.field for d in diff(*documents).of("numerics")} == {"source.untracked.conf.yaml.sha256", "source.untracked.local_settings.py.sha256"}
    assert diff(documents[0], documents[0]).verdict == "same"


def test_same_data_elsewhere_is_record_and_other_data_is_not():
    def env(path, digest): return _finished({"data": {path: {"files": 1, "size_bytes": 1, "sha256": digest * 64}}})
    assert diff(env("/a/x", "a"), env("/b/x", "a")).verdict == "same"
    assert diff(env("/a/x", "a"), env("/a/x", "b")).verdict == "differs"


def test_names_of_packages_and_data_are_kept():
    found = {"python": {"conda": {"aws-c-auth": "0.7.22 hbd3_7", "token-bucket": "0.3 py_0"}}, "data": {"/data/secret/x": {"sha256": "d" * 64, "size_bytes": 123456789}}}
    kept = _finished(found)
    assert kept.python["conda"] == found["python"]["conda"] and kept.data == found["data"]


def test_observed_and_default_are_no_difference_in_numerics():
    plain = _finished({"numerics": {"origin": "default", "settings": {"seed": "random", "threads": 2}}, "libraries": {"torch": {"version": "2.13.0"}}})
    inside = _finished({"numerics": {"origin": "observed", "settings": {"seed": 0, "threads": 2, "mkldnn.enabled": True}},
                        "libraries": {"torch": {"version": "2.13.0"}, "versions": {"onednn": "3.12.0"}, "loaded": {"gomp": "libgomp.so.1"}}})
    assert diff(inside, plain).verdict == diff(plain, inside).verdict == "same"
    other = _finished({"numerics": {"origin": "default", "settings": {"threads": 1}}, "libraries": {"torch": {"version": "2.13.0"}}})
    assert diff(inside, other).verdict == "differs"


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"): capture().save(tmp_path / f"{name}.json")
    odd = json.loads((tmp_path / "c.json").read_text())
    odd["machine"]["libc"] = "glibc 2.17"
    (tmp_path / "c.json").write_text(json.dumps(odd))
    capsys.readouterr()
    assert main(["env", "diff", "a.json", "b.json", "c.json", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [o["name"] for o in found["outliers"]] == ["c"] and "glibc 2.17" in found["outliers"][0]["answer"]
    assert main(["env", "diff", "a.json", "b.json", "b.json"]) == 0
    capsys.readouterr()
    status = main(["env", "check", "--no-load", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (report["verdict"] == "fail") and {c["status"] for c in report["checks"]} <= {"ok", "warning", "failed", "not-run"}


def test_rerun_says_what_is_gone(tmp_path, capsys):
    repo = repository(tmp_path / "r", {"train.py": b"print(1)\n"})
    (repo / "notes.yaml").write_text("x: 1\n")
    _finished({"source": source(repo), "python": {"argv": ["python", "train.py"]}}).save(tmp_path / "env.json")
    assert main(["env", "rerun", str(tmp_path / "env.json"), "--into", str(tmp_path / "one")]) == 0
    (repo / "notes.yaml").unlink()
    assert main(["env", "rerun", str(tmp_path / "env.json"), "--into", str(tmp_path / "two"), "--json"]) == 1
    capsys.readouterr()
    assert main(["env", "rerun", str(tmp_path / "env.json"), "--into", str(tmp_path / "two")]) == 2


def test_rerun_starts_and_compares(tmp_path, capfd):
    """The run's own capture is compared where it writes one; a run that fails fails here too."""
    script = b"import sys\nfrom fsdl_devinfra.env import capture\nimport os\nprint('RAN', os.environ.get('OMP_NUM_THREADS'))\nif '--save' in sys.argv: capture().save('env.json')\nsys.exit('--fail' in sys.argv)\n"
    repo = repository(tmp_path / "r", {"train.py": script})
    def rerun(name, **more):
        env = _finished({"source": source(repo), "python": {"argv": [sys.executable, "train.py", *more.pop("argv", [])]}} | more)
        env.save(tmp_path / f"{name}.json")
        status = main(["env", "rerun", str(tmp_path / f"{name}.json"), "--into", str(tmp_path / name), "--start", "--json"])
        said = capfd.readouterr()
        return status, json.loads(said.out), said.err
    status, found, err = rerun("plain", variables={"OMP_NUM_THREADS": "3"})
    assert "RAN 3" in err and found["exit_status"] == 0 and found["compared_with"] is None and found["layout"]["verdict"] == "ready"
    status, found, _ = rerun("saving", argv=["--save"], packages={"numpy": {"version": "0.0.1"}})
    assert status == 1 and found["compared_with"].endswith("code/env.json") and any(d["field"] == "packages.numpy.version" for d in found["differences"])
    status, found, _ = rerun("failing", argv=["--fail"])
    assert (status, found["verdict"], found["exit_status"], found["differences"]) == (1, "failed", 1, [])


def test_an_env_json_of_the_run_itself_is_no_capture(tmp_path, capfd):
    """Many programs write an `env.json` of their own: it is passed over, and the machine is captured."""
    repo = repository(tmp_path / "r", {"train.py": b"open('env.json', 'w').write('[1]')\n"})
    _finished({"source": source(repo), "python": {"argv": [sys.executable, "train.py"]}}).save(tmp_path / "env.json")
    status = main(["env", "rerun", str(tmp_path / "env.json"), "--into", str(tmp_path / "again"), "--start", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert status in (0, 1) and found["exit_status"] == 0 and found["compared_with"] is None


def test_a_remote_that_looks_like_an_option_is_a_place(tmp_path, capsys):
    """A capture is somebody else's document: laying it out runs nothing that it names."""
    repo = repository(tmp_path / "r", {"train.py": b"1\n"})
    hostile = source(repo) | {"root": None, "remotes": {"origin": f"--template={tmp_path}"}}
    _finished({"source": hostile, "python": {"argv": [sys.executable, "train.py"]}}).save(tmp_path / "env.json")
    assert main(["env", "rerun", str(tmp_path / "env.json"), "--into", str(tmp_path / "again"), "--json"]) == 1
    why = json.loads(capsys.readouterr().out)["missing"][0]
    assert "--template=" in why and "again/code" not in why.split("--template")[0]


def test_options_that_would_be_passed_over_are_refused(tmp_path, capsys):
    files = [str(capture().save(tmp_path / f"{name}.json")) for name in "abc"]
    assert main(["env", "diff", *files]) == 0
    assert main(["env", "diff", *files, "-o", str(tmp_path / "x.html")]) == 2
    assert "Leave -o out" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_a_capture_is_not_written_over(tmp_path, capsys):
    one, other = (str(capture().save(tmp_path / f"{name}.json")) for name in "ab")
    before = Path(one).read_bytes()
    for argv in (["restore", one, "--to", "slurm"], ["diff", one, other], ["diff", other, one]):
        assert main(["env", *argv, "-o", one]) == 2
        assert "written over" in capsys.readouterr().err and Path(one).read_bytes() == before
    assert main(["env", "restore", one, "--to", "slurm", "-o", str(tmp_path / "job.sh")]) == 0


def test_what_an_index_said_is_kept_after_ctrl_c(tmp_path, monkeypatch):
    from fsdl_devinfra.env import restoration
    from fsdl_devinfra.env.proof import Wheel
    from fsdl_devinfra.env.resolution import cache_file
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(restoration, "_record_at", lambda url: "sha256:a")
    def stopped(env, wheels, record):
        record(Wheel("a-1-py3-none-any.whl", "f" * 64, "https://127.0.0.1/a-1-py3-none-any.whl"))
        raise KeyboardInterrupt
    monkeypatch.setattr(restoration, "prove", stopped)
    with pytest.raises(KeyboardInterrupt): restoration.restore(_finished({}), "requirements")
    assert json.loads(cache_file().read_text()) == {"f" * 64: "sha256:a"}


def test_a_warning_is_not_counted_as_passed(monkeypatch):
    from fsdl_devinfra.env import node
    quiet = node.check_node(load=False)
    monkeypatch.setattr(node, "check_disk", lambda folder: node.Finding("disk", "warning", "nearly full"))
    loud = node.check_node(load=False)
    count = int(re.search(r"(\d+) checks passed", quiet.answer)[1])
    assert f"{count - 1} checks passed" in loud.answer and "warning: disk: nearly full" in loud.answer


def test_another_interpreter_is_captured_and_a_wrong_one_is_refused(tmp_path, capsys):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    assert main(["env", "capture", "--python", str(tmp_path / "other"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"]["prefix"] == str(tmp_path / "other") and found["packages"] == {} and not found["missing"]
    assert main(["env", "capture", "--python", str(tmp_path / "none"), "--json"]) == 2


def test_conda_archives_become_an_explicit_file():
    from fsdl_devinfra.env.restoration import conda
    python = {"version": "3.11.7", "conda": {"numpy": "1.26.4 py_0", "odd": "1 0"}, "conda_archives": {"numpy": "https://conda.example.org/linux-64/numpy-1.26.4-py_0.conda#" + "a" * 32}}
    made = conda(_finished({"python": python}), [])
    assert made.files["conda-explicit.txt"].splitlines()[1:] == ["@EXPLICIT", python["conda_archives"]["numpy"]]
    assert any("odd" in note for note in made.notes) and "conda-explicit.txt" not in conda(_finished({"python": {"conda": {}}}), []).files


def test_a_missing_package_costs_one_more_call():
    from fsdl_devinfra.env.resolution import Question, Refused, ask_all
    calls = []
    def attempt(question):
        calls.append(len(question.packages))
        if ("gone", "1") in question.packages: raise Refused("ERROR: No matching distribution found for gone==1")
        return []
    found, failed = ask_all(Question(tuple((f"p{i}", "1") for i in range(40)) + (("gone", "1"),)), attempt)
    assert found == [] and list(failed) == ["gone"] and "no wheel of this version" in failed["gone"] and calls == [41, 40]


def test_a_refusal_without_a_name_is_no_search():
    from fsdl_devinfra.env.resolution import Question, Refused, ask_all
    calls = []
    def attempt(question):
        calls.append(question)
        raise Refused("error: the certificate has expired")
    found, failed = ask_all(Question(tuple((f"p{i}", "1") for i in range(40))), attempt)
    assert len(calls) == 1 and len(failed) == 40 and "certificate" in failed["p3"]


class Healthy:
    """As `pynvml` answers for a card that is well."""
    nvmlInit = staticmethod(lambda: None)
    nvmlDeviceGetCount = staticmethod(lambda: 1)
    nvmlDeviceGetHandleByIndex = staticmethod(lambda i: i)
    nvmlDeviceGetTotalEccErrors = staticmethod(lambda h, kind, since: 0)
    nvmlDeviceGetRetiredPagesPendingStatus = staticmethod(lambda h: 0)
    nvmlDeviceGetRemappedRows = staticmethod(lambda h: (0, 0, 0, 0))
    nvmlDeviceGetCurrentClocksThrottleReasons = staticmethod(lambda h: 0x4)  # a power cap is no fault
    nvmlDeviceGetCurrPcieLinkWidth = nvmlDeviceGetMaxPcieLinkWidth = staticmethod(lambda h: 16)
    nvmlDeviceGetCurrPcieLinkGeneration = nvmlDeviceGetMaxPcieLinkGeneration = staticmethod(lambda h: 5)
    nvmlDeviceGetPerformanceState = staticmethod(lambda h: 0)
    nvmlDeviceGetComputeRunningProcesses = staticmethod(lambda h: [])
    nvmlDeviceGetNvLinkState = staticmethod(lambda h, i: 1)


def _raises(*args): raise RuntimeError("Not Supported")


FAULTS = {"uncorrected ECC": {"nvmlDeviceGetTotalEccErrors": lambda h, kind, since: 3}, "wait to be retired": {"nvmlDeviceGetRetiredPagesPendingStatus": lambda h: 1},
          "could not be remapped": {"nvmlDeviceGetRemappedRows": lambda h: (1, 0, 0, 1)}, "reset the GPU": {"nvmlDeviceGetRemappedRows": lambda h: (0, 1, 1, 0)},
          "thermal": {"nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: 0x40}, "power brake": {"nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: 0x80},
          "8 of 16 lanes": {"nvmlDeviceGetCurrPcieLinkWidth": lambda h: 8}, "generation 3 of 5": {"nvmlDeviceGetCurrPcieLinkGeneration": lambda h: 3},
          "NVLinks are down": {"nvmlDeviceGetNvLinkState": lambda h, i: int(i != 4)},
          "other processes hold": {"nvmlDeviceGetComputeRunningProcesses": lambda h: [type("P", (), {"usedGpuMemory": 1 << 30})]}}


@pytest.mark.parametrize("said", FAULTS)
def test_each_fault_of_a_card_is_found(said):
    from fsdl_devinfra.env.node import check_gpus
    ill = type("Ill", (Healthy,), {k: staticmethod(v) for k, v in FAULTS[said].items()})
    found = check_gpus(ill())
    assert found[0].status == "failed" and said in found[0].found and ";" not in found[0].found


def test_a_healthy_card_an_idle_one_and_one_that_answers_little_pass():
    from fsdl_devinfra.env.node import check_gpus
    idle = {"nvmlDeviceGetCurrPcieLinkGeneration": lambda h: 1, "nvmlDeviceGetPerformanceState": lambda h: 8}
    mute = {name: _raises for name in vars(Healthy) if name.startswith("nvmlDeviceGet") and name not in ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")}
    for more in ({}, idle, mute): assert check_gpus(type("Card", (Healthy,), {k: staticmethod(v) for k, v in more.items()})())[0].status == "ok"


def test_a_card_that_fell_off_the_bus(tmp_path):
    from fsdl_devinfra.env.node import check_count
    for i, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x030200"), ("0x10de", "0x068000"), ("0x1a03", "0x030000")]):
        device = tmp_path / f"sys/bus/pci/devices/0000:{i:02d}:00.0"
        device.mkdir(parents=True)
        (device / "vendor").write_text(vendor + "\n")
        (device / "class").write_text(kind + "\n")
    assert [check_count(n, tmp_path).status for n in (2, 1)] == ["ok", "failed"] and check_count(1, tmp_path / "none").status == "not-run"


@pytest.mark.slow
@pytest.mark.parametrize("change,said", [(("r + 1)", "r + 1 + (r == 1 and rank == 1))"), "wrong sum"), (("dist.all_reduce(x)", "time.sleep(60)"), "did not end"), (('init_process_group(backend)', 'init_process_group("nothing")'), "does not start")])
def test_all_reduce_that_is_wrong_or_hangs(monkeypatch, change, said):
    from fsdl_devinfra.env import node
    assert change[0] in node._ADD
    monkeypatch.setattr(node, "_ADD", node._ADD.replace(*change))
    found = node.check_all_reduce(seconds=25)
    assert found.status == "failed" and said in found.found
