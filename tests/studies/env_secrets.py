"""Ways of writing a secret, and look-alikes, made by a seed: names × syntaxes × values, command lines by program, shapes of providers.

python tests/studies/env_secrets.py --seed 1 --ways 2000 --harmless 600
python tests/studies/env_secrets.py --seed 1 --ways 1000 --vary           under other names, inside other texts
"""
import argparse
import base64
import itertools
import json
import random
import re
import string
import sys
from collections.abc import Callable, Iterator
from urllib.parse import quote

from env_patches import patch_of

from fsdl_devinfra.env.redaction import redact, redact_code, redact_patch, redact_text

ALNUM, HEX = string.ascii_letters + string.digits, "0123456789abcdef"


def text_of(draw: random.Random, count: int, alphabet: str = ALNUM) -> str:
    return "".join(draw.choice(alphabet) for _ in range(count))


#: what people use as a password, a key and a token
VALUES: dict[str, Callable[[random.Random], str]] = {
    "alnum": lambda d: text_of(d, 11) + "7" + text_of(d, d.randint(2, 30)),
    "hex": lambda d: "a7" + text_of(d, 30, HEX),
    "symbols": lambda d: "Q" + text_of(d, 5) + d.choice("!@%^*") + text_of(d, 6) + "9",
    "base64": lambda d: base64.b64encode(d.randbytes(d.choice([24, 30, 33]))).decode(),
    "uuid": lambda d: "-".join(text_of(d, n, HEX) for n in (8, 4, 4, 4, 11)) + "7",
}
NAMES = """HF_TOKEN WANDB_API_KEY DB_PASSWORD AWS_SECRET_ACCESS_KEY MYSQL_PWD CLIENT_SECRET api_key apiKey accessToken access-token auth_token
    password passwd db.password spring.datasource.password userPassword admin_pass SMTP_PASS refresh_token private_key signing_secret
    COMET_API_KEY NEPTUNE_API_TOKEN SECRET_KEY secretKey x-api-key encryption_key PGPASSWORD REDIS_PASSWORD bot_token GITHUB_TOKEN
    mot_de_passe motDePasse contraseña contrasena clave_secreta Passwort kennwort senha wachtwoord lösenord parola hasło heslo пароль 密码 パスワード
    비밀번호 salasana adgangskode passord jelszó şifre""".split()
