"""Ways into models that exist already: patch and unpatch change the classes of a model's modules, and say what they did.

A module's class becomes a subclass of the one it had (`module.__class__ = ...`): the object stays, and with it parameters,
buffers, hooks, names, whoever else holds it, its state_dict and the optimizer's references. What was there before is kept on
the module itself, so that copies and pickles of a patched model can be unpatched too. Only exact types are swapped: a subclass
may compute something else, so it is left, and listed with the reason.
"""

import collections
import copyreg
import dataclasses
import functools
import importlib
import io
import re
import sys
import warnings

import torch
from torch import nn as stock

from fastattn import backend, nn
from fastattn.reroute import accelerated

TARGETS = {
    getattr(stock, name): getattr(nn, name)
    for name in ("LayerNorm", "RMSNorm", "Softmax", "LogSoftmax", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
}  # fmt: skip
# Classes of libraries that need not be here. Their forward stays theirs, and what it calls is brought to ours.
REROUTED = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.attention_pool.AttentionPoolLatent",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNorm2d",
    "timm.layers.norm.RmsNorm",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.vision_transformer.Attention",  # as older ones have it
    "timm.models.vision_transformer_sam.Attention",
    "diffusers.models.attention_processor.Attention",  # whichever processor it holds
    "diffusers.models.attention.AttentionModuleMixin",  # the base of every newer one, which hold processors as well
)
# Where the first is imported, the second knows what to do with its models, by targets(model) and attach(model, report).
LIBRARIES = {"transformers.modeling_utils": "fastattn.integrations.transformers"}
# On a patched module: {"__class__": (before, after), attribute: (was in __dict__, before)}.
BEFORE = "_before_fastattn"
ALIKE = re.compile("LayerNorm|RMSNorm|Softmax|Attention")


def rerouted(self, *args, **kwargs):
    """A forward for `extra`: the class's own, whose calls of torch's attention, norms and softmax run on fastattn."""
    with accelerated():
        return type(self).made_of[0].forward(self, *args, **kwargs)


def patch(model, *, strict=False, extra=None, out_dtype=None):
    """Swap the modules of `model` that fastattn knows for its own, in place; returns a Report, which prints as a table.

    Known: the classes of TARGETS and REROUTED, those of transformers where it is imported, and `extra`, {class: subclass of
    it, or a function to be its forward}; `fastattn.rerouted` is one that serves every class whose forward calls torch's
    attention, norms or softmax. A module counts if its type is exactly one of these. out_dtype="input" has norms and
    softmaxes return their input's dtype under an autocast that would give fp32.

    Where nothing was there to swap, warns, or raises RuntimeError if strict. A second patch changes nothing more.

    >>> report = fastattn.patch(model)
    >>> print(report)
    """
    if not isinstance(model, stock.Module):
        raise TypeError(
            f"patch: got a {type(model).__name__}, needs a torch.nn.Module (a pipeline has its own in .model)"
        )
    if out_dtype not in (None, "input"):
        raise ValueError(f'patch: out_dtype is {out_dtype!r}, must be None (as torch) or "input"')
    integrations = _integrations()
    targets = TARGETS | {
        kind: with_forward(kind, rerouted) for kind in map(type, model.modules()) if _is_rerouted(kind)
    }
    for integration in integrations:
        targets |= {cls: _replacement(cls, wanted) for cls, wanted in integration.targets(model).items()}
    extra = {cls: _replacement(cls, wanted) for cls, wanted in (extra or {}).items()}
    targets |= extra

    report = Report()
    present = set()
    for name, module in model.named_modules():
        present.add(type(module))
        _visit(report, name, module, targets)
    for name, module in model.named_modules():
        # Its eval path packs a padded batch into nested tensors, which only torch's own layers take.
        if (
            isinstance(module, stock.TransformerEncoder)
            and getattr(module, "use_nested_tensor", False)
            and any(isinstance(layer, nn.TransformerEncoderLayer) for layer in module.layers)
        ):
            report.edit(name, module, "use_nested_tensor", False)
        if out_dtype and BEFORE in module.__dict__ and hasattr(type(module), "out_dtype"):
            report.edit(name, module, "out_dtype", out_dtype)
    for integration in integrations:
        integration.attach(model, report)
    _list_alike(report, model)
    report.skipped += [
        ("", cls, "extra: the model has no module of exactly this class")
        for cls in extra.keys() - present
        if extra[cls] not in present
    ]

    if not (report.swapped or report.attributes or report.attention or report.already):
        problem = f"patch: nothing in this {type(model).__name__} could be swapped\n{report}"
        if strict:
            raise RuntimeError(problem)
        warnings.warn(problem, stacklevel=2)
    return report


