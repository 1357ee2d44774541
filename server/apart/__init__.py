"""The engine in a process of its own: what runs there, what stands for it here, and the way between the two.

channel   frames over a socket pair        hosted   what the child does for who asks
messages  what is in them                  child    the life of the child
calls     calls of the child's parts       twins    what the routes work with in their place
entry     sequences there, deltas back     front    the life of both, as `graft serve` sees it
"""