SYNTAXES: dict[str, Callable[[str, str], str]] = {
    "env": lambda n, s: f"{n}={s}", "export": lambda n, s: f"export {n}='{s}'", "export bare": lambda n, s: f"export {n}={s}",
    "make ?=": lambda n, s: f"{n} ?= {s}", "make :=": lambda n, s: f"{n} := {s}", "make +=": lambda n, s: f"{n} += {s}", "make ::=": lambda n, s: f"{n} ::= {s}",
    "powershell": lambda n, s: f'$env:{n} = "{s}"', "powershell bare": lambda n, s: f"$Env:{n}='{s}'", "cmd": lambda n, s: f"set {n}={s}",
    "cmd quoted": lambda n, s: f'set "{n}={s}"', "setx": lambda n, s: f'setx {n} "{s}"', "csh": lambda n, s: f"setenv {n} {s}", "fish": lambda n, s: f"set -gx {n} {s}",
    "fish export": lambda n, s: f'set -x {n} "{s}"', "yaml": lambda n, s: f"{n}: {s}", "yaml quoted": lambda n, s: f"{n}: '{s}'", "json": lambda n, s: f'{{"{n}": "{s}"}}',
    "json escaped": lambda n, s: json.dumps(json.dumps({n: s})), "toml": lambda n, s: f'{n} = "{s}"', "ini": lambda n, s: f"[a]\n{n} = {s}\n",
    "properties": lambda n, s: f"{n}:{s}", "python": lambda n, s: f'{n} = "{s}"', "python dict": lambda n, s: f"d['{n}'] = '{s}'", "dict()": lambda n, s: f'dict({n}="{s}")',
    "ruby": lambda n, s: f"ENV['{n}'] ||= '{s}'", "ruby =>": lambda n, s: f":{n} => '{s}'", "php": lambda n, s: f"define('{n}', '{s}');", "php =": lambda n, s: f"${n} = '{s}';",
    "perl": lambda n, s: f"my ${n} = '{s}';", "js": lambda n, s: f"const {n} = `{s}`;", "js or": lambda n, s: f"process.env.{n} || '{s}'",
    "js ??": lambda n, s: f"process.env.{n} ?? \"{s}\"", "go": lambda n, s: f'os.Setenv("{n}", "{s}")', "go :=": lambda n, s: f'{n} := "{s}"',
    "rust": lambda n, s: f'let {n}: &str = "{s}";', "java": lambda n, s: f'System.setProperty("{n}", "{s}");', "java -D": lambda n, s: f"java -D{n}={s} -jar a.jar",
    "c#": lambda n, s: f'public const string {n} = "{s}";', "c define": lambda n, s: f'#define {n} "{s}"', "r": lambda n, s: f'Sys.setenv({n} = "{s}")',
    "r <-": lambda n, s: f'{n} <- "{s}"', "julia": lambda n, s: f'ENV["{n}"] = "{s}"', "lua": lambda n, s: f'local {n} = "{s}"', "sql": lambda n, s: f"SET {n} = '{s}';",
    "terraform": lambda n, s: f'variable "{n}" {{\n  type = string\n  default = "{s}"\n}}', "terraform one": lambda n, s: f'variable "{n}" {{ default = "{s}" }}',
    "terraform var": lambda n, s: f'terraform apply -var "{n}={s}"', "terraform -var=": lambda n, s: f"terraform apply -var={n}={s}",
    "helm": lambda n, s: f"helm install x y --set auth.{n}={s}", "docker -e": lambda n, s: f"docker run -e {n}={s} img", "docker ARG": lambda n, s: f"ARG {n}={s}",
    "docker ENV": lambda n, s: f"ENV {n} {s}", "docker ENV two": lambda n, s: f"ENV A=1 {n}={s}", "compose": lambda n, s: f"    environment:\n      - {n}={s}\n",
    "k8s": lambda n, s: f"- name: {n}\n  value: {s}\n", "k8s json": lambda n, s: json.dumps({"name": n, "value": s}), "ecs": lambda n, s: json.dumps({"Name": n, "Value": s}),
    "cloudformation": lambda n, s: json.dumps({"ParameterKey": n, "ParameterValue": s}), "aws cli": lambda n, s: f"ParameterKey={n},ParameterValue={s}",
    "xml": lambda n, s: f"<{n}>{s}</{n}>", "xml attribute": lambda n, s: f'<db {n}="{s}"/>', "xml add": lambda n, s: f'<add key="{n}" value="{s}"/>',
    "xml property": lambda n, s: f"<property><name>{n}</name><value>{s}</value></property>", "hadoop": lambda n, s: f"spark-submit --conf spark.hadoop.{n}={s}",
    "flag": lambda n, s: f"train.py --{n.replace('_', '-')} {s} --lr 1", "flag =": lambda n, s: f"train.py --{n}={s}", "flag quoted": lambda n, s: f"train.py --{n} '{s}'",
    "hydra": lambda n, s: f"train.py +logger.{n}={s}", "split literal": lambda n, s: f'{n} = ("{s[:6]}"\n    "{s[6:]}")', "split plus": lambda n, s: f'{n} = "{s[:6]}" + "{s[6:]}"',
    "split backslash": lambda n, s: f'{n} = "{s[:6]}" \\\n    "{s[6:]}"', "base64 assignment": lambda n, s: base64.b64encode(f"{n}={s}".encode()).decode(),
    "query": lambda n, s: f"https://x.example.org/a?b=1&{n}={quote(s, safe='')}", "header": lambda n, s: f"curl -H '{n}: {s}' https://x", "comment": lambda n, s: f"# {n}: {s}",
    "sentence": lambda n, s: f"the {n} is {s}", "arrow": lambda n, s: f"{n} -> {s}", "vault": lambda n, s: f"vault kv put secret/x {n}={s}",
    "kubectl": lambda n, s: f"kubectl create secret generic x --from-literal={n}={s}", "gh": lambda n, s: f"gh secret set {n} --body {s}", "heroku": lambda n, s: f"heroku config:set {n}={s}",
    "log": lambda n, s: f"2026-01-01 INFO {n}='{s}' set", "repr": lambda n, s: f"Config({n}='{s}', lr=1)", "namespace": lambda n, s: f"Namespace(lr=1, {n}='{s}')", "tuple": lambda n, s: f"('{n}', '{s}')",
    "getenv": lambda n, s: f"os.getenv('{n}', '{s}')", "env or": lambda n, s: f"os.environ.get('{n}') or '{s}'", "shell default": lambda n, s: f"${{{n}:-{s}}}",
    "shell default 2": lambda n, s: f"{n}=${{{n}:={s}}}", "field": lambda n, s: f'{n}: str = Field(default="{s}")', "field 2": lambda n, s: f'{n}: str = field(default="{s}")',
    "if": lambda n, s: f'if {n} == "{s}":', "setattr": lambda n, s: f"setattr(cfg, '{n}', '{s}')", "monkeypatch": lambda n, s: f"monkeypatch.setenv('{n}', '{s}')", "yaml block": lambda n, s: f"{n}: |\n  {s}\n",
}
#: command lines by what the program means; `@@` is the secret
COMMANDS = """mysql -u root -p@@ db|mysql --password=@@|mysqldump -uroot -p@@ db|sshpass -p @@ ssh h|sshpass -p@@ ssh h|redis-cli -a @@ ping|mongo -u a -p @@
mongosh --username a --password @@|psql postgresql://me:@@@h/db|docker login -u me -p @@ r.io|podman login -u me -p @@|helm registry login -u me -p @@ r.io|az login -u me -p @@
az login --service-principal -u a -p @@ --tenant t|oc login -u me -p @@|ldapsearch -x -D cn=admin -w @@|ldapsearch -D cn=a -w@@|curl -u me:@@ https://x|curl --user me:@@ https://x
curl -sSu me:@@ https://x|curl -U me:@@ https://x|curl --proxy-user me:@@ https://x|wget --user=me --password=@@ u|wget --http-passwd=@@ u|http -a me:@@ x.org|http --auth me:@@ x.org
httpie -a me:@@ u|aria2c --http-passwd=@@ u|aria2c --http-user=a --http-passwd=@@ u|smbclient //h/s -U me%@@|rclone config create x webdav pass @@|restic --password-command 'echo @@'
openssl enc -aes-256-cbc -k @@|openssl enc -aes-256-cbc -pass pass:@@|openssl rsa -passin pass:@@|gpg --passphrase @@ -d f|gpg --batch --passphrase=@@ -d f|zip -P @@ a.zip f|unzip -P @@ a.zip|unzip -P@@ a.zip
7z x -p@@ a.7z|7za a -p@@ a.7z f|rar x -p@@ a.rar|wandb login @@|huggingface-cli login --token @@|hf auth login --token @@|kaggle config set -n key -v @@|mc alias set m http://x user @@
aws configure set aws_secret_access_key @@|gcloud auth activate-refresh-token me @@|npm config set //r/:_authToken @@|npm config set _authToken=@@|pip config set global.index-url https://me:@@@h/simple
twine upload -u me -p @@ d|poetry publish -u me -p @@|poetry config http-basic.x me @@|poetry config pypi-token.pypi @@|uv publish --token @@|flit publish --password @@
train.py --pass @@|train.py --passw @@|train.py --tok @@|train.py --api-k @@|train.py --hub-tok @@|train.py --secr=@@|train.py --passwd @@|train.py --pw @@|cmake -D token=@@ .|make -e TOKEN=@@|gradle -PapiKey=@@
mvn -Dpassword=@@ x|sbt -Dtoken=@@|java -Dhttp.proxyPassword=@@ A|ansible-playbook -e ansible_password=@@ x|ansible-playbook -e "db_password=@@" x|ansible -e '{"vault_password": "@@"}' x
snowsql -a x -u me --pwd @@|sqlcmd -S h -U sa -P @@|sqlcmd -U sa -P@@|bcp t out f -U sa -P @@|isql dsn me @@|sqlplus me/@@@db|sqlplus -s me/@@@//h:1521/x|impdp me/@@ dir=x|cqlsh h -u me -p @@|clickhouse-client --password @@
influx -username a -password @@|influx auth --token @@|elasticsearch-users useradd a -p @@|etcdctl --user root:@@ get x|vault login @@|vault login token=@@|consul --token=@@|nomad -token=@@
mosquitto_pub -u me -P @@ -t x|rabbitmqctl add_user me @@|rabbitmqctl change_password me @@|kafka --sasl-password @@|lftp -u me,@@ h|lftp -e x -u me,@@ ftp://h|ncftpput -u me -p @@ h|ftp ftp://me:@@@h/
xfreerdp /u:me /p:@@ /v:h|rdesktop -u me -p @@ h|vncviewer -passwd @@|net use x: \\\\h\\s @@ /user:me|cmdkey /add:h /user:me /pass:@@|schtasks /ru me /rp @@|psexec \\\\h -u me -p @@ cmd|runas /password:@@ x
svn co --username me --password @@ u|hg clone https://me:@@@h/r|git clone https://oauth2:@@@gitlab.com/a/b|git -c http.extraHeader='PRIVATE-TOKEN: @@' clone x|gh auth login --with-token @@|glab auth login -t @@
echo me:@@ | chpasswd|echo @@ | sudo -S ls|echo "@@" | docker login --password-stdin|htpasswd -b f me @@|htpasswd -cb f me @@|useradd -p @@ me|mysqladmin -u root password @@|createuser --pwd @@
curl -H "X-Auth-Key: @@" x|curl -H "Api-Key: @@" x|curl -H "Ocp-Apim-Subscription-Key: @@" x|curl -H "PRIVATE-TOKEN:@@" x|curl -H "Authorization: token @@" x|curl -H "Authorization: ApiKey @@" x|curl -H "X-Goog-Api-Key: @@" x
curl -H "X-Vault-Token: @@" x|curl -H "Cookie: session=@@" x|curl -b sid=@@ x|curl --oauth2-bearer @@ x|curl -d 'grant_type=password&password=@@' x|curl -d client_secret=@@ x|curl -F token=@@ x|wget --header="Authorization: Basic @@" x""".replace("\n", "|")
HARMLESS_NAMES = """max_tokens num_tokens tokenizer pad_token_id pass_rate passes key_dim num_key_value_heads author authority secretary keyboard token_dropout
    vocab_size tokens_per_second password_policy auth_required bearer_angle compass keyframes token_type_ids use_auth_token is_private cookie_policy""".split()
