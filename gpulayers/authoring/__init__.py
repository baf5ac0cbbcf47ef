"""What helps to write a layer of one's own, behind ``gpulayers new`` and ``gpulayers check``."""

from gpulayers.authoring.new import new

__all__ = ["new"]
