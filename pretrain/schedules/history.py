"""What the lines of a schedule's history say to people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["told"]

_UNKNOWN = "of a newer version"


def told(line: Mapping[str, Any]) -> str:
    """One line of the history as a sentence, without its time and entry."""
    about = f"{line.get('subject')} step {line.get('step')}: {line.get('protocol')}/{line.get('data')}"
    match line.get("what"):
        case "added" | "removed" as what:
            return str(what)
        case "began":
            return f"began the work of {line.get('due')}"
        case "interrupted":
            return f"the work of {line.get('due')} had been interrupted; it is done again"
        case "skipped":
            return f"skipped {line.get('due')}: {line.get('why')}"
        case "scored":
            return f"{about} {line.get('metric')} {line.get('text')}{' (known)' if line.get('known') else ''}"
        case "regressed":
            return f"REGRESSION: {line.get('text')}"
        case "failed":
            what = about if line.get("protocol") else line.get("subject")
            return f"failed: {f'{what}: ' if what else ''}{line.get('error')}"
        case "left out":
            return f"{about} is left out of its suite: {line.get('why')}"
        case "ended":
            return f"ended the work of {line.get('due')}: {line.get('outcome')}"
        case "delivered":
            return f"the webhook has taken message {line.get('key')}"
        case "undelivered":
            end = "; given up" if line.get("is_over") else ""
            return f"the webhook has not taken message {line.get('key')}: {line.get('problem')}{end}"
        case what:
            return f"{what} ({_UNKNOWN})"
