"""``python -m gpulayers`` is the command ``gpulayers``."""

from gpulayers.cli import main

raise SystemExit(main())