HARMLESS_VALUES = ["1", "512", "0.1", "true", "None", "relu", "mean", "auto"]
CODE = """{n} = {w}|{n} = self.{w}|{n} = {w}[0]|{n} = {w}({n})|f({n}={n})|f({n}={w}.{n})|if {n}:|if not {n}:\n    return|def f({n}: str) -> None:|{n}: Optional[str] = None|{n}: str
return {n}|for {n} in {w}:|assert {n} == {w}.{n}|{n} = os.environ["{u}"]|{n} = os.getenv("{u}")|{n} = getpass.getpass()|d["{n}"] = {w}|{n} = None|del {n}|lambda {n}: {w}|with {n}:\n    pass
raise ValueError("no {n} was given")|print(f"{{{n}}}")|"{n}": {w},|{n} is not None|{n}, {w} = f()|{n} = {w} if {w} else None|class {c}({w}):|parser.add_argument("--{n}")|parser.add_argument("--{n}", type=str, help="the {n} to use")""".replace("\n", "|")
CODE = CODE.split("|")
CONTEXTS = """${{{n}}}|{u}=${u}|{u}=$(cat /run/{n})|--{n} "${u}"|{n}: ${{{{ secrets.{u} }}}}|{n}: {{{{ {n} }}}}|{n}: !vault x|{u}=|{n}: null|{n}: "***"|{n}=<your {n}>|{n}: str|export {u}=${{{u}:-}}|{u}=$OTHER|{n}_file=/run/x|{n}-path: /a/b""".split("|")
CODE_NAMES = "token password secret api_key auth_token cookie session_id credentials auth jwt access_token passphrase private_key".split()
CODE_WORDS = "batch cfg config value x token_list result settings args tokens client response data logits stored next_one".split()