def unpatch(model):
    """Give every module of `model` the class and attributes it had before patch; outputs are again those of before, to the bit.

    Works on a copy or an unpickled patched model as well, and does nothing to a model that was not patched. Returns a Report;
    what could not be restored, because another library has changed the module since, is listed in it and warned of.
    """
    report = Report()
    for name, module in model.named_modules():
        before = module.__dict__.get(BEFORE)
        if before is None:
            continue
        if "__class__" in before and type(module) is not before["__class__"][1]:
            report.skipped.append((name, type(module), "its class was changed again after the patch"))
            continue
        if "__class__" in before and _forward_replaced(module):
            reason = "its forward was replaced on the instance after the patch, and still calls ours: undo that first"
            report.skipped.append((name, type(module), reason))
            continue
        del module.__dict__[BEFORE]
        if "__class__" in before:
            was, ours = before.pop("__class__")
            module.__class__ = was
            report.swapped.append((name, ours, was))
        for attribute, (own, value) in before.items():
            report.attributes.append((name, attribute, getattr(module, attribute, None), value))
            if own:
                setattr(module, attribute, value)
            else:
                delattr(module, attribute)
    if report.skipped:
        warnings.warn(f"unpatch: not everything could be restored\n{report}", stacklevel=2)
    return report


@dataclasses.dataclass
class Report:
    """What patch did: print it, or read its lists. Names are those of model.named_modules(), "" the model itself.

    swapped (name, class before, class after); skipped (name, class, reason); attributes (name, attribute, before, after);
    attention (name, implementation before, after) of transformers' models; already: how many modules were fastattn's.
    """

    swapped: list[tuple[str, type, type]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, type, str]] = dataclasses.field(default_factory=list)
    attributes: list[tuple[str, str, object, object]] = dataclasses.field(default_factory=list)
    attention: list[tuple[str, str | None, str | None]] = dataclasses.field(default_factory=list)
    already: int = 0

    def __post_init__(self):
        self._calls, self._why_torch = backend.calls.copy(), backend.why_torch.copy()

    def edit(self, name, module, attribute, value):
        """Set an attribute of a module (`name` in the model) so that unpatch restores what was there, and list it."""
        before = getattr(module, attribute, None)
        _remember(module, attribute, (attribute in module.__dict__, before))
        setattr(module, attribute, value)
        self.attributes.append((name, attribute, before, value))

    def calls(self):
        """[(op, backend, calls, reason)] of this process since the patch, whichever model made them; reason: why stock torch.

        Counted as they are made: a graph of torch.compile, which makes its choice once, when it is traced, adds nothing.
        """
        made, why = backend.calls - self._calls, backend.why_torch - self._why_torch
        fused = [(op, name, n, "") for (op, name), n in made.items() if name != "torch"]
        return sorted(fused + [(op, "torch", n, reason) for (op, reason), n in why.items()])

    def __str__(self):
        # who does not print does not wait for it
        from rich.console import Console
        from rich.table import Table

        title = (
            f"fastattn: {_count(self.swapped, 'module')} swapped, {len(self.skipped)} left, "
            f"{_count(self.attributes, 'attribute')} changed"
        )
        title += f", {self.already} already fastattn's" if self.already else ""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for row in self._rows():
            table.add_row(*map(str, row))
        text = io.StringIO()
        Console(file=text, width=120, color_system=None, markup=False, highlight=False, emoji=False).print(
            table
        )
        return "\n".join([title, *(line.rstrip() for line in text.getvalue().rstrip().splitlines())])

    def _rows(self):
        """(kind, how often, what, where and why), modules that differ in their numbers only in one row."""
        rows = collections.defaultdict(list)
        for name, before, after in self.swapped:
            rows["swapped", f"{before.__name__} -> {_dotted(after)}", ""].append(name)
        for name, kind, reason in self.skipped:
            rows["left", _dotted(kind), reason].append(name)
        for name, attribute, before, after in self.attributes:
            rows["changed", f"{attribute}: {_change(before, after)}", ""].append(name)
        for name, before, after in self.attention:
            rows["attention", f"{before!r} -> {after!r}", ""].append(name)
        for (kind, what, why), names in rows.items():
            alike = collections.defaultdict(list)
            for name in names:
                alike[re.sub(r"\b\d+\b", "*", name)].append(name or "the model")
            where = ", ".join(pattern if len(same) > 1 else same[0] for pattern, same in alike.items())
            yield kind, len(names), what, f"{where}: {why}" if why else where
        for op, name, n, reason in self.calls():
            yield "calls", n, f"{op} on {name}", reason


