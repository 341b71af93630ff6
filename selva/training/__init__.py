"""Training of an adapter: settings, objective, state of a run, loop, output folder."""
