"""A second campaign against the redaction: shapes of other vendors and ways of writing, planted in every kind of field, and look-alikes that must stay."""
import base64
import json
import random
import string
import time

import pytest

from fsdl_devinfra.env.environment import _finished
from fsdl_devinfra.env.redaction import redact, redact_text

ALNUM, HEX = string.ascii_letters + string.digits, "0123456789abcdef"
UPPER, LOWER, BASE64 = string.ascii_uppercase + string.digits, string.ascii_lowercase + string.digits, ALNUM + "+/"
_draw = random.Random(7)


def r(count, alphabet=ALNUM):
    "Made here and not written down: scanners of repositories would take them for real"
    return "".join(_draw.choice(alphabet) for _ in range(count))


def b64(text):
    return base64.b64encode(text.encode()).decode()


#: way of writing → (text with @@ for the secret, the secret)
WRITTEN = {
    "comet": ("comet init --api-key @@", r(25)),
    "mlflow user": ("MLFLOW_TRACKING_PASSWORD=@@", r(12)),
    "mlflow uri": ("MLFLOW_TRACKING_URI=https://me:@@@mlflow.corp/api", r(12)),
    "wandb netrc": ("machine api.wandb.ai\n  login user\n  password @@\n", r(40, HEX)),
    "wandb bare key 40hex in env": ("WANDB_API_KEY: @@", r(40, HEX)),
    "azure openai": ("AZURE_OPENAI_KEY=@@", r(32, HEX)),
    "azure sas": ("https://acct.blob.core.windows.net/c/b?sp=r&st=2024-01-01&sv=2022-11-02&sr=b&sig=@@%3D", r(43)),
    "azure sb": ("Endpoint=sb://x.servicebus.windows.net/;SharedAccessKeyName=Root;SharedAccessKey=@@=", r(43, BASE64)),
    "azure cosmos": ("AccountEndpoint=https://x.documents.azure.com:443/;AccountKey=@@==;", r(86, BASE64)),
    "azure devops pat b64": ("git -c http.extraheader='AUTHORIZATION: basic @@' clone x", b64(":" + r(52, LOWER))),
    "azure client secret": ("AZURE_CLIENT_SECRET=@@", r(3) + "8Q~" + r(34)),
    "gcp sa json": (json.dumps({"type":"service_account","project_id":"p","private_key_id":"0" * 40,"private_key":"-----BEGIN PRIVATE KEY-----\n@@\n-----END PRIVATE KEY-----\n"}), r(64, BASE64)),
    "gcp hmac": ("@@", "GOOG1E" + r(55, UPPER)),
    "gcp refresh": ('"refresh_token": "1//0@@"', r(60)),
    "aws secret bare assign": ("aws_secret_access_key = @@", r(40, BASE64)),
    "aws yaml": ("aws:\n  secret_key: @@\n  region: us\n", r(40, BASE64)),
    "s3 url with keys": ("s3://AKIA0123456789ABCDEF:@@@bucket/path", r(40)),
    "s3fs opts": ("--storage_options={'key': 'x', 'secret': '@@'}", r(40, BASE64)),
    "slack app": ("@@", "xapp-1-A0" + r(9, UPPER) + "-" + r(13, string.digits) + "-" + r(64, HEX)),
    "slack conf": ("@@", "xoxe.xoxp-1-" + r(160)),
    "stripe restricted": ("@@", "rk_live_" + r(99)),
    "stripe whsec": ("@@", "whsec_" + r(32)),
    "hf in url": ("https://user:@@@huggingface.co/org/x", "hf_" + r(34)),
    "openai svc": ("@@", "sk-svcacct-" + r(58) + "T3BlbkFJ" + r(58)),
    "anthropic admin": ("@@", "sk-ant-admin01-" + r(93)),
    "anthropic oat": ("@@", "sk-ant-oat01-" + r(93)),
    "mistral by name": ("MISTRAL_API_KEY=@@", r(32)),
    "cohere by name": ("CO_API_KEY=@@", r(40)),
    "deepseek sk": ("@@", "sk-" + r(32, HEX)),
    "perplexity": ("@@", "pplx-" + r(48)),
    "xai": ("@@", "xai-" + r(80)),
    "together": ("TOGETHER_API_KEY=@@", r(64, HEX)),
    "fireworks": ("@@", "fw_" + r(24)),
    "fireworks3Z": ("@@", "fw_3Z" + r(22)),
    "modal": ("modal token set --token-id ak-{r(22)} --token-secret @@", "as-" + r(22)),
    "runpod": ("@@", "rpa_" + r(46)),
    "vast": ("vastai set api-key @@", r(64, HEX)),
    "lambda": ("@@", "secret_" + r(20) + "_" + r(8) + "." + r(32)),
    "lightning": ("LIGHTNING_API_KEY=@@", r(36, HEX)),
    "clearml": ("api.credentials.secret_key=@@", r(50)),
    "dagshub": ("DAGSHUB_USER_TOKEN=@@", r(40, HEX)),
    "labelbox jwt": ("@@", "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9." + r(80) + "." + r(43)),
    "roboflow": ("Roboflow(api_key='@@')", r(20)),
    "zenml": ("@@", "ZENKEY_" + r(60)),
    "prefect": ("@@", "pnu_" + r(36)),
    "astronomer": ("ASTRO_API_TOKEN=@@", r(30)),
    "npmrc": ("//registry.example.com/:_authToken=@@", r(36)),
    "npmrc basic": ("//registry.example.com/:_auth=@@", b64("me:" + r(12))),
    "npm granular": ("@@", "npm_" + r(36)),
    "pypi": ("@@", "pypi-AgENdGVzdC5weXBpLm9yZw" + r(120)),
    "pypirc": ("[pypi]\nusername = __token__\npassword = @@\n", r(16)),
    "pip index": ("--extra-index-url https://aws:@@@d-1.d.codeartifact.us-east-1.amazonaws.com/pypi/r/simple/", r(300)),
    "pip index user only": ("https://@@@pkgs.dev.azure.com/o/_packaging/f/pypi/simple/", r(52, LOWER)),
    "conda channel": ("https://conda.anaconda.org/t/@@/org", "or-" + r(8, HEX) + "-" + r(4, HEX) + "-" + r(4, HEX) + "-" + r(4, HEX) + "-" + r(12, HEX)),
    "conda channel quetz": ("https://conda.corp/t/@@/get/channel", r(32)),
    "anaconda nucleus": ("https://repo.anaconda.cloud/t/@@/repo/main", r(40)),
    "gemfury": ("https://@@@pypi.fury.io/me/", r(20)),
    "cloudsmith path": ("https://dl.cloudsmith.io/@@/org/repo/python/simple/", r(16)),
    "gitlab deploy": ("https://gitlab-ci-token:@@@gitlab.com/a/b.git", "glcbt-1a_" + r(20)),
    "git+https pct": ("git+https://me:@@@github.com/a/b@main#egg=b", "p%40ss%2F" + r(10)),
    "github in query": ("https://raw.githubusercontent.com/a/b/main/x.py?token=@@", "GHSAT0" + r(50, UPPER)),
    "ssh url pass": ("ssh://me:@@@host:22/repo", r(10)),
    "scp-like": ("me:@@@github.com:a/b.git", r(14)),
    "argv --token=": ("--token=@@", r(8)),
    "argv --hf-token sp": ("train.py --hf-token @@ --lr 1", r(8)),
    "argv -p attached": ("mysql -uroot -p@@ db", r(12)),
    "argv sshpass": ("sshpass -p @@ ssh h", r(12)),
    "argv sshpass q": ("sshpass -p '@@' ssh h", "a b" + r(12)),
    "docker login": ("docker login -u me -p @@ registry.io", r(12)),
    "curl netrc": ("curl -ume:@@ https://x", r(12)),
    "curl user=": ("curl --user=me:@@ https://x", r(12)),
    "wget http-password": ("wget --http-password=@@ https://x", r(12)),
    "curl H q": ("curl -H 'PRIVATE-TOKEN: @@' https://x", r(20)),
    "curl H xauth": ("curl -H 'X-Auth-Token: @@' https://x", r(20)),
    "curl cookie": ("curl -b 'sessionid=@@' https://x", r(32)),
    "cookie header": ("Cookie: _ga=1; session=@@; theme=dark", r(32)),
    "set-cookie": ("Set-Cookie: SID=@@; Path=/; HttpOnly", r(32)),
    "python -c": ("import huggingface_hub as h; h.login('@@')", "hf_" + r(34)),
    "login(token)": ("login('@@')", r(40, HEX)),
    "wandb.login positional": ("wandb.login('never', '@@')", r(40, HEX)),
    "env export": ("export OPENAI_API_KEY='@@'", r(20)),
    "env json": (json.dumps({"HF":{"token":"@@"}}), r(20)),
    "env json escaped2": (json.dumps(json.dumps({"a":json.dumps({"password":"@@"})})), r(20)),
    "docker auth config": (json.dumps({"auths":{"reg.io":{"auth":"@@"}}}), b64("me:" + r(12))),
    "b64 user:pass in header": ("Proxy-Authorization: Basic @@", b64("me:" + r(12))),
    "yaml multi": ("db:\n  host: x\n  passwd: \"@@\"\n", r(12)),
    "yaml block": ("token: >-\n  @@\n", r(30)),
    "yaml block pipe": ("password: |\n  @@\nhost: x\n", r(30)),
    "toml": ("[x]\npassword = '''@@'''\n", r(12)),
    "dsn pg": ("host=db user=me password=@@ dbname=x", r(12)),
    "dsn odbc": ("Driver={ODBC};Server=x;UID=me;PWD=@@;", r(12)),
    "dsn odbc braces": ("Driver=x;PWD={@@};", "a;b" + r(12)),
    "dsn sentry": ("SENTRY_DSN=https://@@@o1.ingest.sentry.io/1", r(32, HEX)),
    "dsn redis": ("redis://:@@@cache:6379/0", r(12)),
    "dsn mongo": ("mongodb+srv://me:@@@c0.mongodb.net/x?w=majority", r(12)),
    "dsn amqp": ("amqp://g:@@@mq//", r(12)),
    "jdbc": ("jdbc:mysql://h:3306/db?user=me&password=@@&useSSL=false", r(12)),
    "jdbc oracle": ("jdbc:oracle:thin:me/@@@host:1521:x", r(12)),
    "path token": ("/home/me/keys/@@/x", "hf_" + r(34)),
    "path private key": ("/data/@@.ckpt", "ghp_" + r(36)),
    "label": ("LABEL build.token=@@", r(12)),
    "label quoted": ('LABEL "com.x.secret"="@@"', r(12)),
    "dockerfile ENV sp": ("ENV HF_TOKEN @@", r(20)),
    "build-arg": ("docker build --build-arg GH_TOKEN=@@ .", r(20)),
    "docker -e": ("docker run -e API_KEY=@@ img", r(20)),
    "slurm comment": ("#SBATCH --comment='pw=@@'", r(12)),
    "slurm export": ("--export=ALL,HF_TOKEN=@@,A=1", r(12)),
    "pem": ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n@@\n-----END RSA PRIVATE KEY-----", r(64, BASE64)),
    "pem one-line": ("-----BEGIN EC PRIVATE KEY-----\\nMIIE@@\\n-----END EC PRIVATE KEY-----", r(64, BASE64)),
    "pem encrypted": ("-----BEGIN ENCRYPTED PRIVATE KEY-----\n@@\n-----END ENCRYPTED PRIVATE KEY-----", r(64, BASE64)),
    "pem truncated": ("+-----BEGIN PRIVATE KEY-----\n+@@\n", r(64, BASE64)),
    "pem b64": ("KEY=@@", b64("-----BEGIN PRIVATE KEY-----\n" + r(60) + "\n-----END PRIVATE KEY-----")),
    "unicode pw": ('password = "@@"', "pässwörd日本" + r(6)),
    "unicode name": ('пароль = "@@"', "Zq" + r(12)),
    "chinese name": ('密码: @@', "Zq" + r(12)),
    "pw with quotes": ("password='it\\'s@@'", r(12)),
    "pw with dquote in single": ("password='a\"@@'", r(12)),
    "pw with braces": ("password=a{@@}", r(12)),
    "pw with parens": ("--password a(@@)b", r(12)),
    "pw with amp": ("--password=ab&@@", r(12)),
    "pw with comma": ("PASSWORD=ab,@@", r(12)),
    "pw with semi": ("--db-password=ab;@@", r(12)),
    "pw with space quoted": ('--password="ab @@"', r(12)),
    "pw with lt": ('password: ab<@@>', r(12)),
    "pw starting dash": ('--password -@@', r(12)),
    "pw triple quoted": ('PASSWORD = """@@"""', r(12)),
    "f-string": ('+headers = {"Authorization": f"Bearer @@"}', r(20)),
    "bearer no digit": ('Authorization: Bearer @@', r(40, string.ascii_letters)),
    "bearer json": ('{"Authorization": "Bearer @@"}', r(40, string.ascii_letters)),
    "dict call": ('+client = Client(secret="@@")', r(10)),
    "os.environ.setdefault": ('+os.environ.setdefault("HF_TOKEN", "@@")', r(16)),
    "os.putenv": ('+os.putenv("DB_PASSWORD", "@@")', r(16)),
    "tuple": ('+auth=("me", "@@")', r(16)),
    "HTTPBasicAuth": ('+HTTPBasicAuth("me", "@@")', r(16)),
    "getpass default": ('+os.environ.get("API_KEY", "@@")', r(16)),
    "argparse default": ('+p.add_argument("--hub_token", default="@@")', r(16)),
    "k8s secret yaml": ('apiVersion: v1\nkind: Secret\ndata:\n  value: @@\n', b64(r(20))),
    "k8s env value": ('- name: HF_TOKEN\n  value: "@@"\n', r(20)),
    "json name value": (json.dumps([{"name":"DB_PASSWORD","value":"@@"}]), r(20)),
    "xml attr": ('<add key="Password" value="@@"/>', r(20)),
    "xml attr2": ('<server password="@@"/>', r(20)),
    "ini space": ('password @@', r(20)),
    "htpasswd": ('me:$apr1$@@', r(8) + "$" + r(22)),
    "bcrypt": ("@@", "$2b$12$" + r(53)),
    "shadow": ("@@", "$6$" + r(8) + "$" + r(86)),
    "age": ("@@", "AGE-SECRET-KEY-1" + r(58, UPPER)),
    "pgp": ("-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n@@\n-----END PGP PRIVATE KEY BLOCK-----", r(64, BASE64)),
    "jfrog": ("@@", "cmVmdGtuOjAxO" + r(51)),
    "jfrog AKCp": ("@@", "AKCp8" + r(68)),
    "doppler": ("@@", "dp.pt." + r(43)),
    "1password": ("@@", "ops_eyJ" + r(250)),
    "circleci": ("@@", "CCIPAT_" + r(22) + "_" + r(40, HEX)),
    "buildkite": ("@@", "bkua_" + r(40, HEX)),
    "buildkite agent": ("@@", "bkct_" + r(60)),
    "codecov by name": ("CODECOV_TOKEN=@@", r(36, HEX)),
    "snyk by name": ("SNYK_TOKEN=@@", "a1b2c3d4-1111-2222-3333-" + r(12, HEX)),
    "sonar": ("@@", "sqp_" + r(40, HEX)),
    "datadog": ("DD_API_KEY=@@", r(32, HEX)),
    "newrelic": ("NEW_RELIC_LICENSE_KEY=@@", r(36, HEX) + "NRAL"),
    "newrelic insert": ("@@", "NRII-" + r(32)),
    "pagerduty": ("PAGERDUTY_ROUTING_KEY=@@", r(32, HEX)),
    "netlify": ("@@", "nfp_" + r(36)),
    "vercel": ("VERCEL_TOKEN=@@", r(24)),
    "vercel blob": ("@@", "vercel_blob_rw_" + r(16) + "_" + r(30)),
    "cloudflare": ("CF_API_TOKEN=@@", r(40)),
    "cloudflare origin": ("@@", "v1.0-" + r(24, HEX) + "-" + r(146, HEX)),
    "supabase": ("@@", "sbp_" + r(40, HEX)),
    "supabase new": ("@@", "sb_secret_" + r(22) + "_" + r(8)),
    "neon": ("@@", "napi_" + r(64, LOWER)),
    "planetscale": ("@@", "pscale_tkn_" + r(43)),
    "weaviate by name": ("WCD_API_KEY=@@", r(36)),
    "qdrant jwt-like": ("QDRANT_API_KEY=@@", r(36) + "|" + r(40)),
    "milvus": ("MILVUS_TOKEN=root:@@", r(12)),
    "langfuse": ("@@", "sk-lf-" + r(8, HEX) + "-" + r(4, HEX) + "-" + r(4, HEX) + "-" + r(4, HEX) + "-" + r(12, HEX)),
    "helicone": ("@@", "sk-helicone-" + r(7) + "-" + r(7) + "-" + r(7) + "-" + r(7)),
    "braintrust": ("@@", "sk-" + r(48)),
    "assemblyai": ("aai.settings.api_key = '@@'", r(32, HEX)),
    "elevenlabs": ("@@", "sk_" + r(48, HEX)),
    "stability": ("@@", "sk-" + r(48)),
    "deepgram": ("Authorization: Token @@", r(40, HEX)),
    "exa/tavily": ("@@", "tvly-dev-" + r(32)),
    "firecrawl": ("@@", "fc-" + r(32, HEX)),
    "serper": ("SERPER_API_KEY=@@", r(40, HEX)),
    "scaleway": ("SCW_SECRET_KEY=@@", "a1b2c3d4-1111-2222-3333-" + r(12, HEX)),
    "hetzner": ("HCLOUD_TOKEN=@@", r(64)),
    "linode": ("linode-cli --token @@", r(64, HEX)),
    "ovh": ("application_secret=@@", r(32)),
    "alibaba": ("@@", "LTAI" + r(20)),
    "tencent": ("@@", "AKID" + r(32)),
    "yandex": ("@@", "AQVN" + r(35)),
    "yandex iam": ("@@", "t1." + r(60) + "." + r(86)),
    "ibm": ("ibmcloud login --apikey @@", r(44)),
    "volcengine": ("@@", "AKLT" + r(44)),
    "facebook": ("@@", "EAAB" + r(120)),
    "twitter bearer": ("@@", "AAAAAAAAAAAAAAAAAAAAA" + r(80) + "%3D" + r(40)),
    "google oauth code": ("@@", "4/0A" + r(70)),
    "shopify": ("@@", "shpat_" + r(32, HEX)),
    "hashicorp batch": ("@@", "hvb." + r(150)),
    "vault legacy": ("VAULT_TOKEN=s.@@", r(24)),
    "consul": ("CONSUL_HTTP_TOKEN=@@", "a1b2c3d4-1111-2222-3333-" + r(12, HEX)),
    "tfc": ("@@", r(14) + ".atlasv1." + r(67)),
    "pulumi": ("@@", "pul-" + r(40, HEX)),
    "dynatrace": ("@@", "dt0c01." + r(24, UPPER) + "." + r(64, UPPER)),
    "okta": ("Authorization: SSWS @@", "00" + r(40)),
    "clojars": ("@@", "CLOJARS_" + r(60, LOWER)),
    "crates": ("@@", "cio" + r(32)),
    "rubygems": ("@@", "rubygems_" + r(48, HEX)),
    "nuget": ("@@", "oy2" + r(43, LOWER)),
    "docker oat": ("@@", "dckr_oat_" + r(32)),
    "ngc": ("NGC_API_KEY=@@", b64(r(26) + ":" + r(36))),
    "ngc cli": ("docker login nvcr.io -u '$oauthtoken' -p @@", r(84)),
    "kaggle json": (json.dumps({"username":"me","key":"@@"}), r(32, HEX)),
    "kaggle env": ("KAGGLE_KEY=@@", r(32, HEX)),
    "kubeconfig": ("users:\n- name: a\n  user:\n    client-key-data: @@\n", b64(r(200))),
    "kubeconfig token": ("    token: @@\n", r(30)),
    "ray redis pw": ("ray start --redis-password @@", r(12)),
    "jupyter token url": ("http://localhost:8888/lab?token=@@", r(48, HEX)),
    "jupyter pw hash": ("c.ServerApp.password = 'argon2:@@'", r(60)),
    "gradio auth": ("demo.launch(auth=('me','@@'))", r(10)),
    "ngrok": ("ngrok config add-authtoken @@", "2" + r(27) + "_" + r(20)),
    "smtp": ("smtps://me%40x.com:@@@smtp:465", r(10)),
    "s3 presigned": ("https://b.s3.amazonaws.com/k?AWSAccessKeyId=AKIA0123456789ABCDEF&Signature=@@%3D&Expires=1", r(27)),
    "gcs presigned": ("https://storage.googleapis.com/b/k?X-Goog-Algorithm=GOOG4&X-Goog-Signature=@@", r(256, HEX)),
    "cloudfront": ("https://d.cloudfront.net/x?Expires=1&Signature=@@&Key-Pair-Id=K1", r(100)),
    "hf cdn": ("https://cdn-lfs.hf.co/repos/x?response-content-disposition=a&Policy=@@&Signature=b&Key-Pair-Id=K", r(100)),
    "url fragment": ("https://x/cb#access_token=@@&token_type=bearer", r(40)),
    "telegram url": ("https://api.telegram.org/bot123456789:@@/sendMessage", r(35)),
    "discord ptb": ("https://ptb.discord.com/api/webhooks/1234567890/@@", r(68)),
    "teams": ("https://prod-1.westus.logic.azure.com:443/workflows/x/triggers/manual/paths/invoke?sig=@@", r(43)),
    "ntfy": ("@@", "tk_" + r(29, LOWER)),
    "pushover": ("PUSHOVER_TOKEN=@@", r(30, LOWER)),
    "healthchecks": ("https://hc-ping.com/@@", "a1b2c3d4-1111-2222-3333-" + r(12, HEX)),
    "trackio": ("TRACKIO_WRITE_TOKEN=@@", r(20)),
    "swanlab": ("swanlab login -k @@", r(21)),
    "aim remote": ("aim://me:@@@host:53800", r(12)),
    "neptune jwt": ("neptune.init(api_token='@@')", "eyJhcGlfYWRkcmVzcyI6" + r(60) + "=="),
}
FIELDS = {
    "variable": lambda s: {"variables": {"TORCH_X": s}},
    "argument": lambda s: {"python": {"argv": ["python", "t.py", s]}},
    "argument with =": lambda s: {"python": {"argv": ["python", "t.py", "--x=" + s]}},
    "remote": lambda s: {"source": {"remotes": {"origin": s}}},
    "patch": lambda s: {"source": {"diff": "diff --git a/x b/x\n@@ -1 +1 @@\n" + "".join(f"+{line}\n" for line in s.split("\n"))}},
    "untracked file": lambda s: {"source": {"untracked": [{"path": s}]}},
    "package origin": lambda s: {"packages": {"x": {"version": "1", "url": s}}},
    "branch": lambda s: {"source": {"branch": s}},
    "job": lambda s: {"job": {"slurm": {"slurm_job_comment": s}}},
    "nested configuration": lambda s: {"job": {"wandb": {"config": {"deep": [{"x": s}]}}}},
    "container label": lambda s: {"container": {"says": {"label": s}}},
    "reason": lambda s: {"missing": {"x": s}},
    "key": lambda s: {"data": {s: {"files": 1}}},
    "notebook": lambda s: {"python": {"notebook": s}},
}


