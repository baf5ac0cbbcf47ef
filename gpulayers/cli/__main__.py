"""``python -m gpulayers.cli`` is the command ``gpulayers``."""

from gpulayers.cli import main

raise SystemExit(main())
