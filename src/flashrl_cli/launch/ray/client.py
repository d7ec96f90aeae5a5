"""Ray's job client with a time limit on every request, at the address that flashrl was given and no other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol

from flashrl_cli.errors import EnvironmentNotReady

TIMEOUT_S = (5.0, 30.0)
"""Seconds to connect, and to wait for an answer."""
LIMIT = 10_000
"""Most rows that Ray's state API gives."""
OVERRULING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that Ray's client takes for the address whatever it is given (ray/dashboard/utils.py)."""


class Jobs(Protocol):
    """What flashrl uses of `ray.job_submission.JobSubmissionClient`; requests raise RuntimeError or OSError."""

    def submit_job(self, **job: Any) -> str:
        """Submit a job and return its id."""

    def get_job_info(self, job_id: str) -> Any:
        """State of a job: `status`, `message`, `driver_exit_code`."""

    def get_job_logs(self, job_id: str) -> str:
        """All of a job's log so far."""

    def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """The job's log from its start, in pieces as it grows, until the job has ended."""

    def stop_job(self, job_id: str) -> bool:
        """Ask a job to end."""

    def list_jobs(self) -> list[Any]:
        """All jobs that the cluster knows."""

    def listed(self, what: str, **filters: str) -> list[dict[str, Any]]:
        """Ray's `nodes` or `actors`, those whose fields are as `filters` say."""


def connect(address: str) -> Jobs:
    """A client of the job server at `address` (its dashboard's http://host:8265, or a cluster's host:6379).

    Raises EnvironmentNotReady where none answers.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # Ray has no types here
        """Stock requests wait for ever for a host that is gone."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            try:
                return super()._do_request(method, endpoint, **{"timeout": TIMEOUT_S, **options})
            except AuthenticationError as error:
                raise PermissionError(str(error)) from error

        def listed(self, what: str, **filters: str) -> Any:
            """From the state API, as `ray list nodes` asks it (ray/util/state/api.py)."""
            params = {
                "limit": LIMIT,
                "timeout": int(TIMEOUT_S[1]),  # Ray answers 500 to a number with a point
                "filter_keys": list(filters),
                "filter_predicates": ["="] * len(filters),
                "filter_values": list(filters.values()),
            }
            response = self._do_request("GET", f"/api/v0/{what}", params=params)
            response.raise_for_status()
            return response.json()["data"]["result"]["result"]

    try:
        with _without(*OVERRULING):
            return _authenticated(lambda: Client(address))
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError and requests' own
        raise EnvironmentNotReady(
            f"no Ray job server answers at {address}: {_first_line(error)}",
            hint="--ray-address http://HEAD:8265, the dashboard of a cluster with ray[default]; "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN where it asks for a token (`ray get-auth-token` there)",
        ) from error


def _authenticated(make: Callable[[], Jobs]) -> Jobs:
    """A client; where the cluster asks for a token, with the one that `ray start` and `ray.init` take by themselves."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    try:
        return make()
    except PermissionError:
        if not maybe_enable_token_auth_if_token_available(warn_if_disabled=False):
            raise
        return make()


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
