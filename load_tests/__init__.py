"""Load on live servers, and the results that were measured. Knows nothing about the inside of any server."""
