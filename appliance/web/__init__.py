"""The review API: HTTPS for people and programs that read the evidence, and end sessions.

`appliance.daemon.review` builds a `Review` and runs it. Nothing here is on the way of a client's
bytes: the API shares the evidence and the workers' control sockets with the gate, and answers
whether or not the gate, the seal or the sensor run. Importing a module of this package for its
types does not import the server.
"""
