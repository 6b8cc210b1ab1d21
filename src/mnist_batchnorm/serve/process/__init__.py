"""The server's processes, the port that they share, and what they tell one another.

start: open the ports, then serve in this process or supervise workers.
sources: which models the command line names.
supervisor: start worker processes and replace those that die.
worker: serve in one process.
listener: the port and its limits. shared_state: load and unload requests, as files.
"""
