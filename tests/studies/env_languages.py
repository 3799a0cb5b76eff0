"""Secrets and look-alikes in files of many languages, as `git diff` shows them: names × places × values, by a seed.

python tests/studies/env_languages.py --seed 1 --ways 1000 --harmless 600
"""
import json
import random
import sys
from collections.abc import Iterator

from env_patches import patch_of
from env_secrets import VALUES, changed, run

from fsdl_devinfra.env.redaction import redact_patch

NAMES = """api_key password db_password secret_key access_token auth_token client_secret hf_token wandb_api_key smtp_password private_key
    refresh_token aws_secret_access_key github_token encryption_key""".split()

#: file → how a named value is written there; `@n` is the name, `@s` the secret
PLACES: dict[str, list[str]] = {
    "train.yaml": ["@n: @s", "@n: '@s'", '@n: "@s"', "a:\n  @n: @s\n  b: 1", "a: {@n: '@s', b: 1}", "- @n: @s", "- name: @n\n  value: @s", '"@n": "@s"', "@n: @s  # old",
                   "# @n: @s", "env:\n  - @n=@s", "@n: !!str @s", "@n: &anchor @s", "@n: >-\n  @s\n", "run: |\n  export @n=@s\n  python a.py\n", "cmd: python a.py --@n @s"],
    "train.toml": ['@n = "@s"', "@n = '@s'", 'a.@n = "@s"', '"@n" = "@s"', '[a]\n@n = "@s"', 'a = { @n = "@s", b = 1 }', '# @n = "@s"', '@n = """@s"""'],
    "train.json": ['{"@n": "@s"}', '{"a": {"@n": "@s"}}', '  "@n" : "@s",', '{"env": ["@n=@s"]}', '{"name": "@n", "value": "@s"}', '{"args": ["--@n", "@s"]}', '{"cmd": "train --@n=@s"}'],
    "run.sh": ["@n=@s", "export @n=@s", "@n='@s'", 'export @n="@s"', "python a.py --@n @s", "python a.py --@n=@s", "# @n=@s", "curl -H 'Authorization: Bearer @s' u", "@n=@s python a.py",
               "cat <<EOF\n@n=@s\nEOF", "docker run -e @n=@s i", 'declare -x @n="@s"', "readonly @n=@s", ": ${@n:=@s}", "[ -z \"$@n\" ] && @n='@s'", "curl -u me:@s https://x", "echo '@s' | sudo -S ls"],
    "app.js": ["const @n = '@s'", 'let @n = "@s";', "x = {@n: '@s'}", 'x = {"@n": "@s"}', "// @n = '@s'", "process.env.@n = `@s`", "f({ @n: \"@s\" })", "this.@n = '@s'", "x['@n'] = '@s'", "/* @n: @s */",
               "const o = { headers: { Authorization: 'Bearer @s' } }", "export const @n: string = '@s'", "const @n = process.env.A || '@s'", "const @n = process.env.A ?? '@s'"],
    "app.ts": ["const @n: string = '@s'", "class A { private @n = '@s' }", "@n?: string = '@s'", "enum E { @n = '@s' }"],
    "a.py": ["@n = '@s'", 'd = {"@n": "@s"}', "f(@n='@s')", "d['@n'] = '@s'", "# @n = '@s'", "def f(@n='@s'): pass", "def f(@n: str = '@s'): pass", "x = '''\n@n: @s\n'''", "os.environ['@n'] = '@s'", "'''@n=@s'''",
             "parser.add_argument('--@n', default='@s')", "x = f'--@n=@s'", "cmd = ['a.py', '--@n', '@s']", "self.@n = '@s'", "@n: str = '@s'", "if @n == '@s': pass", "os.system('export @n=@s')"],
    "a.ipynb": ["SOURCE:@n = '@s'", "SOURCE:os.environ['@n'] = '@s'", 'SOURCE:@n = "@s"', "SOURCE:# @n = '@s'", "SOURCE:!python a.py --@n @s", "SOURCE:%env @n=@s", "SOURCE:d = {\"@n\": \"@s\"}", "SOURCE:f(@n='@s')",
                "OUTPUT:@n = @s", "OUTPUT:{'@n': '@s'}", "SOURCE:!export @n=@s", "MARKDOWN:the @n: `@s`"],
    ".env": ["@n=@s", '@n="@s"', "export @n=@s", "# @n=@s"],
    "a.ini": ["[a]\n@n = @s", "@n=@s", "@n: @s", "; @n = @s"],
    "Dockerfile": ["ENV @n=@s", "ENV @n @s", "ARG @n=@s", "RUN @n=@s pip install x", "RUN --mount=type=cache echo @n=@s"],
    "a.properties": ["@n=@s", "a.@n=@s", "@n: @s"],
    "a.tf": ['@n = "@s"', 'variable "@n" {\n  default = "@s"\n}', 'a = {\n  @n = "@s"\n}'],
    "a.go": ['const @n = "@s"', '@n := "@s"', 'x := map[string]string{"@n": "@s"}', 'os.Setenv("@n", "@s")'],
    "a.cc": ['const char* @n = "@s";', '#define @n "@s"', 'std::string @n = "@s";', "// @n = @s"],
    "a.rs": ['let @n = "@s";', 'const @n: &str = "@s";'],
    "README.md": ["`export @n=@s`", "    @n=@s", "```\n@n: @s\n```", "the @n is @s", "[a](https://x/?@n=@s)"],
    "Makefile": ["@n = @s", "@n := @s", "run:\n\t@n=@s python a.py", "export @n ?= @s"],
    "a.xml": ["<@n>@s</@n>", '<add key="@n" value="@s"/>'],
}