@pytest.mark.parametrize("way", WRITTEN)
def test_no_way_of_writing_leaks(way):
    template, secret = WRITTEN[way]
    for field, plant in FIELDS.items():
        text = _finished(plant(template.replace("@@", secret))).to_json()
        assert secret not in text and json.dumps(secret)[1:-1] not in text, field


#: command lines as lists, where the secret is an item or a part of one
COMMANDS = [["mysql", "-uroot", "-p@@", "db"], ["sshpass", "-p", "@@", "ssh", "h"], ["docker", "login", "-u", "me", "-p", "@@", "r.io"], ["vastai", "set", "api-key", "@@"],
            ["ngrok", "config", "add-authtoken", "@@"], ["curl", "-u", "me:@@", "x"], ["curl", "-ume:@@", "x"], ["t.py", "--password=a b&c;@@"], ["t.py", "--hub-token", "-@@"],
            ["t.py", "+logger.wandb.api_key=@@"], ["curl", "-H", "Cookie: a=1; s=@@"], ["python", "-c", "import wandb; wandb.login('@@')"], ["t.py", "--cfg", '{"db": {"password": "@@"}}']]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: " ".join(c[:2]))
def test_no_command_line_leaks(command):
    secret = "q7" + r(22)
    text = _finished({"python": {"argv": [item.replace("@@", secret) for item in command]}}).to_json()
    assert secret not in text


