"""How long a case takes: devices and their limits, the clock, one case, a whole run, what is kept. Imports models, cases, judging."""
