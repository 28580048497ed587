"""What the venue answers when it says no: one exception and the venue's own codes and texts.

Source: the error-code pages of the Binance USD-M documentation; texts are part of the protocol,
because clients match on some of them.
"""

MESSAGES: dict[int, str] = {
    -1001: "Internal error; unable to process your request. Please try again.",
    -1100: "Illegal characters found in parameter '{name}'; legal range is '{legal}'.",
    -1102: "Mandatory parameter '{name}' was not sent, was empty/null, or malformed.",
    -1106: "Parameter '{name}' sent when not required.",
    -1111: "Precision is over the maximum defined for this asset.",
    -1115: "Invalid timeInForce.",
    -1116: "Invalid orderType.",
    -1117: "Invalid side.",
    -1121: "Invalid symbol.",
    -1130: "Data sent for parameter '{name}' is not valid.",
    -2007: "Invalid callBack rate.",
    -2011: "Unknown order sent.",
    -2013: "Order does not exist.",
    -2015: "Invalid API-key, IP, or permissions for action.",
    -2019: "Margin is insufficient.",
    -2021: "Order would immediately trigger.",
    -2022: "ReduceOnly Order is rejected.",
    -2025: "Reach max open order limit.",
    -2027: "Exceeded the maximum allowable position at current leverage.",
    -2028: "Leverage is smaller than permitted: insufficient margin balance.",
    -4001: "Price less than 0.",
    -4002: "Price greater than max price.",
    -4003: "Quantity less than zero.",
    -4004: "Quantity less than min quantity.",
    -4005: "Quantity greater than max quantity.",
    -4006: "Stop price less than zero.",
    -4013: "Price less than min price.",
    -4014: "Price not increased by tick size.",
    -4015: "Client order id length should not be more than 36 chars.",
    -4016: "Limit price can't be higher than {limit}.",
    -4023: "Quantity not increased by step size.",
    -4024: "Limit price can't be lower than {limit}.",
    -4028: "Leverage {leverage} is not valid.",
    -4045: "Reach max stop order limit.",
    -4046: "No need to change margin type.",
    -4047: "Margin type cannot be changed if there exists open orders.",
    -4048: "Margin type cannot be changed if there exists position.",
    -4059: "No need to change position side.",
    -4061: "Order's position side does not match user's setting.",
    -4067: "Position side cannot be changed if there exists open orders.",
    -4068: "Position side cannot be changed if there exists position.",
    -4082: "Invalid number of batch place orders.",
    -4108: "This symbol is not open for trading: delivering, delivered, settling, closed or pre-trading.",
    -4109: "This account is inactive. Please activate the account.",
    -4116: "ClientOrderId is duplicated.",
    -4117: "Stop order is in triggering process. Please try again later.",
    -4120: ("Order type not supported for this endpoint. Please use the Algo Order API endpoints instead."),
    -4130: "An open stop or take profit order with GTE and closePosition in the direction is existing.",
    -4131: "The counterparty's best price does not meet the PERCENT_PRICE filter limit.",
    -4136: "Target strategy invalid for orderType {type},closePosition {close_position}.",
    -4161: "Leverage reduction is not supported in Isolated Margin Mode with open positions.",
    -4164: "Order's notional must be no smaller than {notional} (unless you choose reduce only).",
    -4167: "Unable to adjust to Multi-Assets mode with symbols of USDⓈ-M Futures under isolated-margin mode.",
    -4168: "Unable to adjust to isolated-margin mode under the Multi-Assets mode.",
    -4170: "Unable to adjust Multi-Assets Mode with open orders in USDⓈ-M Futures.",
    -4171: "Adjusted asset mode is currently set and does not need to be adjusted repeatedly.",
    -4509: (
        "Time in Force (TIF) GTE can only be used with open positions. "
        "Please ensure that positions are available."
    ),
    -5021: (
        "Due to the order could not be filled immediately, the FOK order has been rejected. "
        "The order will not be recorded in the order history."
    ),
    -5022: (
        "Due to the order could not be executed as maker, the Post Only order will be rejected. "
        "The order will not be recorded in the order history."
    ),
}


class VenueFault(Exception):
    """The venue refuses a request; nothing of it was done."""

    def __init__(self, code: int, message: str, http_status: int = 400) -> None:
        super().__init__(f"{code} {message}")
        self.code = code
        self.message = message
        self.http_status = http_status


def fault(code: int, **words: object) -> VenueFault:
    """The venue's fault for `code`, its text filled with `words`."""
    return VenueFault(code, MESSAGES[code].format(**words))
