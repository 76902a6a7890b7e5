"""A clock of the time that JAX compiles."""

import jax


class CompileClock:
    """What JAX compiled since `start`.

    Attributes:
      seconds: of lowering and compiling; tracing is not in it.
      programs: how many were compiled, or read from disk where they had been compiled before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.programs = 0

    def _listen(self, event: str, duration_secs: float, **_: str | int) -> None:
        compiled = event == "/jax/core/compile/backend_compile_duration"
        if compiled or event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            self.seconds += duration_secs
        self.programs += compiled

    @classmethod
    def start(cls) -> "CompileClock":
        """A clock that counts from now on."""
        clock = cls()
        jax.monitoring.register_event_duration_secs_listener(clock._listen)
        return clock

    def stop(self) -> None:
        """Stops counting."""
        jax.monitoring.unregister_event_duration_listener(self._listen)
