"""Laws of grpo/runs/hub.py: a model is downloaded once, only the files that we read, and every way to fail is one line."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from foreign import write_flax
from make_references import REFERENCES

from grpo.config import TINY_MODEL
from grpo.errors import ConfigError
from grpo.runs.hub import download
from grpo.runs.model_source import find_model
from models.formats.convert import read_config

ROOT, COMMIT = Path(__file__).parents[1], "0123456789abcdef0123456789abcdef01234567"
FILES = {path.name: path.read_bytes() for path in Path(TINY_MODEL).iterdir() if path.is_file()} | {"model.bin": b"a pickle"}
REPOSITORIES = {"me/tiny": FILES, "me/gguf": {"config.json": FILES["config.json"], "tiny.gguf": b"GGUF"}}
FETCH = """
import json, sys
from grpo.errors import ConfigError
from grpo.runs.hub import download
for name in sys.argv[1:]:
    try:
        print(json.dumps(str(download(name))))
    except ConfigError as error:
        print(json.dumps("error: " + str(error)))
"""


class Hub(BaseHTTPRequestHandler):
    """What a download needs of the Hub: a repository's commit, its files, and each of them. `asked` remembers."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        parts = self.path.partition("?")[0].strip("/").split("/")
        api, repository = parts[0] == "api", "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        self.asked.append(self.path)
        if repository == "me/gated":
            return self.answer(b"", 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        if repository == "me/broken":
            return self.answer(b"", 500, {"X-Error-Message": "the disk is full"})
        if repository not in REPOSITORIES:
            return self.answer(b"", 404, {"X-Error-Code": "RepoNotFound"})
        if parts[-1] == "nowhere":
            return self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        if api and parts[4] == "revision":
            siblings = [{"rfilename": name} for name in REPOSITORIES[repository]]
            return self.answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
        if api:
            files = REPOSITORIES[repository].items()
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in files]
            return self.answer(json.dumps(tree).encode())
        self.answer(FILES[parts[-1]], headers={"ETag": f'"{parts[-1]}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A function that fetches names in a process of its own, from a server that runs meanwhile."""
    pytest.importorskip("huggingface_hub")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    Hub.asked.clear()

    def fetched(*names: str, **env: str) -> list[str]:
        env = {
            "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        } | env  # fmt: skip
        command = [sys.executable, "-c", FETCH, *names]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(command, env=kept | env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    yield fetched
    server.shutdown()


def test_a_repository_is_downloaded_once_and_nothing_that_could_be_a_pickle(hub):
    first, again, pinned = hub("hf:me/tiny", "hf:me/tiny", f"hf:me/tiny@{COMMIT}")
    assert first == again == pinned
    assert {path.name for path in Path(first).iterdir()} == FILES.keys() - {"model.bin", "README.md"}
    assert read_config(first) == read_config(TINY_MODEL) and find_model(first).line.startswith("Hugging Face folder")
    weights = [path for path in Hub.asked if path.endswith("resolve/" + COMMIT + "/model.safetensors")]
    assert 1 <= len(weights) <= 2  # its size, then itself
    assert not any("model.bin" in path for path in Hub.asked)
    assert hub("hf:me/tiny", HF_HUB_OFFLINE="1") == [first]


def test_what_cannot_be_downloaded_is_one_line(hub):
    absent, gated, revision, broken, short = hub("hf:me/absent", "hf:me/gated", "hf:me/tiny@nowhere", "hf:me/broken", "hf:tiny")
    assert absent.startswith("error: hf:me/absent does not exist, or is private and HF_TOKEN is not set")
    assert gated.startswith("error: hf:me/gated asks for a licence: accept it on https://huggingface.co/me/gated, and set")
    assert revision == "error: hf:me/tiny@nowhere has no revision nowhere"
    assert broken.startswith("error: hf:me/broken could not be downloaded, and is not on this machine: ") and "500" in broken
    assert short.startswith("error: hf:tiny must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):  # nobody listens there
        (offline,) = hub("hf:me/tiny", **env)
        assert offline.startswith("error: hf:me/tiny could not be downloaded, and is not on this machine: ")
        assert "\n" not in offline


def test_a_repository_without_safetensors_is_not_loaded_as_half_of_one(hub):
    (refused,) = hub("hf:me/gguf")
    assert refused == (
        "error: hf:me/gguf has no safetensors; download a GGUF file or a Flax checkpoint yourself, and give its path"
    )
    assert not any("tiny.gguf" in path for path in Hub.asked)


def test_a_package_that_is_missing_is_named(monkeypatch):
    for package, name, extra in (("huggingface_hub", "hf:me/tiny", "hub"), ("kagglehub", "kaggle:a/b/flax/c", "kaggle")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ConfigError, match=rf'needs the package {package}: pip install -e "\.\[{extra}\]"'):
            download(name)


def test_a_kaggle_model_is_what_kagglehub_downloads(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes((REFERENCES / "gemma2-gqa" / "config.json").read_bytes())
    write_flax(tmp_path / "gemma2-2b-it", REFERENCES / "gemma2-gqa")
    asked = []
    fake = SimpleNamespace(model_download=lambda handle: asked.append(handle) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "kagglehub", fake)
    model = find_model("kaggle:google/gemma-2/flax/gemma2-2b-it")
    assert model.found == f"Flax checkpoint {tmp_path / 'gemma2-2b-it'}" and asked == ["google/gemma-2/flax/gemma2-2b-it"]
    assert model.path == Path("kaggle:google/gemma-2/flax/gemma2-2b-it")  # as it was asked for


@pytest.mark.parametrize(
    "status, reason",
    [
        (401, "needs credentials: set KAGGLE_USERNAME and KAGGLE_KEY"),
        (403, "is not yours to read: accept its licence on kaggle.com"),
        (404, "does not exist"),
        (500, "could not be downloaded, and is not on this machine: no such luck"),
        (None, "could not be downloaded, and is not on this machine: no such luck"),
    ],
)
def test_what_kaggle_refuses_is_one_line(status, reason, monkeypatch):
    def refuse(handle):
        error = OSError("no such luck\nand more")
        if status:
            error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setitem(sys.modules, "kagglehub", SimpleNamespace(model_download=refuse))
    with pytest.raises(ConfigError) as error:
        download("kaggle:a/b/flax/c")
    assert str(error.value).startswith(f"kaggle:a/b/flax/c {reason}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kaggle:google/gemma-2", "kaggle:a/b/c", "kaggle:a/b/c/d/1/more", "hf:a/b/c", "hf:"])
def test_a_name_that_is_none_says_how_it_would_be_one(name):
    with pytest.raises(ConfigError, match=r"must be (kaggle:OWNER/MODEL/FRAMEWORK/VARIATION|hf:OWNER/NAME)"):
        download(name)


def test_any_other_path_is_itself():
    assert download("models/tiny") == Path("models/tiny") and download(Path("/a:b")) == Path("/a:b")
