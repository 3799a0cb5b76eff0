"""No secret reaches a file: planted in every kind of place, by shape and by name, against the detectors of detect-secrets too."""
import importlib
import json
import pkgutil
import re
import string

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from fsdl_devinfra.env.environment import _finished
from fsdl_devinfra.env.redaction import redact, redact_text, secret_name

ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"


def chars(alphabet, low, high=None):
    return st.text(alphabet, min_size=low, max_size=high or low)


def joined(*parts):
    return st.tuples(*(p if isinstance(p, st.SearchStrategy) else st.just(p) for p in parts)).map("".join)


# ---- secrets that have a shape: planted anywhere, with any text around them
SHAPES = {
    "hugging-face": joined("hf_", chars(ALNUM, 34)),
    "hugging-face-org": joined("api_org_", chars(ALNUM, 34)),
    "hugging-face-oauth": joined("hf_oauth_", chars(ALNUM + "_-", 40)),
    "wandb": joined("wandb_v1_", chars(ALNUM + "_", 60)),
    "openai": joined("sk-", chars(ALNUM, 19), "4", chars(ALNUM, 20)),
    "openai-legacy": joined("sk-", chars(ALNUM, 20), "T3BlbkFJ", chars(ALNUM, 20)),
    "openai-project": joined("sk-proj-", chars(ALNUM + "_-", 100)),
    "anthropic": joined("sk-ant-api03-", chars(ALNUM + "_-", 93)),
    "openrouter": joined("sk-or-v1-", chars(HEX, 64)),
    "replicate": joined("r8_", chars(ALNUM, 37)),
    "groq": joined("gsk_", chars(ALNUM, 52)),
    "nvidia": joined("nvapi-", chars(ALNUM + "_-", 64)),
    "langsmith": joined("lsv2_pt_", chars(HEX, 32), "_", chars(HEX, 10)),
    "pinecone": joined("pcsk_", chars(ALNUM + "_", 69)),
    "databricks": joined("dapi", chars(HEX, 32)),
    "kaggle": joined("KGAT_", chars(HEX, 32)),
    "neptune": chars(ALNUM, 60).map(lambda s: "eyJhcGlfYWRkcmVzcyI6" + s + "=="),
    "github": joined("ghp_", chars(ALNUM, 36)),
    "github-app": joined("ghs_", chars(ALNUM, 36)),
    "github-fine": joined("github_pat_", chars(ALNUM, 22), "_", chars(ALNUM, 59)),
    "gitlab": joined("glpat-", chars(ALNUM + "_-", 20)),
    "gitlab-job": joined("glcbt-64_", chars(ALNUM + "_-", 20)),
    "bitbucket": joined("ATBB", chars(ALNUM, 32)),
    "atlassian": joined("ATATT3xFfGF0", chars(ALNUM + "_=-", 100)),
    "aws-id": joined("AKIA", chars(string.ascii_uppercase + string.digits, 16)),
    "aws-temporary": joined("ASIA", chars(string.ascii_uppercase + string.digits, 16)),
    "aws-session": joined("IQoJb3JpZ2luX2Vj", chars(ALNUM, 100)),
    "google-api": joined("AIza", chars(ALNUM + "_-", 35)),
    "google-oauth": joined("ya29.", chars(ALNUM + "_-", 60)),
    "google-client": joined("GOCSPX-", chars(ALNUM + "_-", 28)),
    "azure-storage": joined("AccountKey=", chars(ALNUM + "+/", 86), "=="),
    "slack": joined("xoxb-", chars(string.digits, 12), "-", chars(string.digits, 12), "-", chars(ALNUM, 24)),
    "slack-hook": joined("https://hooks.slack.com/services/T", chars(ALNUM, 8), "/B", chars(ALNUM, 8), "/", chars(ALNUM, 24)),
    "discord-hook": joined("https://discord.com/api/webhooks/", chars(string.digits, 18), "/", chars(ALNUM + "_-", 68)),
    "stripe": joined("sk_live_", chars(ALNUM, 24)),
    "sendgrid": joined("SG.", chars(ALNUM + "_-", 22), ".", chars(ALNUM + "_-", 43)),
    "telegram": joined(chars("123456789", 10), ":", chars(ALNUM + "_-", 35)),
    "package-index": joined("pypi-AgEIcHlwaS5vcmc", chars(ALNUM + "_-", 100)),
    "npm": joined("npm_", chars(ALNUM, 36)),
    "docker-hub": joined("dckr_pat_", chars(ALNUM + "_-", 27)),
    "vault": joined("hvs.", chars(ALNUM + "_-", 90)),
    "digitalocean": joined("dop_v1_", chars(HEX, 64)),
    "tailscale": joined("tskey-auth-", chars(ALNUM, 16), "-", chars(ALNUM, 20)),
    "grafana": joined("glsa_", chars(ALNUM, 32), "_", chars(HEX, 8)),
    "jwt": joined("eyJ", chars(ALNUM, 30), ".eyJ", chars(ALNUM, 60), ".", chars(ALNUM + "_-", 43)),
    "private-key": chars(ALNUM + "+/", 200).map(lambda s: f"-----BEGIN OPENSSH PRIVATE KEY-----\n{s}\n-----END OPENSSH PRIVATE KEY-----"),
}
# ---- values without a shape: what gives them away is where they stand
PLAIN = joined("Zq", chars(ALNUM, 6, 40))  # a beginning that no field name has
PLACES = {
    "environment variable": lambda s: {"variables": {"HF_TOKEN": s}},
    "wandb key": lambda s: {"variables": {"WANDB_API_KEY": s}},
    "aws secret": lambda s: {"variables": {"AWS_SECRET_ACCESS_KEY": s}},
    "webhook without a keyword": lambda s: {"variables": {"NOTIFY_WEBHOOK_URLS": f"https://example.com/{s}"}},
    "argument": lambda s: {"python": {"argv": ["train.py", "--hub_token", s]}},
    "argument with =": lambda s: {"python": {"argv": ["train.py", f"--api-key={s}"]}},
    "hydra argument": lambda s: {"python": {"argv": ["train.py", f"logger.wandb.api_key={s}"]}},
    "command line as text": lambda s: {"python": {"build": f"python train.py --password {s} --lr 1"}},
    "curl user": lambda s: {"python": {"build": f"curl -u me:{s} https://example.com"}},
    "wandb login": lambda s: {"python": {"argv": ["wandb", "login", s]}},
    "remote with password": lambda s: {"source": {"remotes": {"origin": f"https://me:{s}@github.com/me/x.git"}}},
    "remote with token as user": lambda s: {"source": {"remotes": {"origin": f"https://{s}@github.com/me/x.git"}}},
    "remote with x-oauth-basic": lambda s: {"source": {"remotes": {"origin": f"https://{s}:x-oauth-basic@github.com/me/x.git"}}},
    "remote with query": lambda s: {"source": {"remotes": {"origin": f"https://gitlab.com/x.git?private_token={s}&a=1"}}},
    "patch, quoted": lambda s: {"source": {"diff": f'diff --git a/x.py b/x.py\n+password = "{s}"\n'}},
    "patch, .env": lambda s: {"source": {"diff": f"diff --git a/.env b/.env\n+DB_PASSWORD={s}\n"}},
    "patch, yaml": lambda s: {"source": {"diff": f"diff --git a/c.yaml b/c.yaml\n+  client_secret: {s}\n"}},
    "patch, json": lambda s: {"source": {"diff": f'diff --git a/c.json b/c.json\n+  "apiKey": "{s}",\n'}},
    "patch, annotated": lambda s: {"source": {"diff": f'diff --git a/x.py b/x.py\n+auth_token: str | None = "{s}"\n'}},
    "patch, keyword argument": lambda s: {"source": {"diff": f"diff --git a/x.py b/x.py\n+login(token='{s}')\n"}},
    "package origin": lambda s: {"packages": {"x": {"version": "1", "url": f"https://oauth2:{s}@gitlab.com/x.git"}}},
    "index url": lambda s: {"variables": {"PIP_INDEX_URL": f"https://me:{s}@mirror.example.com/simple"}},
    "proxy": lambda s: {"job": {"slurm": {"proxy": f"http://me:{s}@proxy:8080"}}},
    "connection": lambda s: {"data": {f"postgresql+psycopg2://me:{s}@db/x": {"files": 1}}},
    "signed link": lambda s: {"data": {"x": {"url": f"https://b.s3.amazonaws.com/k?X-Amz-Signature={s}&X-Amz-Date=1"}}},
    "azure link": lambda s: {"data": {"x": {"url": f"https://a.blob.core.windows.net/c?sv=2024&sig={s}"}}},
    "header": lambda s: {"python": {"argv": ["curl", "-H", f"Authorization: Bearer {s}"]}},
    "header of git": lambda s: {"source": {"diff": f"diff --git a/c b/c\n+\textraheader = AUTHORIZATION: basic {s}\n"}},
    "subscript": lambda s: {"source": {"diff": f'diff --git a/x.py b/x.py\n+os.environ["HF_TOKEN"] = "{s}"\n'}},
    "wandb.login": lambda s: {"source": {"diff": f'diff --git a/x.py b/x.py\n+wandb.login(key="7{s}{s}{s}")\n'}},
    "header name": lambda s: {"python": {"argv": ["curl", "-H", f"X-Api-Key: {s}"]}},
    "netrc": lambda s: {"source": {"diff": f"diff --git a/n b/n\n+machine api.wandb.ai login user password {s}\n"}},
    "nested secret": lambda s: {"job": {"x": {"credentials": {"value": s}}}},
    "escaped json": lambda s: {"variables": {"SM_TRAINING_ENV": json.dumps({"hyperparameters": {"hub_token": s}})}},
    "reason": lambda s: {"missing": {"source": f"fatal: could not read from https://me:{s}@github.com"}},
    "xml": lambda s: {"source": {"diff": f"diff --git a/x b/x\n+<password>{s}</password>\n"}},
}
#: a text can stand in each of these
FIELDS = [
    lambda s: {"machine": {"os": s}}, lambda s: {"container": {"image": s}}, lambda s: {"accelerators": {"gpus": [{"name": s}]}}, lambda s: {"libraries": {"torch": {"commit": s}}},
    lambda s: {"python": {"executable": s}}, lambda s: {"python": {"argv": ["x", s]}}, lambda s: {"packages": {"x": {"version": "1", "url": s}}}, lambda s: {"packages": {"x": {"version": "1", "editable": s}}},
    lambda s: {"numerics": {"settings": {"x": s}}}, lambda s: {"fingerprint": {"cpu": {"sum": s}}}, lambda s: {"variables": {"TORCH_X": s}}, lambda s: {"source": {"diff": s}}, lambda s: {"source": {"branch": s}},
    lambda s: {"source": {"untracked": [{"path": s}]}}, lambda s: {"job": {"slurm": {"name": s}}}, lambda s: {"hub": {"models": {s: ["a"]}}}, lambda s: {"data": {s: {"files": 1}}}, lambda s: {"missing": {"source": s}},
]
AROUND = ["{}", "see {} here", "x={}", '"{}"', "({})", "a,{},b", "https://example.com/{}", "+{}\n", "--flag={}", "\n{}\n", "key: {}", "[{}]", "{};"]
QUICK = settings(max_examples=10, deadline=None, database=None, phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck))