def test_no_document_leaks():
    secret = "q7" + r(30)
    for document in ({"KAGGLE_KEY": secret}, {"key": secret}, {"env": [{"name": "DB_PASSWORD", "value": secret}]}, {"headers": [["Authorization", "Bearer " + secret]]},
                     {"credentials": {"a": {"b": [secret]}}}, {"пароль": secret}, {"x": f"password={secret}", "y": ["login", secret]}):
        assert secret not in json.dumps(redact(document)[0]), document


HARMLESS = """
token_dropout=True
max_tokens=4096
--max-new-tokens 512
tokenizer_path=/data/tok/tokenizer.json
/home/me/models/tokenizer/token_embeddings.safetensors
sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
--hash=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
commit 4b825dc642cb6eb9a060e54bf8d69288fbee4904
SECRETARY=alice
--key-frames 12
monkey=1
PASS_RATE=0.93
pass_rate: 0.93
pass@1=0.54
passes=3
bypass=true
compass=north
keyboard=us
keypoints=17
num_keypoints=17
key_frames=12
key_dim=64
kv_heads=8
query_key_norm=True
qk_norm=rms
--key value
key_padding_mask=None
num_key_value_heads=8
primary_key=id
foreign_key=user_id
sort_key=name
cache_key=abc123
cache_key=resnet50-imagenet-2024-01
partition_key=2024
keyword_args={}
public_key=ssh-ed25519
authors=["me"]
author=me
authority=ca
basic_block=3
bearer_angle=30
cookie_cutter=True
secretly=1
pattern=*.py
path=/usr/bin
patience=10
patch_size=16
dispatch=1
password_policy=strict
--token-type ids
token_count=1024
n_tokens=1_000_000
tokens=[1,2,3]
tokens_per_batch: 8192
per_token_loss=True
token = tokenizer.encode(text)
token = tokens[i]
next_token = torch.argmax(logits, dim=-1)
for token in tokens: print(token)
token = self.sample(logits)
last_token = ids[-1]
token_ids = tokenizer(text)["input_ids"]
def encode(token: str) -> int:
if token == tokenizer.eos_token:
sep_token=[SEP]
mask_token="[MASK]"
bos_token_id: 1
token: str
unk_token='<unk>'
additional_special_tokens=["<a>"]
token_level_f1=0.91
masked_token_accuracy=0.8
auth_required=False
use_auth=False
oauth2=False
git@github.com:me/x.git
https://github.com/me/x.git@v1.0
pkg @ git+https://github.com/me/x@4b825dc642cb6eb9a060e54bf8d69288fbee4904
https://pypi.example.com/simple/
docker.io/library/python:3.12@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
pytorch/pytorch:2.6.0-cuda12.4-cudnn9-runtime@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855
nvcr.io/nvidia/pytorch:24.10-py3
docker run -u 1000:1000 img
docker run --user 1000:1000 -p 8080:80 img
docker run -p 8888:8888 img
psql -p 5432 -h db
ssh -p 2222 host
torchrun --rdzv-endpoint=host:29500 -p 1
python -u train.py
mkdir -p /data/run_2024
--prefix /opt/conda
--passes 3
me@example.com
mailto:me@example.com
Author: Me <me@example.com>
Signed-off-by: Me <me2024@example.com>
10.0.0.1:29500
node[01-04]:8
2026-01-01T00:00:00Z
uuid 123e4567-e89b-12d3-a456-426614174000
run-20240101_120000-abc12xyz
ckpt-000123-of-001000
s3://bucket/prefix/key/part-0001.parquet
gs://bucket/tokens/shard_00001.bin
hf://datasets/org/name@main/data.parquet
/mnt/data/secret_santa/images
sk_learn=1
sk-learn-contrib
task-sk-model-with-very-long-name-2024-version-3
fc-layer-dims-1024
tk_images
fw_layers=12
napi_version=3
ak-47-detector
rpa_bot=1
pa-model-base-2024
t1.weighted
T1w.nii.gz
v1.0-beta
AAAAB3NzaC1yc2E is how ssh public keys begin
EAA is a rna sequence
ssh-rsa AAAAB3NzaC1yc2EAAAADAQABAAABAQC7 me@host
A100-SXM4-80GB
LTAI
CUDA_VISIBLE_DEVICES=GPU-8f6d7c1e-1b2c-3d4e-5f60-718293a4b5c6
NCCL_SOCKET_IFNAME=eth0
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
--lr=3e-4 --key-frames=12 --token-budget=100
TOKENIZERS_PARALLELISM=false
HF_HUB_DISABLE_IMPLICIT_TOKEN=1
HF_TOKEN_PATH=/x/token
SSH_AUTH_SOCK=/tmp/ssh-XXXX/agent.1
GIT_ASKPASS=/usr/bin/askpass
password_hash_algorithm=bcrypt
login_required=True
the login page of the app
set api-version 2024-01-01
ENV TOKENIZERS_PARALLELISM false
ENV MAX_TOKENS 4096
args.max_tokens
def login(user, password): pass
password: str = None
+    password: str
api_key=os.environ["API_KEY"]
api_key = os.getenv("OPENAI_API_KEY")
token=get_token()
token = None
token = HfFolder.get_token()
--dataset key=value
LABEL org.opencontainers.image.revision=4b825dc642cb6eb9a060e54bf8d69288fbee4904
tree -L 2 --noreport
cookies are small text files
secret_sharing_scheme
model=secret-sauce-7b
experiment: secretsanta
name: token_classification
name: TOKENIZER_PATH
value: 12
TokenClassificationPipeline
AutoModelForTokenClassification
BertForTokenClassification
TOKEN_BUCKET_RATE=100
num_auth_attempts=3
optimizer: adamw, key_dim: 64; value_dim: 64
x = {"key": "value"}
{"key": "train/loss", "value": 0.5}
{"name": "loss", "value": 0.1}
otp-release-25
sas_version=9.4
pat_size=3
dsn_layers=3
jwt_size
webhookless
""".strip().splitlines()
DOCUMENTS = [
    {"python": {"argv": ["train.py", "--key-frames", "12", "--token_dropout", "0.1", "-p", "8080", "-u", "x", "--pass-rate", "0.9", "--tokenizer", "gpt2"]}},
    {"config": {"token_dropout": 0.1, "max_tokens": 4096, "key_dim": 64, "num_key_value_heads": 8, "pass_rate": 0.9, "token_ids": [1, 2, 3], "secretary": "alice", "password_file": "/x/y", "vocab": {"token": 123}}},
    {"job": {"slurm": {"slurm_job_name": "token-ablation", "slurm_job_account": "authors"}}},
    {"config": {"name": "loss", "value": "abcdefgh12345678"}},
    {"python": {"argv": ["docker", "run", "-p", "8080:80", "-u", "1000:1000", "img"]}},
    {"python": {"argv": ["mlflow", "server", "-p", "5000"]}},
    {"python": {"argv": ["tokenizer", "train", "--vocab", "32000", "key", "value1234567890abcd"]}},
]


@pytest.mark.parametrize("text", HARMLESS)
def test_look_alikes_stay(text):
    assert redact_text(text) == text


def test_documents_of_look_alikes_stay():
    for document in DOCUMENTS: assert redact(document) == (document, [])


@pytest.mark.parametrize("line", ["user:u1aaaaaa", "a:b:", "http_", "a.", "a", "://a:b", "a:1bcdef@", "'\"", "token:\n  ", "login(", "eyJ", "x='", "-u "])
def test_long_lines_take_time_in_proportion(line):
    "A line of 60,000 characters, as minified code has; one quadratic expression would take minutes"
    start = time.perf_counter()
    redact_text((line * 60_000)[:60_000])
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("way", WRITTEN)
def test_twice_is_once(way):
    template, secret = WRITTEN[way]
    once = redact_text(template.replace("@@", secret))
    assert redact_text(once) == once
