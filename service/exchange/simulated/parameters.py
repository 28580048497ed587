"""Reading a request's parameters: text as in the query string, refused in the venue's words."""

import re
from collections.abc import Collection, Mapping
from decimal import Decimal, InvalidOperation

from service.exchange.simulated.faults import fault

CLIENT_ID = re.compile(r"[.A-Z:/a-z0-9_-]{1,36}")
CLIENT_ID_RANGE = r"^[\.A-Z\:/a-z0-9_-]{1,36}$"
MAX_INTEGER = 2**63


class Parameters:
    """The unsigned part of one request. An empty value counts as not sent, as on the venue."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values

    def text(self, name: str, default: str = "") -> str:
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool):  # batches come as JSON
            return "true" if value else "false"
        return str(value) or default

    def needed(self, name: str) -> str:
        """Raises -1102 when it was not sent."""
        value = self.text(name)
        if not value:
            raise fault(-1102, name=name)
        return value

    def decimal(self, name: str) -> Decimal | None:
        """Raises -1100 for what is not a plain number."""
        value = self.text(name)
        if not value:
            return None
        try:
            number = Decimal(value)
        except InvalidOperation:
            number = Decimal("NaN")
        if not number.is_finite() or abs(number.adjusted()) > 20:
            raise fault(-1100, name=name, legal="^([0-9]{1,20})(\\.[0-9]{1,20})?$")
        return number

    def needed_decimal(self, name: str) -> Decimal:
        number = self.decimal(name)
        if number is None:
            raise fault(-1102, name=name)
        return number

    def integer(self, name: str) -> int | None:
        value = self.text(name)
        if not value:
            return None
        if not re.fullmatch(r"-?[0-9]{1,19}", value) or abs(int(value)) >= MAX_INTEGER:
            raise fault(-1100, name=name, legal="^[0-9]{1,20}$")
        return int(value)

    def needed_integer(self, name: str) -> int:
        number = self.integer(name)
        if number is None:
            raise fault(-1102, name=name)
        return number

    def flag(self, name: str) -> bool:
        value = self.text(name).lower()
        if value not in ("", "true", "false"):
            raise fault(-1130, name=name)
        return value == "true"

    def choice(self, name: str, allowed: Collection[str], code: int, default: str = "") -> str:
        """One of `allowed`, else the fault `code`; -1102 when it is missing and has no default."""
        value = self.text(name, default) or self.needed(name)
        if value not in allowed:
            raise fault(code, name=name)
        return value

    def client_id(self, name: str) -> str:
        """ "" when not sent. Raises -4015 when too long, -1100 for other characters."""
        value = self.text(name)
        if len(value) > 36:
            raise fault(-4015)
        if value and not CLIENT_ID.fullmatch(value):
            raise fault(-1100, name=name, legal=CLIENT_ID_RANGE)
        return value

    def limit(self, default: int, most: int) -> int:
        number = self.integer("limit")
        return default if number is None else max(1, min(number, most))
