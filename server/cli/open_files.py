"""How many files, and so connections, the process may have open.

Knows nothing about what they are for.
"""

import resource

OTHER_FILES = 512  # beside connections: the store, adapters that are read, libraries, the log


def room_for(num_connections: int) -> int:
    """Raises the process's soft limit where that is needed and allowed; the connections that fit under it then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return num_connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    return max(min(num_connections, max(soft, allowed) - OTHER_FILES), 1)
