"""When a cron expression is due, as Debian's cron has it: five fields, in the wall clock of a time zone.

A time that a change of clocks leaves out is due at the end of the gap, one that comes twice is due the first time.
All times that go in and out are UTC.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, available_timezones

from cronsim import CronSim, CronSimError

from pretrain.errors import RequestError, nearest

__all__ = ["FIELDS", "checked_cron", "checked_zone", "last_due", "next_due"]

FIELDS = {
    "minute": "0-59",
    "hour": "0-23",
    "day of month": "1-31 or L",
    "month": "1-12 or JAN-DEC",
    "day of week": "0-7 or SUN-SAT",
}
_NOT_FOR_OTHER_MACHINES = {"localtime", "posixrules", "Factory"}
_LEAP_YEAR = datetime(2024, 1, 1)


def checked_cron(expression: str, option: str = "--cron") -> str:
    """The expression, its fields one space apart.

    Args:
        expression: Of five fields.
        option: That it was given with, for messages.

    Raises:
        RequestError: a field is wrong, which is named, there are not five, or no day is ever due.
    """
    parts, names = expression.split(), list(FIELDS)
    if len(parts) != len(FIELDS):
        expected = f"expected five, {', '.join(names)}, as in '0 2 * * *'"
        raise RequestError(f"{option} {expression!r}: {len(parts)} field{'s' * (len(parts) != 1)}; {expected}")
    for number, (part, name) in enumerate(zip(parts, names, strict=True)):
        alone = ["*"] * len(parts)
        alone[number] = part
        if not _is_understood(" ".join(alone)):
            expected = f"expected * or {FIELDS[name]}, as in 1,3 or 1-5 or */2"
            raise RequestError(f"{option} {expression!r}: field {number + 1} ({name}) is {part!r}; {expected}")
    checked = " ".join(parts)
    try:
        next(CronSim(checked, _LEAP_YEAR))
    except (CronSimError, StopIteration):
        said = f"fields 3 to 5 ({' '.join(parts[2:])}) name no day that exists"
        raise RequestError(f"{option} {expression!r}: {said}; nothing would ever run") from None
    return checked


def checked_zone(name: str, option: str = "--tz") -> str:
    """The name of a time zone.

    Args:
        name: As in the database of time zones.
        option: That it was given with, for messages.

    Raises:
        RequestError: there is none of that name; says the nearest.
    """
    known = available_timezones() - _NOT_FOR_OTHER_MACHINES
    if name in known:
        return name
    by_city = sorted(zone for zone in known if zone.rpartition("/")[2].lower() == name.lower())
    hint = f"; did you mean '{by_city[0]}'?" if by_city else nearest(name, known)
    raise RequestError(f"{option} {name}: no such time zone; expected a name such as Europe/Berlin or UTC{hint}")


def last_due(expression: str, zone: str, now: datetime) -> datetime:
    """The newest time that is due at `now` or before."""
    just_after = now.replace(microsecond=0) + timedelta(seconds=1)
    return next(CronSim(expression, just_after.astimezone(ZoneInfo(zone)), reverse=True)).astimezone(UTC)


def next_due(expression: str, zone: str, now: datetime) -> datetime:
    """The first time that is due after `now`."""
    return next(CronSim(expression, now.astimezone(ZoneInfo(zone)))).astimezone(UTC)


def _is_understood(expression: str) -> bool:
    try:
        CronSim(expression, _LEAP_YEAR)
    except CronSimError:
        return False
    return True
