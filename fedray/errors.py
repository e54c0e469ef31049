"""What fedray raises for mistakes that a user can mend: each message says what, where and what to do."""


class FedrayError(Exception):
    """Every error that fedray raises on purpose and that is not a plain ``ValueError``."""


class ConfigError(FedrayError, ValueError):
    """The configuration names something that does not exist, or has a wrong type or an impossible value."""


class DataError(FedrayError, ValueError):
    """A file or data set is missing, corrupt, or not what it is said to be; the message names it."""


class ClientError(FedrayError):
    """A client's update raised; the message names the client, and no state has changed."""