#: file → what holds no secret; `@n` is a name, `@w` another word, `@u` the name in capitals
PLAIN: dict[str, list[str]] = {
    "train.yaml": ["@n: null", "@n: ${@u}", "@n: ${{ secrets.@u }}", "@n: {{ .Values.@n }}", "secretKeyRef:\n  name: @w\n  key: @n", "@n: true", "- @n", "@n: []", "@n: {}", "@n: &@w", "@n: *@w", "@n: !vault", "@n:\n  @w: 1",
                   "@n: string", "type: @n", "required: [@n, @w]", "@n:\n  type: string\n  description: the @n to use", "- run: echo $@u", "token: <pad>", "max_tokens: 4096", "tokenizer: meta-llama/Llama-3.1-8B", "pad_token: '[PAD]'",
                   "key: value", "cache-key: ${{ hashFiles('a') }}", "author: Jane Doe", "secretName: my-secret", "serviceAccountName: @w"],
    "train.toml": ["@n = true", "@n = ['@w']", "[@n]", "[tool.@n]", "@n = { version = '1.0' }", "keyring = '^24.3'", "google-auth = '>=2.1'", "tokenizers = '==0.21.4'", "[@n.@w]\na = 1", "# set @n first", "keywords = ['@n']"],
    "train.json": ['{"@n": null}', '{"@n": true}', '{"@n": {"type": "string"}}', '{"required": ["@n", "@w"]}', '{"@n": []}', '{"@n": "${@u}"}', '{"$ref": "#/definitions/@n"}', '{"pad_token": "<pad>", "eos_token": "</s>"}',
                   '{"tokenizer_class": "LlamaTokenizerFast"}', '{"@n": {"description": "the @n of @w"}}', '{"properties": {"@n": {}}}', '{"title": "@n"}', '{"additionalProperties": "@n"}', '{"token": 512, "key": "a"}'],
    "run.sh": ["@n=$1", '@n="$@u"', "@n=$(cat /run/@n)", "export @u", "unset @n", 'if [ -z "$@n" ]; then exit 1; fi', "read -s @n", "python a.py --@n $@u", 'python a.py --@n "${@u}"', "@n=${@u:-}", "@n=", "f() { local @n=$1; }",
               "for @n in $@w; do :; done", "case $@n in *) ;; esac", "echo \"$@n\"", "echo no @n given", "source @n.sh", "--@n) @n=$2; shift ;;", "python a.py --max-tokens 4096 --token-type bpe"],
    "app.js": ["const @n = @w", "const @n = @w.@n", "const {@n, @w} = x", "f({@n, @w})", "f({@n: @w})", "x.@n = @w.get('@n')", "if (!@n) throw new Error('no @n')", "@n: undefined", "const @n = await f(@w)", "@n = @n || @w", "@n => @w",
               "type A = {@n: string}", "const @n = process.env.@u", "import {@n} from './@w'", "return @n ? @w : null", "`${@n}`", "@n: @w.@n,", "x = @n === @w", "/@n=[^&]+/.test(@w)", "@n: [@w]", "@n: function(@w) {}", "var @n=@w,a=1;",
               "const @n = getElementById('@n')", "<input type=\"@n\" name=\"@n\">", "s.@n!==@w&&(@n=@w)", "this.@n = @w;", "@n?.@w", "var @n = new @w()", "@n: @w === 'a' ? 1 : 2"],
    "app.ts": ["@n: string;", "@n?: @w | null;", "constructor(private @n: string) {}", "function f(@n: string, @w: number): void {}", "let @n: @w<string>;", "@n as string"],
    "a.py": ["@n = @w", "@n: str", "@n: Optional[str] = None", "def f(@n, @w=None): pass", "f(@n=@w)", "@n = os.environ['@u']", "d = {'@n': @w}", "@n = @w.@n", "raise ValueError('no @n')", "@n = args.@n", "if @n is None: pass", "@n, @w = f()",
             "x[@n] = @w[0]", "lambda @n: @w", "@n = getpass('@n: ')", "parser.add_argument('--@n', help='the @n')", "{@n: @w}", "print(f'{@n}={@w}')", "@n = @w if @w else None", "class A(@w): @n: int = 1", "@n = b''", "@n = '@n'",
             "'''\n@n: the @n that is sent\n@w: other\n'''", "'''\n:param @n: the @n to use\n'''", "# the @n is read from @u", "# @n: str"],
    "a.ipynb": ["SOURCE:@n = @w", "SOURCE:f(@n=@w)", "SOURCE:@n = os.environ['@u']", "SOURCE:tokenizer.pad_token = tokenizer.eos_token", "SOURCE:%env @u", "SOURCE:!python a.py --@n $@u", "OUTPUT:@n: 512", "MARKDOWN:the @n is needed",
                "SOURCE:@n = getpass('@n')", "SOURCE:def f(@n, @w): pass", "SOURCE:d = {'@n': @w}", "SOURCE:@n: str = None"],
    ".env": ["@u=", "@u=${@w}", "# @u is needed"],
    "a.ini": ["[@n]", "@n = %(@w)s", "@n =", "@n = true"],
    "Dockerfile": ["ARG @u", "ENV @u=$@u", "RUN --mount=type=secret,id=@n cat /run/secrets/@n", "RUN test -n \"$@u\""],
    "a.tf": ['variable "@n" {\n  type = string\n  sensitive = true\n}', "@n = var.@n", '@n = data.@w.x.@n', '@n = "${var.@n}"'],
    "a.go": ["@n := @w", "func f(@n string, @w int) error {", "x.@n = @w.@n", "@n string `json:\"@n\"`", "if @n == \"\" {", "@n: @w,", "@n := os.Getenv(\"@u\")", "return @n, nil"],
    "a.cc": ["auto @n = @w;", "std::string @n;", "f(@n, @w);", "@n->@w();", "@n = @w[0];", "const char* @n = nullptr;", "#include <@n.h>", "case @n: return @w;", "@n ? @w : 0;", "Token @n = @w::@n;"],
    "a.rs": ["let @n = @w;", "@n: &str,", "fn f(@n: String) -> @w {", "@n: @w.clone(),"],
    "README.md": ["Set `@u` first.", "- `@n`: the @n to use", "`export @u=<your @n>`", "| @n | string | the @n |", "[@n](#@n)", "the @n is sent as header", "`--@n TEXT`"],
    "Makefile": ["@n = $(@w)", "@n ?=", "@n: @w", "\tpython a.py --@n $(@u)"],
    "a.xml": ["<@n/>", "<@n>${@u}</@n>", '<xs:element name="@n" type="xs:string"/>'],
}
PLAIN_NAMES = "token password secret api_key auth_token cookie session_id credentials access_token passphrase private_key auth bearer secret_key".split()
WORDS = "batch cfg config value tokens_list result settings options client response data logits stored other_name userInput nextValue".split()


