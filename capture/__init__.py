"""The evidence: writing, sealing, reading and verifying it. Imports nothing else of Narrows."""
