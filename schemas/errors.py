"""The errors that a person can act on: jobs print their message without a traceback and end non-zero."""


class ColdRefreshError(RuntimeError):
    """Something outside the code is wrong (a table, a setting, a model, a cluster): the message says what and the remedy."""


class ContractError(ColdRefreshError):
    """A table is not what its schema says: the message names the table, the column, and the remedy."""
