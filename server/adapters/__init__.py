"""Adapters from their files to the rows that a step reads.

registry.py    every verb, and the list of its parts, which lie beside it
store/         the store tier: a folder, or an object store that several servers share
host.py        the host tier
device/        the device tier
format/        what an adapter is as files
methods/       one file per method; `method.py` is their contract, `lowering.py` holds them to it
merging/       several adapters into one, per request or for good, or into the base
remote/        places that adapters are fetched from
"""
