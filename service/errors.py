"""Every error perpd raises across a part's boundary, named for what the caller should do.

PerpdError
  SettingsInvalid         exit 78: the message names file, key, what was found, what is allowed
  LimitTooLow             exit 78: the memory limit is below what start-up needs
  DataDirectoryUnusable   exit 73: not writable, full, or held by another daemon
    StateDamaged          exit 73: the state cannot be read; restore a backup
    SchemaUnknown         exit 73: the state was written by a newer perpd
    StoreUnavailable      exit 69: the database does not answer; entries pause until it does
  LeaseLost               exit 75: another perpd trades this account now; nothing more may be sent
  LeaseHeld               exit 69: a perpd runs on this state; stop it first
  PortInUse               exit 69: another process listens there
  HistoryUnusable         exit 65: the archive or dataset holds nothing to work with
  CheckFailed             exit 77: live trading does not start, `perpd check` says what to do
    CheckFailedForNow     exit 69: by nothing but what may pass by itself: start again
  DaemonUnreachable       exit 69: no daemon answers on the data directory's control socket
    NobodyListens         there is no socket, or one that a killed daemon left behind
  VenueError
    VenueUnavailable      nothing was sent, or only a read: retry with back-off and jitter
      VenueThrottled      429, 418, -1003, -1015: nothing more before `retry_at_ms`
    VenueRestricted       HTTP 451 or 403: this place may not trade there; exit 77
    VenueCredentials      -2014, -2015, -1022: key, permission or signature; exit 77
    VenueClockSkew        -1021, -5028: measure the offset again, sign again, once
    VenueMalformed        an answer that cannot be decoded; a read is retried, an order is unknown
    RequestRejected       the venue said no to a request that is not an order: record, do not retry
      OrderRejected       the venue said no to an order: record the reason, do not retry
    OrderOutcomeUnknown   sent, no usable answer: reconcile by client order id before anything else
  StrategyInvalid         exit 78: a user's strategy cannot be loaded or breaks its contract
  WorkerLost              a worker died or was killed at its time limit
  CacheUnavailable        the cache's second tier cannot answer: compute instead, try it again later
  CycleStalled            exit 1: no cycle finished for too long, to be started anew
  ArchiveNotDrained       exit 74: records were left in the journal at the end
  StateConflict           a record contradicts what is booked: quarantine its symbol, trade the others
"""

from service.reactions import Reaction, reaction_to

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_USAGE = 64
EXIT_DATA = 65  # EX_DATAERR: what is on disk is not whole, or not enough
EXIT_UNAVAILABLE = 69
EXIT_DATA_DIRECTORY = 73
EXIT_IO = 74
EXIT_RESTART = 75  # EX_TEMPFAIL: drained on purpose, to be started anew
EXIT_NOT_PERMITTED = 77
EXIT_SETTINGS = 78
EXIT_INTERRUPTED = 130


class PerpdError(Exception):
    """perpd cannot go on with what it was doing."""

    exit_code = EXIT_FAILURE
    transient = False  # it may pass by itself, so that trying again later helps
    advice = ""  # what the user can do, where the message does not say it


