"""From the plain data that an objective states to views that refer to each other soundly.

An objective states its views as mappings, so it needs nothing of this package. `kind` says what a view is; without it,
it is an `image`.

Not here: the kinds and their keys (`kinds`), making views (`maker`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.specs import require_choice
from data_pipelines.views.base import View
from data_pipelines.views.registry import kinds

__all__ = ["require_distinct", "views_from"]

_DEFAULT_KIND = "image"


def views_from(specs: Sequence[Mapping[str, Any]]) -> tuple[View, ...]:
    """Views from the plain data an objective states; see the class of each kind for its keys.

    Raises:
        DataError: a key is unknown or missing, a value out of range, a name used twice, or no view at all.
    """
    views: list[View] = []
    for spec in specs:
        views.append(_view_from(spec, views))
    require_distinct(views)
    return tuple(views)


def require_distinct(views: Sequence[View]) -> None:
    """Refuse an empty list, a name used twice, and a reference to what is no earlier view of the kind."""
    names = [view.name for view in views]
    if not names:
        raise DataError("no view is asked for; a stream needs at least one")
    for number, view in enumerate(views):
        if names.count(view.name) > 1:
            raise DataError(f"view name {view.name!r} is used twice; names are the entries of a batch")
        for relation in view.relations:
            leader = _leader(view, views[:number], relation)
            if leader is not None:
                view.require_leader(relation, leader)


def _view_from(spec: Mapping[str, Any], earlier: Sequence[View]) -> View:
    kind, known = spec.get("kind", _DEFAULT_KIND), kinds()
    require_choice(f"view {dict(spec)!r}", "kind", kind, known)
    view = known[kind].from_spec(spec)
    leader = _leader(view, earlier, "same_crop_as")
    if leader is None:
        return view
    for name in view.led_keys:
        if name in spec:
            raise DataError(
                f"view {view.name!r}: {name}={spec[name]!r} has no effect, the crops are those of {leader.name!r}; "
                "leave it out"
            )
    return replace(view, **{name: getattr(leader, name) for name in view.led_keys})


def _leader(view: View, earlier: Sequence[View], relation: str) -> View | None:
    """The earlier view of the same kind that `view` names in `relation`; None when it names none."""
    name = getattr(view, relation, None)
    if name is None:
        return None
    candidates = {other.name: other for other in earlier if type(other) is type(view)}
    require_choice(f"view {view.name!r}", relation, name, candidates)
    return candidates[name]