def ways(seed: int, count: int) -> Iterator[tuple[str, object, str, Callable]]:
    "Kind, document, secret, and what reads it."
    draw = random.Random(seed)
    for i in range(count):
        kind = draw.choice(list(VALUES))
        secret = VALUES[kind](draw)
        if i % 3 == 2:
            command = draw.choice([c for c in re.split(r"(?<! )[|](?! )", COMMANDS) if "@@" in c])
            if "Basic" in command: secret = base64.b64encode(b"me:" + draw.randbytes(9).hex().encode()).decode()
            elif "@@@" in command or "'@@" in command: secret = VALUES["alnum"](draw)
            line = command.replace("@@", secret)
            as_list = i % 2 and not any(c in line for c in "'\"|\\")
            yield "command " + command, line.split() if as_list else line, secret, (lambda d: json.dumps(redact({"argv": d})[0])) if as_list else redact_text
        else:
            name, syntax = draw.choice(NAMES), draw.choice(list(SYNTAXES))
            if syntax in ("split literal", "split plus", "split backslash"): secret = VALUES["alnum"](draw)
            text = SYNTAXES[syntax](name, secret)
            looked = secret[6:] if syntax.startswith("split") else quote(secret, safe="") if syntax == "query" else text if syntax == "base64 assignment" else secret
            yield f"{syntax} · {name} · {kind}", text, looked, redact_text


