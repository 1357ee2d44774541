"""The live server of the HTTP tests, for these too."""

from tests.api.conftest import live, settings  # noqa: F401
