"""The long-running processes: each module builds the objects of one, and runs them until SIGTERM.

The only place where the parts of a process are put together. `appliance.cli` calls them; systemd
units or the lab's supervisor start and restart the processes. A module imports what its own process
needs and nothing else: the review API has no proxy and no protocol in it, the gate no web server.
"""