def written(found):
    return _finished(found).to_json()


def test_at_least_forty_shapes():
    assert len(SHAPES) + len(PLACES) >= 40


@pytest.mark.parametrize("kind", SHAPES)
def test_shape_never_survives(kind):
    @QUICK
    @given(SHAPES[kind], st.sampled_from(FIELDS), st.sampled_from(AROUND))
    def check(secret, field, around):
        text = written(field(around.format(secret)))
        core = secret.split("\n")[1] if "\n" in secret else secret.rpartition("/")[2] if "://" in secret else secret
        assert core not in text and json.dumps(core)[1:-1] not in text
        assert "<removed:" in text
    check()


@pytest.mark.parametrize("place", PLACES)
def test_place_never_leaks(place):
    @QUICK
    @given(PLAIN)
    def check(secret):
        assert secret not in json.dumps(json.loads(written(PLACES[place](secret)))).replace("removed", "")
    check()


def test_shapes_in_all_fields():
    token = "ghp_" + "aB3dE6gH9j" * 4
    for field in FIELDS:
        assert token not in written(field(token)), field(token)


def test_change_is_still_seen():
    first, again, other = (_finished({"variables": {"HF_TOKEN": t}}).variables["HF_TOKEN"] for t in ("hf_" + "a" * 34, "hf_" + "a" * 34, "hf_" + "b" * 34))
    assert first == again != other


