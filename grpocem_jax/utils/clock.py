"""A clock of the time that JAX compiles."""

import jax


class CompileClock:
    """Seconds that JAX spent lowering and compiling since `start`; tracing is not in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in (
            "/jax/core/compile/jaxpr_to_mlir_module_duration",
            "/jax/core/compile/backend_compile_duration",
        ):
            self.seconds += duration_secs

    @classmethod
    def start(cls) -> "CompileClock":
        """A clock that counts from now on."""
        clock = cls()
        jax.monitoring.register_event_duration_secs_listener(clock._listen)
        return clock

    def stop(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