def _is_rerouted(kind):
    return _dotted(kind) in REROUTED or any(
        base.__name__.endswith("Mixin") and _dotted(base) in REROUTED for base in kind.__mro__
    )


def _visit(report, name, module, targets):
    kind = type(module)
    if "__class__" in module.__dict__.get(BEFORE, ()) or isinstance(module, tuple(targets.values())):
        report.already += 1
    elif kind in targets:
        if _forward_replaced(module):  # accelerate's hooks, Liger's instance patch
            reason = "its forward was replaced on the instance, which a change of class does not reach"
            report.skipped.append((name, kind, reason))
        else:
            _remember(module, "__class__", (kind, targets[kind]))
            module.__class__ = targets[kind]
            report.swapped.append((name, kind, targets[kind]))
    elif reason := _why_left(module, targets):
        report.skipped.append((name, kind, reason))


def _forward_replaced(module):
    """Whether an instance has a forward of its own. accelerate leaves the class's there, when its hooks go: that is removed."""
    forward = module.__dict__.get("forward")
    if getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward:
        del module.forward
    return "forward" in module.__dict__


def _why_left(module, targets):
    """A sentence on a module that is nearly one of the targets, else None."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        scripted = module.original_name in {cls.__name__ for cls in targets}
        return (
            f"a scripted {module.original_name}: compiled code has no class to change" if scripted else None
        )
    near = next((cls for cls in targets if isinstance(module, cls)), None)
    if near is None:
        return None
    if any(cls.__name__ == "FSDPModule" for cls in kind.__mro__):
        return "sharded by fully_shard, which gave it a class of its own: patch first, then shard"
    if hasattr(module, "parametrizations"):
        return "parametrised: its weights are computed by its class, which a swap would lose"
    if kind.__module__.startswith(("torch.ao.", "torch.nn.quantized", "torchao.")):
        return "quantised"
    return f"a subclass of {near.__name__}, which may compute something else; {_ways_for(kind)}"


def _ways_for(kind):
    return f"extra={{{kind.__name__}: fastattn.rerouted}} brings what it calls to fastattn"


def _list_alike(report, model):
    """Modules that are none of the known classes, but are called like one, and have nothing swapped inside."""
    swapped = [name for name, *_ in report.swapped]
    listed = {name for name, *_ in report.skipped}
    for name, module in model.named_modules():
        kind = type(module)
        if (
            ALIKE.search(kind.__name__)
            and not kind.__module__.startswith(("torch.", "fastattn."))
            and BEFORE not in module.__dict__
            and name not in listed
            and not any(s.startswith(f"{name}.") for s in swapped)
        ):
            report.skipped.append((name, kind, f"not a class that fastattn knows; {_ways_for(kind)}"))


def _integrations():
    """Our modules for the libraries that this process has imported; models of no others can be here."""
    found = []
    for theirs, ours in LIBRARIES.items():
        if theirs in sys.modules:
            try:
                found.append(importlib.import_module(ours))
            except ImportError as e:
                library = theirs.partition(".")[0]
                warnings.warn(f"patch: models of this {library} are not swapped: {e}", stacklevel=3)
    return found


def _remember(module, attribute, before):
    module.__dict__.setdefault(BEFORE, {}).setdefault(attribute, before)


def _replacement(cls, wanted):
    if isinstance(wanted, type):
        if not issubclass(wanted, cls):
            raise TypeError(
                f"patch: extra[{cls.__name__}] is {wanted.__name__}, must be a subclass of {cls.__name__}, or a forward for it"
            )
        return wanted
    if not callable(wanted):
        raise TypeError(f"patch: extra[{cls.__name__}] is {wanted!r}, must be a class or a function")
    return with_forward(cls, wanted)


class _Made(type):
    """The type of classes made by with_forward."""


@functools.cache
def with_forward(cls, forward):
    """The subclass of cls whose forward is this function of (module, *args); it pickles as what it was made of."""
    return _Made(
        f"Fast{cls.__name__}", (cls,), {"forward": forward, "made_of": (cls, forward), "__module__": __name__}
    )


copyreg.pickle(_Made, lambda made: (with_forward, made.made_of))


def _dotted(cls):
    module = "torch.nn" if cls.__module__.startswith("torch.nn.modules.") else cls.__module__
    return f"{module}.{cls.__qualname__}".removeprefix("__main__.")


def _change(before, after):
    pair = [repr(value) for value in (before, after)]
    if max(map(len, pair)) <= 40:
        return " -> ".join(pair)
    return (
        f"a copy of its {type(before).__name__}"
        if type(before) is type(after)
        else f"a {type(after).__name__}"
    )


def _count(rows, noun):
    return f"{len(rows)} {noun}{'' if len(rows) == 1 else 's'}"