HARMLESS = ["use_cls_token=True", "MAX_TOKENS=4096", "--max_new_tokens 512", "num_memory_tokens: 16", "pad_token_id=0", "eos_token = '</s>'", "--pad_token '<pad>'", "tokenizer=gpt2", "TOKENIZERS_PARALLELISM=false",
            "meta-llama/Llama-3.1-8B-Instruct", "sha256:" + "a1" * 32, "3f786850e387550fdab836ed7e6dc881de23001b", "https://github.com/me/repo.git", "git@github.com:me/repo.git", "ssh://git@github.com/me/repo.git",
            "--author me", "keyboard=us", "monkey=1", "--lr 1e-4 --seed 0", "sk-learn", "task-specific-tuning-of-large-models", "key=value", "HF_TOKEN_PATH=/home/me/.cache/token", "https://example.com/a?page=2&sort=name",
            "cls_token", "token_type_ids", "bos_token='<s>'", "tokens_per_second=12345", "image_token_index=32000", "--secrets-file x.yaml", "password_file=/run/x", "desk-top-publishing-with-8-columns-and-more",
            "risk-adjusted-return-over-2024-q1", "the bearer of this message", "basic authentication is used", "NVIDIA A100-SXM4-80GB", "train_ds/2024-01-01/part-00001-of-00128.parquet", "AVX512 AMX", "0.1.dev20240101+g1234567", "use_auth_token=True", "push_to_hub=False"]


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_stays(text):
    assert redact_text(text) == text


