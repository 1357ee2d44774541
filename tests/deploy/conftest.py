"""The live server of the HTTP tests, for these too."""

from tests.api.conftest import gate, live, settings  # noqa: F401
