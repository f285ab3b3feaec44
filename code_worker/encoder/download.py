"""Download of a published checkpoint from the Hugging Face hub, every failure said in words that help."""

from __future__ import annotations

import re
from pathlib import Path

from code_worker.errors import ArtifactError, ArtifactStorageError, ConfigurationError
from code_worker.system.libraries import silent_import

with silent_import():
    from huggingface_hub import constants, errors, snapshot_download

HUB_PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_WANTED = ["config.json", "preprocessor_config.json", "model.safetensors", "sklearn/*"]
_SHARDS = ["model.safetensors.index.json", "model-*-of-*.safetensors"]
_PASSING = frozenset({408, 429})
# The hub's client changed its HTTP library more than once; this is the base class of whichever it uses.
_HTTP_ERROR: type[Exception] = getattr(errors, "HTTPError", OSError)


def download(source: str) -> Path:
    """Directory with the files of `hf:owner/name[@revision]`; its name is the commit that was fetched.

    The hub's own cache is used, and what it holds is enough when the hub cannot be reached.

    Raises:
        ConfigurationError: a malformed name, or a repository or revision that does not exist or is not open to us.
        ArtifactStorageError: the hub cannot be reached now, and the cache does not hold the files.
        ArtifactError: it refuses them.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise ConfigurationError(f"{source!r} is not a hub name; write hf:owner/name or hf:owner/name@revision")
    repo, revision = match["repo"], match["revision"]
    directory = _snapshot(repo, revision, _WANTED)
    if not (directory / "model.safetensors").is_file():
        directory = _snapshot(repo, revision, [*_WANTED, *_SHARDS])
    if not any(directory.glob("model*.safetensors")):
        directory = _snapshot(repo, revision, [*_WANTED, "pytorch_model.bin"])
    return directory


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    name = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ConfigurationError(
            f"{name} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigurationError(
            f"{name} does not exist on {constants.ENDPOINT}, or is private and HF_TOKEN is missing or may not read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigurationError(f"{repo} has no branch, tag or commit {revision!r}") from error
    except errors.HFValidationError as error:
        raise ConfigurationError(f"{name!r} is not a hub name: {error}") from error
    except (_HTTP_ERROR, OSError) as error:
        refused = _status(error) in range(400, 500) and _status(error) not in _PASSING
        raise (ArtifactError if refused else ArtifactStorageError)(
            f"cannot download {name} from {constants.ENDPOINT}: {_why(error)}. {_by_hand(repo)}"
        ) from error


def _why(error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the hub's cache does not hold it"
    if (status := _status(error)) is not None:
        return f"the server answered {status}"
    reason = _reason(error)
    first = str(reason).partition("\n")[0].rstrip(". ")
    return f"{type(reason).__name__}: {first}" if first else type(reason).__name__


def _reason(error: Exception) -> BaseException:
    # The client wraps what went wrong in "not found in the cache either".
    return error.__cause__ or error


def _status(error: Exception) -> int | None:
    status = getattr(getattr(_reason(error), "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _by_hand(repo: str) -> str:
    return (
        f"On a machine with network run `hf download {repo} --local-dir DIR`, bring DIR here and run "
        "`code-worker releases import DIR`"
    )
