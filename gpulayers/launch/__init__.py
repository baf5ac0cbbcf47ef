"""The launch tape: what a launcher does on the host is recorded once, and every repeat is one call in C.

A launcher makes views, takes memory from ``empty`` and launches kernels; what it does depends on metadata alone. So a
plan's second call of a kind is recorded while it runs as ever, the third again, and where both did the same, the next ones
are replayed: allocate, write the addresses into prepared arguments, launch.

``UNTAPED`` lists what takes the launcher's road every time. ``GPULAYERS_TAPE=0`` makes everything take it.
"""

from gpulayers.launch._record import UNTAPED as UNTAPED
from gpulayers.launch._record import Untapeable as Untapeable
from gpulayers.launch._settings import forget as forget
from gpulayers.launch._settings import off as off
from gpulayers.launch._settings import on_cpu as on_cpu
from gpulayers.launch._taped import Backward as Backward
from gpulayers.launch._taped import Forward as Forward
from gpulayers.launch._taped import Kind as Kind
from gpulayers.launch._taped import explained as explained
