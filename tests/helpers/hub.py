"""A helper of the tests: a small hub on this machine, and downloads from it in processes of their own."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse

from helpers.paths import ROOT

TOKEN = "hf_aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"


COMMON = {".gitattributes": "*.gguf lfs", "README.md": "read me", "LICENSE": "a licence", "USE_POLICY.md": "a policy"}


REPOS: dict[str, dict[str, str | bytes]] = {}  # models: each file by repo and name; filled by weights/test_hub.py
DATASETS: dict[str, dict[str, str]] = {}  # datasets; filled by data/test_datasets.py


class Hub(http.server.BaseHTTPRequestHandler):
    """The few calls of the hub's API that a download makes, answered as huggingface.co does."""

    protocol_version = "HTTP/1.1"
    seen: list[tuple[str, str, str | None]] = []  # method, path, token
    broken: set[str] = set()  # files that are answered by an error
    head = ""  # main's commit follows from it and the name

    def log_message(self, *given):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        Hub.seen.append((self.command, path, token))
        parts = path.strip("/").split("/")
        api, repos = parts[0] == "api", REPOS
        if parts[api] in ("models", "datasets"):  # pages of models begin with their owner
            repos = DATASETS if parts[api] == "datasets" else REPOS
            parts = parts[api + 1 :]
        repo, rest = "/".join(parts[:2]), parts[2:]
        if token == "wrong":
            return self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        if repo not in repos or (repo == "meta/private" and token != TOKEN):
            return self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files, commit = repos[repo], hashlib.sha1(f"{repo}{Hub.head}".encode()).hexdigest()
        if (rest[1] if len(rest) > 1 else "main") not in ("main", "v1", "refs/convert/parquet", commit):
            return self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if api and rest[:1] == ["tree"]:
            listed = [{"type": "file", "path": f, "size": len(t), "oid": commit} for f, t in files.items()]
            return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        if api:
            found = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            return self.answer(200, json.dumps(found).encode(), Content_Type="application/json")
        if repo == "meta/gated" and token != TOKEN:
            return self.answer(403 if token else 401, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        name = "/".join(rest[2:])
        if name in Hub.broken:
            return self.answer(403)
        data = files[name] if isinstance(files[name], bytes) else files[name].encode()
        etag = hashlib.sha1(f"{repo}/{name}".encode()).hexdigest()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            return self.answer(206, data[int(asked[1]) : int(asked[2]) + 1])
        self.answer(200, data, X_Repo_Commit=commit, ETag=f'"{etag}"', Accept_Ranges="bytes")

    do_HEAD = do_GET


@contextlib.contextmanager
def serving():
    """Serves the hub from a thread; the value is its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


DOWNLOAD = """
"Prints the path of each download in argv, or the error that refuses it, as lines of JSON."
import json, sys
from llama_jax.errors import ConfigError
from llama_jax.weights import hub_models
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(hub_models.download(name))))
    except ConfigError as error:
        print(json.dumps("refused: " + str(error)))
"""


def download(home, endpoint, *names, script=DOWNLOAD, **environment):
    """The results of `hub_models.download`, or its refusals, one for each name; it runs in a process of its own.

    `environment` adds variables of that process. Another `script` must print a line of JSON for each name.
    """
    Hub.seen.clear()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, *names], env=kept | settings | environment, capture_output=True, timeout=120
    )
    assert run.returncode == 0, run.stderr.decode()
    assert b"No files matched" not in run.stderr and b"Traceback" not in run.stderr, run.stderr.decode()
    said = [json.loads(line) for line in run.stdout.decode().splitlines()]
    assert len(said) == len(names)
    assert not any("\n" in text for text in said)
    return said


def fetched(repo=None):
    """The files that the hub was asked for."""
    return {
        path.partition("/resolve/")[2].split("/", 1)[1]
        for method, path, _ in Hub.seen
        if method == "GET" and "/resolve/" in path and (repo is None or path.startswith(f"/{repo}/"))
    }
