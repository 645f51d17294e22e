"""The kernel side: BPF programs, their loader and the sensor. Imports nothing else of Narrows."""