def notebook(written: str) -> str:
    "A notebook with one line in a cell's source, its output or its prose."
    kind, _, text = written.partition(":")
    lines = [line + "\n" for line in ["import os", *text.split("\n"), "print(1)"]]
    output = [{"name": "stdout", "output_type": "stream", "text": lines}] if kind == "OUTPUT" else []
    cell = {"cell_type": "markdown", "metadata": {}, "source": lines} if kind == "MARKDOWN" else {
        "cell_type": "code", "execution_count": 1, "id": "a1b2", "metadata": {}, "outputs": output, "source": ["f()\n"] if output else lines}
    return json.dumps({"cells": [cell], "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def written(draw: random.Random, file: str, template: str, name: str, secret: str = "") -> str:
    "The patch of a file that holds one such place."
    name = name.upper() if draw.random() < 0.3 and not template.startswith(("the", "<")) else name
    if draw.random() < 0.3 and not any(q in template for q in ("@n}", "$@n", "SOURCE")): name = "".join(w.title() if i else w for i, w in enumerate(name.split("_")))
    text = template.replace("@n", name).replace("@s", secret).replace("@u", name.upper()).replace("@w", draw.choice(WORDS))
    return patch_of(file, (notebook(text) if file.endswith(".ipynb") else text + "\n").encode())


def ways(seed: int, count: int) -> Iterator[tuple[str, str, str]]:
    "Kind, patch and the secret in it."
    draw = random.Random(seed)
    places = [(file, template) for file, templates in PLACES.items() for template in templates]
    for _ in range(count):
        file, template = draw.choice(places)
        kind = draw.choice(["alnum", "hex", "base64", "uuid"] if "?@n" in template else list(VALUES))
        secret = VALUES[kind](draw)
        if "curl -u" in template: secret = VALUES["alnum"](draw)
        yield f"{file} · {template} · {kind}", written(draw, file, template, draw.choice(NAMES), secret), secret


def harmless(seed: int, count: int) -> Iterator[str]:
    "Patches that hold no secret."
    draw = random.Random(seed)
    places = [(file, template) for file, templates in PLAIN.items() for template in templates]
    for _ in range(count):
        file, template = draw.choice(places)
        yield written(draw, file, template, draw.choice(PLAIN_NAMES))


def study(seed: int, count: int, look_alikes: int) -> dict[str, list]:
    "Ways that leak, and look-alikes that were changed."
    leaks = [(kind, patch) for kind, patch, secret in ways(seed, count) if secret in redact_patch(patch)]
    return {"leaks": leaks, "damaged": changed((patch, redact_patch) for patch in harmless(seed, look_alikes))}


if __name__ == "__main__": sys.exit(run(study, __doc__ or "", 1000))
