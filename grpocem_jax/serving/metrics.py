"""What the server counts, as Prometheus reads it."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server.

    Args:
      gauges: gives numbers of now by name, each with a label's value and a number: the label is
        ``state``.
      compiled: how many programs have been compiled since the server listens, and in how many
        seconds.
    """

    def __init__(
        self,
        gauges: Callable[[], Mapping[str, Mapping[str, float]]],
        compiled: Callable[[], tuple[int, float]],
    ):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "grpocem_requests",
            "Requests that have ended, by route and HTTP status; 499: the client had gone.",
            ["route", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "grpocem_request_seconds",
            "Seconds from a request's head to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter(
            "grpocem_tokens",
            "Tokens of prompts that were read and of completions that were made.",
            ["kind"],
            registry=self._registry,
        )
        self._registry.register(_Gauges(gauges))
        self._registry.register(_Compiled(compiled))

    def observe(self, route: str, status: int, seconds: float) -> None:
        """Counts a request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def count_tokens(self, prompt: int, completion: int) -> None:
        """Counts the tokens of a request."""
        self._tokens.labels("prompt").inc(prompt)
        self._tokens.labels("completion").inc(completion)

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], Mapping[str, Mapping[str, float]]]):
        self._gauges = gauges

    def collect(self):
        for name, values in self._gauges().items():
            family = GaugeMetricFamily(
                f"grpocem_{name}", f"{name} now, by state.", labels=["state"]
            )
            for state, value in values.items():
                family.add_metric([state], value)
            yield family

    def describe(self):
        return []


class _Compiled(Collector):
    def __init__(self, compiled: Callable[[], tuple[int, float]]):
        self._compiled = compiled

    def collect(self):
        programs, seconds = self._compiled()
        yield CounterMetricFamily(
            "grpocem_compilations",
            "Programs compiled, or read from disk, since the server listens: for searches by texts "
            "of a new length, never for completions.",
            programs,
        )
        yield CounterMetricFamily(
            "grpocem_compilation_seconds", "Seconds that took beside other work.", seconds
        )

    def describe(self):
        return []
