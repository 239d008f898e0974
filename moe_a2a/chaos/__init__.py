"""`moe-a2a chaos`: an elastic group whose ranks, store, watchers and network are lost at random, and that is checked
all the while. docs/elastic.md explains what it does.

events: what happens, drawn from a seed. steps: a step, checked against the oracle. board: shared memory between the
processes. rank: the process of a rank, whatever it makes; step_rank, collective_rank: what. network: hosts as network
namespaces. group: the processes, and what they say. director: carries events out. tally: what came of it. command: the
command line.
"""
