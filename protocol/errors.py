"""Every error that a user can cause, as one tree.

    SkerryError
    ├── ConfigError            a wrong file, key or value in a configuration
    ├── RequestError           a parameter of a request is wrong (HTTP 400)
    │   ├── ContextFull        the text does not fit into the model's context
    │   └── UnknownAnswer      no answer of that id is known (HTTP 404)
    ├── Overloaded             no room now, try again after `retry_after` seconds (HTTP 429)
    ├── AuthError              a key is missing, wrong or revoked (HTTP 401)
    ├── ProtocolError          a message from the other side is malformed or over a limit
    ├── LinkError              the other side cannot be reached or went away
    │   └── UpstreamError      the LLM's own server failed or answered something unusable
    ├── StoreError             what the device keeps on disk: unreadable, no room
    │   └── StoreInUse         another process uses it
    ├── TrainingError          an adapter cannot be trained from what there is
    │   └── NoTraining         what training needs is not installed
    └── ModelError             a model file or catalog entry
        ├── UnknownModel       no such id in the catalog
        ├── BadModelFile       the file is missing, truncated or not what its name says
        ├── BadAdapter         an adapter's file is damaged, or made for another model
        ├── WorkshopError      a model could not be exported or quantised
        └── PullError          the model could not be fetched
            ├── SourceUnreachable   a source does not answer
            ├── HashMismatch   what came is not what the catalog names
            ├── DiskFull       the file does not fit
            ├── ReadOnlyFolder the folder may not be written to
            ├── UnsafePath     an archive member or catalog entry points outside its folder
            └── PullLocked     another process is pulling the same file

The message says what is wrong and what to do; the command line prints it without a traceback and exits with
`exit_code`.
"""

from __future__ import annotations


class SkerryError(Exception):
    """Base of everything a user can cause."""

    exit_code = 1


class ConfigError(SkerryError):
    exit_code = 3


class RequestError(SkerryError):
    """`param` names the offending request field, for the API's error object."""

    exit_code = 4

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextFull(RequestError):
    pass


class UnknownAnswer(RequestError):
    pass


class Overloaded(SkerryError):
    """`retry_after`: seconds after which trying again is worth it."""

    exit_code = 5

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AuthError(SkerryError):
    exit_code = 6


class ProtocolError(SkerryError):
    exit_code = 7


class LinkError(SkerryError):
    exit_code = 8


class UpstreamError(LinkError):
    pass


class StoreError(SkerryError):
    exit_code = 11


class StoreInUse(StoreError):
    pass


class TrainingError(SkerryError):
    exit_code = 12


class NoTraining(TrainingError):
    pass


class ModelError(SkerryError):
    exit_code = 9


class UnknownModel(ModelError):
    pass


class BadModelFile(ModelError):
    pass


class BadAdapter(ModelError):
    pass


class WorkshopError(ModelError):
    pass


class PullError(ModelError):
    exit_code = 10


class SourceUnreachable(PullError):
    pass


class HashMismatch(PullError):
    pass


class DiskFull(PullError):
    pass


class ReadOnlyFolder(PullError):
    pass


class UnsafePath(PullError):
    pass


class PullLocked(PullError):
    pass
