"""The engine in a process of its own: what runs there, what stands for it here, and the way between the two.

channel   frames over a socket pair        door     where sequences enter the child
messages  what is in them                  hosted   what the child does for who asks
steps     a step's deltas in them          child    the life of the child
calls     calls of the child's parts       twins    what the routes work with in their place
entry     sequences there, deltas back     front    the life of both, as `graft serve` sees it
"""
