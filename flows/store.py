"""Finished stages that machines share: an object store behind the stages folder of each.

`execution.store` names it as obstore does: s3://bucket/prefix, gs://, az://, file:///folder. Files
are kept by their SHA-256, once for all stages. A stage is there as soon as its manifest is, and a
manifest is written once: whoever finishes a stage that another machine has finished in the meantime
takes what is there.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from crnn.errors import SettingsError
from crnn.files import sha256

ADDRESS = "CRNN_SLIM_STORE"
"""Variable that holds the address, for this process and its children."""


class StoreError(RuntimeError):
    """The store does not do what was asked of it; a later attempt may succeed."""


class DamagedFileError(Exception):
    """The store does not have a file that it should have."""


def use(address: str | None) -> None:
    """Share stages through the store from now on; None: share nothing.

    Raises:
        SettingsError: There is no such kind of store, or the library for it is missing.
    """
    os.environ.pop(ADDRESS, None)
    if address:
        _opened(address)
        os.environ[ADDRESS] = address


def is_shared() -> bool:
    """Whether there is a store."""
    return ADDRESS in os.environ


def manifest_of(key: str) -> bytes | None:
    """The manifest of a stage as some machine has written it; None where none has.

    Raises:
        StoreError: The store cannot be reached.
    """
    obstore = _obstore()
    with _reaching():
        try:
            return bytes(obstore.get(_store(), _manifest(key)).bytes())
        except FileNotFoundError:
            return None


def fetch(digests: dict[str, str], folder: Path) -> None:
    """Write files, by name and SHA-256, into a folder, and prove each by its hash.

    Raises:
        StoreError: The store cannot be reached.
        DamagedFileError: It does not have one of them, or had other bytes; these are gone now.
    """
    obstore, store = _obstore(), _store()
    for name, digest in digests.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with _reaching():
            try:
                with path.open("wb") as file:
                    for chunk in obstore.get(store, _content(digest)).stream():
                        file.write(chunk)
            except FileNotFoundError as error:
                raise DamagedFileError(f"{name} is missing") from error
            if sha256(path) != digest:
                with suppress(FileNotFoundError):  # Another one has found it at the same time.
                    obstore.delete(store, _content(digest))
                raise DamagedFileError(f"{name} has other bytes than its manifest says")


def offer(key: str, folder: Path, digests: dict[str, str], manifest: bytes) -> bytes:
    """Share a stage, unless another machine has shared it already.

    Args:
        key: Of the stage.
        folder: Where its files are.
        digests: SHA-256 of every file, by name.
        manifest: What is written last, and once.

    Returns:
        The manifest that is there now: this one, or that of the machine that was first.

    Raises:
        StoreError: The store cannot be reached.
    """
    obstore, store = _obstore(), _store()
    with _reaching():
        for name, digest in digests.items():
            if not _has(_content(digest)):
                obstore.put(store, _content(digest), folder / name)
        try:
            obstore.put(store, _manifest(key), manifest, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return manifest_of(key) or manifest
    return manifest


def forget(key: str) -> None:
    """Take a stage out of the store, so that it can be shared anew.

    Raises:
        StoreError: The store cannot be reached.
    """
    with _reaching(), suppress(FileNotFoundError):
        _obstore().delete(_store(), _manifest(key))


def _manifest(key: str) -> str:
    return f"stages/{key}.json"


def _content(digest: str) -> str:
    return f"files/{digest[:2]}/{digest}"


def _has(place: str) -> bool:
    try:
        _obstore().head(_store(), place)
    except FileNotFoundError:
        return False
    return True


def _store() -> Any:
    return _opened(os.environ[ADDRESS])


@cache
def _opened(address: str) -> Any:
    obstore = _obstore()
    options = {"mkdir": True} if address.startswith("file:") else {}
    try:
        return obstore.store.from_url(address, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(
            "execution.store is an address like s3://bucket/prefix, gs://bucket/prefix,"
            f" az://container/prefix or file:///folder, not {address!r} ({reason})"
        ) from error


def _obstore() -> Any:
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        raise SettingsError(
            "execution.store needs a library more: pip install 'crnn-slim[cluster]'"
        ) from error
    return obstore


@contextmanager
def _reaching() -> Iterator[None]:
    """Inside, what the store's library raises becomes a sentence."""
    obstore = _obstore()
    try:
        yield
    except obstore.exceptions.BaseError as error:
        reason = " ".join(str(error).split())[:300]
        raise StoreError(
            f"the store {os.environ[ADDRESS]} cannot be used ({reason}); what is finished is kept"
            " on this machine, run the same command to go on"
        ) from error