def harmless(seed: int, count: int) -> Iterator[tuple[str, Callable]]:
    "Texts that hold no secret, and what reads them."
    draw = random.Random(seed)
    plain = list(SYNTAXES)
    for i in range(count):
        if i % 3 == 0:
            syntax = draw.choice([s for s in plain if not s.startswith(("split", "base64", "sentence"))])
            yield SYNTAXES[syntax](draw.choice(HARMLESS_NAMES), draw.choice(HARMLESS_VALUES)), redact_text
            continue
        n = draw.choice(CODE_NAMES)
        template = draw.choice(CODE if i % 3 == 1 else CONTEXTS)
        text = template.format(n=n, u=n.upper(), w=draw.choice(CODE_WORDS), c=n.title().replace("_", ""))
        yield text, (lambda code: redact_code(code, "a.py")) if i % 3 == 1 else redact_text


#: what may stand around a line, wherever it was written down
AROUND: dict[str, Callable[[str], str]] = {
    "plain": lambda t: t, "crlf": lambda t: t.replace("\n", "\r\n") + "\r\n", "indent": lambda t: "\n".join("    " + line for line in t.split("\n")),
    "mail": lambda t: "\n".join("> " + line for line in t.split("\n")), "log": lambda t: "2026-01-01T00:00:00Z INFO worker-3 | " + t,
    "comment behind": lambda t: t + "  # set by ops", "fence": lambda t: "```\n" + t + "\n```", "table": lambda t: f"| a | {t} | b |", "json": lambda t: json.dumps({"message": t}),
    "json in json": lambda t: json.dumps(json.dumps({"m": t})), "repr": lambda t: repr({"cmd": t}), "bash -c": lambda t: "bash -c " + json.dumps(t),
    "ssh": lambda t: t if "'" in t else f"ssh node17 '{t}'", "and": lambda t: f"cd /data && {t} && ls", "html": lambda t: f"<pre>{t}</pre>", "tab": lambda t: "\t" + t,
    "no-break space": lambda t: "note:\u00a0" + t, "byte order mark": lambda t: "\ufeff" + t, "parentheses": lambda t: f"({t})", "srun": lambda t: "srun --export=ALL " + t,
}
FILES = "notes.txt run.log a.sh README.md Dockerfile x.env".split()


