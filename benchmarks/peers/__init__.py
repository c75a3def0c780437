"""Other libraries' estimates on the same arrays, each in an environment and a process of its own.

`environments.environment` makes the environments, `run.run_peer` runs one measure of one peer.
geomkd and its extras need none of them.
"""
