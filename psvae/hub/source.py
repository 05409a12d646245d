"""Where a checkpoint's files come from: a folder, one file, the package itself, or the Hub through its cache."""

import os
import re
from pathlib import Path
from typing import Any

from psvae.errors import CheckpointError

__all__ = ["CONFIG", "LISTED", "Source", "packaged"]

CONFIG = "config.json"
LISTED = 20  # names in one error message
_PACKAGED = Path(__file__).parents[1] / "models"  # folders that come with psvae
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def _packaged_names() -> list[str]:
    return sorted(file.parent.name for file in _PACKAGED.glob(f"*/{CONFIG}"))


def packaged(name: str | os.PathLike[str]) -> Path | None:
    """The folder of a model that comes with psvae; None where none has that name, or something here has it."""
    return _PACKAGED / name if not Path(name).exists() and str(name) in _packaged_names() else None


class Source:
    """A local folder or file, a model of the package by its name, or a Hub repository.

    Attributes:
        file: the name of the one file that was asked for, if a path to a file came.
        unseen: names that `find` could not rule out: not in the local cache, and the Hub cannot be reached.

    Raises:
        CheckpointError: nothing is there, and it cannot be a Hub id.
    """

    def __init__(self, repo_or_folder: str | os.PathLike[str], subfolder: str, **hub_options: Any) -> None:
        if not isinstance(repo_or_folder, str | os.PathLike):
            raise CheckpointError(
                f"a {type(repo_or_folder).__name__} came; wanted a folder, a file or a Hub id: weights in memory are "
                "saved first, a model's by its save_pretrained(folder), a dict of tensors by safetensors' save_file"
            )
        self.name, self.subfolder, self.hub_options = str(repo_or_folder), subfolder, hub_options
        self.unseen: set[str] = set()
        path = Path(repo_or_folder)
        self.file = path.name if path.is_file() else None
        self.folder = path.parent if path.is_file() else path if path.is_dir() else None
        if self.folder is None:
            self.folder = packaged(self.name)
        if self.folder is None and not _REPO_ID.fullmatch(self.name):
            raise CheckpointError(
                f"{self.name!r} is not a folder or file here, nor a Hub id of the form 'org/name', nor a model of the "
                f"package ({', '.join(_packaged_names())})"
            )

    def __str__(self) -> str:
        return "/".join(part for part in (self.name, self.subfolder) if part)

    def find(self, filename: str) -> Path | None:
        """The local path of a file, fetched if need be; ``None`` if the source does not have it, or it is `unseen`.

        Raises:
            CheckpointError: the repository or revision does not exist, or cannot be reached.
        """
        if self.folder is not None:
            path = self.folder / self.subfolder / filename
            return path if path.is_file() else None
        from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        where = f"revision {self.hub_options['revision'] or 'main'!r} of {self.name!r}"
        try:
            path = Path(hf_hub_download(self.name, filename, subfolder=self.subfolder or None, **self.hub_options))
        except errors.LocalEntryNotFoundError as error:
            places = {name: self.hub_options.get(name) for name in ("cache_dir", "revision")}
            nested = "/".join(part for part in (self.subfolder, filename) if part)
            if try_to_load_from_cache(self.name, nested, **places) is not None:
                return None  # the cache remembers that the repository has none, as those of LDM files
            if filename != CONFIG:
                self.unseen.add(filename)
                return None  # absent from a cached snapshot whose config was found
            raise CheckpointError(
                f"there is no folder {self.name!r} here, and {filename} of {where} is not in the local cache and the "
                "Hub cannot be reached: go online once, or pass a local folder"
            ) from error
        except errors.EntryNotFoundError:
            return None
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.name!r} is gated: accept its terms on its page and run `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise CheckpointError(f"there is no {where}; check the branch, tag or commit") from error
        except errors.RepositoryNotFoundError as error:
            raise CheckpointError(
                f"there is no folder {self.name!r} here and no repository of that name on the Hub, or it is private: "
                "check the name, or pass token=..."
            ) from error
        except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
            raise CheckpointError(f"{filename} of {where} could not be fetched: {error}") from error
        # the rest comes from the same commit, even if the branch moves meanwhile
        self.hub_options["revision"] = path.parents[len(Path(self.subfolder, filename).parts) - 1].name
        return path

    def listing(self) -> str:
        """What is there, for an error message."""
        if self.folder is None:
            return f"look at the files of {self.name!r}; without a connection only those in the local cache are seen"
        names = sorted(path.name for path in (self.folder / self.subfolder).glob("*"))
        return f"the folder holds {', '.join(names[:LISTED]) or 'nothing'}"
