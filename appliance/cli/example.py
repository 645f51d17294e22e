"""The documented example of a configuration: `narrows config example` prints it.

Every key is in it, the optional ones with their defaults behind a "#".
"""

from __future__ import annotations

EXAMPLE = """\
# Narrows: the one configuration of an appliance. Meanings: docs/configuration.md.
# Times end in _s or _ms, sizes in _bytes. An unknown key stops the start.

[paths]
# state = "/var/lib/narrows"           # keys, evidence, ledger, index
# run = "/run/narrows"                 # sockets and memory of this boot; must be tmpfs
# blob = "/usr/lib/narrows/sensor.blob"  # compiled BPF programs

[gate]
# workers = 0                          # 0: one a core
# listen_port = 15001
# connect_timeout_s = 10.0
# detect_ms = 200                      # a client that is silent for longer is opaque
# max_sessions = 9000                  # of one worker; more of them wait

[redirect]
clients = ["10.20.0.0/16"]             # whose traffic goes through the gate
bypass = ["10.20.99.0/24"]             # destinations that are routed and not touched
management = ["10.0.0.0/24"]           # never reached from clients through the gate
# quic_reject = true                   # so that QUIC falls back to TCP

[evidence]
# segment_bytes = 268435456
# segment_s = 300                      # a segment is ended when it is so old; 0: when it is full
# chunk_count = 6                      # 4 MiB pieces of memory per worker
# commit_ms = 50                       # longest time that evidence is in memory only
# reserve_bytes = 33554432             # held back for an orderly stop on a full disk
# checkpoint_s = 5                     # longest time between signed checkpoints
# rewrite_s = 30                       # how long a finished segment is left as it is

[attribution]
# wait_ms = 50                         # longest wait for an owner before the first upstream byte
# on_forged = "continue"               # or "refuse"; both are alarmed
# replay_entries = 262144

[sensor]
# cgroup = ""                          # subtree whose processes are seen; "": all
prefixes = ["10.30.0.0/16"]            # where the SYN option is written
covers = ["10.20.0.0/16"]              # client addresses that the sensor answers for
# host = ""                            # "": the host name

[review]
# address = "127.0.0.1"                # where the review API listens, HTTPS only
# port = 8443
# certificate = ""                     # PEM; "": review.crt in the state directory, self-signed
# key = ""                             # PEM, mode 0600; both or none

[tls]
# ca = ""                              # the gate's own authority; made in paths.state when empty
# ca_key = ""                          # its key, mode 0600

# The first route that matches destination and port decides; TCP that none names is refused.
[[route]]
name = "databases"
destinations = ["10.30.0.0/16"]
ports = [5432, "6432-6439"]
durability = "fsync"                   # bytes leave when their record survives power loss
on_evidence_failure = "closed"         # no evidence, no traffic; "open" goes on with a Gap
on_failure = "closed"                  # no gate, no traffic; "bypass" routes and counts
source = "client"                      # whose address the server sees; or "gate"
tls = "intercept"                      # opened, and what is inside recorded; or "passthrough"
tls_verify = "pinned"                  # how the server's certificate is checked: "system", "off"
tls_ca = "/etc/narrows/servers.pem"    # the authorities that "pinned" means
tls_certificate = "/etc/narrows/db.pem"  # the server's own, shown to clients: SCRAM-PLUS passes
tls_key = "/etc/narrows/db.key"        # mode 0600
tls_upstream = "tls"                   # "plain": the server is spoken to in the clear

[[route]]
name = "everything else"
# destinations = ["0.0.0.0/0", "::/0"]
# ports = "all"
# protocol = "tcp"
# action = "intercept"
# tls = "passthrough"                  # relayed as it is

[[route]]
name = "name service"
protocol = "udp"
action = "allow"                       # routed, and counted as Flow records
ports = [53]

[[account]]
name = "ci-deployer"
owner = "platform team"                # who answers for it
purpose = "rolls out releases and migrates the database"
ticket = "OPS-101"
expires = 2027-12-31                   # last day on which it is known
match = { cgroup = "/system.slice/ci.service/*" }  # all selectors that are given must hold

[[account]]
name = "backup-job"
owner = "storage team"
purpose = "copies the orders to the archive every night"
match = { unit = "backup.service", exe = "/usr/bin/pg_dump", uid = 34 }
# container = "8c1f2a9b7d3e"           # other selectors: container, exe_sha256, network
# exe_sha256 = "64 hexadecimal digits"
# network = ["10.20.7.0/24"]           # alone it gives assurance "network", not "kernel"
"""
