"""How a batch that runs in the daemon itself learns that its time is over. Apart, because workers load it."""


class LimitReached(BaseException):
    """The time limit of a batch; not an Exception, so that a strategy's own handlers let it pass."""
