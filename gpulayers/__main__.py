"""``python -m gpulayers`` is the command ``gpulayers``."""

from .cli import main

raise SystemExit(main())
