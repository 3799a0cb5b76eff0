__version__ = "0.1.0"

TYPE_CHECKING = False  # as in typing, without importing it: the package must stay light
if TYPE_CHECKING:
    from fsdl_devinfra.env import capture
    from fsdl_devinfra.front_door import check, cost, diff, estimate, export, plan
    from fsdl_devinfra.hub import inspect, load, lock

_MODULE_OF = {"capture": "env", "check": "front_door", "cost": "front_door", "diff": "front_door", "estimate": "front_door",
              "export": "front_door", "inspect": "hub", "load": "hub", "lock": "hub", "plan": "front_door"}
__all__ = ["capture", "check", "cost", "diff", "estimate", "export", "inspect", "load", "lock", "plan"]


def __getattr__(name: str) -> object:
    """Import a function's module when the function is first used (PEP 562)."""
    if name not in _MODULE_OF: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *_MODULE_OF})
