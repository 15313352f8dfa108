"""`hf:OWNER/NAME[@REVISION]` and `kaggle:OWNER/MODEL/FRAMEWORK/VARIATION` -> a folder on this machine, downloaded once.

The hubs' packages are needed only here. Licences of gated models are accepted in a browser.
"""

from pathlib import Path

from data.problems import cache_only_when_offline
from grpo.errors import ConfigError

FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja")  # never a pickle


def download(path: str | Path) -> Path:
    """`path` itself, or the folder that a hub model was downloaded to. Raises ConfigError."""
    kind, _, name = str(path).partition(":")
    if kind == "hf":
        return download_hugging_face(name)
    return download_kaggle(name) if kind == "kaggle" else Path(path)


def download_hugging_face(name: str) -> Path:
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1:
        raise ConfigError(f"hf:{name} must be hf:OWNER/NAME or hf:OWNER/NAME@REVISION, such as hf:google/gemma-2-2b-it")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError:
        raise ConfigError(f'hf:{name} needs the package huggingface_hub: pip install -e ".[hub]"') from None
    try:
        with cache_only_when_offline():
            folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
        if any(folder.rglob("*.safetensors")):
            return folder
        reason = "has no safetensors; download a GGUF file or a Flax checkpoint yourself, and give its path"
    except GatedRepoError:
        reason = f"asks for a licence: accept it on https://huggingface.co/{repository}, and set HF_TOKEN"
    except RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except RepositoryNotFoundError:
        reason = "does not exist, or is private and HF_TOKEN is not set or not allowed to read it"
    except Exception as error:  # no network, a server error: the package raises many types
        reason = f"could not be downloaded, and is not on this machine: {first_line(error)}"
    raise ConfigError(f"hf:{name} {reason}")


def download_kaggle(name: str) -> Path:
    if name.count("/") not in (3, 4):
        raise ConfigError(
            f"kaggle:{name} must be kaggle:OWNER/MODEL/FRAMEWORK/VARIATION, such as kaggle:google/gemma-2/flax/gemma2-2b-it"
        )
    try:
        import kagglehub  # type: ignore[import-not-found]
    except ImportError:
        raise ConfigError(f'kaggle:{name} needs the package kagglehub: pip install -e ".[kaggle]"') from None
    try:
        return Path(kagglehub.model_download(name))
    except Exception as error:  # the package has many exception types
        status = getattr(getattr(error, "response", None), "status_code", 0)
        reason = {
            401: "needs credentials: set KAGGLE_USERNAME and KAGGLE_KEY, or KAGGLE_API_TOKEN",
            403: "is not yours to read: accept its licence on kaggle.com, and set KAGGLE_USERNAME and KAGGLE_KEY",
            404: "does not exist",
        }.get(status, f"could not be downloaded, and is not on this machine: {first_line(error)}")
    raise ConfigError(f"kaggle:{name} {reason}")


def first_line(error: Exception) -> str:
    """What another package says of its error, as part of a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
