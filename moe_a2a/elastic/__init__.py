"""CPU ranks that go on when a rank is lost, take it back, grow and shrink. docs/elastic.md explains how.

options: what a caller gives. lookout: who takes part in a step, and waits that end when a source is lost. keeper: what
a rank does for its group beside its steps. places: how processes find each other. windows: where writes of other hosts
come in. shared, rail: the transports. delivery: writes to other hosts. meeting: founding and joining. backend: all of
it behind `AllToAll`. group: what `AllToAll.elastic` offers.
"""
