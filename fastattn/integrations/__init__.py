"""What ties the library to others: transformers (attention and masks by name), torch.distributed (ring, Ulysses, DTensor).

Nothing here imports a third party: `await_transformers` registers "fastattn" as soon as somebody else does.
"""

import importlib.util
import sys

AWAITED = "transformers.modeling_utils"  # the module that owns the table of attention implementations


def await_transformers():
    """attn_implementation="fastattn" works from the moment transformers' models can be imported, now or later."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch:
    """An import hook that leaves with the one import it waits for."""

    def find_spec(self, name, path=None, target=None):
        if name != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            run = spec.loader.exec_module

            def run_and_register(module):
                run(module)
                _register()

            spec.loader.exec_module = run_and_register
        return spec


def _register():
    try:
        from fastattn.integrations import transformers  # noqa: F401
    except ImportError:
        pass  # transformers 4: its own message says that it does not know "fastattn"