def test_harmless_settings_stay():
    document = {"argv": ["train.py", "--use_cls_token", "--max_new_tokens", "512", "--pad_token", "<pad>"], "variables": {"TOKENIZERS_PARALLELISM": "true", "MAX_TOKENS": "4096"},
                "packages": {n: {"version": "1.0"} for n in ("tokenizers", "secretstorage", "keyring", "pytoken", "password", "tiktoken")}}
    assert redact(document) == (document, [])


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_handled_and_twice_is_once(text):
    once = redact_text(text)
    assert redact_text(once) == once


@settings(max_examples=200, deadline=None)
@given(st.text(string.ascii_letters + "_-.", max_size=30))
def test_any_name_is_handled(name):
    assert secret_name(name) in (True, False)


def _detectors():
    import detect_secrets.plugins as plugins
    from detect_secrets.plugins.base import RegexBasedDetector
    for module in pkgutil.iter_modules(plugins.__path__):
        for value in vars(importlib.import_module(f"detect_secrets.plugins.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, RegexBasedDetector) and value is not RegexBasedDetector: yield value


#: addresses of machines are no secrets; Artifactory's passwords (AP and any word) would eat APACHE2LICENSE, so only those with a digit go
NOT_SECRETS = {"IPPublicDetector", "ArtifactoryDetector"}
#: go by the name before them; their expressions generate brackets and spaces that nobody writes, so the names are tested instead
BY_NAME = {"BasicAuthDetector": "--repo https://me:{}@host/x", "CloudantDetector": "cloudant_password = '{}'", "IbmCloudIamDetector": '"ibm_cloud_iam_api_key": "{}"',
           "IbmCosHmacDetector": "ibm_cos_hmac_secret_access_key={}", "SoftlayerDetector": "softlayer-api-key: {}"}
CASES = {f"{d.__name__}-{i}": r for d in {d.__name__: d for d in _detectors()}.values() if d.__name__ not in NOT_SECRETS | set(BY_NAME) for i, r in enumerate(d.denylist)}
GENERATE = settings(QUICK, max_examples=12)


def test_detect_secrets_has_detectors():
    assert len({name.split("-")[0] for name in CASES}) >= 15


@pytest.mark.parametrize("name", BY_NAME)
def test_what_detect_secrets_finds_by_name_goes(name):
    secret = "9f8a7b6c5d4e3f2a1b0c" * 2
    assert secret not in redact_text(BY_NAME[name].format(secret))


def test_webhook_of_softlayer():
    assert "a1" * 32 not in redact_text("https://api.softlayer.com/soap/v3.1/" + "a1" * 32)


@pytest.mark.parametrize("name", CASES)
def test_everything_that_detect_secrets_finds_goes(name):
    """Strings made from each detector's own expression do not come out as they went in (those too short to be secrets aside)."""
    regex = CASES[name]
    printable = st.characters(min_codepoint=32, max_codepoint=126)

    @GENERATE
    @given(st.from_regex(re.compile(regex.pattern, (regex.flags | re.ASCII) & ~re.UNICODE & ~re.IGNORECASE), fullmatch=True, alphabet=printable))
    def check(text):
        if len(text) >= 24: assert redact_text(text) != text
    check()


def test_a_secret_is_marked_once():
    """A mark is not taken for a name and a secret, and two programs of a command that mean the same item leave one mark, of the secret."""
    said = redact_text("curl -u me:hunter2 https://example.org")
    assert said.count("<removed:") == 1 and "hunter2" not in said
    assert "hunter2x" not in redact_text("curl -u ghp_0123456789abcdefghijABCDEFGHIJ012345:hunter2x https://example.org")
    twice, once = (redact([*programs, "-p", "hunter22"])[0][-1] for programs in (["mongo", "mongosh"], ["mongosh"]))
    assert twice == once


@pytest.mark.parametrize("text", [r"export HF_TOKEN=\$HF_TOKEN", r"HF_TOKEN=\${HF_TOKEN}", r"password=\None", r"password=\*\*", r'"X-Api-Key: \$KEY"',
                                  '{"msg": "Enter password:\\n"}'])
def test_a_backslash_before_a_reference_is_no_secret(text):
    assert redact_text(text) == text


def test_an_escaped_secret_is_hashed_without_its_backslash():
    assert redact_text(r"PASSWORD=\hunter22x") == redact_text("PASSWORD=hunter22x").replace("=", "=\\")


def test_a_password_in_a_list_of_arguments_is_marked_once():
    (_, _, clean), removed = redact(["curl", "-u", "me:hunter22x"])
    assert clean == redact_text("password=hunter22x").replace("password=", "me:") and len(removed) == 1
