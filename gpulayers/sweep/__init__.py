"""``gpulayers audit``: every kernel in every configuration that its table can choose, compiled and read with no GPU."""

from gpulayers.sweep._command import audit as audit