class SettingsInvalid(PerpdError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = EXIT_SETTINGS


class LimitTooLow(PerpdError):
    """The memory limit is below what start-up needs."""

    exit_code = EXIT_SETTINGS
    advice = (
        "raise monitor.memory_limit_mb, the control group's or the container's limit, or lower "
        "analysis.workers, market.symbols or market.candles"
    )


class StrategyInvalid(PerpdError):
    """A strategy cannot be loaded or breaks its contract."""

    exit_code = EXIT_SETTINGS


class DataDirectoryUnusable(PerpdError):
    """The data directory cannot be written, is full, or belongs to another daemon."""

    exit_code = EXIT_DATA_DIRECTORY


class StateDamaged(DataDirectoryUnusable):
    """The state file is damaged; it is never repaired or replaced without being told to."""

    advice = "keep the file, then restore a backup with `perpd store restore FILE`"


class SchemaUnknown(DataDirectoryUnusable):
    """The state was written by a newer perpd; migrations only go forward."""

    advice = "run the newer perpd, or restore a backup of before the upgrade with `perpd store restore FILE`"


class StoreUnavailable(DataDirectoryUnusable):
    """The database does not answer, or refuses: nothing is opened until it takes writes again."""

    exit_code = EXIT_UNAVAILABLE
    transient = True
    advice = "check DATABASE_URL, the database and the network between"


class LeaseLost(PerpdError):
    """Another perpd holds the lease now: this one may send nothing more, and ends."""

    exit_code = EXIT_RESTART
    advice = "started again, this perpd stands by until the other one ends"


class LeaseHeld(PerpdError):
    """A perpd holds the lease on the state, so it cannot be worked on."""

    exit_code = EXIT_UNAVAILABLE
    advice = "stop that perpd first"


class PortInUse(PerpdError):
    """Another process listens on the port."""

    exit_code = EXIT_UNAVAILABLE


class HistoryUnusable(PerpdError):
    """The archive holds nothing that a dataset can be made of, or the dataset's directory cannot be used."""

    exit_code = EXIT_DATA


class CheckFailed(PerpdError):
    """A check that live trading needs has failed."""

    exit_code = EXIT_NOT_PERMITTED
    advice = "run `perpd check` for the whole table and what to do"


class CheckFailedForNow(CheckFailed):
    """All that failed may pass by itself, such as an outage of the venue: a supervisor starts perpd again."""

    exit_code = EXIT_UNAVAILABLE
    transient = True
    advice = "start again until it has passed; run `perpd check` for the whole table"


class DaemonUnreachable(PerpdError):
    """No daemon answers on the data directory's control socket."""

    exit_code = EXIT_UNAVAILABLE


class NobodyListens(DaemonUnreachable):
    """No socket, or a dead one: nobody accepts a connection."""


class CacheUnavailable(PerpdError):
    """The second tier of the feature cache cannot be read or written; what it would save is computed."""


class CycleStalled(PerpdError):
    """No cycle has finished for too long: the process ends, so that whoever supervises it starts it anew."""


class ArchiveNotDrained(PerpdError):
    """Records did not reach their segments before the drain limit; the journal has them."""

    exit_code = EXIT_IO


class WorkerLost(PerpdError):
    """A worker process died, or was killed at its time limit, with a batch in hand."""


class StateConflict(PerpdError):
    """A record contradicts what the store holds, such as a venue order that belongs to another trade."""


class VenueError(PerpdError):
    """The exchange could not do what was asked."""

    exit_code = EXIT_UNAVAILABLE
    advice = "check exchange.rest_url, the network and the venue's status"

    def __init__(self, message: str, *, code: int = 0, status: int = 0) -> None:
        super().__init__(message)
        self.code = code  # the venue's own error code, 0 where it gave none
        self.status = status  # the HTTP status, 0 where there was no answer

    @property
    def answered(self) -> bool:
        """The venue said something. Where it did not, nobody refused anything."""
        return bool(self.code or self.status)

    @property
    def words(self) -> str:
        """The venue's code, where it gave one, and the message."""
        return f"{self.code}: {self}" if self.code else str(self)

    @property
    def reaction(self) -> Reaction:
        """What the code asks of the caller; the class says the rest."""
        return reaction_to(self.code)


class VenueUnavailable(VenueError):
    """Nothing was sent, or only a read: retry with back-off."""

    transient = True


class VenueThrottled(VenueUnavailable):
    """The venue asks for silence until `retry_at_ms` (venue time, UTC)."""

    def __init__(self, message: str, *, retry_at_ms: int, code: int = 0, status: int = 0) -> None:
        super().__init__(message, code=code, status=status)
        self.retry_at_ms = retry_at_ms


class VenueRestricted(VenueError):
    """The venue does not serve this location (451) or blocks it (403)."""

    exit_code = EXIT_NOT_PERMITTED
    advice = "run perpd in a region that the venue serves; United States addresses are refused"


class VenueCredentials(VenueError):
    """The key, its permissions, its address list or the signature is wrong."""

    exit_code = EXIT_NOT_PERMITTED
    advice = (
        "check PERPD_API_KEY and PERPD_API_SECRET, the key's futures permission and its list of addresses"
    )


class VenueClockSkew(VenueError):
    """The timestamp is outside the receive window."""

    transient = True


class VenueMalformed(VenueError):
    """The venue's answer cannot be decoded."""

    transient = True


class RequestRejected(VenueError):
    """The venue refused the request."""


class OrderRejected(RequestRejected):
    """The venue refused the order; nothing rests there."""


class OrderOutcomeUnknown(VenueError):
    """The order was sent and no usable answer came: ask by client order id, never resend."""

    transient = True
