"""The Hub as it answers: what its clients raise, in one line that says what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

from zotuner.errors import ZotunerError

LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


@contextmanager
def asking(what: str) -> Iterator[None]:
    """For the time of a request to the Hub.

    Args:
        what: What the line begins with.

    Raises:
        ZotunerError: The Hub refused, has not what was asked for, or cannot be reached.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (_http_error(), HFValidationError, OSError) as error:
        raise ZotunerError(f"{what} ({reason(error)})") from None


def reason(error: Exception) -> str:
    """Why a request to the Hub failed."""
    from huggingface_hub import constants, errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    unreached = (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    offline = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "is there a network?"
    meanings = [
        (isinstance(error, errors.GatedRepoError), f"a gated repository: ask for access on its page, and {LOG_IN}"),
        (isinstance(error, errors.RepositoryNotFoundError), f"no such repository, or a private one: {LOG_IN}"),
        (isinstance(error, errors.RevisionNotFoundError), "the repository has no such revision"),
        (isinstance(error, errors.RemoteEntryNotFoundError), "the repository has no such file"),
        (status in (401, 403), f"the Hub does not allow it: {LOG_IN}, with a token that has the right"),
        (isinstance(error, unreached), f"the Hub cannot be reached: {offline}"),
        (isinstance(error, _http_error()) and status is None, f"the Hub cannot be reached: {offline}"),
    ]
    return next((text for true, text in meanings if true), " ".join(str(error).split())[:200])


def _http_error() -> type[Exception]:
    """What the library for HTTP raises; which library that is differs between releases of huggingface_hub."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined,no-any-return]