def other_name(draw: random.Random, name: str) -> str:
    "The same name as another program writes it."
    if not re.fullmatch(r"\w+", name, re.ASCII): return name
    parts = name.lower().split("_")
    return draw.choice([name, name.upper(), "".join(map(str.title, parts)), "-".join(parts), "my_" + name, name + "_2", "PROD_" + name.upper(), ".".join(["app", *parts])])


def varied(seed: int, count: int) -> Iterator[tuple[str, object, str, Callable]]:
    "The same ways under other names, inside other texts, as a text, a document and a patch."
    draw = random.Random(seed)
    texts = ((kind, text, secret) for kind, text, secret, _ in ways(seed + 1, 2 * count) if isinstance(text, str))
    for kind, text, secret in itertools.islice(texts, count):
        name = kind.split(" · ")[1] if " · " in kind else ""
        if name and text.count(name) == 1: text = text.replace(name, other_name(draw, name))
        around, file = draw.choice(list(AROUND)), draw.choice(FILES)
        reads: list[Callable] = [redact_text, lambda t: json.dumps(redact({"job": {"notes": {"text": t}}})[0], ensure_ascii=False), lambda t, f=file: redact_patch(patch_of(f, t.encode()))]
        yield f"{around} · {kind}", AROUND[around](text), secret, draw.choice(reads)


def study(seed: int, count: int, look_alikes: int, vary: bool = False) -> dict[str, list]:
    "Ways that leak, and look-alikes that were changed."
    leaks = [(kind, document) for kind, document, secret, read in (varied if vary else ways)(seed, count) if secret in read(document)]
    return {"leaks": leaks, "damaged": changed(harmless(seed, look_alikes))}


def changed(texts: Iterator[tuple[str, Callable]]) -> list[tuple[str, str]]:
    "Texts that hold no secret and come out different, before and after."
    return [(text, after) for text, read in texts if (after := read(text)) != text]


def run(study: Callable[..., dict[str, list]], description: str, ways: int, **more: Callable) -> int:
    "The command line of a study of redaction."
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--ways", type=int, default=ways)
    options.add_argument("--harmless", type=int, default=600)
    options.add_argument("--show", action="store_true")
    for name in more: options.add_argument(f"--{name}", action="store_true")
    args = options.parse_args()
    found = study(args.seed, args.ways, args.harmless, **{name: getattr(args, name) for name in more})
    print(f"seed {args.seed}: {args.ways} ways, {len(found['leaks'])} leak; {args.harmless} look-alikes, {len(found['damaged'])} damaged")
    for row in found["leaks"] + found["damaged"] if args.show else []: print("  ", *(repr(str(part)[-200:]) for part in row))
    return bool(found["leaks"] or found["damaged"])


if __name__ == "__main__": sys.exit(run(study, __doc__ or "", 2000, vary=bool))
