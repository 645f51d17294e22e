"""Three hosts in network namespaces on this machine, and the demo on them: `./run lab`, `./run
demo`.
"""
